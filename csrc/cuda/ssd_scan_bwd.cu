// What      gradients of ssd_scan: to x, dt, A, B, C, D, dt_bias and the initial states, from those of y and the last states.
// Grid      five launches: the forward's first two for the states and, in the same grid, for their gradients from the other end;
//           a walk that leaves what enters every chunk; the gradients; totals over chunks. The gradients: a block of 256 threads
//           per chunk of 64 tokens and group, which goes over the group's heads: four warps with the rows of C's gradient, four
//           with those of B's and x's. 136 KB of shared memory, or 88 KB where a block can have no more: then it waits for
//           each head's tiles. 255 registers, no spill on sm_80 and sm_90a (nvcc 13.0).
// Traffic   the states that enter every chunk and their gradients, written and read in bf16, are most of it: at 65,536 tokens of 64
//           heads of 64 x 128 4.3 GB of 7.9 GB, where inputs, gradients and outputs once are 2.7 GB.
// Roofline  DRAM: 2.6 ms at 3.0 TB/s (H100); the products are 590 GFLOP, 1.2 ms at the 0.63 of 800 TFLOP/s that mma.sync is
//           reported to reach. All computed.
// Measured  never run on hardware.
// Limits    as the forward; fp32 needs 118 KB of shared memory a block (sm_80, sm_90).
// Why so    the heads of a group are one block's because the gradients of B and C are sums over them: in registers, in order,
//           without a pass of its own or an atomic. The gradient of a log decay is a sum over the pairs of tokens it
//           stands between, which nothing cancels: differences of sums would be rounding behind one large step.
#include "cuda/ssd_segments.cuh"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "ssd_scan_bwd[cuda]";
constexpr int kSideWarps = 4;  // four warps with C's gradient, four with B's
constexpr int kGradThreads = 2 * kSideWarps * kWarp;  // a ninth warp, for the steps, would cost the others 87 of 255 registers
constexpr int kTotals = 3;      // gradients of A, D and dt_bias

template <class T>
struct Shape {
  static constexpr int kRowTiles = kTokens<T> / 16, kParts = kSideWarps / kRowTiles;
  static constexpr int kPiecesS = kS / 8 / kParts, kPiecesP = kP / 8 / kParts;
};

// Two neighbours of a tile, at an even column.
template <int kColumns>
HEBATRON_DEVICE float2 pair_of(const Tile<bf16, kColumns>& t, int row, int column) {
  const uint32_t word = *reinterpret_cast<const uint32_t*>(&t(row, column));
  return {unpack_bf16(word, 0), unpack_bf16(word, 1)};
}
template <int kColumns>
HEBATRON_DEVICE float2 pair_of(const Tile<float, kColumns>& t, int row, int column) {
  return *reinterpret_cast<const float2*>(&t(row, column));
}

// What the warps of one unit leave for the gradients of its steps, by token; where they share columns, by part of them.
template <class T>
struct Sums {
  using S = Shape<T>;
  float read[S::kParts][kTokens<T>];    // grad_y times what was read of the entering state
  float kept[S::kParts][kTokens<T>];    // gradient of the leaving state times what the token added to it
  float direct[S::kParts][kTokens<T>];  // of dt as the factor of x
  float skip[S::kParts][kTokens<T>];    // x . grad_y, of D
  float within[kTokens<T>];             // of the log decay, from the pairs it stands between whose later one is in its row tile
  float behind[S::kRowTiles][kTokens<T>];  // the same from those whose later one is in a row tile behind its own
  float carried[2 * kSideWarps];        // gradient of the leaving state . the entering state
};

// A head's gradients of steps while its slices add up, a lane's own: in registers they would make the rest spill.
template <class T>
struct SoFar {
  double log_decay[LaneSteps<T>::kPer][kWarp], direct[LaneSteps<T>::kPer][kWarp], skip[LaneSteps<T>::kPer][kWarp];
};

