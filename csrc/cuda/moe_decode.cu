// What      y_t = sum_k down[e] (weight relu(up[e] x_t)^2), e = ids[t, k], for 1 to 128 tokens: the forward of moe_mlp that
//           streams the chosen experts' weights, on all chips from sm_80.
// Grid      four blocks an SM of 128 threads, persistent; 16 KB of shared memory, 128 registers. They draw units by ticket:
//           first (expert, 16 rows of up), then (expert, 16 rows of down). A unit's four warps share K, 32 at a time in turn.
// Traffic   the weights of every chosen expert once, up to 32 rows of it (again for the next 32); x and the activation
//           (T K F bf16) from L2, the rows of y (T K D fp32) written and read there.
// Roofline  bytes of weights: six of 128 experts of 2,688 x 1,856. T = 1: 120 MB, H100 40 us at 3.0 TB/s, A100 59 us at 2.04;
//           T = 8: 41 experts, 272 and 400 us; T = 64: 122 experts, 812 us and 1.2 ms. Besides it one memset of the counters
//           (about 2 us) and the first and last latency (about 2 us). Computed.
// Measured  never run on hardware.
// Limits    bf16; width and expert_width and the strides multiples of 8, tensors on 16 bytes; tokens <= 128, tokens * top_k
//           <= 1,024 and, from 33 tokens on, <= 16 an expert; 512 experts. The values of ids are trusted.
// Why so    the weights are the 16 rows of mma.sync and the tokens its 8 columns: a lane's 16 bytes of a row of weights and
//           its 16 bytes of a token are fragments as they come, since both have the same order of K, so nothing passes
//           through shared memory. down waits for an expert's activation by a counter, not for the grid: the first experts'
//           are long done. Tickets give out up before down, so whoever waits waits for a block that runs, however many
//           are resident. The last unit of 16 columns adds the experts of every token in the order of k: no atomics on
//           values, the same bits every run.
#include "cuda/moe_decode.h"

#include "cuda/prim.cuh"

