// What the attention kernels share: the layout of rows in shared memory, the softmax's small pieces, which keys a query sees,
// and how a block finds its tile of packed sequences.
#pragma once
#include <cmath>

#include "cuda/rows.cuh"
#include "hebatron/ops.h"

namespace hebatron::cuda {
namespace {

using bf16 = __nv_bfloat16;
constexpr float kNone = -INFINITY;  // the score of a key that is not seen
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Byte offset of 16-byte chunk `chunk` of row `row`, of kChunks each, 8 at least: 8 rows at one chunk (a matrix of ldmatrix)
// and 8 chunks of a row (a quarter warp's cp.async) fall into different banks.
template <int kChunks>
HEBATRON_DEVICE uint32_t swizzled(int row, int chunk) {
  return uint32_t(row * kChunks + (chunk ^ row % 8)) * 16;
}

// Over the four lanes that hold a row of an accumulator.
HEBATRON_DEVICE float quad_max(float v) {
  v = fmaxf(v, shfl_xor(v, 1));
  return fmaxf(v, shfl_xor(v, 2));
}
HEBATRON_DEVICE float quad_sum(float v) {
  v += shfl_xor(v, 1);
  return v + shfl_xor(v, 2);
}

// The 16-byte chunks of kRows rows, `stride` elements apart, to shared memory by all kThreads threads; rows from `rows` on and
// elements from `columns` on become zeros. One address goes from row to row: one for every copy fills the registers.
template <int kRows, int kChunks, int kThreads>
HEBATRON_DEVICE void load_rows(uint32_t to, const bf16* from, int64_t stride, int rows, int columns) {
  constexpr int kApart = kThreads / kChunks;  // a thread's rows
  static_assert(kThreads % kChunks == 0 && kRows % kApart == 0, "every thread copies as much, of one chunk");
  const int first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  if (chunk * 8 >= columns) rows = 0;
  from += first * stride + chunk * 8;
  stride *= kApart;
#pragma unroll
  for (int row = first, i = 0; i < kRows / kApart; i++, row += kApart) {
    cp_async_16(to + swizzled<kChunks>(row, chunk), from, row < rows);
    from += stride;
  }
}

// 16 rows of a warp's accumulator, times `upper` and, of the 8 lower rows, `lower`, to memory; by way of `shared`, the warp's own
// 16 rows of a tile, so that whole chunks are stored.
template <int kDim>
HEBATRON_DEVICE void store_rows(const float (&sums)[kDim / 8][4], float upper, float lower, uint8_t* shared, bf16* to, int64_t stride,
                                int rows, int columns) {
  constexpr int kChunks = kDim / 8;
  const int lane = lane_id();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float scale = half ? lower : upper;
#pragma unroll
    for (int j = 0; j < kChunks; j++)
      *reinterpret_cast<uint32_t*>(shared + swizzled<kChunks>(half * 8 + lane / 4, j) + lane % 4 * 4) =
          pack_bf16(sums[j][2 * half] * scale, sums[j][2 * half + 1] * scale);
  }
  warp_sync();
#pragma unroll 4
  for (int piece = lane; piece < 16 * kChunks; piece += kWarp) {
    const int row = piece / kChunks, chunk = piece % kChunks;
    if (row < rows && chunk * 8 < columns)
      *reinterpret_cast<uint4*>(to + row * stride + chunk * 8) = *reinterpret_cast<const uint4*>(shared + swizzled<kChunks>(row, chunk));
  }
}

// One sequence of a call, as cu_seqlens has it, and which of its keys its queries see; both are counted from its own start.
struct Sequence {
  int first_query, queries, first_key, keys;
  bool causal;
  int window;

  HEBATRON_DEVICE Sequence(const AttentionArgs& a, int n)
      : first_query(a.cu_seqlens_q[n]), queries(a.cu_seqlens_q[n + 1] - first_query), first_key(a.cu_seqlens_k[n]),
        keys(a.cu_seqlens_k[n + 1] - first_key), causal(a.causal), window(a.window < kMostTokens ? int(a.window) : kMostTokens) {}

