// What      out[r] = act(a[r] b[e]) * scale[r] by CUTLASS's stock ptr-array collective: the baseline of grouped_gemm.
// Grid      persistent, one block per SM, 384 threads: a producer and two consumer warpgroups, 168 registers, no spill
//           (nvcc 13.0, CUTLASS 4.2.0). Cooperative 128 x 208 and 128 x 224 in clusters of 2 x 1, ping-pong 128 x 128.
// Traffic   a once per column of tiles, b once per row of tiles (L2 holds most of the repeats), out once. Before it,
//           `prepare` writes 68 bytes per expert and the rows past the last end, if there are any.
// Roofline  tensor cores from about 300 rows an expert: 393,216 x 1,856 x 2,688 is 3.92 TFLOP, 4.9 ms at 800 TFLOP/s (H100).
// Measured  never run on hardware, nor under the emulator, which does not hold CUTLASS.
// Limits    sm_90 only. Rows of a in place (no gather), k contiguous in b; strides and n multiples of 8, addresses of 16
//           bytes.
// Why so    shapes, pointers and strides of the experts are built on the device, so the host never waits for the routing.
//           Then CUTLASS cannot know the number of tiles: it launches a block per SM, and each walks the experts 32 at a
//           time. An expert with no row has no tile: it is stepped over, and no tensor map is made from its zero rows. A
//           block left without a tile returns before it loads anything; if every expert is empty, all of them do.
#include "cuda/grouped_gemm.h"

// Only what the ptr-array kernels of sm_90 need, in the order they need: collective_builder.hpp of gemm/ and
// gemm_universal.hpp bring every architecture, a quarter more lines.
#include <cutlass/device_kernel.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/collective/collective_mma_decl.hpp>
#include <cutlass/gemm/collective/sm90_mma_array_tma_gmma_ss_warpspecialized.hpp>
#include <cutlass/gemm/collective/builders/sm90_gmma_builder.inl>
#include <cutlass/gemm/kernel/gemm_universal_decl.h>
#include <cutlass/gemm/kernel/sm90_gemm_array_tma_warpspecialized_cooperative.hpp>
#include <cutlass/gemm/kernel/sm90_gemm_array_tma_warpspecialized_pingpong.hpp>

#include <climits>

#include "cuda/prim.cuh"

#ifndef NDEBUG
#error "without NDEBUG CUTLASS's device asserts serialise wgmma (C7510)"
#endif

namespace hebatron::cuda {
namespace {

constexpr char kOp[] = "grouped_gemm[cutlass]";
constexpr int kMaxSms = 144;                            // of a whole GH100; H100 and H200 have up to 132
constexpr int64_t kBytesMaps = 4 * 128 * kMaxSms + 128;  // a block rewrites its maps of a, b and twice out for each expert
constexpr int64_t kAlign = 128;

using Element = cutlass::bfloat16_t;
using Shape = cute::Shape<int, int, int>;
using ProblemShape = cutlass::gemm::GroupProblemShape<Shape>;

// The choice at run time, not in the type: an activation of its own would double the kernels to compile.
struct ActivationArguments {
  bool relu2 = false;
};

template <class T>
struct Activation {
  using Arguments = ActivationArguments;
  CUTLASS_HOST_DEVICE T operator()(T v, const Arguments& arguments) const {
    return !arguments.relu2 ? v : v < T(0) ? T(0) : v * v;  // NaN stays NaN
  }
};

template <class T, int kCount>
struct Activation<cutlass::Array<T, kCount>> {
  using Arguments = ActivationArguments;
  using Values = cutlass::Array<T, kCount>;
  CUTLASS_HOST_DEVICE Values operator()(Values v, const Arguments& arguments) const {
#pragma unroll
    for (int i = 0; i < kCount; i++) v[i] = Activation<T>{}(v[i], arguments);
    return v;
  }
};

// What the collective reads of each expert, in device memory.
struct Groups {
  Shape* shape;
  const Element** a;
  const Element** b;
  Element** out;
  const float** scale;
  int64_t* a_stride;
  int64_t* b_stride;
  int64_t* out_stride;

