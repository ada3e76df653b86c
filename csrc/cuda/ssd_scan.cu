// What      h_t = exp(dt_t A) h_t-1 + dt_t x_t B_t^T, y_t = h_t C_t + D x_t over packed sequences, as products over chunks.
// Grid      three launches: what every segment (1,024 tokens) adds to a state of zeros; the states that enter the segments, one
//           after another; the outputs. First and last a block of 128 threads per segment and 64 columns of a head, which walks
//           16 chunks of 64 tokens (fp32: 32 chunks' worth of 32), the state in 64 registers a thread. Outputs: 81 KB of shared
//           memory, two blocks an SM on A100 and H100, 255 registers; segments: 49 KB, 168 registers, three blocks. No spill
//           on sm_80 and sm_90a (nvcc 13.0). sm_86, sm_89 and sm_120 hold one block of the outputs.
// Traffic   x, B and dt twice, C once, y once, and each segment's state (32 KB a head) four times: at 65,536 tokens of 64 heads of
//           64 x 128 in 8 groups 2.58 GB, where inputs and outputs once are 1.36 GB.
// Roofline  that: 0.86 ms at 3.0 TB/s (H100); the products are 271 GFLOP, 0.54 ms at the 0.63 of 800 TFLOP/s that mma.sync is
//           reported to reach. 4,096 tokens: 0.16 GB, 54 us and three launches. The outputs' bound is shared memory: a chunk of a
//           head passes 330 KB through it (217 of ldmatrix), 2,600 clocks of 128 bytes, 0.74 ms on 132 SMs at 1.755 GHz where its
//           DRAM is 0.49: with the other launches 1.06 ms, and nothing lost yet. All computed; to reach: 1.1 ms at 65,536.
// Measured  never run on hardware.
// Limits    bf16 (mma.sync, fp32 sums and states) and fp32 (fp32 products, many times slower); head_dim a multiple of 8,
//           state_dim one up to 128; rows of x, B, C on 16 bytes; fewer than 2^31 tokens, 64-bit offsets. The values of
//           cu_seqlens are trusted: the host never reads them, its grid holds as many segments as there can be.
// Why so    a segment's state is entered as decay * state + what it adds, also the last one's, so that a sequence cut at whole
//           segments gives the same bits. A block computes its own C B^T: of chunks of 64 tokens that is 43 of 271 GFLOP over
//           the 8 heads of a group, and sharing it would leave 32 blocks at 4,096 tokens.
#include "cuda/ssd_segments.cuh"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "ssd_scan[cuda]";