  static constexpr int kMostTokens = 1 << 30;  // of a call: places and window together stay below 2^31
  // The keys that query i sees, from begin to end; both rise with i. The last query stands at the last key.
  HEBATRON_DEVICE int begin(int i) const {
    const int first = keys - queries + i + 1 - window;
    return causal && first > 0 ? first : 0;
  }
  HEBATRON_DEVICE int end(int i) const {
    const int last = keys - queries + i + 1;
    return !causal || last > keys ? keys : last < 0 ? 0 : last;
  }
  // The queries that see any of the keys from j on up to j_end.
  HEBATRON_DEVICE int first_seeing(int j) const {
    const int first = j - (keys - queries);
    return !causal || first < 0 ? 0 : first < queries ? first : queries;
  }
  HEBATRON_DEVICE int end_seeing(int j_end) const {
    const int last = j_end - 1 - (keys - queries) + window;
    return !causal || last > queries ? queries : last < 0 ? 0 : last;
  }
};

// Tile number `tile` of those of kRows rows that the sequences of `ends` (cu_seqlens) have; sequence -1: there is none.
struct RowTile {
  int sequence, place, count;  // which of the sequence's `count` tiles
};

// Called by one warp: a scan of 32 sequences at a time.
template <int kRows>
HEBATRON_DEVICE void find_tile(const int32_t* ends, int sequences, int tile, RowTile* found) {
  const int lane = lane_id();
  int before = 0;  // tiles of the sequences before the 32 at hand
  for (int first = 0; first < sequences; first += kWarp) {
    const int n = first + lane;
    const int tiles = n < sequences ? (ends[n + 1] - ends[n] + kRows - 1) / kRows : 0;
    int after = tiles;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int left = shfl_up(after, offset);
      if (lane >= offset) after += left;
    }
    after += before;
    const bool hit = tile >= after - tiles && tile < after;
    if (hit) *found = {n, tile - (after - tiles), tiles};
    if (any(hit)) return;
    before = shfl(after, kWarp - 1);
  }
  if (lane == 0) *found = {-1, 0, 0};
}

// As many tiles as there can be: the lengths are on the device.
template <int kRows>
int64_t most_tiles(int64_t tokens, int64_t sequences) {
  const int64_t most = tokens / kRows + (sequences < tokens ? sequences : tokens);
  return most < tokens ? most : tokens;
}

// A tile of one query head's queries: kv heads, then tiles, then the heads of a kv head.
struct HeadTile {
  int tile, head;
  HEBATRON_DEVICE HeadTile(const AttentionArgs& a, int tiles) {
    const int group = int(a.heads / a.kv_heads), block = blockIdx.x;
    tile = block / group % tiles;
    head = block / group / tiles * group + block % group;
  }
};

// The sequence that token `token` of a call belongs to: the last that begins at or before it and is not empty.
HEBATRON_DEVICE int sequence_of(const int32_t* ends, int sequences, int64_t token) {
  int low = 0, high = sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (ends[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// fp32, for parity: a row of up to 256 elements, of which a lane has every 32nd.
constexpr int kMostDim = 256, kSlots = kMostDim / kWarp;
HEBATRON_DEVICE void read_fp32(const float* row, int64_t columns, float (&out)[kSlots]) {
#pragma unroll
  for (int c = 0; c < kSlots; c++) out[c] = c * kWarp + lane_id() < columns ? row[c * kWarp + lane_id()] : 0.0f;
}
HEBATRON_DEVICE void write_fp32(float* row, int64_t columns, const float (&in)[kSlots], float scale) {
#pragma unroll
  for (int c = 0; c < kSlots; c++)
    if (c * kWarp + lane_id() < columns) row[c * kWarp + lane_id()] = in[c] * scale;
}
HEBATRON_DEVICE float dot(const float (&x)[kSlots], const float (&y)[kSlots]) {
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < kSlots; c++) sum += x[c] * y[c];
  return warp_sum(sum);
}

inline void check_attention(const char* op, const AttentionArgs& a) {
  check(a.tokens_q >= 0 && a.tokens_q < Sequence::kMostTokens, op, "tokens_q must be 0 to 2^30 - 1", a.tokens_q);
  check(a.tokens_k >= 0 && a.tokens_k < Sequence::kMostTokens, op, "tokens_k must be 0 to 2^30 - 1", a.tokens_k);
  check(a.head_dim > 0 && a.head_dim <= kMostDim, op, "head_dim must be 1 to 256", a.head_dim);
  check(a.kv_heads > 0 && a.heads > 0 && a.heads % a.kv_heads == 0, op, "kv_heads must divide the heads", a.kv_heads);
  check(a.heads < int64_t(1) << 20, op, "heads must be below 2^20", a.heads);
  check(a.window > 0, op, "window must be > 0", a.window);
  check(a.sequences >= 0 && a.sequences < Sequence::kMostTokens, op, "sequences must be 0 to 2^30 - 1", a.sequences);
  if (a.dtype == DType::f32) return;
  check(a.head_dim % 8 == 0, op, "head_dim must be a multiple of 8 for bfloat16", a.head_dim);
  for (const int64_t stride : {a.q_stride, a.q_head_stride, a.k_stride, a.k_head_stride, a.v_stride, a.v_head_stride})
    check(stride % 8 == 0, op, "the strides must be multiples of 8 for bfloat16", stride);
  check(addresses_of({a.q, a.k, a.v, a.o}) % 16 == 0, op, "q, k, v and o must start on 16 bytes", 0);
}

inline void check_attention_pointers(const char* op, const AttentionArgs& a, const Exec& exec) {
  check_pointers(op, {{"q", a.q}, {"cu_seqlens_q", a.cu_seqlens_q}, {"cu_seqlens_k", a.cu_seqlens_k}, {"o", a.o}, {"lse", a.lse}}, exec);
  if (a.tokens_k > 0) check_pointers(op, {{"k", a.k}, {"v", a.v}}, exec);
}

}  // namespace
}  // namespace hebatron::cuda
