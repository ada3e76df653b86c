// What      one new key and value per sequence into its pages, then o = softmax(scale q k^T) v over them, one query token each.
// Grid      append, a thread per 16 bytes; then attend, a block per (part of the keys, kv head and 16 of its query heads,
//           sequence): 4 warps (2 for head dims above 128), each with 16 keys at a time and 3 stages of its own in shared
//           memory: 96 KB for head dims above 64, 48 KB else. Parts are a pure function of the sizes: two blocks an SM, of which
//           chips with less shared memory than Hopper run one after another at 96 KB, 64 KB of keys still in flight an SM.
// Traffic   every key and value that is seen, once per 16 query heads of its kv head; a part's sums 8.8 KB out and back by L2.
// Roofline  DRAM: 4 * keys * kv_heads * head_dim bytes. 65,536 keys, 2 kv heads of 128: 67 MB, H100 22.4 us at 3.0 TB/s, A100
//           32.9 us at 2.04; 32 sequences of 8,192: 268 MB, 89 and 132 us. Computed. The append and its launch come in front.
// Measured  never run on hardware.
// Limits    bf16; head dims up to 256 and all strides multiples of 8, tensors on 16 bytes; 65,535 sequences, as many kv heads.
//           Values of block_table and lengths are trusted: lengths below max_blocks * block_size.
// Why so    a warp copies, waits for and reads its own keys, so that no barrier stands in the main loop. The last block of up
//           to 12 parts to arrive joins them, and the last of up to 12 such groups those, each in the order of the keys: one
//           block for 128 parts would read 1.1 MB, 10 us at 64 bytes a clock. What a ticket is drawn from must be 0 and the
//           workspace holds anything, so append, which has to end before any key is read (a page may be shared), clears it.
#include <algorithm>

#include "cuda/attention.cuh"
#include "hebatron/ops.h"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "attention_decode[cuda]";
constexpr int kHeads = 16;                 // the rows of mma.sync
constexpr int kKeys = 16;                  // of a warp's step: one k16 of the second product
constexpr int kStages = 3;                 // two steps of 8 KB a warp in flight: 64 KB a block, where an H100 needs 18 KB an SM
constexpr int kFan = 12;                   // parts, and groups of them, that one block joins
constexpr int64_t kMaxParts = kFan * kFan;
constexpr int64_t kLeastKeys = 256;        // of a part of the whole table: four steps of each warp
constexpr int64_t kMostSms = 256;          // for the workspace, whose size is asked for without a device
constexpr int64_t kMaxGrid = 65535;

template <int kDim_>
struct Tile {
  static constexpr int kDim = kDim_, kChunks = kDim / 8, kWarps = kDim > 128 ? 2 : 4, kThreads = kWarps * kWarp;
  static constexpr int kBytesRows = kKeys * kDim * 2, kBytesStage = 2 * kBytesRows, kBytesShared = kWarps * kStages * kBytesStage;
  // What is known of some keys: the sums of 16 heads, each head's largest score and its total. Rows of 8 more floats: the four
  // rows that half a warp stores at once then fall into different banks.
  static constexpr int kRow = kDim + 8, kPart = kHeads * kRow + 2 * kHeads;
  static_assert(kWarps * kPart * 4 <= kBytesShared, "the warps' sums take the place of the stages");
};

struct Problem {
  AttentionDecodeArgs a;
  int group, tiles, parts;  // query heads of a kv head, 16 at a time; parts of the keys at most
  float *sums, *groups;     // parts, and kFan, of every (sequence, kv head, tile)
  uint32_t* tickets;        // kFan + 1 of each
  int64_t count_tickets;
};