template <class T, int kStages>
struct GradMemory {
  static constexpr int kTileB = kTokens<T> * kS, kTileX = kTokens<T> * kP, kTileH = kP * kS;
  static constexpr int kStageElements = 2 * kTileX + 2 * kTileH, kElements = 2 * kTileB + kStages * kStageElements;
  static constexpr int kBytes = kElements * int(sizeof(T)) + 2 * int(sizeof(Steps<T>) + sizeof(Sums<T>)) + int(sizeof(SoFar<T>));
};

struct ChunkStates {
  const void *entering, *returning;  // by chunk's slot and head: the state before it, the gradient of the one behind it
  float* totals;                     // by chunk's slot and head: kTotals
};

// One chunk of one group: a block goes over the group's heads (and slices of them), so that the gradients of B and C are summed
// over heads in registers, in order.
template <class T, int kStages>
struct Gradients {
  using Memory = GradMemory<T, kStages>;
  using S = Shape<T>;
  const SsdScanBwdArgs& b;
  const SsdScanArgs& a;
  const ChunkStates& states;
  const Run at;
  const int slot, group, slices, units;
  T* const tiles;
  Steps<T>* const steps;  // of even and odd heads
  Sums<T>* const sums;    // of even and odd units
  SoFar<T>* const so_far;

  HEBATRON_DEVICE Gradients(const SsdScanBwdArgs& b_, const ChunkStates& states_, int slices_, uint8_t* memory)
      : b(b_), a(b_.forward), states(states_), at(b_.forward, blockIdx.x / unsigned(b_.forward.groups), chunk_tokens<T>(b_.forward)),
        slot(int(blockIdx.x / unsigned(b_.forward.groups))), group(int(blockIdx.x % unsigned(b_.forward.groups))), slices(slices_),
        units(int(a.heads / a.groups) * slices_), tiles(reinterpret_cast<T*>(memory)),
        steps(reinterpret_cast<Steps<T>*>(memory + Memory::kElements * sizeof(T))), sums(reinterpret_cast<Sums<T>*>(steps + 2)), so_far(reinterpret_cast<SoFar<T>*>(sums + 2)) {}

  HEBATRON_DEVICE Tile<T, kS> B_tile() const { return {tiles}; }
  HEBATRON_DEVICE Tile<T, kS> C_tile() const { return {tiles + Memory::kTileB}; }
  HEBATRON_DEVICE T* stage(int unit) const { return tiles + 2 * Memory::kTileB + unit % kStages * Memory::kStageElements; }
  HEBATRON_DEVICE Tile<T, kP> x_tile(int unit) const { return {stage(unit)}; }
  HEBATRON_DEVICE Tile<T, kP> dy_tile(int unit) const { return {stage(unit) + Memory::kTileX}; }
  HEBATRON_DEVICE Tile<T, kS> h_tile(int unit) const { return {stage(unit) + 2 * Memory::kTileX}; }
  HEBATRON_DEVICE Tile<T, kS> dh_tile(int unit) const { return {stage(unit) + 2 * Memory::kTileX + Memory::kTileH}; }
  HEBATRON_DEVICE int head_of(int unit) const { return group * int(a.heads / a.groups) + unit / slices; }
  HEBATRON_DEVICE int column_of(int unit) const { return unit % slices * kP; }
  HEBATRON_DEVICE int columns_of(int unit) const { return least(kP, int(a.head_dim) - column_of(unit)); }
  HEBATRON_DEVICE void sync() const { named_barrier_sync(1, kGradThreads); }

  HEBATRON_DEVICE void load_group() const {
    const int64_t column = int64_t(group) * a.state_dim;
    B_tile().template load<kTokens<T>, kGradThreads>(static_cast<const T*>(a.B) + at.begin * a.B_stride + column, a.B_stride, at.tokens, int(a.state_dim));
    C_tile().template load<kTokens<T>, kGradThreads>(static_cast<const T*>(a.C) + at.begin * a.C_stride + column, a.C_stride, at.tokens, int(a.state_dim));
  }
  HEBATRON_DEVICE void load_unit(int unit) const {
    const int64_t column = head_of(unit) * a.head_dim + column_of(unit), stride = a.heads * a.head_dim;
    const int64_t state = (slot * stride + column) * a.state_dim;
    const int columns = columns_of(unit), width = int(a.state_dim);
    x_tile(unit).template load<kTokens<T>, kGradThreads>(static_cast<const T*>(a.x) + at.begin * a.x_stride + column, a.x_stride, at.tokens, columns);
    dy_tile(unit).template load<kTokens<T>, kGradThreads>(static_cast<const T*>(b.grad_y) + at.begin * stride + column, stride, at.tokens, columns);
    h_tile(unit).template load<kP, kGradThreads>(static_cast<const T*>(states.entering) + state, a.state_dim, columns, width);
    dh_tile(unit).template load<kP, kGradThreads>(static_cast<const T*>(states.returning) + state, a.state_dim, columns, width);
    cp_async_commit();
  }

