// What      o = softmax(scale q k^T) v over the keys that a query sees, and the log of each row's sum of exponentials.
// Grid      a block of 4 warps per 128 queries (64 for head dims above 128) of a query head, of all sequences together: the
//           host knows no lengths, blocks past the last tile end at once. Keys and values by 32 (64 for head dims to 64) in two
//           stages: 48, 64 or 96 KB with the queries for head dims to 64, 128 and 256, so that every chip's shared memory holds
//           them; 224, 253 and 247 registers, no spill (nvcc 13.0, sm_80 and sm_90a). fp32: a warp per query and head. On Hopper
//           head dim 128 goes to attention_sm90.cu.
// Traffic   q, o and lse once; k and v once from DRAM, from L2 once per tile and head: 128 rows a byte.
// Roofline  tensor: 4 * pairs * head_dim operations. 65,536 tokens, 32 heads of 128, causal: 35.2 TFLOP, H100 44 ms at the 800
//           TFLOP/s of wgmma, of which mma.sync is reported to reach 0.63 and FlashAttention-2, built alike, 335; A100 113 ms.
//           Computed.
// Measured  never run on hardware.
// Limits    bf16: head dims up to 256 and strides multiples of 8, tensors on 16 bytes. fp32: head dims up to 256. Fewer than
//           2^30 tokens; 64-bit offsets. The values of cu_seqlens are trusted.
// Why so    blocks go by kv head, then by tile, the longest first, then by query head: the 16 query heads that read the same
//           keys run together, and all that runs is of one kv head, whose k and v are 34 MB at 65,536 tokens where both heads'
//           67 would not fit the 50 MB of an H100's L2. A warp has 32 rows: with 16, 8 warps would each read k and v, 128 bytes a
//           clock, all that shared memory gives. Two stages of 32 keys, not one of 64: one barrier for as many keys, and the
//           addresses of fragments are made anew at every step; kept over the loop they spill.
#include "cuda/attention.cuh"
#include "cuda/attention_sm90.h"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "attention_prefill[cuda]";

template <int kDim_>
struct Tile {
  static constexpr int kDim = kDim_, kChunks = kDim / 8, kThreads = 128;
  static constexpr int kFrags = kDim > 128 ? 1 : 2;  // of 16 rows a warp
  static constexpr int kWarpM = 16 * kFrags, kM = 4 * kWarpM, kN = kDim > 64 ? 32 : 64;
  static constexpr int kBytesQ = kM * kDim * 2, kBytesKeys = kN * kDim * 2, kBytesShared = kBytesQ + 4 * kBytesKeys;
  static constexpr int kBlocks = kDim > 128 ? 1 : 2;
};

// One warp's rows: accumulators as mma.sync has them, a lane's row lane / 4 of every 8.
template <class T>
struct Rows {
  float o[T::kFrags][T::kDim / 8][4] = {};
  float largest[T::kFrags][2], total[T::kFrags][2] = {};  // of the scores in base 2; of this lane's weights

  HEBATRON_DEVICE Rows() {
#pragma unroll
    for (int f = 0; f < T::kFrags; f++) largest[f][0] = largest[f][1] = kNone;
  }

  // s = q k^T
  HEBATRON_DEVICE static void score(float (&s)[T::kFrags][T::kN / 8][4], uint32_t q, uint32_t keys) {
    const int lane = lane_id();
    const uint32_t a_row = q + swizzled<T::kChunks>(lane % 16, lane / 16);
    const uint32_t b_row = keys + swizzled<T::kChunks>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int step = 0; step < T::kDim / 16; step++) {
      uint32_t a[T::kFrags][4];
#pragma unroll
      for (int f = 0; f < T::kFrags; f++) ldmatrix_x4(a[f], (a_row ^ step * 32) + f * 16 * T::kDim * 2);
#pragma unroll
      for (int j = 0; j < T::kN / 8; j += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, (b_row ^ step * 32) + j * 8 * T::kDim * 2);
#pragma unroll
        for (int f = 0; f < T::kFrags; f++) {
          mma_m16n8k16(s[f][j], a[f], {b[0], b[1]});
          mma_m16n8k16(s[f][j + 1], a[f], {b[2], b[3]});
        }
      }
    }
  }

  // Scores become weights 2^(scale s - largest); o and total are brought to the new largest. A row that has seen no key keeps
  // -inf, and its weights are 2^(-inf - 0).
  HEBATRON_DEVICE void weigh(float (&s)[T::kFrags][T::kN / 8][4], float scale) {
#pragma unroll
    for (int f = 0; f < T::kFrags; f++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float top = kNone;
#pragma unroll
        for (int j = 0; j < T::kN / 8; j++) top = fmaxf(top, fmaxf(s[f][j][2 * half], s[f][j][2 * half + 1]));
        top = fmaxf(largest[f][half], quad_max(top) * scale);
        const float unit = top == kNone ? 0.0f : top;
        const float ratio = exp2_approx(largest[f][half] - unit);
        largest[f][half] = top;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < T::kN / 8; j++)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; i++) {
            s[f][j][i] = exp2_approx(s[f][j][i] * scale - unit);
            sum += s[f][j][i];
          }
        total[f][half] = total[f][half] * ratio + sum;
