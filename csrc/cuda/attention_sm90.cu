// What      the forward of attention_prefill for head dim 128 on Hopper: o and lse as csrc/cuda/attention.cu has them.
// Grid      a block per 128 queries of a query head, in the order of attention.cu: one producer warpgroup, of which one thread
//           starts the copies, and two consumers of 64 rows each; 384 threads, 168 registers (setmaxnreg: 40 and 232). Queries 32
//           KB, keys and values by 128 in two stages of 64 KB: 160 KB of shared memory, one block an SM.
// Traffic   q, o and lse once; k and v once from DRAM, from L2 once per tile and head: 128 rows a byte.
// Roofline  tensor: 4 * pairs * head_dim operations. 65,536 tokens, 32 heads, causal: 35.2 TFLOP, H100 44 ms at 800 TFLOP/s;
//           FlashAttention-3 is reported at 616. Computed.
// Measured  never run on hardware.
// Limits    bf16, head dim 128, compute capability 9.0; rows of 16-byte multiples that do not overlap. Else as attention.cu.
// Why so    the weights go from the first product's accumulator to the second's left operand in registers: both have the same
//           layout. A warpgroup waits for its products before its softmax, and the other's products fill the tensor cores
//           meanwhile. The last tile of keys holds rows of the next sequence, since a tensor map clips at the tensor's end alone:
//           their scores become -inf, and their values zeros in shared memory, for 0 times NaN is NaN.
#include "cuda/attention_sm90.h"

#include "cuda/attention.cuh"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "attention_prefill[sm90a]";
constexpr int kDim = 128, kM = 128, kN = 128, kStages = 2;
constexpr int kBytesRow = 128, kBytesHalf = kN * kBytesRow, kBytesTile = 2 * kBytesHalf;  // 64 elements of every row, twice
constexpr int kConsumers = 2 * kWarpgroup, kThreads = kConsumers + kWarpgroup, kConsumerBarrier = 1;
constexpr int kBytesShared = (1 + 2 * kStages) * kBytesTile;

struct Barriers {
  uint64_t queries, keys_full[kStages], keys_empty[kStages], values_full[kStages], values_empty[kStages];
};

// One block's tile: what the producer and the consumers agree on.
struct Work {
  Sequence sequence;
  int head, kv_head, first, rows;  // the queries
  int begin, end;                  // the keys
};

HEBATRON_DEVICE void load_tile(uint32_t at, uint8_t* shared, const TensorMap& map, uint64_t* full, int head, int token) {
  mbarrier_arrive_expect(full, kBytesTile);  // the boxes, zero fill included
#pragma unroll
  for (int half = 0; half < 2; half++) tma_load_3d(shared + at + half * kBytesHalf, &map, full, half * 64, head, token);
}

HEBATRON_DEVICE void produce(const Work& w, uint8_t* shared, Barriers& barriers, const TensorMap& q, const TensorMap& k,
                             const TensorMap& v) {
  load_tile(0, shared, q, &barriers.queries, w.head, w.sequence.first_query + w.first);
  for (int key = w.begin, n = 0; key < w.end; key += kN, n++) {
    const int stage = n % kStages, token = w.sequence.first_key + key;
    const uint32_t phase = n / kStages % 2, at = (1 + 2 * stage) * kBytesTile;
    mbarrier_wait(&barriers.keys_empty[stage], phase ^ 1);
    load_tile(at, shared, k, &barriers.keys_full[stage], w.kv_head, token);
    mbarrier_wait(&barriers.values_empty[stage], phase ^ 1);
    load_tile(at + kBytesTile, shared, v, &barriers.values_full[stage], w.kv_head, token);
  }
}

// A consumer's 64 rows, of which a lane has row lane / 4 of its warp's 16 and the one 8 further: 2 columns of every 8.
struct Rows {
  float o[kDim / 2] = {};
  float largest[2] = {kNone, kNone}, total[2] = {};

  // Scores become weights, as left operands; o and total are brought to the new largest.
  HEBATRON_DEVICE void weigh(float (&s)[kN / 2], uint32_t (&weights)[kN / 16][4], float scale) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = kNone;
#pragma unroll
      for (int j = 0; j < kN / 8; j++) top = fmaxf(top, fmaxf(s[j * 4 + 2 * half], s[j * 4 + 2 * half + 1]));
      top = fmaxf(largest[half], quad_max(top) * scale);
      const float unit = top == kNone ? 0.0f : top;
      const float ratio = exp2_approx(largest[half] - unit);
      largest[half] = top;
      total[half] *= ratio;
#pragma unroll
      for (int j = 0; j < kN / 8; j++) {
        const float x = exp2_approx(s[j * 4 + 2 * half] * scale - unit), y = exp2_approx(s[j * 4 + 2 * half + 1] * scale - unit);
        total[half] += x + y;
        weights[j / 2][j % 2 * 2 + half] = pack_bf16(x, y);
      }
#pragma unroll
      for (int j = 0; j < kDim / 8; j++) o[j * 4 + 2 * half] *= ratio, o[j * 4 + 2 * half + 1] *= ratio;
    }
  }
};