namespace hebatron::cuda {
namespace {

using bf16 = __nv_bfloat16;
constexpr const char* kOp = "moe_decode[cuda]";
constexpr int kThreads = 128, kWarps = kThreads / kWarp, kBlocks = 4;
constexpr int kRows = 16;    // of weights a unit
constexpr int kTokens = 8;   // of a group: the columns of mma.sync
constexpr int kMostGroups = 4;
constexpr int kStep = 32;    // of K: 8 from each of a quad's lanes
constexpr int kMaxSlots = 1024, kMaxExperts = 512, kMaxTokens = 128;

struct Matrix {
  const bf16* data;
  int64_t expert_stride, stride;
  int rows, k;
};

struct Problem {
  const bf16* x;
  int64_t x_stride;
  const int64_t* ids;    // slots
  const float* weights;  // slots
  Matrix up, down;
  bf16* y;
  int slots, top_k, experts;
  bf16* active;  // slots, up.rows
  float* rows;   // slots, down.rows
  // 0 at the start: units given out; units of up done, by chosen expert; units of down done, by 16 columns
  uint32_t *ticket, *up_done, *down_done;
};

HEBATRON_DEVICE int tiles_of(const Matrix& m) { return (m.rows + kRows - 1) / kRows; }

// What every block works out for itself: the slots sorted by expert, and which experts have any.
struct Tables {
  int order[kMaxSlots];         // slots by expert, then by themselves
  int begin[kMaxExperts + 1];   // where an expert's start there
  int chosen[kMaxExperts];      // the experts that have slots, in order
  int count;                    // of them
  int unit, last;               // what thread 0 tells the others
};

// A scan of 32 values: the sum of those before the lane, and that of all.
HEBATRON_DEVICE int sum_before(int v, int& all) {
  int sum = v;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int left = shfl_up(sum, offset);
    if (lane_id() >= offset) sum += left;
  }
  all = shfl(sum, kWarp - 1);
  return sum - v;
}

// `ids` is scratch of kMaxSlots. A thread counts, and then lists, the slots of an expert: tokens * top_k steps.
HEBATRON_DEVICE void sort_slots(const Problem& p, Tables& t, int* ids) {
  for (int s = threadIdx.x; s < p.slots; s += kThreads) ids[s] = int(p.ids[s]);
  block_sync();
  for (int e = threadIdx.x; e < p.experts; e += kThreads) {
    int count = 0;
    for (int s = 0; s < p.slots; s++) count += ids[s] == e;
    t.begin[e + 1] = count;
  }
  block_sync();
  if (threadIdx.x < kWarp) {
    int slots = 0, experts = 0;
    for (int first = 0; first < p.experts; first += kWarp) {
      const int e = first + lane_id(), count = e < p.experts ? t.begin[e + 1] : 0;
      int more_slots, more_experts;
      const int slot = slots + sum_before(count, more_slots), place = experts + sum_before(count > 0, more_experts);
      if (e < p.experts) t.begin[e + 1] = slot + count;
      if (count > 0) t.chosen[place] = e;
      slots += more_slots;
      experts += more_experts;
    }
    if (lane_id() == 0) t.begin[0] = 0, t.count = experts;
  }
  block_sync();
  for (int e = threadIdx.x; e < p.experts; e += kThreads) {
    int at = t.begin[e];
    for (int s = 0; s < p.slots; s++)
      if (ids[s] == e) t.order[at++] = s;
  }
  block_sync();
}

HEBATRON_DEVICE uint4 zeros() { return uint4{0, 0, 0, 0}; }

// sum[g] += 16 rows of weights from `w` on, of which `rows` exist, times the tokens of group g; `source` is this lane's token
// of each group, or null. This warp's part of K, kAhead steps of which are read at a time.
template <int kGroups, int kAhead>
HEBATRON_DEVICE void multiply(const bf16* w, int64_t stride, int rows, int k, const bf16* const (&source)[kGroups],
                              float (&sum)[kGroups][4]) {
  const int row = lane_id() / 4, chunk = lane_id() % 4 * 8;
  const bf16* upper = w + row * stride;
  const bf16* lower = upper + 8 * stride;
  const bool has_upper = row < rows, has_lower = row + 8 < rows;
  for (int k0 = int(threadIdx.x) / kWarp * kStep + chunk; k0 - chunk < k; k0 += kWarps * kStep * kAhead) {
    uint4 a[kAhead][2], b[kAhead][kGroups];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int at = k0 + i * kWarps * kStep;
      a[i][0] = has_upper && at < k ? load_streaming(upper + at) : zeros();
      a[i][1] = has_lower && at < k ? load_streaming(lower + at) : zeros();
    }
#pragma unroll
    for (int i = 0; i < kAhead; i++)
#pragma unroll
      for (int g = 0; g < kGroups; g++) {
        const int at = k0 + i * kWarps * kStep;
        b[i][g] = source[g] && at < k ? *reinterpret_cast<const uint4*>(source[g] + at) : zeros();
      }
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const uint32_t first[4] = {a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y};
      const uint32_t second[4] = {a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w};
#pragma unroll
      for (int g = 0; g < kGroups; g++) {
        mma_m16n8k16(sum[g], first, {b[i][g].x, b[i][g].y});
        mma_m16n8k16(sum[g], second, {b[i][g].z, b[i][g].w});
      }
    }
  }
}

// One unit, for the slots slots[0 .. count - 1] of the expert, at most 8 kGroups: the sums of 16 rows of weights, which the
// warps add up in their order; finish(slot, row of weights, sum). `sums` is kWarps x kGroups x 128.
template <int kGroups, int kAhead, class Source, class Finish>
HEBATRON_DEVICE void unit(const Matrix& m, int expert, int first_row, const int* slots, int count, float* sums,
                          const Source& source_of, const Finish& finish) {
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  const bf16* source[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; g++) {
    const int n = g * kTokens + lane / 4;
    source[g] = n < count ? source_of(slots[n]) : nullptr;
  }
  float sum[kGroups][4] = {};
  multiply<kGroups, kAhead>(m.data + expert * m.expert_stride + first_row * m.stride, m.stride, m.rows - first_row, m.k, source, sum);
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int i = 0; i < 4; i++)  // [token][row]: neighbouring threads then store neighbouring rows
      sums[((warp * kGroups + g) * kTokens + lane % 4 * 2 + i % 2) * kRows + lane / 4 + i / 2 * 8] = sum[g][i];
  block_sync();
  const int row = threadIdx.x % kRows, token = threadIdx.x / kRows;