// y, from the right state at the start of each segment.
template <class T>
struct OutputMemory {
  static constexpr int kStageElements = kTokens<T> * (kP + kS), kElements = 2 * kStageElements + kTokens<T> * kS + kP * kS;
  static constexpr int kBytes = kElements * int(sizeof(T)) + int(sizeof(Steps<T>));
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) outputs(const SsdScanArgs a, const Walk walk, int slices) {
  HEBATRON_DYNAMIC_SHARED(memory);
  using Memory = OutputMemory<T>;
  constexpr int kRowTiles = kTokens<T> / 16, kColumnParts = kWarps / kRowTiles, kPieces = kP / 8 / kColumnParts;
  const int chunk = chunk_tokens<T>(a), warp = threadIdx.x / kWarp, g = lane_id() / 4, q = lane_id() % 4;
  const Place at(a, chunk, slices);
  if (at.tokens <= 0) return;
  T* const stages = reinterpret_cast<T*>(memory);
  const Tile<T, kS> C_tile{stages + 2 * Memory::kStageElements}, h_tile{C_tile.at + kTokens<T> * kS};
  Steps<T>& steps = *reinterpret_cast<Steps<T>*>(memory + Memory::kElements * sizeof(T));
  const auto x_tile = [&](int c) { return Tile<T, kP>{stages + c % 2 * Memory::kStageElements}; };
  const auto B_tile = [&](int c) { return Tile<T, kS>{stages + c % 2 * Memory::kStageElements + kTokens<T> * kP}; };
  const auto load = [&](int c) {  // addresses made anew: kept over the chunks, six registers more spill in fp32
    const int rows = least(chunk, at.tokens - c * chunk);
    const int64_t token = at.begin + c * chunk;
    const T* const C = static_cast<const T*>(a.C) + token * a.C_stride + at.group * a.state_dim;
    const T* const x = static_cast<const T*>(a.x) + token * a.x_stride + at.head * a.head_dim + at.column;
    const T* const B = static_cast<const T*>(a.B) + token * a.B_stride + at.group * a.state_dim;
    C_tile.template load<kTokens<T>>(C, a.C_stride, rows, int(a.state_dim));
    x_tile(c).template load<kTokens<T>>(x, a.x_stride, rows, at.columns);
    B_tile(c).template load<kTokens<T>>(B, a.B_stride, rows, int(a.state_dim));
    cp_async_commit();
  };
  LaneSteps<T> mine;
  const auto find = [&](int c) {
    mine.read(a, at.head, at.begin + c * chunk, least(chunk, at.tokens - c * chunk));
    mine.find(a, at.head, least(chunk, at.tokens - c * chunk));
  };
  const int chunks = (at.tokens + chunk - 1) / chunk;
  load(0);
  if (warp == 0) find(0);
  State state = {};
  const float* const from = entering(a, walk, at);
  if (from)
    load_rows(from + (int64_t(at.column) + warp * 16) * a.state_dim, a.state_dim, state, at.columns - warp * 16, int(a.state_dim));
  to_tile(h_tile, warp * 16, state);
  for (int c = 0; c < chunks; c++) {
    // Later rows have more weights: every other chunk the warps change places, so that each has as many in the end.
    const int place = warp % kRowTiles, tile = c % 2 ? kRowTiles - 1 - place : place, row = tile * 16, column = warp / kRowTiles * kPieces * 8;
    cp_async_wait<0>();
    block_sync();  // this chunk's tiles and its state are here; nobody reads the last one's tiles and steps any more
    if (warp == 0) mine.write(steps);
    Left<T> C_rows[kS / 16];
    float y[kPieces][4] = {};
#pragma unroll
    for (int k = 0; k < kS; k += 16) {
      C_rows[k / 16].rows(C_tile, row, k);
      multiply<true>(y, C_rows[k / 16], h_tile, column, k);
    }
    block_sync();  // the steps are here; C and h may be written over
    if (c + 1 < chunks) load(c + 1);
    const float from_start[2] = {exp2_approx(steps.log(row + g)), exp2_approx(steps.log(row + g + 8))};
#pragma unroll
    for (int i = 0; i < kPieces; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) y[i][e] *= from_start[e / 2];
    for (int j = 0; j <= row; j += 16) {
      float weights[2][4] = {};
#pragma unroll
      for (int k = 0; k < kS; k += 16) multiply<true>(weights, C_rows[k / 16], B_tile(c), j, k);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int from = j + i * 8 + q * 2 + e % 2, to = row + g + e / 2 * 8;
          const float log = from <= to ? steps.log_between(from, to) : -1e30f;  // masked first: it may be any size there
          weights[i][e] *= exp2_approx(log) * steps.dt[from];
        }
      Left<T> left;
      left.from(weights);
      multiply<false>(y, left, x_tile(c), column, j);
    }
    const float D = a.D ? a.D[at.head] : 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) y[i][e] += D * widen(x_tile(c)(row + g + e / 2 * 8, column + i * 8 + q * 2 + e % 2));
    const int64_t token = at.begin + c * chunk + row;
    store_rows(static_cast<T*>(a.y) + (token * a.heads + at.head) * a.head_dim + at.column + column, a.heads * a.head_dim, y,
               least(chunk, at.tokens - c * chunk) - row, at.columns - column);
    if (c + 1 == chunks) break;
    if (warp == 0) find(c + 1);
    advance(state, steps, x_tile(c), B_tile(c), warp);
    to_tile(h_tile, warp * 16, state);
  }
}

template <class T>
void run(const SsdScanArgs& a, const Exec& exec) {
  const Segments<T> segments(a);
  check(exec.bytes_workspace >= segments.bytes(), kOp, "workspace is too small", exec.bytes_workspace);
  Walk walk = forward_walk(a);
  segments.place(walk, static_cast<char*>(exec.workspace));
  run_segments<T>(kOp, a, walk, walk, 1, exec);
  const LaunchShape shape{segments.blocks(a, 1), dim3(kThreads), OutputMemory<T>::kBytes};
  if (a.tokens) launch(kOp, outputs<T>, shape, exec, a, walk, int(slices_of(a)));
}

}  // namespace

int64_t ssd_scan_fwd_workspace(const SsdScanArgs& a) {
  check_scan(kOp, a);
  return a.dtype == DType::f32 ? Segments<float>(a).bytes() : Segments<bf16>(a).bytes();
}

void ssd_scan_fwd(const SsdScanArgs& a, const Exec& exec) {
  check_scan(kOp, a);
  if (a.sequences == 0) return;
  const DeviceGuard guard(exec);
  check(a.A && a.last && (!a.tokens || (a.x && a.dt && a.B && a.C && a.y)), kOp, "all but D, dt_bias, cu_seqlens and initial must be given, tokens", a.tokens);
  check_rows(kOp, a, {a.y, a.last});
  check_pointers(kOp, {{"x", a.x}, {"dt", a.dt}, {"A", a.A}, {"B", a.B}, {"C", a.C}, {"D", a.D}, {"dt_bias", a.dt_bias},
                 {"cu_seqlens", a.cu_seqlens}, {"initial", a.initial}, {"y", a.y}, {"last", a.last}, {"workspace", exec.workspace}}, exec);
  a.dtype == DType::f32 ? run<float>(a, exec) : run<bf16>(a, exec);
}

}  // namespace hebatron::cuda