  // h . dh of the unit, a warp's share of rows.
  HEBATRON_DEVICE void carry(int unit) const {
    const int warp = threadIdx.x / kWarp, lane = lane_id();
    float dot = 0.0f;
#pragma unroll
    for (int r = 0; r < kP / (2 * kSideWarps); r++)
#pragma unroll
      for (int c = 0; c < kS; c += kWarp) {
        const int row = warp * (kP / (2 * kSideWarps)) + r;
        dot += widen(h_tile(unit)(row, c + lane)) * widen(dh_tile(unit)(row, c + lane));
      }
    dot = warp_sum(dot);
    if (lane == 0) sums[unit % 2].carried[warp] = dot;
  }

  // m: the products of 16 later tokens (rows) with 16 earlier ones, tile `earlier` of them. Adds to within what the log decay of
  // each row's token has of them, and to the sums by column what that of the earlier tiles' tokens has. No differences of
  // sums: behind one large step they would be rounding.
  HEBATRON_DEVICE void pairs(const float (&m)[2][4], int row, int earlier, float (&within)[2], float& before, Sums<T>& to) const {
    const int g = lane_id() / 4, q = lane_id() % 4;
    float upper[4], lower[4];  // by column, of the rows from this one on
#pragma unroll
    for (int c = 0; c < 4; c++) {
      upper[c] = m[c / 2][c % 2], lower[c] = m[c / 2][2 + c % 2];
#pragma unroll
      for (int offset = 1; offset < 8; offset *= 2) {
        const float up = shfl_down(upper[c], offset * 4), low = shfl_down(lower[c], offset * 4);
        if (g + offset < 8) upper[c] += up, lower[c] += low;
      }
      upper[c] += shfl(lower[c], q);
      const int column = earlier + c / 2 * 8 + q * 2 + c % 2;
      within[0] += column < row + g ? upper[c] : 0.0f;
      within[1] += column < row + g + 8 ? lower[c] : 0.0f;
    }
    if (earlier == row) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {  // the sums of the columns before each
      const float first = shfl(upper[half * 2], q), both = first + shfl(upper[half * 2 + 1], q);
      float sum = both;
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        const float other = shfl_up(sum, offset);
        if (q >= offset) sum += other;
      }
      const float exclusive = before + sum - both;
      if (g == 0) {
        float* const out = to.behind[row / 16] + earlier + half * 8 + q * 2;
        out[0] = exclusive, out[1] = exclusive + first;
      }
      before += shfl(sum, lane_id() | 3);
    }
  }

  HEBATRON_DEVICE static void store_sums(const float (&v)[2], float* to) {  // of rows, over a quad
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = v[half] + shfl_xor(v[half], 1);
      sum += shfl_xor(sum, 2);
      if (lane_id() % 4 == 0) to[lane_id() / 4 + half * 8] = sum;
    }
  }

  HEBATRON_DEVICE void write_steps(int unit) const {  // of its head, by one warp
    LaneSteps<T> mine;
    mine.read(a, head_of(unit), at.begin, at.tokens);
    mine.find(a, head_of(unit), at.tokens);
    mine.write(steps[unit / slices % 2]);
  }

  // From the sums of a unit to the gradients of its head's steps, by one warp.
  HEBATRON_DEVICE void finish(int unit) const {
    const int lane = lane_id();
    SoFar<T>& total = *so_far;
    constexpr int kPer = LaneSteps<T>::kPer;
    const Sums<T>& from = sums[unit % 2];
    const int head = head_of(unit);
    float carried = 0.0f;
    for (int w = 0; w < 2 * kSideWarps; w++) carried += from.carried[w];
    LaneSteps<T> step;
    step.read(a, head, at.begin, at.tokens);
    step.find(a, head, at.tokens);
    double read[kPer], kept[kPer], read_sum = 0.0, kept_sum = 0.0;
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int i = lane_id() * kPer + k;
      read[k] = kept[k] = 0.0;
      if (unit % slices == 0) total.log_decay[k][lane] = total.direct[k][lane] = total.skip[k][lane] = 0.0;
      for (int p = 0; p < S::kParts; p++) {
        read[k] += double(from.read[p][i]);
        kept[k] += double(from.kept[p][i]);
        total.direct[k][lane] += double(from.direct[p][i]);
        total.skip[k][lane] += double(from.skip[p][i]);
      }
      double within = double(from.within[i]);
      for (int tile = i / 16 + 1; tile < S::kRowTiles; tile++) within += double(from.behind[tile][i]);
      total.log_decay[k][lane] += within + double(carried * exp2_approx(float(step.total)));
      read_sum += read[k], kept_sum += kept[k];
    }
    double read_later = read_sum, kept_before = kept_sum;  // of this lane's tokens and those after, before it
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const double later = shfl_down(read_later, offset), earlier = shfl_up(kept_before, offset);
      read_later += lane_id() + offset < kWarp ? later : 0.0;
      kept_before += lane_id() >= offset ? earlier : 0.0;
    }
    kept_before -= kept_sum;
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      total.log_decay[k][lane] += read_later + kept_before;
      read_later -= read[k];
      kept_before += kept[k];
    }
    if (unit % slices + 1 < slices) return;
    double totals[kTotals] = {};
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int i = lane_id() * kPer + k;
      if (i >= at.tokens) continue;
      const float raw = step.raw[k], open = softplus(raw);
      double grad = 0.0;
      if (open >= float(a.dt_min) && open <= float(a.dt_max))
        grad = (total.direct[k][lane] + total.log_decay[k][lane] * double(a.A[head])) * double(1.0f / (1.0f + expf(-raw)));
      b.grad_dt[(at.begin + i) * a.heads + head] = float(grad);
      totals[0] += total.log_decay[k][lane] * double(step.dt[k]);
      totals[1] += total.skip[k][lane];
      totals[2] += grad;
    }
