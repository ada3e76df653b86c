// What      the gradients of attention: with p = exp(scale q k^T - lse), delta = sum(grad_o * o), ds = p * (grad_o v^T - delta):
//           grad_v = p^T grad_o, grad_k = scale ds^T q, grad_q = scale ds k.
// Grid      prepare, 16 lanes a row; then of_keys, a block of 4 warps per 64 keys of a kv head and part of its query heads, 32
//           queries a step; then of_queries, a block per 64 queries of a head, 32 keys a step. Both hold 64 rows of two tensors
//           and two stages of 32 of the other two: 64 KB for head dims above 64, 32 KB else; 253 and 193 registers at most, no
//           spill (nvcc 13.0, sm_80 and sm_90a). Where parts of the heads are more than one (a pure function of the sizes: four
//           blocks an SM), their fp32 sums are added by a last kernel. fp32: a warp per row.
// Traffic   q, k, v, o, grad_o and the gradients once from DRAM; through L2 q and grad_o once per 64 keys, k and v once per 64
//           queries and head. At most 67 MB of fp32 sums, out and back.
// Roofline  tensor: 14 * pairs * head_dim operations. 65,536 tokens, 32 heads of 128, causal: 123 TFLOP, H100 154 ms at the 800
//           TFLOP/s of wgmma, of which mma.sync is reported to reach 0.63: 244 ms. The bound is shared memory: 64 x 32 pairs of a
//           head take 2,560 clocks of 128 bytes (nine in ten of them ldmatrix), 371 ms on 132 SMs at 1.755 GHz. The gradients
//           as such are 10 * pairs * head_dim, 110 ms. Computed.
// Measured  never run on hardware.
// Limits    bf16: head dims up to 128, else as the forward: of 64 keys' sums a thread holds 128 at head dim 128. fp32 as the
//           forward.
// Why so    7 products instead of 5, the scores and grad_o v^T once more for grad_q: 40 % more operations, and no sum of floats
//           without an order. One pass would add 64 keys' part of grad_q to fp32 memory at every step: 65,536 tokens are 550 GB
//           of atomics in no order, or as many bytes of parts. Rows are keys in of_keys and queries in of_queries, so p and ds are
//           left operands as they come and never pass through shared memory. All query heads of a step come before the next
//           queries, from the last to the first: blocks that run together read the same rows of q and grad_o.
#include <algorithm>

#include "cuda/attention.cuh"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "attention_prefill[cuda]";
constexpr int64_t kMostSms = 256;  // for the workspace, whose size is asked for without a device

template <int kDim_>
struct Tile {
  static constexpr int kDim = kDim_, kChunks = kDim / 8, kThreads = 128;
  static constexpr int kRows = 64, kStep = 32;  // a block's rows, 16 a warp; rows of the other side a step
  static constexpr int kBytesRow = kDim * 2, kBytesRows = kRows * kBytesRow, kBytesStep = kStep * kBytesRow;
  static constexpr int kBytesShared = 2 * kBytesRows + 4 * kBytesStep;
};
template <class T>
using Pairs = float[T::kStep / 8][4];  // 16 rows against a step
template <class T>
using Sums = float[T::kDim / 8][4];  // 16 rows of a gradient

struct alignas(8) Stats {
  float lse, delta;  // lse in base 2, 0 where a query sees no key: 2^(-inf - 0) is its weight
};

struct Problem {
  AttentionBwdArgs b;
  int tiles, parts, group;  // tiles at most; parts of the query heads of a kv head
  Stats* stats;             // heads, tokens_q
  float* sums;              // parts; grad_k and grad_v; tokens_k, kv_heads, head_dim; null for one part
  HEBATRON_DEVICE Stats of(const Sequence& s, int head, int query) const {
    if (query >= s.queries) return {0.0f, 0.0f};
    return stats[head * b.forward.tokens_q + s.first_query + query];
  }
};