  // Lays the arrays out behind `begin` and returns the end.
  int64_t place(int64_t begin, int64_t experts) {
    int64_t at = begin;
    auto take = [&](auto*& array) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(at);
      at += (experts * int64_t(sizeof(*array)) + kAlign - 1) / kAlign * kAlign;
    };
    take(shape);
    take(a);
    take(b);
    take(out);
    take(scale);
    take(a_stride);
    take(b_stride);
    take(out_stride);
    return at;
  }
};

constexpr int kPrepareThreads = 256;

__global__ void __launch_bounds__(kPrepareThreads) prepare(const GroupedGemmArgs args, const Groups groups) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t e = thread; e < args.experts; e += threads) {
    const int64_t begin = e ? args.offsets[e - 1] : 0;
    groups.shape[e] = cute::make_shape(int(args.offsets[e] - begin), int(args.n), int(args.k));
    groups.a[e] = static_cast<const Element*>(args.a) + begin * args.a_stride;
    groups.b[e] = static_cast<const Element*>(args.b) + e * args.b_expert_stride;
    groups.out[e] = static_cast<Element*>(args.out) + begin * args.n;
    groups.scale[e] = args.scale ? args.scale + begin : nullptr;
    groups.a_stride[e] = args.a_stride;
    groups.b_stride[e] = args.b_stride;
    groups.out_stride[e] = args.n;
  }
  const int64_t end = args.offsets[args.experts - 1];
  uint4* tail = reinterpret_cast<uint4*>(static_cast<Element*>(args.out) + end * args.n);
  for (int64_t i = thread; i < (args.rows - end) * args.n / 8; i += threads) tail[i] = uint4{0, 0, 0, 0};
}

// One kernel of CUTLASS. b as n columns with k contiguous is ColumnMajor there.
template <int kTileN, class Cluster, class Schedule, class EpilogueSchedule>
struct Kernel {
  using Tile = cute::Shape<cute::_128, cute::Int<kTileN>, cute::_64>;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

  template <template <class> class Function, class Result, class... Inputs>
  using Apply = cutlass::epilogue::fusion::Sm90EVT<cutlass::epilogue::fusion::Sm90Compute<Function, Result, float, kRound>, Inputs...>;
  // A pointer as its element makes the broadcast read one column per expert; alignment 1: an expert may begin at any row.
  using Scale = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, float*, float, cute::Stride<cute::_1, cute::_0, cute::_0>, 1>;
  using Fusion = Apply<cutlass::multiplies, Element, Apply<Activation, float, cutlass::epilogue::fusion::Sm90AccFetch>, Scale>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float,
      void, RowMajor*, 8, Element, RowMajor*, 8, EpilogueSchedule, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor*, 8, Element, ColumnMajor*, 8, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>, Schedule>::CollectiveOp;
  using Gemm = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>;

  using StrideA = typename Gemm::InternalStrideA;
  using StrideB = typename Gemm::InternalStrideB;
  using StrideD = typename Gemm::InternalStrideD;
  static_assert(sizeof(StrideA) == 8 && sizeof(StrideB) == 8 && sizeof(StrideD) == 8, "a stride is one number: Groups holds int64_t");
  static_assert(Gemm::SharedStorageSize <= 227 * 1024, "a block of sm_90 has 227 KB of shared memory");