// Also clears the tickets.
__global__ void append(HEBATRON_GRID_CONSTANT(Problem) p) {
  const AttentionDecodeArgs& a = p.a;
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, packs = a.head_dim / 8;
  if (at < p.count_tickets) p.tickets[at] = 0;
  const int64_t column = at % packs * 8, head = at / packs % a.kv_heads, n = at / packs / a.kv_heads;
  if (n >= a.sequences) return;
  const int length = a.lengths[n], block_size = int(a.block_size);
  const int64_t block = a.block_table[n * a.max_blocks + length / block_size];
  const int64_t to = block * a.block_stride + length % block_size * a.row_stride + head * a.head_stride + column;
  const auto copy = [&](void* pages, const void* rows, int64_t from) {
    *reinterpret_cast<uint4*>(static_cast<bf16*>(pages) + to) = *reinterpret_cast<const uint4*>(static_cast<const bf16*>(rows) + from);
  };
  copy(a.keys, a.k_new, n * a.k_new_stride + head * a.k_new_head_stride + column);
  copy(a.values, a.v_new, n * a.v_new_stride + head * a.v_new_head_stride + column);
}

// One warp's keys: the 16 from `first` on, then those kWarps * 16 further, up to `last`.
template <class T>
struct Keys {
  const Problem& p;
  uint32_t stages;  // this warp's
  int kv_head, first, last;

  HEBATRON_DEVICE int steps() const { return (last - first + T::kWarps * kKeys - 1) / (T::kWarps * kKeys); }
  HEBATRON_DEVICE int key(int step) const { return first + step * T::kWarps * kKeys; }

  // Where this lane's key of a step lies, -1 past the last; lanes 16 apart ask for the same one.
  HEBATRON_DEVICE int64_t find(int step) const {
    const AttentionDecodeArgs& a = p.a;
    const int k = key(step) + lane_id() % kKeys, block_size = int(a.block_size);
    if (k >= last) return -1;
    const int64_t block = a.block_table[int64_t(blockIdx.z) * a.max_blocks + k / block_size];
    return block * a.block_stride + k % block_size * a.row_stride + kv_head * a.head_stride;
  }

  // What lies past the last key or the head dim becomes zeros.
  HEBATRON_DEVICE void load(int stage, int64_t mine) const {
    const uint32_t to = stages + stage * T::kBytesStage;
#pragma unroll 8
    for (int piece = lane_id(); piece < kKeys * T::kChunks; piece += kWarp) {
      const int row = piece / T::kChunks, chunk = piece % T::kChunks;
      const int64_t offset = shfl(mine, row);
      const bool in = offset >= 0 && chunk * 8 < p.a.head_dim;
      const int64_t at = in ? offset + chunk * 8 : 0;
      cp_async_16(to + swizzled<T::kChunks>(row, chunk), static_cast<const bf16*>(p.a.keys) + at, in);
      cp_async_16(to + T::kBytesRows + swizzled<T::kChunks>(row, chunk), static_cast<const bf16*>(p.a.values) + at, in);
    }
  }
};

// What a warp knows of its keys so far: a lane has 2 columns of every 8 of rows lane / 4 and 8 further.
template <class T>
struct Sums {
  float o[T::kDim / 8][4] = {};
  float largest[2] = {kNone, kNone}, total[2] = {};  // of the scores in base 2; of this lane's weights

  // Adds the 16 keys of a stage, of which the first `count` exist.
  HEBATRON_DEVICE void add(const uint32_t (&q)[T::kDim / 16][4], uint32_t keys, uint32_t values, int count, float scale) {
    const int lane = lane_id();
    float s[2][4] = {};
#pragma unroll
    for (int step = 0; step < T::kDim / 16; step++) {
      uint32_t r[4];
      ldmatrix_x4(r, keys + swizzled<T::kChunks>(lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
      mma_m16n8k16(s[0], q[step], {r[0], r[1]});
      mma_m16n8k16(s[1], q[step], {r[2], r[3]});
    }
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (j * 8 + lane % 4 * 2 + i % 2 >= count) s[j][i] = kNone;
    uint32_t weights[4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]), fmaxf(s[1][2 * half], s[1][2 * half + 1]));
      top = fmaxf(largest[half], quad_max(top) * scale);
      const float unit = top == kNone ? 0.0f : top;  // keys whose scores are all -inf weigh 0 beside others
      const float ratio = exp2_approx(largest[half] - unit);
      largest[half] = top;
      total[half] *= ratio;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float x = exp2_approx(s[j][2 * half] * scale - unit), y = exp2_approx(s[j][2 * half + 1] * scale - unit);
        total[half] += x + y;
        weights[2 * j + half] = pack_bf16(x, y);
      }
#pragma unroll
      for (int j = 0; j < T::kDim / 8; j++) o[j][2 * half] *= ratio, o[j][2 * half + 1] *= ratio;
    }
