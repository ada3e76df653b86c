// What      out[r] = act(a[row(r)] b[e]^T) * scale[r] for the rows r of expert e; act is the identity or relu(.)^2.
// Grid      one persistent block an SM, 384 threads: a producer warpgroup (40 registers) and two consumer warpgroups
//           (232). Tiles 128 x {128, 208, 224, 232} and 256 x 192 with {7, 5, 5, 5, 4} stages of 64 k, all 227 KB of
//           shared memory; 168 registers at launch, no spill (nvcc 13.0, sm_90a).
// Traffic   DRAM: a's rows, b and out once. L2: 2 (m + n) k bytes a tile of m x n, so 82 flop a byte with 128 x 232 and
//           110 with 256 x 192.
// Roofline  H100 at 800 TFLOP/s and 3.0 TB/s, 6 of 128 experts a token, k 2688, n 1856: 463 us for 4,096 tokens (DRAM:
//           b alone is 1.28 GB), 1,226 us for 16,384 (tensor cores; with 128 x 232 L2 would have to give 9.7 TB/s).
// Measured  never run on hardware.
// Limits    bf16; k and n multiples of 8; a, b, out on 16 bytes and strides multiples of 8; k contiguous in b; gathered
//           rows within 64 GiB; 512 experts, with 128 x 232 490; sm_90 only: nothing of sm_90a runs on Blackwell. The
//           values of offsets and rows_of_a are trusted: the host never reads them.
// Why so    TMA cannot gather rows on Hopper, so the producer copies a by cp.async and b by TMA, on one mbarrier.
//           Results go from registers to memory in 16-byte stores under a row predicate: a tensor map cannot clip at an
//           expert's end, and a staging buffer would cost the fifth stage. No atomics: the same bits every run.
#include "cuda/grouped_gemm.cuh"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "grouped_gemm[sm90a]";
constexpr int kStepK = 64;  // of K in a stage: 128 bytes, one row of the swizzle
constexpr int kBytesRow = 128;
constexpr int kAtomM = 64;  // rows of one wgmma
constexpr int kProducers = kWarpgroup;  // threads
constexpr int kConsumers = 2 * kWarpgroup;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // 128 * 40 + 256 * 232 = 384 * 168
constexpr int kBytesShared = 227 * 1024;  // what a block of sm_90 may have
constexpr int kBytesTables = 2048;        // of these, at least, for the barriers and the count of tiles
constexpr int kMaxExperts = 512;

constexpr int stage_count(int m, int n) { return (kBytesShared - kBytesTables) / ((m + n) * kBytesRow); }
constexpr int max_experts(int m, int n) {  // 490 with 128 x 232, whose five stages leave no more
  const int stages = stage_count(m, n), bytes_barriers = stages * 2 * int(sizeof(uint64_t));
  const int room = (kBytesShared - stages * (m + n) * kBytesRow - bytes_barriers) / int(sizeof(int)) - 2;
  return room < kMaxExperts ? room : kMaxExperts;
}

template <int kM, int kN, bool kGathers>
struct Config {
  static constexpr int kTileM = kM, kTileN = kN;
  static constexpr bool kGather = kGathers;       // a through rows_of_a by cp.async, or in order by TMA
  static constexpr int kAtoms = kM / kAtomM / 2;  // wgmmas of a consumer warpgroup per 16 of K
  static constexpr int kBytesA = kM * kBytesRow, kBytesB = kN * kBytesRow, kBytesStage = kBytesA + kBytesB;
  static constexpr int kStages = stage_count(kM, kN);
  static_assert(kM % (2 * kAtomM) == 0 && kN % 8 == 0 && kN <= 256 && kStages >= 3);
};

struct Problem {
  const uint4* a;  // a row is a_stride packs of 16 bytes
  const int32_t* rows_of_a;
  const int32_t* offsets;
  const float* scale;
  __nv_bfloat16* out;
  int rows, experts, n, k;
  uint32_t a_stride;
  bool relu2;
};

// What lives in the dynamic shared memory.
template <class C>
struct Shared {
  uint8_t* stages;  // kStages of a's tile, then b's
  uint64_t* full;   // a stage holds its tiles
  uint64_t* empty;  // both consumer warpgroups have read a stage
  int* first;       // [experts + 2]: how many row tiles come before expert e