HEBATRON_DEVICE float in_base_2(float lse) { return lse == kNone ? 0.0f : lse * kLog2E; }

__global__ void prepare(HEBATRON_GRID_CONSTANT(Problem) p) {
  const AttentionArgs& a = p.b.forward;
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 16;
  const int column = threadIdx.x % 16 * 8;
  float sum = 0.0f;
  if (row < a.tokens_q * a.heads && column < a.head_dim) {
    float o[8], grad[8];
    load<8>(static_cast<const bf16*>(a.o) + row * a.head_dim + column, o);
    load<8>(static_cast<const bf16*>(p.b.grad_o) + row * a.head_dim + column, grad);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += o[i] * grad[i];
  }
#pragma unroll
  for (int mask = 8; mask; mask /= 2) sum += shfl_xor(sum, mask);
  if (row < a.tokens_q * a.heads && column == 0) p.stats[row % a.heads * a.tokens_q + row / a.heads] = {in_base_2(a.lse[row]), sum};
}

// to = a b^T of 16 rows of a and a step of b.
template <class T>
HEBATRON_DEVICE void multiply(Pairs<T>& to, uint32_t a, uint32_t b) {
  const int lane = lane_id();
  a += swizzled<T::kChunks>(lane % 16, lane / 16);
  b += swizzled<T::kChunks>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int j = 0; j < T::kStep / 8; j++) to[j][0] = to[j][1] = to[j][2] = to[j][3] = 0.0f;
#pragma unroll
  for (int k = 0; k < T::kDim / 16; k++) {
    uint32_t left[4], right[4];
    ldmatrix_x4(left, a ^ k * 32);
#pragma unroll
    for (int j = 0; j < T::kStep / 8; j += 2) {
      ldmatrix_x4(right, (b ^ k * 32) + j * 8 * T::kBytesRow);
      mma_m16n8k16(to[j], left, {right[0], right[1]});
      mma_m16n8k16(to[j + 1], left, {right[2], right[3]});
    }
  }
}