#pragma unroll
        for (int j = 0; j < T::kDim / 8; j++) o[f][j][2 * half] *= ratio, o[f][j][2 * half + 1] *= ratio;
      }
  }

  // o += weights v
  HEBATRON_DEVICE void add(const float (&s)[T::kFrags][T::kN / 8][4], uint32_t values) {
    const uint32_t b_row = values + swizzled<T::kChunks>(lane_id() % 16, lane_id() / 16);
#pragma unroll
    for (int step = 0; step < T::kN / 16; step++) {
      uint32_t a[T::kFrags][4];
#pragma unroll
      for (int f = 0; f < T::kFrags; f++)
#pragma unroll
        for (int i = 0; i < 4; i++) a[f][i] = pack_bf16(s[f][2 * step + i / 2][i % 2 * 2], s[f][2 * step + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int j = 0; j < T::kDim / 8; j += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, (b_row ^ j * 16) + step * 16 * T::kDim * 2);
#pragma unroll
        for (int f = 0; f < T::kFrags; f++) {
          mma_m16n8k16(o[f][j], a[f], {b[0], b[1]});
          mma_m16n8k16(o[f][j + 1], a[f], {b[2], b[3]});
        }
      }
    }
  }
};

// -inf where a row does not see a key: of the rows from `row` on, the keys from `key` on.
template <class T>
HEBATRON_DEVICE void hide(float (&s)[T::kFrags][T::kN / 8][4], const Sequence& sequence, int row, int key) {
  key += lane_id() % 4 * 2;
#pragma unroll
  for (int f = 0; f < T::kFrags; f++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int i = row + f * 16 + half * 8 + lane_id() / 4, begin = sequence.begin(i) - key, end = sequence.end(i) - key;
#pragma unroll
      for (int j = 0; j < T::kN / 8; j++)
#pragma unroll
        for (int c = 0; c < 2; c++)
          if (j * 8 + c < begin || j * 8 + c >= end) s[f][j][2 * half + c] = kNone;
    }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks) forward(HEBATRON_GRID_CONSTANT(AttentionArgs) a, int tiles) {
  HEBATRON_DYNAMIC_SHARED(shared);
  HEBATRON_SHARED(RowTile, found, 1);
  const HeadTile work(a, tiles);
  if (threadIdx.x < kWarp) find_tile<T::kM>(a.cu_seqlens_q, int(a.sequences), work.tile, found);
  block_sync();
  if (found->sequence < 0) return;
  const Sequence sequence(a, found->sequence);
  const int first = (found->count - 1 - found->place) * T::kM;  // the longest first
  const int rows = sequence.queries - first < T::kM ? sequence.queries - first : T::kM;
  const int kv_head = work.head / int(a.heads / a.kv_heads), warp_row = threadIdx.x / kWarp * T::kWarpM, columns = int(a.head_dim);
  const int64_t token = int64_t(sequence.first_query) + first;
  const uint32_t q = smem_address(shared), stages = q + T::kBytesQ;
  const bf16* const k_rows = static_cast<const bf16*>(a.k) + sequence.first_key * a.k_stride + kv_head * a.k_head_stride;
  const bf16* const v_rows = static_cast<const bf16*>(a.v) + sequence.first_key * a.v_stride + kv_head * a.v_head_stride;
  const auto stage_of = [&](int key) { return stages + key / T::kN % 2 * 2 * T::kBytesKeys; };
  const auto load_keys = [&](int key) {
    const int count = sequence.keys - key;
    load_rows<T::kN, T::kChunks, T::kThreads>(stage_of(key), k_rows + key * a.k_stride, a.k_stride, count, columns);
    load_rows<T::kN, T::kChunks, T::kThreads>(stage_of(key) + T::kBytesKeys, v_rows + key * a.v_stride, a.v_stride, count, columns);
  };

  const int begin = sequence.begin(first) / T::kN * T::kN, end = sequence.end(first + rows - 1);
  const bf16* const q_rows = static_cast<const bf16*>(a.q) + token * a.q_stride + work.head * a.q_head_stride;
  load_rows<T::kM, T::kChunks, T::kThreads>(q, q_rows, a.q_stride, rows, columns);
  if (begin < end) load_keys(begin);
  Rows<T> mine;
  const float scale = float(a.scale) * kLog2E;
  for (int key = begin; key < end; key += T::kN) {
    cp_async_wait_all();
    block_sync();  // the keys and values are here, and every warp has read those before
    if (key + T::kN < end) load_keys(key + T::kN);
    float s[T::kFrags][T::kN / 8][4] = {};
    Rows<T>::score(s, q + warp_row * T::kDim * 2, stage_of(key));
    if (key + T::kN > sequence.end(first) || key < sequence.begin(first + rows - 1)) hide<T>(s, sequence, first + warp_row, key);
    mine.weigh(s, scale);
    mine.add(s, stage_of(key) + T::kBytesKeys);
  }
  cp_async_wait_all();
  block_sync();  // the queries are here where there was no key, and no longer needed

  bf16* const o = static_cast<bf16*>(a.o) + (token * a.heads + work.head) * columns;
#pragma unroll
  for (int f = 0; f < T::kFrags; f++) {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = warp_row + f * 16 + half * 8 + lane_id() / 4;
      const float total = quad_sum(mine.total[f][half]);
      inverse[half] = total == 0.0f ? 0.0f : 1.0f / total;
      if (lane_id() % 4 == 0 && row < rows)
        a.lse[(token + row) * a.heads + work.head] = total == 0.0f ? kNone : (mine.largest[f][half] + log2f(total)) * kLn2;
    }
    const int row = warp_row + f * 16;
    store_rows<T::kDim>(mine.o[f], inverse[0], inverse[1], shared + row * T::kDim * 2, o + row * a.heads * columns, a.heads * columns,
                        rows - row, columns);
  }
}