#pragma unroll
    for (int n = 0; n < kTotals; n++) {
#pragma unroll
      for (int mask = kWarp / 2; mask; mask /= 2) totals[n] += shfl_xor(totals[n], mask);
      if (lane_id() == 0) states.totals[(int64_t(slot) * a.heads + head) * kTotals + n] = float(totals[n]);
    }
  }

  // One side's rows: kWriters those of B's gradient (and of x), else those of C's.
  template <bool kWriters>
  HEBATRON_DEVICE void side() const {
    const int warp = threadIdx.x / kWarp % kSideWarps, g = lane_id() / 4, q = lane_id() % 4;
    const int row = warp % S::kRowTiles * 16, part = warp / S::kRowTiles, column_S = part * S::kPiecesS * 8, column_P = part * S::kPiecesP * 8;
    const Tile<T, kS> own = kWriters ? B_tile() : C_tile(), other = kWriters ? C_tile() : B_tile();
    const auto counts = [&](int tile) { return kWriters ? tile * 16 >= row : tile * 16 <= row; };
    // The first of the readers has the least to multiply: it does what one warp can do for all.
    const bool serves = threadIdx.x < kWarp;
    load_group();
    load_unit(0);
    if (serves) write_steps(0);
    float scores[S::kRowTiles][2][4] = {}, grad[S::kPiecesS][4] = {};
    for (int unit = 0; unit < units; unit++) {
      cp_async_wait<0>();
      sync();  // the unit's tiles and steps are here, and nobody reads the last one's any more
      if (kStages == 2 && unit + 1 < units) load_unit(unit + 1);
      if (!kWriters && serves) {
        if ((unit + 1) % slices == 0 && unit + 1 < units) write_steps(unit + 1);
        if (unit) finish(unit - 1);
      }
      if (unit == 0)
#pragma unroll
        for (int k = 0; k < kS; k += 16) {
          Left<T> left;
          left.rows(own, row, k);
#pragma unroll
          for (int tile = 0; tile < S::kRowTiles; tile++)
            if (counts(tile)) multiply<true>(scores[tile], left, other, tile * 16, k);
        }
      const Steps<T>& step = steps[unit / slices % 2];
      Sums<T>& to = sums[unit % 2];
      const Tile<T, kP> rows = kWriters ? x_tile(unit) : dy_tile(unit), others = kWriters ? dy_tile(unit) : x_tile(unit);
      const Tile<T, kS> through = kWriters ? dh_tile(unit) : h_tile(unit);
      Left<T> lefts[kP / 16];
#pragma unroll
      for (int k = 0; k < kP; k += 16) lefts[k / 16].rows(rows, row, k);
      float decay[2], dt[2], dots[2] = {};  // of the lane's rows: to the end or from the start
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int i = row + g + half * 8;
        decay[half] = exp2_approx(kWriters ? step.log_between(i, kTokens<T> - 1) : step.log(i));
        dt[half] = step.dt[i];
      }
#pragma unroll
      for (int s = 0; s < S::kPiecesS; s += 4) {  // through the state
        float sum[4][4] = {};
#pragma unroll
        for (int k = 0; k < kP; k += 16) multiply<false>(sum, lefts[k / 16], through, column_S + s * 8, k);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const float2 with = pair_of(own, row + g + half * 8, column_S + (s + i) * 8 + q * 2);
            const float scale = kWriters ? decay[half] * dt[half] : decay[half];
            const float first = sum[i][half * 2] * scale, second = sum[i][half * 2 + 1] * scale;
            grad[s + i][half * 2] += first;
            grad[s + i][half * 2 + 1] += second;
            dots[half] += first * with.x + second * with.y;
          }
      }
      store_sums(dots, (kWriters ? to.kept : to.read)[part] + row);
      float v[S::kPiecesP][4] = {}, within[2] = {}, before = 0.0f;
      if (kWriters) {
#pragma unroll 1  // eight copies keep eight addresses: 28 to 44 bytes spilled
        for (int k = 0; k < kS; k += 16) {
          Left<T> left;
          left.rows(own, row, k);
          multiply<true>(v, left, through, column_P, k);
        }
#pragma unroll
        for (int i = 0; i < S::kPiecesP; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) v[i][e] *= decay[e / 2];
      }