  HEBATRON_DEVICE explicit Shared(uint8_t* base)
      : stages(base),
        full(reinterpret_cast<uint64_t*>(base + C::kStages * C::kBytesStage)),
        empty(full + C::kStages),
        first(reinterpret_cast<int*>(empty + C::kStages)) {}
  HEBATRON_DEVICE uint8_t* tile_a(int stage) const { return stages + stage * C::kBytesStage; }
  HEBATRON_DEVICE uint8_t* tile_b(int stage) const { return tile_a(stage) + C::kBytesA; }
};

// The place in the ring of stages; producer and consumers step through the same sequence.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  HEBATRON_DEVICE void next() {
    if (++stage < kStages) return;
    stage = 0;
    phase ^= 1;
  }
};

// The rows of expert e. The rows after the last expert belong to one more, `experts`, which has no weights.
HEBATRON_DEVICE int rows_begin(const Problem& p, int e) { return e > 0 ? p.offsets[e - 1] : 0; }
HEBATRON_DEVICE int rows_end(const Problem& p, int e) { return e < p.experts ? p.offsets[e] : p.rows; }

// A whole warp fills `first`: a running sum, 32 experts at a time.
template <int kTileM>
HEBATRON_DEVICE void count_tiles(const Problem& p, int* first) {
  const int lane = lane_id();
  int before = 0;
  for (int base = 0; base <= p.experts; base += kWarp) {
    const int e = base + lane;
    int sum = e <= p.experts ? (rows_end(p, e) - rows_begin(p, e) + kTileM - 1) / kTileM : 0;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int other = shfl_up(sum, offset);
      if (lane >= offset) sum += other;
    }
    if (e <= p.experts) first[e + 1] = before + sum;
    before += shfl(sum, kWarp - 1);
  }
  if (lane == 0) first[0] = 0;
}

struct Tile {
  int expert, row, row_end, column;
};

// Columns run fastest: blocks at work together share an expert's rows and weights in L2.
template <class C>
HEBATRON_DEVICE Tile locate(const Problem& p, const int* first, int tile) {
  const int across = (p.n + C::kTileN - 1) / C::kTileN, down = tile / across;
  int low = 0, high = p.experts + 1;
  while (high - low > 1) {  // the last e with first[e] <= down: never an empty one
    const int middle = (low + high) / 2;
    if (first[middle] <= down) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return {low, rows_begin(p, low) + (down - first[low]) * C::kTileM, rows_end(p, low), tile % across * C::kTileN};
}

template <class C>
HEBATRON_DEVICE int tile_count(const Problem& p, const int* first) {
  return first[p.experts + 1] * ((p.n + C::kTileN - 1) / C::kTileN);
}

HEBATRON_DEVICE int step_count(const Problem& p, const Tile& tile) {
  return tile.expert < p.experts ? (p.k + kStepK - 1) / kStepK : 0;
}

template <class C>
HEBATRON_DEVICE void produce(const TensorMap& map_a, const TensorMap& map_b, const Problem& p,
                             const Shared<C>& shared) {
  constexpr int kRows = C::kTileM / 16;  // of a thread: 8 threads copy the 128 bytes of a row, 16 rows at a time
  const int warp = threadIdx.x / kWarp, chunk = threadIdx.x % 8, row = threadIdx.x / 8;
  const bool elected = elect_one();
  if (!C::kGather && !(elected && warp == 0)) return;
  // Rows 16 apart have the same place in the swizzle, so one address serves them all.
  const uint32_t destination = smem_address(shared.stages) + row * kBytesRow + (chunk ^ row % 8) * 16;
  const int tiles = tile_count<C>(p, shared.first);
  Ring<C::kStages> ring;
  for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
    const Tile tile = locate<C>(p, shared.first, t);
    const int steps = step_count(p, tile);
    uint32_t source[kRows], present = 0;  // in packs from a: 32 bits reach 64 GiB, and 40 registers hold 16 of them
    if (C::kGather) {
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        const int r = tile.row + row + 16 * i;
        const bool exists = steps > 0 && r < tile.row_end;
        source[i] = chunk + (exists ? uint32_t(p.rows_of_a[r]) * p.a_stride : 0u);
        present |= uint32_t(exists) << i;
      }
    }
    for (int step = 0; step < steps; step++, ring.next()) {
      uint64_t* full = &shared.full[ring.stage];
      mbarrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
      if (elected && warp == (C::kGather ? step % (kProducers / kWarp) : 0)) {
        mbarrier_arrive_expect(full, C::kBytesB + (C::kGather ? 0 : C::kBytesA));  // the box, zero fill included
        tma_load_3d(shared.tile_b(ring.stage), &map_b, full, step * kStepK, tile.column, tile.expert);
        if (!C::kGather) tma_load_2d(shared.tile_a(ring.stage), &map_a, full, step * kStepK, tile.row);
      }
      if (C::kGather) {
        // Past k and past the expert's rows nothing is read and zeros are written.
        const uint32_t valid = step * kStepK + chunk * 8 < p.k ? present : 0;
        const uint4* a = p.a + step * (kStepK / 8);
#pragma unroll
        for (int i = 0; i < kRows; i++)
          cp_async_16(destination + ring.stage * C::kBytesStage + i * 16 * kBytesRow, a + source[i], valid >> i & 1);
        cp_async_arrive(full);
      }
    }
  }
}