  static void run(const GroupedGemmArgs& args, const Groups& groups, const Exec& exec) {
    typename Gemm::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    arguments.problem_shape = {int(args.experts), groups.shape, nullptr};
    arguments.mainloop = {groups.a, reinterpret_cast<StrideA*>(groups.a_stride), groups.b, reinterpret_cast<StrideB*>(groups.b_stride)};
    arguments.epilogue.thread = {{{}, {args.relu2}}, {args.scale ? groups.scale : nullptr, 1.0f, {}}, {}};
    arguments.epilogue.ptr_D = groups.out;
    arguments.epilogue.dD = reinterpret_cast<StrideD*>(groups.out_stride);
    arguments.hw_info.device_id = exec.device;
    arguments.hw_info.sm_count = sm_count(exec);
    // Tiles of one expert along n first: blocks that run together share rows of a, and an expert's b stays in L2.
    using Raster = typename Gemm::TileScheduler::RasterOrderOptions;
    arguments.scheduler.raster_order = Raster::AlongN;
    check(arguments.hw_info.sm_count <= kMaxSms, kOp, "the device must have at most 144 SMs", arguments.hw_info.sm_count);
    check(int64_t(Gemm::get_workspace_size(arguments)) <= kBytesMaps, kOp, "CUTLASS's tensor maps must fit their workspace",
          int64_t(Gemm::get_workspace_size(arguments)));
    const typename Gemm::Params params = Gemm::to_underlying_arguments(arguments, exec.workspace);
    LaunchShape shape{Gemm::get_grid_shape(params), Gemm::get_block_shape(), Gemm::SharedStorageSize};
    shape.cluster = cute::size<0>(Cluster{});
    launch(kOp, cutlass::device_kernel<Gemm>, shape, exec, params);
  }
};

template <int kTileN>
using Cooperative =
    Kernel<kTileN, cute::Shape<cute::_2, cute::_1, cute::_1>, cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative,
           cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative>;
using PingPong = Kernel<128, cute::Shape<cute::_1, cute::_1, cute::_1>, cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong,
                        cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong>;

// Columns of a tile: as asked, else the width that pads n least. Under 256 rows an expert a cluster of two tiles is half
// empty. The bound is reasoned, not measured.
int64_t tile_columns(const GroupedGemmArgs& args) {
  if (args.tile_n) return args.tile_n;
  if (args.rows < 256 * args.experts) return 128;
  auto padded = [&](int64_t columns) { return (args.n + columns - 1) / columns * columns; };
  return padded(208) < padded(224) ? 208 : 224;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

const char* refuse_grouped_gemm_cutlass(const GroupedGemmArgs& args) {
  if (args.kept) return "has no way back through relu2";
  if (args.rows_of_a) return "gathers no rows: needs them in place (moe_permute first)";
  if (!args.b_k_major) return "needs b with K contiguous, a transposed view of (experts, N, K)";
  if (args.tile_m || args.tile_n) {
    const bool known = args.tile_m == 128 && (args.tile_n == 128 || args.tile_n == 208 || args.tile_n == 224);
    if (!known) return "has the tiles 128x128, 128x208 and 128x224";
  }
  if (args.n % 8 || args.a_stride % 8 || args.b_stride % 8 || args.b_expert_stride % 8)
    return "needs n and the strides of a and b in multiples of 8 elements";
  if (!aligned(args.a) || !aligned(args.b) || !aligned(args.out)) return "needs a, b and out on 16-byte addresses";
  if (args.n > INT_MAX || args.k > INT_MAX || args.experts > INT_MAX) return "needs sizes below 2^31";
  return nullptr;
}

int64_t grouped_gemm_cutlass_workspace(const GroupedGemmArgs& args) { return Groups{}.place(kBytesMaps, args.experts); }

void grouped_gemm_cutlass(const GroupedGemmArgs& args, const Exec& exec) {
  const int64_t workspace = reinterpret_cast<int64_t>(exec.workspace);
  check(workspace % kAlign == 0, kOp, "workspace must lie on 128 bytes", workspace);
  Groups groups;
  groups.place(workspace + kBytesMaps, args.experts);
  launch(kOp, prepare, LaunchShape{dim3(unsigned(2 * sm_count(exec))), dim3(kPrepareThreads)}, exec, args, groups);
  switch (tile_columns(args)) {
    case 128:
      return PingPong::run(args, groups, exec);
    case 208:
      return Cooperative<208>::run(args, groups, exec);
    default:
      return Cooperative<224>::run(args, groups, exec);
  }
}

}  // namespace hebatron::cuda