#pragma unroll 1  // four copies would keep four times the addresses, and spill; so the scores go round
      for (int tile = 0; tile < S::kRowTiles; tile++) {  // through the chunk's other tokens
        if (counts(tile)) {
          float product[2][4] = {}, weights[2][4];
#pragma unroll
          for (int k = 0; k < kP; k += 16) {
            Left<T> left;  // read again: kept from above, 16 registers, it spills
            left.rows(rows, row, k);
            multiply<true>(product, left, others, tile * 16, k);
          }
#pragma unroll
          for (int i = 0; i < 2; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const int mine = row + g + e / 2 * 8, its = tile * 16 + i * 8 + q * 2 + e % 2, from = kWriters ? mine : its, until = kWriters ? its : mine;
              const float between = exp2_approx(from <= until ? step.log_between(from, until) : -1e30f);  // masked first
              product[i][e] *= between * step.dt[from];
              weights[i][e] = scores[0][i][e] * (kWriters ? between : product[i][e]);
            }
          Left<T> left;
          left.from(product);
          multiply<false>(grad, left, other, column_S, tile * 16);
          if (kWriters) {
            left.from(weights);
            multiply<false>(v, left, others, column_P, tile * 16);
          } else if (part == 0) {
            pairs(weights, row, tile * 16, within, before, to);
          }
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const float first = scores[0][i][e];
#pragma unroll
            for (int n = 1; n < S::kRowTiles; n++) scores[n - 1][i][e] = scores[n][i][e];
            scores[S::kRowTiles - 1][i][e] = first;
          }
      }
      if (kWriters) {
        const int head = head_of(unit);
        const float D = a.D ? a.D[head] : 0.0f;
        float direct[2] = {}, skip[2] = {};
#pragma unroll
        for (int i = 0; i < S::kPiecesP; i++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int r = row + g + half * 8, c = column_P + i * 8 + q * 2;
            const float2 x = pair_of(rows, r, c), dy = pair_of(others, r, c);
            float &first = v[i][half * 2], &second = v[i][half * 2 + 1];
            direct[half] += x.x * first + x.y * second;
            skip[half] += x.x * dy.x + x.y * dy.y;
            first = dt[half] * first + D * dy.x;
            second = dt[half] * second + D * dy.y;
          }
        store_sums(direct, to.direct[part] + row);
        store_sums(skip, to.skip[part] + row);
        store_rows(static_cast<T*>(b.grad_x) + ((at.begin + row) * a.heads + head) * a.head_dim + column_of(unit) + column_P, a.heads * a.head_dim, v,
                   at.tokens - row, columns_of(unit) - column_P);
      } else if (part == 0) {
        store_sums(within, to.within + row);
      }
      carry(unit);
      if (kStages == 1 && unit + 1 < units) {
        sync();
        load_unit(unit + 1);
      }
    }
    sync();
    if (!kWriters && serves) finish(units - 1);
    store_rows(static_cast<T*>(kWriters ? b.grad_B : b.grad_C) + ((at.begin + row) * a.groups + group) * a.state_dim + column_S, a.groups * a.state_dim, grad,
               at.tokens - row, int(a.state_dim) - column_S);
  }

};