// -inf where a row does not see a key: of the rows `row` and 8 further, the keys from `key` on.
HEBATRON_DEVICE void hide(float (&s)[kN / 2], const Sequence& sequence, int row, int key) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int begin = sequence.begin(row + half * 8) - key, end = sequence.end(row + half * 8) - key;
#pragma unroll
    for (int j = 0; j < kN / 8; j++)
#pragma unroll
      for (int c = 0; c < 2; c++)
        if (j * 8 + c < begin || j * 8 + c >= end) s[j * 4 + 2 * half + c] = kNone;
  }
}

// The values of the rows from `count` on, by all consumers.
HEBATRON_DEVICE void clear(uint8_t* values, int count) {
  for (int at = (threadIdx.x - kWarpgroup) + count * 8; at < kN * 8; at += kConsumers)
#pragma unroll
    for (int half = 0; half < 2; half++) *reinterpret_cast<uint4*>(values + half * kBytesHalf + at * 16) = uint4{0, 0, 0, 0};
  fence_proxy_async();
  named_barrier_sync(kConsumerBarrier, kConsumers);
}

HEBATRON_DEVICE void consume(const AttentionArgs& a, const Work& w, uint8_t* shared, Barriers& barriers) {
  const int group = shfl(int(threadIdx.x) / kWarpgroup, 0) - 1;  // uniform, and ptxas sees it
  const int warp_row = group * 64 + threadIdx.x % kWarpgroup / kWarp * 16, lane = lane_id(), row = w.first + warp_row + lane / 4;
  const bool speaks = lane == 0;  // for its warp, on the empty barriers
  const uint32_t base = smem_address(shared), q = base + group * 64 * kBytesRow;
  const float scale = float(a.scale) * kLog2E;
  Rows mine;
  if (w.begin < w.end) mbarrier_wait(&barriers.queries, 0);
  for (int key = w.begin, n = 0; key < w.end; key += kN, n++) {
    const int stage = n % kStages;
    const uint32_t phase = n / kStages % 2, keys = base + (1 + 2 * stage) * kBytesTile, values = keys + kBytesTile;
    float s[kN / 2];
    mbarrier_wait(&barriers.keys_full[stage], phase);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDim / 16; step++) {
      const uint32_t at = step / 4 * kBytesHalf + step % 4 * 32;
      wgmma_ss<0, 0>(s, wgmma_descriptor(q + at), wgmma_descriptor(keys + at), step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(s);
    if (speaks) mbarrier_arrive(&barriers.keys_empty[stage]);
    const bool whole = key + kN <= w.sequence.end(w.first) && key >= w.sequence.begin(w.first + w.rows - 1);
    if (!whole) hide(s, w.sequence, row, key + lane % 4 * 2);
    uint32_t weights[kN / 16][4];
    mine.weigh(s, weights, scale);
    mbarrier_wait(&barriers.values_full[stage], phase);
    if (key + kN > w.sequence.keys) clear(shared + (values - base), w.sequence.keys - key);
    wgmma_hold(mine.o);
#pragma unroll
    for (int step = 0; step < kN / 16; step++) wgmma_hold(weights[step]);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kN / 16; step++)
      wgmma_rs<1>(mine.o, weights[step], wgmma_descriptor(values + step * 16 * kBytesRow, 1024, kBytesHalf), true);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(mine.o);
    if (speaks) mbarrier_arrive(&barriers.values_empty[stage]);
  }
  named_barrier_sync(kConsumerBarrier, kConsumers);  // both have read the queries, whose place the results take

  float sums[kDim / 8][4], inverse[2];
#pragma unroll
  for (int i = 0; i < kDim / 2; i++) sums[i / 4][i % 4] = mine.o[i];
  const int64_t token = int64_t(w.sequence.first_query) + w.first + warp_row;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float total = quad_sum(mine.total[half]);
    inverse[half] = total == 0.0f ? 0.0f : 1.0f / total;
    const int r = half * 8 + lane / 4;
    if (lane % 4 == 0 && warp_row + r < w.rows)
      a.lse[(token + r) * a.heads + w.head] = total == 0.0f ? kNone : (mine.largest[half] + log2f(total)) * kLn2;
  }
  bf16* const o = static_cast<bf16*>(a.o) + (token * a.heads + w.head) * kDim;
  store_rows<kDim>(sums, inverse[0], inverse[1], shared + warp_row * kDim * 2, o, a.heads * kDim, w.rows - warp_row, kDim);
}