// The 64 rows of one accumulator, the first being `top`. A lane holds two neighbours of every 8 columns in two rows, 8
// apart. Two such blocks of columns make four words, which the quad transposes into 16 bytes of one row for each lane.
template <int kTileN>
HEBATRON_DEVICE void store_rows(const float (&acc)[kTileN / 2], const Problem& p, const Tile& tile, int top) {
  const int lane = lane_id(), quad = lane % 4;
  const int upper = top + threadIdx.x % kWarpgroup / kWarp * 16 + lane / 4;
  float scale[2] = {1.0f, 1.0f};
  if (p.scale) {
#pragma unroll
    for (int half = 0; half < 2; half++)
      if (upper + 8 * half < tile.row_end) scale[half] = p.scale[upper + 8 * half];
  }
  const int row = upper + quad / 2 * 8;
  __nv_bfloat16* out = p.out + int64_t(row) * p.n;
#pragma unroll
  for (int block = 0; block < kTileN / 8; block += 2) {
    const bool pair = block + 1 < kTileN / 8;  // 232 columns leave one block over: two lanes hold the same 16 bytes
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int half = i / 2, at = (block + (pair ? i % 2 : 0)) * 4 + half * 2;
      word[i] = pack_bf16(activated(acc[at], p.relu2, scale[half]), activated(acc[at + 1], p.relu2, scale[half]));
    }
    transpose_quad(word);
    const int column = tile.column + (block + (pair ? quad % 2 : 0)) * 8;
    if (row < tile.row_end && column < p.n && (pair || quad % 2 == 0))
      *reinterpret_cast<uint4*>(out + column) = uint4{word[0], word[1], word[2], word[3]};
  }
}

template <class C>
HEBATRON_DEVICE void store_zeros(const Problem& p, const Tile& tile) {
  constexpr int kPacks = C::kTileN / 8;
  for (int i = threadIdx.x - kProducers; i < C::kTileM * kPacks; i += kConsumers) {
    const int row = tile.row + i / kPacks, column = tile.column + i % kPacks * 8;
    if (row < tile.row_end && column < p.n)
      *reinterpret_cast<uint4*>(p.out + int64_t(row) * p.n + column) = uint4{0, 0, 0, 0};
  }
}