// fp32, for parity: a warp's query against one key after another; a lane has every 32nd element of the head.
__global__ void __launch_bounds__(128) forward_fp32(HEBATRON_GRID_CONSTANT(AttentionArgs) a) {
  const int64_t work = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  const int64_t token = work / a.heads, head = work % a.heads;
  if (token >= a.tokens_q) return;
  const Sequence sequence(a, sequence_of(a.cu_seqlens_q, int(a.sequences), token));
  const int i = int(token - sequence.first_query);
  const int64_t kv_head = head / (a.heads / a.kv_heads);
  const float scale = float(a.scale) * kLog2E;
  float q[kSlots], o[kSlots] = {}, largest = kNone, total = 0.0f;
  read_fp32(static_cast<const float*>(a.q) + token * a.q_stride + head * a.q_head_stride, a.head_dim, q);
  for (int j = sequence.begin(i); j < sequence.end(i); j++) {
    const int64_t key = int64_t(sequence.first_key) + j;
    float k[kSlots], v[kSlots];
    read_fp32(static_cast<const float*>(a.k) + key * a.k_stride + kv_head * a.k_head_stride, a.head_dim, k);
    read_fp32(static_cast<const float*>(a.v) + key * a.v_stride + kv_head * a.v_head_stride, a.head_dim, v);
    const float s = dot(q, k) * scale, top = fmaxf(largest, s), unit = top == kNone ? 0.0f : top;
    const float ratio = exp2_approx(largest - unit), weight = exp2_approx(s - unit);
    largest = top;
    total = total * ratio + weight;
#pragma unroll
    for (int c = 0; c < kSlots; c++) o[c] = o[c] * ratio + weight * v[c];
  }
  write_fp32(static_cast<float*>(a.o) + work * a.head_dim, a.head_dim, o, total == 0.0f ? 0.0f : 1.0f / total);
  if (lane_id() == 0) a.lse[work] = total == 0.0f ? kNone : (largest + log2f(total)) * kLn2;
}

template <int kDim>
void run(const AttentionArgs& a, const Exec& exec) {
  using T = Tile<kDim>;
  const int64_t tiles = most_tiles<T::kM>(a.tokens_q, a.sequences), blocks = tiles * a.heads;
  check(blocks < int64_t(1) << 31, kOp, "tiles must be fewer than 2^31", blocks);
  launch(kOp, forward<T>, LaunchShape{dim3(unsigned(blocks)), dim3(T::kThreads), T::kBytesShared}, exec, a, int(tiles));
}

}  // namespace

int64_t attention_prefill_fwd_workspace(const AttentionArgs& a) {
  check_attention(kOp, a);
  return 0;
}

void attention_prefill_fwd(const AttentionArgs& a, const Exec& exec) {
  check_attention(kOp, a);
  if (a.tokens_q == 0) return;
  DeviceGuard guard(exec);
  check_attention_pointers(kOp, a, exec);
  if (a.dtype == DType::f32) {
    const int64_t blocks = (a.tokens_q * a.heads + 3) / 4;
    check(blocks < int64_t(1) << 31, kOp, "tokens_q * heads must be fewer than 2^33", a.tokens_q * a.heads);
    return launch(kOp, forward_fp32, LaunchShape{dim3(unsigned(blocks)), dim3(128)}, exec, a);
  }
  if (attention_sm90_takes(a, exec)) return attention_sm90(a, exec);
  if (a.head_dim > 128) return run<256>(a, exec);
  if (a.head_dim > 64) return run<128>(a, exec);
  return run<64>(a, exec);
}

}  // namespace hebatron::cuda