#pragma unroll
    for (int j = 0; j < T::kDim / 8; j += 2) {
      uint32_t r[4];
      ldmatrix_x4_trans(r, values + swizzled<T::kChunks>(lane % 16, j + lane / 16));
      mma_m16n8k16(o[j], weights, {r[0], r[1]});
      mma_m16n8k16(o[j + 1], weights, {r[2], r[3]});
    }
  }

  HEBATRON_DEVICE void store(float* part) const {
    const int row = lane_id() / 4, column = lane_id() % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row + half * 8;
      const float all = quad_sum(total[half]);
#pragma unroll
      for (int j = 0; j < T::kDim / 8; j++)
        *reinterpret_cast<float2*>(part + r * T::kRow + j * 8 + column) = float2{o[j][2 * half], o[j][2 * half + 1]};
      if (column == 0) part[kHeads * T::kRow + r] = largest[half], part[kHeads * T::kRow + kHeads + r] = all;
    }
  }
};

// The block's part of the result: `count` parts, one behind another, added in their order. To the part `to`; or, where that is
// null, divided by the totals to the rows of o.
template <class T>
HEBATRON_DEVICE void join(const Problem& p, const float* parts, int count, float* to, bf16* o, int heads) {
  for (int at = threadIdx.x; at < kHeads * T::kDim / 4; at += T::kThreads) {
    const int row = at / (T::kDim / 4), column = at % (T::kDim / 4) * 4;
    const float* largest_of = parts + kHeads * T::kRow + row;
    float largest = kNone, total = 0.0f, sum[4] = {};
    for (int i = 0; i < count; i++) largest = fmaxf(largest, largest_of[i * T::kPart]);
#pragma unroll 4
    for (int i = 0; i < count; i++) {
      const float ratio = exp2_approx(largest_of[i * T::kPart] - largest);
      float more[4];
      load<4>(parts + i * T::kPart + row * T::kRow + column, more);
      total += largest_of[i * T::kPart + kHeads] * ratio;
#pragma unroll
      for (int c = 0; c < 4; c++) sum[c] += more[c] * ratio;
    }
    if (to) {
      store<4>(to + row * T::kRow + column, sum);
      if (column == 0) to[kHeads * T::kRow + row] = largest, to[kHeads * T::kRow + kHeads + row] = total;
    } else if (row < heads && column < p.a.head_dim) {
      const float inverse = 1.0f / total;
#pragma unroll
      for (int c = 0; c < 4; c++) sum[c] *= inverse;
      store<4>(o + row * p.a.head_dim + column, sum);
    }
  }
}

// Whether this block is the last of `count` to come here. What the others stored before is then seen.
HEBATRON_DEVICE bool is_last(uint32_t* ticket, int count, int* told) {
  block_sync();
  if (threadIdx.x == 0) {
    fence_gpu();
    *told = atomic_add(ticket, 1u) + 1 == uint32_t(count);
    fence_gpu();
  }
  block_sync();
  return *told != 0;
}