#pragma unroll
  for (int g = 0; g < kGroups; g++) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) total += sums[((w * kGroups + g) * kTokens + token) * kRows + row];
    const int n = g * kTokens + token;
    if (n < count && first_row + row < m.rows) finish(slots[n], first_row + row, total);
  }
  block_sync();  // `sums` is free, and all is stored
}

// All slots of an expert, 32 at a time.
template <class Source, class Finish>
HEBATRON_DEVICE void units(const Matrix& m, int expert, int first_row, const int* slots, int count, float* sums,
                           const Source& source_of, const Finish& finish) {
  for (; count > 0; slots += kMostGroups * kTokens, count -= kMostGroups * kTokens) {
    if (count <= kTokens)
      unit<1, 4>(m, expert, first_row, slots, count, sums, source_of, finish);
    else if (count <= 2 * kTokens)
      unit<2, 4>(m, expert, first_row, slots, count, sums, source_of, finish);
    else
      unit<4, 2>(m, expert, first_row, slots, count < 4 * kTokens ? count : 4 * kTokens, sums, source_of, finish);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks) decode(HEBATRON_GRID_CONSTANT(Problem) p) {
  HEBATRON_SHARED(Tables, tables, 1);
  HEBATRON_SHARED(float, sums, kWarps * kMostGroups * kTokens * kRows);
  Tables& t = *tables;
  const bool speaks = threadIdx.x == 0;
  uint32_t next = speaks ? atomic_add(p.ticket, 1u) : 0;
  sort_slots(p, t, reinterpret_cast<int*>(sums));
  const int up_tiles = tiles_of(p.up), down_tiles = tiles_of(p.down);
  while (true) {
    if (speaks) t.unit = int(next);
    block_sync();
    const bool down = t.unit >= t.count * up_tiles;
    const int u = down ? t.unit - t.count * up_tiles : t.unit, tiles = down ? down_tiles : up_tiles;
    if (u >= t.count * tiles) return;
    if (speaks) next = atomic_add(p.ticket, 1u);  // it is here by the end of the unit
    const int place = u / tiles, tile = u % tiles, expert = t.chosen[place];
    const int* slots = t.order + t.begin[expert];
    const int count = t.begin[expert + 1] - t.begin[expert];
    if (!down) {
      units(p.up, expert, tile * kRows, slots, count, sums, [&](int slot) { return p.x + slot / p.top_k * p.x_stride; },
            [&](int slot, int f, float v) {
              v = v < 0.0f ? 0.0f : v * v;
              p.active[int64_t(slot) * p.up.rows + f] = __float2bfloat16_rn(v * p.weights[slot]);
            });
      if (speaks) {
        fence_gpu();
        atomic_add(p.up_done + place, 1u);
      }
      continue;
    }
    if (speaks)
      while (load_acquire(p.up_done + place) < uint32_t(up_tiles)) {
      }
    block_sync();
    units(p.down, expert, tile * kRows, slots, count, sums, [&](int slot) { return p.active + int64_t(slot) * p.up.rows; },
          [&](int slot, int d, float v) { p.rows[int64_t(slot) * p.down.rows + d] = v; });
    if (speaks) {
      fence_gpu();
      t.last = atomic_add(p.down_done + tile, 1u) + 1 == uint32_t(t.count);
      fence_gpu();
    }
    block_sync();
    if (!t.last) continue;
    for (int i = threadIdx.x; i < p.slots / p.top_k * kRows; i += kThreads) {
      const int token = i / kRows, d = tile * kRows + i % kRows;
      if (d >= p.down.rows) continue;
      float total = 0.0f;
      for (int k = 0; k < p.top_k; k++) total += p.rows[int64_t(token * p.top_k + k) * p.down.rows + d];
      p.y[int64_t(token) * p.down.rows + d] = __float2bfloat16_rn(total);
    }
  }
}

struct Layout {
  int64_t bytes_counters, bytes_active, bytes_rows;
  explicit Layout(const MoeMlpArgs& a) {
    const auto padded = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
    const int64_t slots = a.tokens * a.top_k, counters = 1 + a.experts + (a.width + kRows - 1) / kRows;
    bytes_counters = padded(counters * int64_t(sizeof(uint32_t)));
    bytes_active = padded(slots * a.expert_width * int64_t(sizeof(bf16)));
    bytes_rows = padded(slots * a.width * int64_t(sizeof(float)));
  }
  int64_t bytes() const { return bytes_counters + bytes_active + bytes_rows; }
};

}  // namespace