// to += weights b
template <class T>
HEBATRON_DEVICE void add(Sums<T>& to, const Pairs<T>& weights, uint32_t b) {
  b += swizzled<T::kChunks>(lane_id() % 16, lane_id() / 16);
#pragma unroll
  for (int k = 0; k < T::kStep / 16; k++) {
    uint32_t left[4], right[4];
#pragma unroll
    for (int i = 0; i < 4; i++) left[i] = pack_bf16(weights[2 * k + i / 2][i % 2 * 2], weights[2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int j = 0; j < T::kDim / 8; j += 2) {
      ldmatrix_x4_trans(right, (b ^ j * 16) + k * 16 * T::kBytesRow);
      mma_m16n8k16(to[j], left, {right[0], right[1]});
      mma_m16n8k16(to[j + 1], left, {right[2], right[3]});
    }
  }
}

// One part of a kv head's query heads against 64 keys.
template <class T>
__global__ void __launch_bounds__(T::kThreads, 2) of_keys(HEBATRON_GRID_CONSTANT(Problem) p) {
  HEBATRON_DYNAMIC_SHARED(shared);
  HEBATRON_SHARED(RowTile, found, 1);
  const AttentionArgs& a = p.b.forward;
  const int part = blockIdx.x / p.tiles % p.parts, kv_head = blockIdx.x / p.tiles / p.parts, columns = int(a.head_dim);
  if (threadIdx.x < kWarp) find_tile<T::kRows>(a.cu_seqlens_k, int(a.sequences), blockIdx.x % p.tiles, found);
  block_sync();
  if (found->sequence < 0) return;
  const Sequence s(a, found->sequence);
  const int first_key = found->place * T::kRows, count = s.keys - first_key < T::kRows ? s.keys - first_key : T::kRows;
  const int each = (p.group + p.parts - 1) / p.parts, first_head = kv_head * p.group + part * each;
  const int left = p.group - part * each, heads = left < each ? left : each;  // 0 or less for a part past the last head
  const int begin = s.first_seeing(first_key) / T::kStep * T::kStep, end = s.end_seeing(first_key + count);
  const int tiles = begin < end ? (end - begin + T::kStep - 1) / T::kStep : 0, steps = heads > 0 ? tiles * heads : 0;

  const uint32_t keys = smem_address(shared), values = keys + T::kBytesRows, stages = values + T::kBytesRows;
  const int64_t key = int64_t(s.first_key) + first_key;
  load_rows<T::kRows, T::kChunks, T::kThreads>(keys, static_cast<const bf16*>(a.k) + key * a.k_stride + kv_head * a.k_head_stride,
                                               a.k_stride, count, columns);
  load_rows<T::kRows, T::kChunks, T::kThreads>(values, static_cast<const bf16*>(a.v) + key * a.v_stride + kv_head * a.v_head_stride,
                                               a.v_stride, count, columns);
  const auto query_of = [&](int step) { return begin + (tiles - 1 - step / heads) * T::kStep; };
  const auto load_step = [&](int step) {
    const int query = query_of(step), head = first_head + step % heads;
    const int64_t token = int64_t(s.first_query) + query;
    const uint32_t to = stages + step % 2 * 2 * T::kBytesStep;
    const bf16* const q_rows = static_cast<const bf16*>(a.q) + token * a.q_stride + head * a.q_head_stride;
    const bf16* const grad_rows = static_cast<const bf16*>(p.b.grad_o) + (token * a.heads + head) * columns;
    load_rows<T::kStep, T::kChunks, T::kThreads>(to, q_rows, a.q_stride, s.queries - query, columns);
    load_rows<T::kStep, T::kChunks, T::kThreads>(to + T::kBytesStep, grad_rows, a.heads * columns, s.queries - query, columns);
  };
  if (steps > 0) load_step(0);
  const int warp_row = threadIdx.x / kWarp * 16, lane = lane_id(), j0 = first_key + warp_row + lane / 4;
  const float scale = float(a.scale) * kLog2E;
  Sums<T> grad_k = {}, grad_v = {};
  for (int step = 0; step < steps; step++) {
    cp_async_wait_all();
    block_sync();  // the step's rows are here, and every warp has read those of the step before
    if (step + 1 < steps) load_step(step + 1);
    const int query = query_of(step), head = first_head + step % heads;
    const uint32_t q = stages + step % 2 * 2 * T::kBytesStep, grad_o = q + T::kBytesStep;
    Pairs<T> weights, ds;
    multiply<T>(weights, keys + warp_row * T::kBytesRow, q);
    multiply<T>(ds, values + warp_row * T::kBytesRow, grad_o);
    const bool whole = query + T::kStep <= s.queries && first_key + T::kRows <= s.end(query) &&
                       first_key >= s.begin(query + T::kStep - 1);
#pragma unroll
    for (int j = 0; j < T::kStep / 8; j++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int i = query + j * 8 + lane % 4 * 2 + c, first_seen = s.begin(i), end_seen = i < s.queries ? s.end(i) : 0;
        const Stats stats = p.of(s, head, i);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float& weight = weights[j][2 * half + c];
          const bool hidden = !whole && (j0 + half * 8 < first_seen || j0 + half * 8 >= end_seen);
          weight = hidden ? 0.0f : exp2_approx(weight * scale - stats.lse);
          ds[j][2 * half + c] = weight * (ds[j][2 * half + c] - stats.delta);
        }
      }
    add<T>(grad_v, weights, grad_o);
    add<T>(grad_k, ds, q);
  }
  cp_async_wait_all();
  block_sync();  // the keys and values are here where there was no step, and no longer needed

  const int rows = count - warp_row;
  const int64_t row = (key + warp_row) * a.kv_heads + kv_head, step = a.kv_heads * columns;
  if (p.parts == 1) {
    uint8_t* const place = shared + warp_row * T::kBytesRow;
    bf16 *const k_rows = static_cast<bf16*>(p.b.grad_k) + row * columns, *const v_rows = static_cast<bf16*>(p.b.grad_v) + row * columns;
    store_rows<T::kDim>(grad_k, float(a.scale), float(a.scale), place, k_rows, step, rows, columns);
    store_rows<T::kDim>(grad_v, 1.0f, 1.0f, place + T::kBytesRows, v_rows, step, rows, columns);
    return;
  }
  const int64_t whole = a.tokens_k * step;
  float* const to = p.sums + 2 * part * whole + row * columns;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int j = 0; j < T::kDim / 8; j++) {
      const int r = half * 8 + lane / 4, column = j * 8 + lane % 4 * 2;
      if (r >= rows || column >= columns) continue;
      store<2>(to + r * step + column, {grad_k[j][2 * half], grad_k[j][2 * half + 1]});
      store<2>(to + whole + r * step + column, {grad_v[j][2 * half], grad_v[j][2 * half + 1]});
    }
}