template <class T>
__global__ void __launch_bounds__(T::kThreads) attend(HEBATRON_GRID_CONSTANT(Problem) p) {
  HEBATRON_DYNAMIC_SHARED(stages);
  HEBATRON_SHARED(int, told, 1);
  const AttentionDecodeArgs& a = p.a;
  const int n = blockIdx.z, part = blockIdx.x, kv_head = blockIdx.y / p.tiles, first_head = blockIdx.y % p.tiles * kHeads;
  const int heads = p.group - first_head < kHeads ? p.group - first_head : kHeads;
  const int end = a.lengths[n] + 1, begin = end > a.window ? end - int(a.window) : 0;
  // the keys of a part: whole rounds of all warps
  const int each = ((end - begin + p.parts - 1) / p.parts + T::kWarps * kKeys - 1) / (T::kWarps * kKeys) * (T::kWarps * kKeys);
  const int parts = (end - begin + each - 1) / each;
  if (part >= parts) return;
  const int first = begin + part * each, last = end - first < each ? end : first + each;

  const int warp = threadIdx.x / kWarp, lane = lane_id();
  const Keys<T> keys{p, smem_address(stages) + warp * kStages * T::kBytesStage, kv_head, first + warp * kKeys, last};
  const int steps = keys.steps();
#pragma unroll
  for (int s = 0; s < kStages - 1; s++) {
    if (s < steps) keys.load(s, keys.find(s));
    cp_async_commit();
  }
  int64_t next = keys.find(kStages - 1);  // a step ahead of its copies: they do not wait for the table
  uint32_t q[T::kDim / 16][4];
  const int64_t head = int64_t(kv_head) * p.group + first_head;
  const bf16* const from = static_cast<const bf16*>(a.q) + n * a.q_stride + head * a.q_head_stride;
#pragma unroll
  for (int step = 0; step < T::kDim / 16; step++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i % 2 * 8, column = step * 16 + lane % 4 * 2 + i / 2 * 8;
      q[step][i] = row < heads && column < a.head_dim ? *reinterpret_cast<const uint32_t*>(from + row * a.q_head_stride + column) : 0;
    }
  Sums<T> sums;
  const float scale = float(a.scale) * kLog2E;
  int slot = 0;
  for (int step = 0; step < steps; step++) {
    cp_async_wait<kStages - 2>();
    warp_sync();  // the step's keys are here, and every lane has read the stage of the one before
    if (step + kStages - 1 < steps) keys.load(slot == 0 ? kStages - 1 : slot - 1, next);
    cp_async_commit();
    next = keys.find(step + kStages);
    const uint32_t stage = keys.stages + slot * T::kBytesStage;
    sums.add(q, stage, stage + T::kBytesRows, last - keys.key(step), scale);
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }
  block_sync();  // the warps' sums take the place of all stages
  float* const of_warps = reinterpret_cast<float*>(stages);
  sums.store(of_warps + warp * T::kPart);
  block_sync();

  bf16* const o = static_cast<bf16*>(a.o) + (n * a.heads + head) * a.head_dim;
  if (parts == 1) return join<T>(p, of_warps, T::kWarps, nullptr, o, heads);
  const int64_t tile = int64_t(n) * gridDim.y + blockIdx.y;
  float* const of_parts = p.sums + tile * p.parts * T::kPart;
  join<T>(p, of_warps, T::kWarps, of_parts + part * T::kPart, nullptr, heads);
  const int group = part / kFan, groups = (parts + kFan - 1) / kFan;
  const int members = parts - group * kFan < kFan ? parts - group * kFan : kFan;
  uint32_t* const tickets = p.tickets + tile * (kFan + 1);
  if (!is_last(tickets + group, members, told)) return;
  const float* const of_group = of_parts + group * kFan * T::kPart;
  if (groups == 1) return join<T>(p, of_group, members, nullptr, o, heads);
  float* const of_groups = p.groups + tile * kFan * T::kPart;
  join<T>(p, of_group, members, of_groups + group * T::kPart, nullptr, heads);
  if (is_last(tickets + kFan, groups, told)) join<T>(p, of_groups, groups, nullptr, o, heads);
}

struct Plan {
  int64_t tiles, blocks, parts;  // 16 query heads each; (sequence, kv head, tile)s; parts of the keys of each
  int64_t bytes_tickets = 0, bytes_sums = 0, bytes_groups = 0;

  Plan(const AttentionDecodeArgs& a, int64_t sms) {
    const int64_t keys = std::min(a.max_blocks * a.block_size, a.window), part = a.head_dim > 128 ? Tile<256>::kPart
                                                                               : a.head_dim > 64  ? Tile<128>::kPart
                                                                                                  : Tile<64>::kPart;
    tiles = (a.heads / a.kv_heads + kHeads - 1) / kHeads;
    blocks = a.sequences * a.kv_heads * tiles;
    parts = blocks ? std::min({2 * std::min(sms, kMostSms) / blocks, keys / kLeastKeys, kMaxParts}) : 1;
    if (parts <= 1) {
      parts = 1;
      return;
    }
    bytes_tickets = (blocks * (kFan + 1) * int64_t(sizeof(uint32_t)) + 255) / 256 * 256;
    bytes_sums = blocks * parts * part * int64_t(sizeof(float));
    bytes_groups = blocks * kFan * part * int64_t(sizeof(float));
  }
  int64_t bytes() const { return bytes_tickets + bytes_sums + bytes_groups; }
};