const char* refuse_moe_decode(const MoeMlpArgs& a) {
  const int64_t slots = a.tokens * a.top_k;
  if (a.dtype != DType::bf16 || a.weight_dtype != DType::bf16 || a.packed) return "x and the weights must be bf16, and not packed";
  if (a.hidden) return "keeps nothing for a backward";
  if (a.tokens < 1 || a.tokens > kMaxTokens || slots > kMaxSlots) return "tokens must be 1 to 128, and tokens * top_k at most 1,024";
  if (a.tokens > 32 && slots > 16 * a.experts) return "an expert must have at most 16 rows on average";
  if (a.experts < 1 || a.experts > kMaxExperts) return "experts must be 1 to 512";
  for (const int64_t size : {a.width, a.expert_width, a.x_stride, a.up_expert_stride, a.up_stride, a.down_expert_stride, a.down_stride})
    if (size % 8) return "width, expert_width and the strides must be multiples of 8";
  for (const int64_t size : {a.width, a.expert_width})
    if (size < 8 || size > 1 << 20) return "width and expert_width must be 8 to 2^20";
  for (const void* p : {a.x, a.up, a.down})
    if (reinterpret_cast<uintptr_t>(p) % 16) return "x, up and down must start on a multiple of 16 bytes";
  return nullptr;
}

int64_t moe_decode_workspace(const MoeMlpArgs& a) { return Layout(a).bytes(); }

void moe_decode(const MoeMlpArgs& a, const Exec& exec) {
  if (const char* reason = refuse_moe_decode(a)) fail(std::string(kOp) + ": " + reason + ", got " + std::to_string(a.tokens) + " tokens");
  const Layout layout(a);
  check(exec.bytes_workspace >= layout.bytes(), kOp, "the workspace must be large enough, bytes", exec.bytes_workspace);
  const DeviceGuard guard(exec);
  check_pointer(kOp, "x", a.x, exec);
  check_pointer(kOp, "ids", a.ids, exec);
  check_pointer(kOp, "weights", a.weights, exec);
  check_pointer(kOp, "up", a.up, exec);
  check_pointer(kOp, "down", a.down, exec);
  check_pointer(kOp, "y", a.y, exec);
  char* const base = static_cast<char*>(exec.workspace);
  uint32_t* const counters = reinterpret_cast<uint32_t*>(base);
  Problem p{};
  p.x = static_cast<const bf16*>(a.x), p.x_stride = a.x_stride, p.ids = a.ids, p.weights = a.weights;
  p.up = {static_cast<const bf16*>(a.up), a.up_expert_stride, a.up_stride, int(a.expert_width), int(a.width)};
  p.down = {static_cast<const bf16*>(a.down), a.down_expert_stride, a.down_stride, int(a.width), int(a.expert_width)};
  p.y = static_cast<bf16*>(a.y);
  p.slots = int(a.tokens * a.top_k), p.top_k = int(a.top_k), p.experts = int(a.experts);
  p.active = reinterpret_cast<bf16*>(base + layout.bytes_counters);
  p.rows = reinterpret_cast<float*>(base + layout.bytes_counters + layout.bytes_active);
  p.ticket = counters, p.up_done = counters + 1, p.down_done = counters + 1 + a.experts;
  fill_zero(kOp, counters, size_t(layout.bytes_counters), exec);
  launch(kOp, decode, LaunchShape{dim3(unsigned(kBlocks * sm_count(exec))), dim3(kThreads)}, exec, p);
}

}  // namespace hebatron::cuda