// The parts of the heads, in their order.
__global__ void add_parts(HEBATRON_GRID_CONSTANT(Problem) p, int64_t whole) {
  const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (at >= 2 * whole) return;
  float sum[4] = {};
  for (int part = 0; part < p.parts; part++) {
    float more[4];
    load<4>(p.sums + 2 * part * whole + at, more);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += more[i];
  }
  const float scale = at < whole ? float(p.b.forward.scale) : 1.0f;
#pragma unroll
  for (int i = 0; i < 4; i++) sum[i] *= scale;
  store<4>(at < whole ? static_cast<bf16*>(p.b.grad_k) + at : static_cast<bf16*>(p.b.grad_v) + at - whole, sum);
}

// 64 queries of a head against all keys they see.
template <class T>
__global__ void __launch_bounds__(T::kThreads, 2) of_queries(HEBATRON_GRID_CONSTANT(Problem) p) {
  HEBATRON_DYNAMIC_SHARED(shared);
  HEBATRON_SHARED(RowTile, found, 1);
  const AttentionArgs& a = p.b.forward;
  const HeadTile work(a, p.tiles);
  if (threadIdx.x < kWarp) find_tile<T::kRows>(a.cu_seqlens_q, int(a.sequences), work.tile, found);
  block_sync();
  if (found->sequence < 0) return;
  const Sequence s(a, found->sequence);
  const int first = (found->count - 1 - found->place) * T::kRows;  // the longest first
  const int count = s.queries - first < T::kRows ? s.queries - first : T::kRows;
  const int kv_head = work.head / p.group, columns = int(a.head_dim);
  const int64_t token = int64_t(s.first_query) + first, row = token * a.heads + work.head, step = a.heads * columns;
  const uint32_t q = smem_address(shared), grad_o = q + T::kBytesRows, stages = grad_o + T::kBytesRows;
  const bf16* const q_rows = static_cast<const bf16*>(a.q) + token * a.q_stride + work.head * a.q_head_stride;
  load_rows<T::kRows, T::kChunks, T::kThreads>(q, q_rows, a.q_stride, count, columns);
  load_rows<T::kRows, T::kChunks, T::kThreads>(grad_o, static_cast<const bf16*>(p.b.grad_o) + row * columns, step, count, columns);
  const bf16* const k_rows = static_cast<const bf16*>(a.k) + s.first_key * a.k_stride + kv_head * a.k_head_stride;
  const bf16* const v_rows = static_cast<const bf16*>(a.v) + s.first_key * a.v_stride + kv_head * a.v_head_stride;
  const auto load_step = [&](int key) {
    const uint32_t to = stages + key / T::kStep % 2 * 2 * T::kBytesStep;
    load_rows<T::kStep, T::kChunks, T::kThreads>(to, k_rows + key * a.k_stride, a.k_stride, s.keys - key, columns);
    load_rows<T::kStep, T::kChunks, T::kThreads>(to + T::kBytesStep, v_rows + key * a.v_stride, a.v_stride, s.keys - key, columns);
  };
  const int begin = s.begin(first) / T::kStep * T::kStep, end = s.end(first + count - 1);
  if (begin < end) load_step(begin);
  const int warp_row = threadIdx.x / kWarp * 16, lane = lane_id(), i0 = first + warp_row + lane / 4;
  const float scale = float(a.scale) * kLog2E;
  const Stats stats[2] = {p.of(s, work.head, i0), p.of(s, work.head, i0 + 8)};
  Sums<T> grad_q = {};
  for (int key = begin; key < end; key += T::kStep) {
    cp_async_wait_all();
    block_sync();  // the step's rows are here, and every warp has read those of the step before
    if (key + T::kStep < end) load_step(key + T::kStep);
    const uint32_t keys = stages + key / T::kStep % 2 * 2 * T::kBytesStep;
    Pairs<T> weights, ds;
    multiply<T>(weights, q + warp_row * T::kBytesRow, keys);
    multiply<T>(ds, grad_o + warp_row * T::kBytesRow, keys + T::kBytesStep);
    const bool whole = key + T::kStep <= s.end(first) && key >= s.begin(first + count - 1);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int first_seen = s.begin(i0 + half * 8), end_seen = s.end(i0 + half * 8);
#pragma unroll
      for (int j = 0; j < T::kStep / 8; j++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int at = key + j * 8 + lane % 4 * 2 + c;
          const bool hidden = !whole && (at < first_seen || at >= end_seen);
          const float weight = hidden ? 0.0f : exp2_approx(weights[j][2 * half + c] * scale - stats[half].lse);
          ds[j][2 * half + c] = weight * (ds[j][2 * half + c] - stats[half].delta);
        }
    }
    add<T>(grad_q, ds, keys);
  }
  cp_async_wait_all();
  block_sync();  // the queries are here where there was no key, and no longer needed
  bf16* const to = static_cast<bf16*>(p.b.grad_q) + (row + warp_row * a.heads) * columns;
  store_rows<T::kDim>(grad_q, float(a.scale), float(a.scale), shared + warp_row * T::kBytesRow, to, step, count - warp_row, columns);
}