__global__ void __launch_bounds__(kThreads, 1)
    forward(HEBATRON_GRID_CONSTANT(TensorMap) q, HEBATRON_GRID_CONSTANT(TensorMap) k, HEBATRON_GRID_CONSTANT(TensorMap) v,
            HEBATRON_GRID_CONSTANT(AttentionArgs) a, int tiles) {
  HEBATRON_DYNAMIC_SHARED(shared);
  HEBATRON_SHARED(RowTile, found, 1);
  HEBATRON_SHARED(Barriers, barriers, 1);
  const HeadTile tile(a, tiles);
  if (threadIdx.x < kWarp) find_tile<kM>(a.cu_seqlens_q, int(a.sequences), tile.tile, found);
  if (threadIdx.x == 0) {
    mbarrier_init(&barriers->queries, 1);
    for (int stage = 0; stage < kStages; stage++) {
      mbarrier_init(&barriers->keys_full[stage], 1);
      mbarrier_init(&barriers->values_full[stage], 1);
      mbarrier_init(&barriers->keys_empty[stage], kConsumers / kWarp);
      mbarrier_init(&barriers->values_empty[stage], kConsumers / kWarp);
    }
    mbarrier_fence_init();
  }
  block_sync();
  if (found->sequence < 0) return;
  const Sequence sequence(a, found->sequence);
  const int first = (found->count - 1 - found->place) * kM;  // the longest first
  const int rows = sequence.queries - first < kM ? sequence.queries - first : kM;
  const Work work{sequence, tile.head, tile.head / int(a.heads / a.kv_heads), first, rows, sequence.begin(first) / kN * kN,
                  sequence.end(first + rows - 1)};
  if (threadIdx.x < kWarpgroup) {
    registers_decrease<40>();
    if (threadIdx.x < kWarp && elect_one() && work.begin < work.end) produce(work, shared, *barriers, q, k, v);
  } else {
    registers_increase<232>();
    consume(a, work, shared, *barriers);
  }
}

// Rows of 128 elements by head and token; where there is one of either, its stride says nothing.
TensorMap map_of(const void* rows, int64_t tokens, int64_t heads, int64_t token_stride, int64_t head_stride) {
  TensorMapShape shape;
  shape.rank = 3;
  shape.dim[0] = kDim, shape.dim[1] = uint64_t(heads), shape.dim[2] = uint64_t(tokens);
  shape.stride[0] = uint64_t(heads > 1 ? head_stride : kDim) * 2;
  shape.stride[1] = uint64_t(tokens > 1 ? token_stride : heads * kDim) * 2;
  shape.box[0] = 64, shape.box[1] = 1, shape.box[2] = kN;
  return tensor_map(kOp, rows, shape);
}

bool apart(int64_t tokens, int64_t heads, int64_t token_stride, int64_t head_stride) {
  return (heads == 1 || head_stride >= kDim) && (tokens == 1 || token_stride >= kDim);
}

}  // namespace

bool attention_sm90_takes(const AttentionArgs& a, const Exec& exec) {
  return compute_capability(exec) == 90 && a.dtype == DType::bf16 && a.head_dim == kDim && a.tokens_k > 0 &&
         apart(a.tokens_q, a.heads, a.q_stride, a.q_head_stride) && apart(a.tokens_k, a.kv_heads, a.k_stride, a.k_head_stride) &&
         apart(a.tokens_k, a.kv_heads, a.v_stride, a.v_head_stride);
}

void attention_sm90(const AttentionArgs& a, const Exec& exec) {
  const int64_t tiles = most_tiles<kM>(a.tokens_q, a.sequences), blocks = tiles * a.heads;
  check(blocks < int64_t(1) << 31, kOp, "tiles must be fewer than 2^31", blocks);
  const LaunchShape shape{dim3(unsigned(blocks)), dim3(kThreads), kBytesShared};
  launch(kOp, forward, shape, exec, map_of(a.q, a.tokens_q, a.heads, a.q_stride, a.q_head_stride),
         map_of(a.k, a.tokens_k, a.kv_heads, a.k_stride, a.k_head_stride),
         map_of(a.v, a.tokens_k, a.kv_heads, a.v_stride, a.v_head_stride), a, int(tiles));
}

}  // namespace hebatron::cuda