template <class C>
HEBATRON_DEVICE void consume(const Problem& p, const Shared<C>& shared) {
  const int first_atom = (shfl(int(threadIdx.x) / kWarpgroup, 0) - 1) * C::kAtoms;  // uniform, and ptxas sees it
  const bool speaks = lane_id() == 0;  // for its warp, on the empty barriers
  const int tiles = tile_count<C>(p, shared.first);
  Ring<C::kStages> ring;
  for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
    const Tile tile = locate<C>(p, shared.first, t);
    const int steps = step_count(p, tile);
    if (steps == 0) {
      store_zeros<C>(p, tile);
      continue;
    }
    float acc[C::kAtoms][C::kTileN / 2];
    int reading = 0;  // the stage of the wgmmas in flight
    for (int step = 0; step < steps; step++, ring.next()) {
      mbarrier_wait(&shared.full[ring.stage], ring.phase);
      if (C::kGather) fence_proxy_async();
      const uint32_t a = smem_address(shared.tile_a(ring.stage)) + first_atom * kAtomM * kBytesRow;
      const uint32_t b = smem_address(shared.tile_b(ring.stage));
      wgmma_fence();
#pragma unroll
      for (int slice = 0; slice < kStepK / 16; slice++) {
#pragma unroll
        for (int m = 0; m < C::kAtoms; m++)
          wgmma_ss<0, 0>(acc[m], wgmma_descriptor(a + m * kAtomM * kBytesRow + slice * 32),
                         wgmma_descriptor(b + slice * 32), step + slice > 0);
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
    for (int m = 0; m < C::kAtoms; m++) store_rows<C::kTileN>(acc[m], p, tile, tile.row + (first_atom + m) * kAtomM);
  }
}

template <class C>
__global__ void __launch_bounds__(kProducers + kConsumers, 1)
    multiply(HEBATRON_GRID_CONSTANT(TensorMap) map_a, HEBATRON_GRID_CONSTANT(TensorMap) map_b,
             HEBATRON_GRID_CONSTANT(Problem) p) {
  HEBATRON_DYNAMIC_SHARED(bytes);
  const Shared<C> shared(bytes);
  if (threadIdx.x < kWarp) count_tiles<C::kTileM>(p, shared.first);
  if (threadIdx.x == kWarp) {
    tma_prefetch(&map_b);
    if (!C::kGather) tma_prefetch(&map_a);
    for (int s = 0; s < C::kStages; s++) {
      mbarrier_init(&shared.full[s], C::kGather ? 1 + kProducers : 1);  // b's bytes, and each thread's copies of a
      mbarrier_init(&shared.empty[s], kConsumers / kWarp);
    }
    mbarrier_fence_init();
  }
  block_sync();
  if (threadIdx.x < kProducers) {
    registers_decrease<kProducerRegisters>();
    produce<C>(map_a, map_b, p, shared);
  } else {
    registers_increase<kConsumerRegisters>();
    consume<C>(p, shared);
  }
}

// The tiles there are: X(m, n).
#define HEBATRON_SM90_TILES(X) X(128, 128) X(128, 208) X(128, 224) X(128, 232) X(256, 192)

#define HEBATRON_SM90_TILE(m, n) GroupedGemmTile{m, n},
constexpr GroupedGemmTile kTiles[] = {HEBATRON_SM90_TILES(HEBATRON_SM90_TILE)};

constexpr int64_t kFlopsPerClock = 4096;  // of an SM of H100, bf16
constexpr int64_t kBytesL2PerClock = 40;  // into an SM: A100's published 5,120 over 132 SMs; unmeasured on H100

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class C>
void run(const GroupedGemmArgs& args, const Exec& exec, int64_t sms) {
  constexpr uint64_t kBytes = sizeof(__nv_bfloat16);
  // The stride over a single expert means nothing, and may be anything.
  const int64_t expert_stride = args.experts > 1 ? args.b_expert_stride : args.n * args.b_stride;
  TensorMapShape b;
  b.rank = 3;
  b.dim[0] = uint64_t(args.k), b.dim[1] = uint64_t(args.n), b.dim[2] = uint64_t(args.experts);
  b.stride[0] = uint64_t(args.b_stride) * kBytes, b.stride[1] = uint64_t(expert_stride) * kBytes;
  b.box[0] = kStepK, b.box[1] = C::kTileN;
  const TensorMap map_b = tensor_map(kOp, args.b, b);
  TensorMap map_a = map_b;  // unused when gathering
  if (!C::kGather) {
    TensorMapShape a;
    a.dim[0] = uint64_t(args.k), a.dim[1] = uint64_t(args.a_rows);
    a.stride[0] = uint64_t(args.a_stride) * kBytes;
    a.box[0] = kStepK, a.box[1] = C::kTileM;
    map_a = tensor_map(kOp, args.a, a);
  }
  Problem problem;
  problem.a = static_cast<const uint4*>(args.a), problem.a_stride = uint32_t(args.a_stride / 8);
  problem.rows_of_a = args.rows_of_a, problem.offsets = args.offsets, problem.scale = args.scale;
  problem.out = static_cast<__nv_bfloat16*>(args.out);
  problem.rows = int(args.rows), problem.experts = int(args.experts), problem.n = int(args.n), problem.k = int(args.k);
  problem.relu2 = args.relu2;
  const int64_t most = (ceil_div(args.rows, C::kTileM) + args.experts) * ceil_div(args.n, C::kTileN);
  const LaunchShape shape{dim3(unsigned(most < sms ? most : sms)), dim3(kProducers + kConsumers), kBytesShared};
  launch(kOp, multiply<C>, shape, exec, map_a, map_b, problem);
}

bool is_tile(int64_t m, int64_t n) {
  for (const GroupedGemmTile& tile : kTiles)
    if (tile.m == m && tile.n == n) return true;
  return false;
}

}  // namespace