// fp32, for parity: a warp's row against one row of the other side after another.
__global__ void __launch_bounds__(128) prepare_fp32(HEBATRON_GRID_CONSTANT(Problem) p) {
  const AttentionArgs& a = p.b.forward;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (row >= a.tokens_q * a.heads) return;
  float o[kSlots], grad[kSlots];
  read_fp32(static_cast<const float*>(a.o) + row * a.head_dim, a.head_dim, o);
  read_fp32(static_cast<const float*>(p.b.grad_o) + row * a.head_dim, a.head_dim, grad);
  const float delta = dot(o, grad);
  if (lane_id() == 0) p.stats[row % a.heads * a.tokens_q + row / a.heads] = {in_base_2(a.lse[row]), delta};
}

// The rows of q, grad_o, k and v that meet, and what their weight and its gradient are.
struct Pair {
  float q[kSlots], grad_o[kSlots], k[kSlots], v[kSlots];
  HEBATRON_DEVICE void read_query(const AttentionBwdArgs& b, int64_t token, int64_t head) {
    const AttentionArgs& a = b.forward;
    read_fp32(static_cast<const float*>(a.q) + token * a.q_stride + head * a.q_head_stride, a.head_dim, q);
    read_fp32(static_cast<const float*>(b.grad_o) + (token * a.heads + head) * a.head_dim, a.head_dim, grad_o);
  }
  HEBATRON_DEVICE void read_key(const AttentionArgs& a, int64_t key, int64_t head) {
    read_fp32(static_cast<const float*>(a.k) + key * a.k_stride + head * a.k_head_stride, a.head_dim, k);
    read_fp32(static_cast<const float*>(a.v) + key * a.v_stride + head * a.v_head_stride, a.head_dim, v);
  }
  HEBATRON_DEVICE float weight(double scale, const Stats& stats) const {
    return exp2_approx(dot(q, k) * (float(scale) * kLog2E) - stats.lse);
  }
  HEBATRON_DEVICE float ds(float weight, const Stats& stats) const { return weight * (dot(grad_o, v) - stats.delta); }
};

