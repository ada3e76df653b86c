// What      out[e] = sum over the rows r of expert e of a[row(r)]^T b[r], bf16 or fp32; transposed, b^T a.
// Grid      one persistent block an SM: a producer warpgroup and two or three consumer warpgroups. Tiles of out
//           128 x 192, 192 x 192 (three) and 256 x 192, with {5, 4, 4} stages of 64 rows, all 227 KB of shared memory.
// Traffic   DRAM: out once, a and b once where an expert's rows fit in L2. L2: 128 (m + n) bytes for 64 rows of a tile of
//           m x n: 77, 96 and 110 flop a byte.
// Roofline  H100 at 800 TFLOP/s and 3.0 TB/s, 6 of 128 experts a token, m 2688, n 1856: 463 us for 4,096 tokens (DRAM:
//           out alone is 1.28 GB in bf16; 889 us in fp32), 1,226 us for 16,384 (tensor cores).
// Measured  never run on hardware.
// Limits    bf16; m and n multiples of 8; a, b, out on 16 bytes and strides multiples of 8; gathered rows within 64 GiB;
//           sm_90 only. The values of offsets and rows_of_a are trusted: the host never reads them.
// Why so    Both operands are K-last in memory and MN-major for wgmma: a comes by cp.async (TMA gathers no rows on Hopper),
//           b by TMA. A tensor map cannot end with an expert, and zero times the NaN of a neighbour is a NaN: so where an
//           expert's rows end within a step, b comes by cp.async too and both are zero from there on. Transposed, the two
//           change places in the product, and the stores stay rows of out. No atomics: the same bits every run.
#include "cuda/grouped_gemm_sm90.cuh"