template <class T, int kStages>
__global__ void __launch_bounds__(kGradThreads, 1) gradients(const SsdScanBwdArgs b, const ChunkStates states, int slices) {
  HEBATRON_DYNAMIC_SHARED(memory);
  const Gradients<T, kStages> work(b, states, slices, memory);
  if (work.at.tokens <= 0) {
    const int count = int(b.forward.heads / b.forward.groups) * kTotals;
    for (int i = threadIdx.x; i < count; i += kGradThreads)
      states.totals[int64_t(work.slot) * b.forward.heads * kTotals + work.group * count + i] = 0.0f;
    return;
  }
  if (threadIdx.x < kSideWarps * kWarp)
    work.template side<false>();
  else
    work.template side<true>();
}

// The totals of the chunks, by head, in one order.
constexpr int kTotalThreads = 256;
__global__ void __launch_bounds__(kTotalThreads) add_totals(const float* totals, int64_t chunks, const SsdScanBwdArgs b) {
  HEBATRON_SHARED(double, slots, kTotalThreads / kWarp);
  float* const out[kTotals] = {b.grad_A, b.grad_D, b.grad_dt_bias};
#pragma unroll
  for (int n = 0; n < kTotals; n++) {
    double sum = 0.0;
    for (int64_t c = threadIdx.x; c < chunks; c += kTotalThreads) sum += double(totals[(c * b.forward.heads + blockIdx.x) * kTotals + n]);
#pragma unroll
    for (int mask = kWarp / 2; mask; mask /= 2) sum += shfl_xor(sum, mask);
    if (lane_id() == 0) slots[threadIdx.x / kWarp] = sum;
    block_sync();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kTotalThreads / kWarp; w++) sum += slots[w];
      out[n][blockIdx.x] = float(sum);
    }
    block_sync();
  }
}

template <class T>
struct Layout {
  Segments<T> segments;
  int64_t chunks, bytes_chunks, bytes;
  explicit Layout(const SsdScanArgs& a) : segments(a), chunks(slots_of(a, chunk_length<T>(a))) {
    bytes_chunks = (chunks * a.heads * a.head_dim * a.state_dim * int64_t(sizeof(T)) + 255) / 256 * 256;
    bytes = 2 * (segments.bytes() + bytes_chunks) + chunks * a.heads * kTotals * int64_t(sizeof(float));
  }
};