__global__ void __launch_bounds__(128) of_queries_fp32(HEBATRON_GRID_CONSTANT(Problem) p) {
  const AttentionArgs& a = p.b.forward;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp, token = row / a.heads;
  if (token >= a.tokens_q) return;
  const Sequence s(a, sequence_of(a.cu_seqlens_q, int(a.sequences), token));
  const int head = int(row % a.heads), i = int(token - s.first_query);
  const Stats stats = p.of(s, head, i);
  Pair pair;
  float grad_q[kSlots] = {};
  pair.read_query(p.b, token, head);
  for (int j = s.begin(i); j < s.end(i); j++) {
    pair.read_key(a, int64_t(s.first_key) + j, head / p.group);
    const float ds = pair.ds(pair.weight(a.scale, stats), stats);
#pragma unroll
    for (int c = 0; c < kSlots; c++) grad_q[c] += ds * pair.k[c];
  }
  write_fp32(static_cast<float*>(p.b.grad_q) + row * a.head_dim, a.head_dim, grad_q, float(a.scale));
}

__global__ void __launch_bounds__(128) of_keys_fp32(HEBATRON_GRID_CONSTANT(Problem) p) {
  const AttentionArgs& a = p.b.forward;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp, key = row / a.kv_heads;
  if (key >= a.tokens_k) return;
  const Sequence s(a, sequence_of(a.cu_seqlens_k, int(a.sequences), key));
  const int kv_head = int(row % a.kv_heads), j = int(key - s.first_key);
  Pair pair;
  float grad_k[kSlots] = {}, grad_v[kSlots] = {};
  pair.read_key(a, key, kv_head);
  for (int i = s.first_seeing(j); i < s.end_seeing(j + 1); i++)
    for (int head = kv_head * p.group; head < (kv_head + 1) * p.group; head++) {
      const Stats stats = p.of(s, head, i);
      pair.read_query(p.b, int64_t(s.first_query) + i, head);
      const float weight = pair.weight(a.scale, stats), ds = pair.ds(weight, stats);
#pragma unroll
      for (int c = 0; c < kSlots; c++) grad_k[c] += ds * pair.q[c], grad_v[c] += weight * pair.grad_o[c];
    }
  write_fp32(static_cast<float*>(p.b.grad_k) + row * a.head_dim, a.head_dim, grad_k, float(a.scale));
  write_fp32(static_cast<float*>(p.b.grad_v) + row * a.head_dim, a.head_dim, grad_v, 1.0f);
}

struct Plan {
  int64_t tiles_k, parts = 1, bytes_stats, bytes_sums = 0;

  Plan(const AttentionArgs& a, int64_t sms) : tiles_k(most_tiles<Tile<128>::kRows>(a.tokens_k, a.sequences)) {
    bytes_stats = (a.heads * a.tokens_q * int64_t(sizeof(Stats)) + 255) / 256 * 256;
    const int64_t blocks = tiles_k * a.kv_heads, wanted = blocks ? 4 * std::min(sms, kMostSms) / blocks : 1;
    if (a.dtype == DType::f32) return;
    parts = std::max<int64_t>(1, std::min(wanted, a.heads / a.kv_heads));
    if (parts > 1) bytes_sums = parts * 2 * a.tokens_k * a.kv_heads * a.head_dim * int64_t(sizeof(float));
  }
  int64_t bytes() const { return bytes_stats + bytes_sums; }
};

unsigned blocks_of(int64_t work, int64_t each) {
  const int64_t blocks = (work + each - 1) / each;
  check(blocks < int64_t(1) << 31, kOp, "blocks must be fewer than 2^31", blocks);
  return unsigned(blocks);
}