namespace hebatron::cuda {
namespace {
using namespace sm90;

constexpr const char* kOp = "grouped_gemm_wgrad[sm90a]";
constexpr int kStep = kStepK;  // rows of a and b in a stage

// A tile of out, kM x kN. The gathered a gives its rows, or, transposed, its columns.
template <int kM, int kN, bool kSwap>
struct Tiling {
  static constexpr int kTileM = kM, kTileN = kN;
  static constexpr bool kTransposed = kSwap;
  static constexpr int kGroups = kM == 192 ? 3 : 2;  // consumer warpgroups, one above the other
  static constexpr int kAtoms = kM / kAtomM / kGroups;
  static constexpr int kConsumers = kGroups * kWarpgroup, kThreads = kProducers + kConsumers;
  static constexpr int kGroupsA = (kSwap ? kN : kM) / 64, kGroupsB = (kSwap ? kM : kN) / 64;  // of 64 columns
  static constexpr int kBytesA = kGroupsA * kBytesGroup, kBytesB = kGroupsB * kBytesGroup, kBytesStage = kBytesA + kBytesB;
  static constexpr int kStages = stage_count(kM, kN);
  static_assert(kM % (kGroups * kAtomM) == 0 && kN % 64 == 0 && kN <= 256 && kStages >= 3);
};

struct Sums {
  const uint4 *a, *b;  // a row is a_stride, b_stride packs of 16 bytes
  const int32_t* rows_of_a;
  const int32_t* offsets;
  void* out;
  int experts, m, n;
  uint32_t a_stride;
  int64_t b_stride;
  bool fp32;
};

template <class C>
struct Stages {
  uint8_t* stages;  // kStages of a's tile, then b's
  uint64_t* full;
  uint64_t* empty;
  HEBATRON_DEVICE explicit Stages(uint8_t* base)
      : stages(base), full(reinterpret_cast<uint64_t*>(base + C::kStages * C::kBytesStage)), empty(full + C::kStages) {}
  HEBATRON_DEVICE uint8_t* tile_a(int stage) const { return stages + stage * C::kBytesStage; }
  HEBATRON_DEVICE uint8_t* tile_b(int stage) const { return tile_a(stage) + C::kBytesA; }
};

// Which rows are summed, and where in out (rows as they lie there: m of them, or n when transposed).
struct Part {
  int expert, begin, end, row, column;
  HEBATRON_DEVICE int steps() const { return (end - begin + kStep - 1) / kStep; }
};

template <class C>
HEBATRON_DEVICE int parts_down(const Sums& p) {
  return ((C::kTransposed ? p.n : p.m) + C::kTileM - 1) / C::kTileM;
}
template <class C>
HEBATRON_DEVICE int parts_across(const Sums& p) {
  return ((C::kTransposed ? p.m : p.n) + C::kTileN - 1) / C::kTileN;
}

// Experts one after the other: the blocks at work share the rows of one or two in L2, and every expert, long or short, is
// spread over all of them.
template <class C>
HEBATRON_DEVICE Part locate(const Sums& p, int t) {
  const int across = parts_across<C>(p), of_expert = parts_down<C>(p) * across;
  const int expert = t / of_expert, rest = t % of_expert;
  return {expert, expert > 0 ? p.offsets[expert - 1] : 0, p.offsets[expert], rest / across * C::kTileM, rest % across * C::kTileN};
}

// The places of four rows of a, 16 apart, in packs; 0 past the expert's end, where nothing is read.
HEBATRON_DEVICE void find_rows(const Sums& p, int first, int end, uint32_t (&source)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int r = first + 16 * i;
    source[i] = r < end ? uint32_t(p.rows_of_a ? p.rows_of_a[r] : r) * p.a_stride : 0u;
  }
}

template <class C>
HEBATRON_DEVICE void produce(const TensorMap& map_b, const Sums& p, const Stages<C>& shared) {
  // 8 threads copy the 128 bytes of a row in a group of 64 columns; rows 16 apart have the same place in the swizzle.
  const int warp = threadIdx.x / kWarp, chunk = threadIdx.x % 8, row = threadIdx.x / 8;
  const bool elected = elect_one();
  const uint32_t destination = smem_address(shared.stages) + row * kBytesRow + (chunk ^ row % 8) * 16;
  const int parts = p.experts * parts_down<C>(p) * parts_across<C>(p);
  Ring<C::kStages> ring;
  for (int t = blockIdx.x; t < parts; t += gridDim.x) {
    const Part part = locate<C>(p, t);
    const int column_a = (C::kTransposed ? part.column : part.row) + chunk * 8;
    const int column_b = C::kTransposed ? part.row : part.column;
    uint32_t source[4];
    find_rows(p, part.begin + row, part.end, source);
    for (int first = part.begin; first < part.end; first += kStep, ring.next()) {
      const bool whole = part.end - first >= kStep;
      uint64_t* full = &shared.full[ring.stage];
      mbarrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
      if (elected && warp == ring.stage % (kProducers / kWarp)) {
        if (whole) {
          mbarrier_arrive_expect(full, C::kBytesB);
#pragma unroll
          for (int g = 0; g < C::kGroupsB; g++)
            tma_load_2d(shared.tile_b(ring.stage) + g * kBytesGroup, &map_b, full, column_b + g * 64, first);
        } else {
          mbarrier_arrive(full);
        }
      }
      const uint32_t to = destination + ring.stage * C::kBytesStage;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint4* from = p.a + source[i] + column_a / 8;
        const bool exists = first + row + 16 * i < part.end;
#pragma unroll
        for (int g = 0; g < C::kGroupsA; g++)
          cp_async_16(to + g * kBytesGroup + i * 16 * kBytesRow, from + g * 8, exists && column_a + g * 64 < p.m);
      }
      if (!whole) {
        for (int i = 0; i < 4; i++) {
          const bool exists = first + row + 16 * i < part.end;
          const uint4* from = p.b + (exists ? first + row + 16 * i : 0) * p.b_stride + column_b / 8 + chunk;
          for (int g = 0; g < C::kGroupsB; g++)
            cp_async_16(to + C::kBytesA + g * kBytesGroup + i * 16 * kBytesRow, from + g * 8,
                        exists && column_b + chunk * 8 + g * 64 < p.n);
        }
      }
      cp_async_arrive(full);
      find_rows(p, first + kStep + row, part.end, source);
    }
  }
}

// The 64 rows of one accumulator, the first being `top`: as in grouped_gemm's store_rows, but every row of out is there up
// to its end. In fp32 the two neighbours a lane holds go as they are: four lanes fill a sector of 32 bytes.
template <class C>
HEBATRON_DEVICE void store_sums(const float (&acc)[C::kTileN / 2], const Sums& p, const Part& part, int top) {
  const int rows = C::kTransposed ? p.n : p.m, columns = C::kTransposed ? p.m : p.n;
  const int lane = lane_id(), quad = lane % 4;
  const int upper = top + threadIdx.x % kWarpgroup / kWarp * 16 + lane / 4;
  const int64_t begin = int64_t(part.expert) * rows * columns;
  if (p.fp32) {
    float* out = static_cast<float*>(p.out) + begin;
#pragma unroll
    for (int i = 0; i < C::kTileN / 2; i += 2) {
      const int row = upper + i / 2 % 2 * 8, column = part.column + i / 4 * 8 + quad * 2;
      if (row < rows && column < columns) *reinterpret_cast<float2*>(out + int64_t(row) * columns + column) = float2{acc[i], acc[i + 1]};
    }
    return;
  }
  const int row = upper + quad / 2 * 8;
  __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.out) + begin + int64_t(row) * columns;