template <class T>
void run(const SsdScanBwdArgs& b, const Exec& exec) {
  const SsdScanArgs& a = b.forward;
  const Layout<T> layout(a);
  check(exec.bytes_workspace >= layout.bytes, kOp, "workspace is too small", exec.bytes_workspace);
  char* base = static_cast<char*>(exec.workspace);
  Walk forward = forward_walk(a), backward{};
  forward.inner = nullptr;
  backward.back = true;
  backward.rows = b.grad_y, backward.rows_stride = a.heads * a.head_dim, backward.columns = a.C, backward.columns_stride = a.C_stride;
  backward.outer = b.grad_last, backward.inner = b.grad_initial;
  for (Walk* walk : {&forward, &backward}) {
    layout.segments.place(*walk, base);
    walk->chunks = base + layout.segments.bytes();
    base += layout.segments.bytes() + layout.bytes_chunks;
  }
  const ChunkStates states{forward.chunks, backward.chunks, reinterpret_cast<float*>(base)};
  const int slices = int(slices_of(a));
  if (a.sequences) run_segments<T>(kOp, a, forward, backward, 2, exec);
  if (a.tokens) {
    launch(kOp, walk<T, true>, LaunchShape{layout.segments.blocks(a, 2), dim3(kThreads), WalkMemory<T>::kBytes}, exec, a, forward, backward, slices);
    const dim3 blocks(unsigned(layout.chunks * a.groups));
    const int available = bytes_shared_per_block(exec);
    check(available >= GradMemory<T, 1>::kBytes, kOp, "a block must have shared memory for a chunk, bytes", available);
    if (available >= GradMemory<T, 2>::kBytes)
      launch(kOp, gradients<T, 2>, LaunchShape{blocks, dim3(kGradThreads), GradMemory<T, 2>::kBytes}, exec, b, states, slices);
    else
      launch(kOp, gradients<T, 1>, LaunchShape{blocks, dim3(kGradThreads), GradMemory<T, 1>::kBytes}, exec, b, states, slices);
  }
  launch(kOp, add_totals, LaunchShape{dim3(unsigned(a.heads)), dim3(kTotalThreads)}, exec, states.totals, a.tokens ? layout.chunks : 0, b);
}

}  // namespace

int64_t ssd_scan_bwd_workspace(const SsdScanBwdArgs& b) {
  check_scan(kOp, b.forward);
  return b.forward.dtype == DType::f32 ? Layout<float>(b.forward).bytes : Layout<bf16>(b.forward).bytes;
}

void ssd_scan_bwd(const SsdScanBwdArgs& b, const Exec& exec) {
  const SsdScanArgs& a = b.forward;
  check_scan(kOp, a);
  const DeviceGuard guard(exec);
  check(b.grad_A && b.grad_D && b.grad_dt_bias && (!a.sequences || b.grad_last), kOp, "grad_A, grad_D, grad_dt_bias and grad_last must be given, sequences", a.sequences);
  check(!a.tokens || (a.x && a.dt && a.A && a.B && a.C && b.grad_y && b.grad_x && b.grad_dt && b.grad_B && b.grad_C), kOp,
        "all but D, dt_bias, cu_seqlens and the initial states must be given, tokens", a.tokens);
  check_rows(kOp, a, {b.grad_y, b.grad_last, b.grad_x, b.grad_B, b.grad_C, b.grad_initial});
  check_pointers(kOp, {{"x", a.x}, {"dt", a.dt}, {"A", a.A}, {"B", a.B}, {"C", a.C}, {"D", a.D}, {"dt_bias", a.dt_bias},
                 {"cu_seqlens", a.cu_seqlens}, {"initial", a.initial}, {"grad_y", b.grad_y}, {"grad_last", b.grad_last}, {"grad_x", b.grad_x},
                 {"grad_dt", b.grad_dt}, {"grad_A", b.grad_A}, {"grad_B", b.grad_B}, {"grad_C", b.grad_C}, {"grad_D", b.grad_D},
                 {"grad_dt_bias", b.grad_dt_bias}, {"grad_initial", b.grad_initial}, {"workspace", exec.workspace}}, exec);
  a.dtype == DType::f32 ? run<float>(b, exec) : run<bf16>(b, exec);
}

}  // namespace hebatron::cuda