template <int kDim>
void run(Problem& p, int64_t tiles_k, const Exec& exec) {
  using T = Tile<kDim>;
  const AttentionArgs& a = p.b.forward;
  if (a.tokens_q > 0) launch(kOp, prepare, LaunchShape{dim3(blocks_of(a.tokens_q * a.heads, 8)), dim3(128)}, exec, p);
  if (a.tokens_k > 0) {
    p.tiles = int(tiles_k);
    launch(kOp, of_keys<T>, LaunchShape{dim3(blocks_of(tiles_k * p.parts * a.kv_heads, 1)), dim3(T::kThreads), T::kBytesShared}, exec, p);
    const int64_t whole = a.tokens_k * a.kv_heads * a.head_dim;
    if (p.parts > 1) launch(kOp, add_parts, LaunchShape{dim3(blocks_of(whole, 256)), dim3(128)}, exec, p, whole);
  }
  if (a.tokens_q == 0) return;
  const int64_t tiles = most_tiles<T::kRows>(a.tokens_q, a.sequences);
  p.tiles = int(tiles);
  launch(kOp, of_queries<T>, LaunchShape{dim3(blocks_of(tiles * a.heads, 1)), dim3(T::kThreads), T::kBytesShared}, exec, p);
}

void run_fp32(const Problem& p, const Exec& exec) {
  const AttentionArgs& a = p.b.forward;
  const LaunchShape queries{dim3(blocks_of(a.tokens_q * a.heads, 4)), dim3(128)}, keys{dim3(blocks_of(a.tokens_k * a.kv_heads, 4)), dim3(128)};
  if (a.tokens_q > 0) launch(kOp, prepare_fp32, queries, exec, p);
  if (a.tokens_k > 0) launch(kOp, of_keys_fp32, keys, exec, p);
  if (a.tokens_q > 0) launch(kOp, of_queries_fp32, queries, exec, p);
}

void check_args(const AttentionBwdArgs& b) {
  check_attention(kOp, b.forward);
  if (b.forward.dtype == DType::f32) return;
  check(b.forward.head_dim <= 128, kOp, "head_dim must be at most 128 for the gradients in bfloat16", b.forward.head_dim);
  check(addresses_of({b.grad_o, b.grad_q, b.grad_k, b.grad_v}) % 16 == 0, kOp, "the gradients must start on 16 bytes", 0);
}

}  // namespace

int64_t attention_prefill_bwd_workspace(const AttentionBwdArgs& b) {
  check_args(b);
  return Plan(b.forward, kMostSms).bytes();
}

void attention_prefill_bwd(const AttentionBwdArgs& b, const Exec& exec) {
  check_args(b);
  const AttentionArgs& a = b.forward;
  if (a.tokens_q == 0 && a.tokens_k == 0) return;
  DeviceGuard guard(exec);
  const Plan plan(a, sm_count(exec));
  check(exec.bytes_workspace >= plan.bytes(), kOp, "the workspace must be large enough, bytes", exec.bytes_workspace);
  check_attention_pointers(kOp, a, exec);
  if (a.tokens_q > 0) check_pointers(kOp, {{"grad_o", b.grad_o}, {"grad_q", b.grad_q}, {"workspace", exec.workspace}}, exec);
  if (a.tokens_k > 0) check_pointers(kOp, {{"grad_k", b.grad_k}, {"grad_v", b.grad_v}}, exec);
  char* const base = static_cast<char*>(exec.workspace);
  Problem p{b, 0, int(plan.parts), int(a.heads / a.kv_heads), reinterpret_cast<Stats*>(base), nullptr};
  if (plan.parts > 1) p.sums = reinterpret_cast<float*>(base + plan.bytes_stats);
  if (a.dtype == DType::f32) return run_fp32(p, exec);
  if (a.head_dim > 64) return run<128>(p, plan.tiles_k, exec);
  return run<64>(p, plan.tiles_k, exec);
}

}  // namespace hebatron::cuda