#pragma unroll
  for (int i = 0; i < C::kTileN / 2; i += 8) {
    uint32_t word[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int at = i + j % 2 * 4 + j / 2 * 2;
      word[j] = pack_bf16(acc[at], acc[at + 1]);
    }
    transpose_quad(word);
    const int column = part.column + i * 2 + quad % 2 * 8;
    if (row < rows && column < columns) *reinterpret_cast<uint4*>(out + column) = uint4{word[0], word[1], word[2], word[3]};
  }
}

template <class C>
HEBATRON_DEVICE void store_zeros(const Sums& p, const Part& part) {
  const int rows = C::kTransposed ? p.n : p.m, columns = C::kTransposed ? p.m : p.n;
  const int bytes = p.fp32 ? 4 : 2, per_row = C::kTileN * bytes / 16;
  uint8_t* out = static_cast<uint8_t*>(p.out) + int64_t(part.expert) * rows * columns * bytes;
  for (int i = threadIdx.x - kProducers; i < C::kTileM * per_row; i += C::kConsumers) {
    const int row = part.row + i / per_row, column = part.column + i % per_row * (16 / bytes);
    if (row < rows && column < columns)
      *reinterpret_cast<uint4*>(out + (int64_t(row) * columns + column) * bytes) = uint4{0, 0, 0, 0};
  }
}