void check_args(const AttentionDecodeArgs& a) {
  check(a.dtype == DType::bf16, kOp, "dtype must be bfloat16, 1", int64_t(a.dtype));
  check(a.sequences >= 0 && a.sequences <= kMaxGrid, kOp, "sequences must be 0 to 65,535", a.sequences);
  check(a.head_dim > 0 && a.head_dim % 8 == 0 && a.head_dim <= 256, kOp, "head_dim must be a multiple of 8 up to 256", a.head_dim);
  check(a.kv_heads > 0 && a.heads > 0 && a.heads % a.kv_heads == 0, kOp, "kv_heads must divide the heads", a.kv_heads);
  check(a.heads <= kMaxGrid, kOp, "heads must be at most 65,535", a.heads);
  check((a.block_size > 0 && a.max_blocks > 0) || a.sequences == 0, kOp, "block_size and max_blocks must be > 0", a.block_size);
  check(a.max_blocks * a.block_size < int64_t(1) << 31, kOp, "max_blocks * block_size must be below 2^31", a.max_blocks * a.block_size);
  check(a.window > 0, kOp, "window must be > 0", a.window);
  for (const int64_t stride : {a.q_stride, a.q_head_stride, a.k_new_stride, a.k_new_head_stride, a.v_new_stride, a.v_new_head_stride,
                               a.block_stride, a.row_stride, a.head_stride})
    check(stride % 8 == 0, kOp, "the strides must be multiples of 8", stride);
  check(addresses_of({a.q, a.k_new, a.v_new, a.keys, a.values, a.o}) % 16 == 0, kOp, "the tensors must start on 16 bytes", 0);
}

template <int kDim>
void run(const Problem& p, const Exec& exec) {
  using T = Tile<kDim>;
  const LaunchShape shape{dim3(unsigned(p.parts), unsigned(p.a.kv_heads * p.tiles), unsigned(p.a.sequences)), dim3(T::kThreads), T::kBytesShared};
  launch(kOp, attend<T>, shape, exec, p);
}

}  // namespace

int64_t attention_decode_workspace(const AttentionDecodeArgs& a) {
  check_args(a);
  return Plan(a, kMostSms).bytes();
}

void attention_decode(const AttentionDecodeArgs& a, const Exec& exec) {
  check_args(a);
  if (a.sequences == 0) return;
  DeviceGuard guard(exec);
  const Plan plan(a, sm_count(exec));
  check(exec.bytes_workspace >= plan.bytes(), kOp, "the workspace must be large enough, bytes", exec.bytes_workspace);
  check_pointers(kOp, {{"q", a.q}, {"k_new", a.k_new}, {"v_new", a.v_new}, {"keys", a.keys}, {"values", a.values},
                       {"block_table", a.block_table}, {"lengths", a.lengths}, {"o", a.o}}, exec);
  char* const base = static_cast<char*>(exec.workspace);
  Problem p{a, int(a.heads / a.kv_heads), int(plan.tiles), int(plan.parts)};
  if (plan.parts > 1) {
    check_pointers(kOp, {{"workspace", base}}, exec);
    p.tickets = reinterpret_cast<uint32_t*>(base);
    p.count_tickets = plan.blocks * (kFan + 1);
    p.sums = reinterpret_cast<float*>(base + plan.bytes_tickets);
    p.groups = reinterpret_cast<float*>(base + plan.bytes_tickets + plan.bytes_sums);
  }
  const int64_t packs = std::max(a.sequences * a.kv_heads * (a.head_dim / 8), p.count_tickets);
  launch(kOp, append, LaunchShape{dim3(unsigned((packs + 127) / 128)), dim3(128)}, exec, p);
  if (a.head_dim > 128) return run<256>(p, exec);
  if (a.head_dim > 64) return run<128>(p, exec);
  return run<64>(p, exec);
}

}  // namespace hebatron::cuda