GroupedGemmTile sm90_tile(int64_t rows, int64_t experts, int64_t n, int64_t sms) {
  GroupedGemmTile best{0, 0};
  int64_t best_cost = 0;
  for (const GroupedGemmTile& tile : kTiles) {
    if (experts > max_experts(int(tile.m), int(tile.n))) continue;
    const int64_t tiles = (ceil_div(rows, tile.m) + experts / 2) * ceil_div(n, tile.n);
    const int64_t clocks_tensor = tile.m * tile.n * kStepK * 2 / kFlopsPerClock;
    const int64_t clocks_l2 = (tile.m + tile.n) * kBytesRow / kBytesL2PerClock;
    const int64_t cost = ceil_div(tiles, sms) * (clocks_tensor > clocks_l2 ? clocks_tensor : clocks_l2);
    if (best_cost > 0 && cost >= best_cost) continue;
    best = tile;
    best_cost = cost;
  }
  return best;
}

const char* refuse_grouped_gemm_sm90(const GroupedGemmArgs& args) {
  if (args.kept) return "has no way back through relu2";
  constexpr int64_t kMaxInt = 0x7fffffff, kMaxStride = int64_t(1) << 39;
  const int64_t b_expert_stride = args.experts == 1 ? args.b_stride : args.b_expert_stride;  // of one: any
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  if (args.experts > kMaxExperts) return "experts must be at most 512";
  if (args.tile_m != 0 || args.tile_n != 0) {
    if (!is_tile(args.tile_m, args.tile_n)) return "the tile must be 128x128, 128x208, 128x224, 128x232 or 256x192";
    const bool room = args.experts <= max_experts(int(args.tile_m), int(args.tile_n));
    if (!room) return "experts must be at most 490 with the tile 128x232";
  }
  if (!args.b_k_major) return "b must be the transposed view of a tensor (experts, n, k)";
  if (args.k % 8 != 0) return "k must be a multiple of 8";
  if (args.n % 8 != 0) return "n must be a multiple of 8";
  if (args.a_stride % 8 != 0) return "the row stride of a must be a multiple of 8";
  if (args.b_stride % 8 != 0 || b_expert_stride % 8 != 0) return "the strides of b must be multiples of 8";
  // What a tensor map cannot say: rows that overlap, strides of 2^40 bytes.
  if (args.b_stride < args.k || b_expert_stride < args.b_stride) return "the rows and experts of b must not overlap";
  if (!args.rows_of_a && args.a_stride < args.k) return "the rows of a must not overlap";
  if (args.b_stride >= kMaxStride || b_expert_stride >= kMaxStride || args.a_stride >= kMaxStride)
    return "strides must be less than 2^39";
  if ((address(args.a) | address(args.b) | address(args.out)) % 16 != 0) return "a, b and out must start on 16 bytes";
  if (args.k > kMaxInt - kStepK || args.n > kMaxInt - 256) return "k and n must be less than 2^31 - 256";
  const bool reached = !args.rows_of_a || args.a_rows * (args.a_stride / 8) <= int64_t(1) << 32;
  if (!reached) return "the rows of a must lie within 64 GiB";
  const int64_t most_tiles = (args.rows / 128 + args.experts + 2) * (args.n / 128 + 1);
  if (args.rows > kMaxInt - 256 || most_tiles > kMaxInt / 2) return "rows times n must be less than 2^44";
  return nullptr;
}

void grouped_gemm_sm90(const GroupedGemmArgs& args, const Exec& exec) {
  const int64_t sms = sm_count(exec);
  const GroupedGemmTile tile =
      args.tile_m ? GroupedGemmTile{args.tile_m, args.tile_n} : sm90_tile(args.rows, args.experts, args.n, sms);
#define HEBATRON_SM90_RUN(tile_m, tile_n)                                                 \
  if (tile.m == tile_m && tile.n == tile_n)                                               \
    return args.rows_of_a ? run<Config<tile_m, tile_n, true>>(args, exec, sms)            \
                          : run<Config<tile_m, tile_n, false>>(args, exec, sms);
  HEBATRON_SM90_TILES(HEBATRON_SM90_RUN)
  fail(std::string(kOp) + ": " + refuse_grouped_gemm_sm90(args));
}

const char* refuse_grouped_gemm_wgrad_sm90(const GroupedGemmWgradArgs&) { return "has no kernel for the gradient of the weights"; }
void grouped_gemm_wgrad_sm90(const GroupedGemmWgradArgs& args, const Exec&) {
  fail(std::string("grouped_gemm_wgrad[sm90]: ") + refuse_grouped_gemm_wgrad_sm90(args));
}

}  // namespace hebatron::cuda