template <class C>
HEBATRON_DEVICE void consume(const Sums& p, const Stages<C>& shared) {
  const int first_atom = (shfl(int(threadIdx.x) / kWarpgroup, 0) - 1) * C::kAtoms;  // uniform, and ptxas sees it
  const bool speaks = lane_id() == 0;  // for its warp, on the empty barriers
  const int parts = p.experts * parts_down<C>(p) * parts_across<C>(p);
  Ring<C::kStages> ring;
  for (int t = blockIdx.x; t < parts; t += gridDim.x) {
    const Part part = locate<C>(p, t);
    const int steps = part.steps();
    if (steps == 0) {
      store_zeros<C>(p, part);
      continue;
    }
    float acc[C::kAtoms][C::kTileN / 2];
    int reading = 0;  // the stage of the wgmmas in flight
    for (int step = 0; step < steps; step++, ring.next()) {
      mbarrier_wait(&shared.full[ring.stage], ring.phase);
      fence_proxy_async();
      const uint32_t a = smem_address(shared.tile_a(ring.stage)), b = smem_address(shared.tile_b(ring.stage));
      const uint32_t upper = (C::kTransposed ? b : a) + first_atom * kBytesGroup, across = C::kTransposed ? a : b;
      wgmma_fence();
#pragma unroll
      for (int slice = 0; slice < kStep / 16; slice++) {
        const uint32_t k = slice * 16 * kBytesRow;
#pragma unroll
        for (int m = 0; m < C::kAtoms; m++)
          wgmma_ss<1, 1>(acc[m], wgmma_descriptor(upper + m * kBytesGroup + k, 1024, kBytesGroup),
                         wgmma_descriptor(across + k, 1024, kBytesGroup), step + slice > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();  // the group before this one is done, and its stage free
      if (step > 0 && speaks) mbarrier_arrive(&shared.empty[reading]);
      reading = ring.stage;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < C::kAtoms; m++) wgmma_hold(acc[m]);
    if (speaks) mbarrier_arrive(&shared.empty[reading]);
#pragma unroll
    for (int m = 0; m < C::kAtoms; m++) store_sums<C>(acc[m], p, part, part.row + (first_atom + m) * kAtomM);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    multiply_transposed(HEBATRON_GRID_CONSTANT(TensorMap) map_b, HEBATRON_GRID_CONSTANT(Sums) p) {
  HEBATRON_DYNAMIC_SHARED(bytes);
  const Stages<C> shared(bytes);
  if (threadIdx.x == 0) {
    tma_prefetch(&map_b);
    for (int s = 0; s < C::kStages; s++) {
      mbarrier_init(&shared.full[s], 1 + kProducers);  // b's bytes, and each thread's copies
      mbarrier_init(&shared.empty[s], C::kConsumers / kWarp);
    }
    mbarrier_fence_init();
  }
  block_sync();
  if (threadIdx.x < kProducers) {
    registers_decrease<Registers<C::kGroups>::kProducer>();
    produce<C>(map_b, p, shared);
  } else {
    registers_increase<Registers<C::kGroups>::kConsumer>();
    consume<C>(p, shared);
  }
}

template <class C>
void run_sums(const GroupedGemmWgradArgs& args, const Exec& exec) {
  TensorMapShape b;
  b.dim[0] = uint64_t(args.n), b.dim[1] = uint64_t(args.rows);
  b.stride[0] = uint64_t(args.b_stride) * sizeof(__nv_bfloat16);
  b.box[0] = 64, b.box[1] = kStep;
  Sums p;
  p.a = static_cast<const uint4*>(args.a), p.a_stride = uint32_t(args.a_stride / 8);
  p.b = static_cast<const uint4*>(args.b), p.b_stride = args.b_stride / 8;
  p.rows_of_a = args.rows_of_a, p.offsets = args.offsets, p.out = args.out;
  p.experts = int(args.experts), p.m = int(args.m), p.n = int(args.n), p.fp32 = args.out_dtype == DType::f32;
  const int64_t rows = args.transposed ? args.n : args.m, columns = args.transposed ? args.m : args.n;
  const int64_t parts = args.experts * ceil_div(rows, C::kTileM) * ceil_div(columns, C::kTileN), sms = sm_count(exec);
  const LaunchShape shape{dim3(unsigned(parts < sms ? parts : sms)), dim3(C::kThreads), kBytesShared};
  launch(kOp, multiply_transposed<C>, shape, exec, tensor_map(kOp, args.b, b), p);
}

}  // namespace

const char* refuse_grouped_gemm_wgrad_sm90(const GroupedGemmWgradArgs& args) {
#define HEBATRON_SM90_NAME(M, N) " " #M "x" #N
#define HEBATRON_SM90_IS(M, N) || (args.tile_m == M && args.tile_n == N)
  constexpr int64_t kMaxInt = 0x7fffffff, kMaxStride = int64_t(1) << 39;
  if (args.dtype != DType::bf16) return "a and b must be bf16";
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const bool chosen = (args.tile_m == 0 && args.tile_n == 0) HEBATRON_SM90_WGRAD_TILES(HEBATRON_SM90_IS);
  if (!chosen) return "the tile must be one of" HEBATRON_SM90_WGRAD_TILES(HEBATRON_SM90_NAME);
  if (args.m % 8 != 0 || args.n % 8 != 0) return "m and n must be multiples of 8";
  if (args.a_stride % 8 != 0 || args.b_stride % 8 != 0) return "the row strides of a and b must be multiples of 8";
  if (args.b_stride < args.n) return "the rows of b must not overlap";  // what a tensor map cannot say
  if (args.a_stride >= kMaxStride || args.b_stride >= kMaxStride) return "strides must be less than 2^39";
  if ((address(args.a) | address(args.b) | address(args.out)) % 16 != 0) return "a, b and out must start on 16 bytes";
  if (args.a_rows * (args.a_stride / 8) > int64_t(1) << 32) return "the rows of a must lie within 64 GiB";
  if (args.rows > kMaxInt - 128 || args.m > kMaxInt - 512 || args.n > kMaxInt - 512) return "rows, m and n must be less than 2^31 - 512";
  if (args.experts * ceil_div(args.m, 128) > kMaxInt / 2 / ceil_div(args.n, 128)) return "experts times m times n must be less than 2^44";
  return nullptr;
}

void grouped_gemm_wgrad_sm90(const GroupedGemmWgradArgs& args, const Exec& exec) {
  const int64_t rows = args.transposed ? args.n : args.m, columns = args.transposed ? args.m : args.n;
  const GroupedGemmTile tile = args.tile_m ? GroupedGemmTile{args.tile_m, args.tile_n}
                                           : sm90_tile({TileUse::wgrad, args.rows, args.experts, rows, columns, sm_count(exec)});
#define HEBATRON_SM90_RUN(M, N)                                                 \
  if (tile.m == M && tile.n == N)                                               \
    return args.transposed ? run_sums<Tiling<M, N, true>>(args, exec) : run_sums<Tiling<M, N, false>>(args, exec);
  HEBATRON_SM90_WGRAD_TILES(HEBATRON_SM90_RUN)
  fail(std::string(kOp) + ": grouped_gemm_tiles.inc names a tile that is not built, " + std::to_string(tile.m) + "x" + std::to_string(tile.n));
}

}  // namespace hebatron::cuda
