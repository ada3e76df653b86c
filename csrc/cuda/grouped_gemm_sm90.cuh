// The sm_90a kernel of grouped_gemm_fwd, for both layouts of b (grouped_gemm_sm90.cu: k contiguous, grouped_gemm_dgrad_sm90.cu:
// n contiguous), and what the kernel of the weights' gradient shares with it. grouped_gemm_sm90.cu has the header.
#pragma once
#include "cuda/grouped_gemm.cuh"
#include "cuda/grouped_gemm_sm90.h"

namespace hebatron::cuda::sm90 {

constexpr int kAtomM = 64;              // rows of one wgmma
constexpr int kProducers = kWarpgroup;  // threads
constexpr int kBytesGroup = kStepK * kBytesRow;  // 64 k of 64 columns, where those are contiguous

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

// Of a thread, with so many consumer warpgroups: 128 * 40 + 256 * 232 = 384 * 168 and 128 * 56 + 384 * 152 = 512 * 128.
template <int kGroups>
struct Registers {
  static constexpr int kProducer = kGroups == 2 ? 40 : 56, kConsumer = kGroups == 2 ? 232 : 152;
};

// A block's tile, kM x kN; with kBlocks 2, a cluster's is twice as high.
template <int kM, int kN, int kBlocks, bool kGathers, bool kKMajor>
struct Config {
  static constexpr int kTileM = kM, kTileN = kN, kCluster = kBlocks;
  static constexpr bool kGather = kGathers;   // a through rows_of_a by cp.async, or in order by TMA
  static constexpr bool kBKMajor = kKMajor;   // b with k contiguous, or with n
  static constexpr int kGroups = kM == 192 ? 3 : 2;  // consumer warpgroups, one above the other or, of 64 rows, side by side
  static constexpr int kDown = kM == kAtomM ? 1 : kGroups, kAcross = kGroups / kDown;
  static constexpr int kAtoms = kM / kAtomM / kDown;  // of 64 rows, of a warpgroup
  // 512 threads start with 128 registers, and ptxas refuses a wgmma that needs more (C7602: 138 with n 224): so three
  // warpgroups multiply by half the columns at a time.
  static constexpr int kHalves = kGroups == 3 && kN > 192 ? 2 : 1;
  static constexpr int kColumns = kN / kAcross / kHalves;  // of a wgmma
  static constexpr int kConsumers = kGroups * kWarpgroup, kThreads = kProducers + kConsumers;
  static constexpr int kBytesA = kM * kBytesRow, kBytesB = kN * kBytesRow, kBytesStage = kBytesA + kBytesB;
  static constexpr int kStages = stage_count(kM, kN);
  static constexpr int kBoxes = kKMajor ? 1 : kN / 64;  // TMA copies of b a stage
  static_assert(kM % (kDown * kAtomM) == 0 && kColumns % 8 == 0 && kColumns <= 256 && kStages >= 3);
  static_assert(kColumns >= kPieceColumns && (kKMajor || kColumns % 64 == 0));
  static_assert(kCluster == 1 || !kKMajor || kN % 16 == 0, "each half of b must end with an atom of 8 rows");
};

struct Problem {
  const uint4* a;  // a row is a_stride packs of 16 bytes
  const int32_t* rows_of_a;
  const int32_t* offsets;
  const float* scale;
  const __nv_bfloat16* kept;  // the way back through relu2, or null
  float* pieces;              // and its row sums
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
  uint64_t* empty;  // the consumers of the cluster have read a stage
  int* first;       // [experts + 2]: how many row tiles come before expert e

  HEBATRON_DEVICE explicit Shared(uint8_t* base)
      : stages(base),
        full(reinterpret_cast<uint64_t*>(base + C::kStages * C::kBytesStage)),
        empty(full + C::kStages),
        first(reinterpret_cast<int*>(empty + C::kStages)) {}
  HEBATRON_DEVICE uint8_t* tile_a(int stage) const { return stages + stage * C::kBytesStage; }
  HEBATRON_DEVICE uint8_t* tile_b(int stage) const { return tile_a(stage) + C::kBytesA; }
};

// The rows of expert e. The rows after the last expert belong to one more, `experts`, which has no weights.
HEBATRON_DEVICE int rows_begin(const Problem& p, int e) { return e > 0 ? p.offsets[e - 1] : 0; }
HEBATRON_DEVICE int rows_end(const Problem& p, int e) { return e < p.experts ? p.offsets[e] : p.rows; }

// A whole warp fills `first`: a running sum, 32 experts at a time.
template <int kRows>
HEBATRON_DEVICE void count_tiles(const Problem& p, int* first) {
  const int lane = lane_id();
  int before = 0;
  for (int base = 0; base <= p.experts; base += kWarp) {
    const int e = base + lane;
    int sum = e <= p.experts ? (rows_end(p, e) - rows_begin(p, e) + kRows - 1) / kRows : 0;
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
  int expert, row, row_end, column;  // of this block
};

// The tile of a cluster. Columns run fastest: blocks at work together share an expert's rows and weights in L2.
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
  const int rank = C::kCluster > 1 ? int(cluster_rank()) : 0;
  const int row = rows_begin(p, low) + ((down - first[low]) * C::kCluster + rank) * C::kTileM;
  return {low, row, rows_end(p, low), tile % across * C::kTileN};
}

template <class C>
HEBATRON_DEVICE int tile_count(const Problem& p, const int* first) {
  return first[p.experts + 1] * ((p.n + C::kTileN - 1) / C::kTileN);
}

HEBATRON_DEVICE int step_count(const Problem& p, const Tile& tile) {
  return tile.expert < p.experts ? (p.k + kStepK - 1) / kStepK : 0;
}

// b's tile, or this block's half of it for both: rows of b where k is contiguous, else k of every group of 64 columns.
template <class C>
HEBATRON_DEVICE void load_b(const TensorMap& map, uint8_t* tile_b, uint64_t* full, int k, const Tile& tile) {
  const int rank = C::kCluster > 1 ? int(cluster_rank()) : 0;
#pragma unroll
  for (int box = 0; box < C::kBoxes; box++) {
    uint8_t* to = tile_b + (C::kBKMajor ? rank * (C::kBytesB / C::kCluster) : box * kBytesGroup + rank * (kBytesGroup / C::kCluster));
    const int x = C::kBKMajor ? k : tile.column + box * 64;
    const int y = C::kBKMajor ? tile.column + rank * (C::kTileN / C::kCluster) : k + rank * (kStepK / C::kCluster);
    if (C::kCluster > 1) {
      tma_load_3d_multicast(to, &map, full, x, y, tile.expert, (1 << C::kCluster) - 1);
    } else {
      tma_load_3d(to, &map, full, x, y, tile.expert);
    }
  }
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
  for (int t = blockIdx.x / C::kCluster; t < tiles; t += gridDim.x / C::kCluster) {
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
        mbarrier_arrive_expect(full, C::kBytesB + (C::kGather ? 0 : C::kBytesA));  // the boxes, zero fill included
        load_b<C>(map_b, shared.tile_b(ring.stage), full, step * kStepK, tile);
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

// The 64 rows of one accumulator, the first being `top`, and its columns from `left`. A lane holds two neighbours of every 8
// columns in two rows, 8 apart. Two such blocks of columns make four words, which the quad transposes into 16 bytes of one
// row for each lane; what it reads of `kept` goes the other way.
template <int kColumns>
HEBATRON_DEVICE void store_rows(const float (&acc)[kColumns / 2], const Problem& p, const Tile& tile, int top, int left) {
  const int lane = lane_id(), quad = lane % 4;
  const int upper = top + threadIdx.x % kWarpgroup / kWarp * 16 + lane / 4;
  float scale[2] = {1.0f, 1.0f}, sum[2] = {0.0f, 0.0f};
  if (p.scale) {
#pragma unroll
    for (int half = 0; half < 2; half++)
      if (upper + 8 * half < tile.row_end) scale[half] = p.scale[upper + 8 * half];
  }
  const int row = upper + quad / 2 * 8;
  const int64_t begin = int64_t(row) * p.n;
#pragma unroll
  for (int block = 0; block < kColumns / 8; block += 2) {
    const bool pair = block + 1 < kColumns / 8;  // 232 columns leave one block over: two lanes hold the same 16 bytes
    const int column = left + (block + (pair ? quad % 2 : 0)) * 8;
    const bool mine = row < tile.row_end && column < p.n && (pair || quad % 2 == 0);
    uint32_t word[4], kept[4] = {0, 0, 0, 0};
    if (p.kept) {
      if (mine) {
        const uint4 pack = *reinterpret_cast<const uint4*>(p.kept + begin + column);
        kept[0] = pack.x, kept[1] = pack.y, kept[2] = pack.z, kept[3] = pack.w;
      }
      transpose_quad(kept);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int half = i / 2, at = (block + (pair ? i % 2 : 0)) * 4 + half * 2;
      const float x = acc[at], y = acc[at + 1];
      if (!p.kept) {
        word[i] = pack_bf16(activated(x, p.relu2, scale[half]), activated(y, p.relu2, scale[half]));
        continue;
      }
      const float kept_x = unpack_bf16(kept[i], 0), kept_y = unpack_bf16(kept[i], 1);
      word[i] = pack_bf16(through_relu2(x, kept_x, scale[half]), through_relu2(y, kept_y, scale[half]));
      if ((pair || i % 2 == 0) && left + (block + i % 2) * 8 < p.n) sum[half] += x * kept_x + y * kept_y;
    }
    transpose_quad(word);
    if (mine) *reinterpret_cast<uint4*>(p.out + begin + column) = uint4{word[0], word[1], word[2], word[3]};
  }
  if (!p.kept || left >= p.n) return;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    sum[half] += shfl_xor(sum[half], 1);
    sum[half] += shfl_xor(sum[half], 2);
    const int r = upper + 8 * half;
    if (quad == 0 && r < tile.row_end) p.pieces[int64_t(left / kColumns) * p.rows + r] = sum[half];
  }
}

template <class C>
HEBATRON_DEVICE void store_zeros(const Problem& p, const Tile& tile) {
  constexpr int kPacks = C::kTileN / 8;
  for (int i = threadIdx.x - kProducers; i < C::kTileM * kPacks; i += C::kConsumers) {
    const int row = tile.row + i / kPacks, column = tile.column + i % kPacks * 8;
    if (row < tile.row_end && column < p.n)
      *reinterpret_cast<uint4*>(p.out + int64_t(row) * p.n + column) = uint4{0, 0, 0, 0};
  }
  if (!p.kept) return;
  constexpr int kPieces = C::kTileN / C::kColumns;
  for (int i = threadIdx.x - kProducers; i < C::kTileM * kPieces; i += C::kConsumers) {
    const int row = tile.row + i / kPieces, column = tile.column + i % kPieces * C::kColumns;
    if (row < tile.row_end && column < p.n) p.pieces[int64_t(column / C::kColumns) * p.rows + row] = 0.0f;
  }
}

// The consumers have read a stage: every block of the cluster copies into it.
template <class C>
HEBATRON_DEVICE void release(uint64_t* empty) {
  if (C::kCluster == 1) {
    mbarrier_arrive(empty);
  } else {
    for (int rank = 0; rank < C::kCluster; rank++) mbarrier_arrive_rank(empty, uint32_t(rank));
  }
}

template <class C>
HEBATRON_DEVICE void consume(const Problem& p, const Shared<C>& shared) {
  const int group = shfl(int(threadIdx.x) / kWarpgroup, 0) - 1;  // uniform, and ptxas sees it
  const int first_atom = group / C::kAcross * C::kAtoms, left = group % C::kAcross * C::kHalves * C::kColumns;
  const bool speaks = lane_id() == 0;  // for its warp, on the empty barriers
  const int tiles = tile_count<C>(p, shared.first);
  Ring<C::kStages> ring;
  for (int t = blockIdx.x / C::kCluster; t < tiles; t += gridDim.x / C::kCluster) {
    const Tile tile = locate<C>(p, shared.first, t);
    const int steps = step_count(p, tile);
    if (steps == 0) {
      store_zeros<C>(p, tile);
      continue;
    }
    float acc[C::kAtoms][C::kHalves][C::kColumns / 2];
    int reading = 0;  // the stage of the wgmmas in flight
    for (int step = 0; step < steps; step++, ring.next()) {
      mbarrier_wait(&shared.full[ring.stage], ring.phase);
      if (C::kGather) fence_proxy_async();
      const uint32_t a = smem_address(shared.tile_a(ring.stage)) + first_atom * kAtomM * kBytesRow;
      // 64 columns are kBytesGroup either way: 64 rows of 128 bytes, or 64 k of them.
      const uint32_t b = smem_address(shared.tile_b(ring.stage)) + left * kBytesRow;
      wgmma_fence();
#pragma unroll
      for (int slice = 0; slice < kStepK / 16; slice++) {
        constexpr int kBytesSlice = C::kBKMajor ? 32 : 16 * kBytesRow;
#pragma unroll
        for (int m = 0; m < C::kAtoms; m++) {
#pragma unroll
          for (int half = 0; half < C::kHalves; half++)
            wgmma_ss<0, C::kBKMajor ? 0 : 1>(
                acc[m][half], wgmma_descriptor(a + m * kAtomM * kBytesRow + slice * 32),
                wgmma_descriptor(b + half * C::kColumns * kBytesRow + slice * kBytesSlice, 1024, C::kBKMajor ? 16 : kBytesGroup),
                step + slice > 0);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();  // the group before this one is done, and its stage free
      if (step > 0 && speaks) release<C>(&shared.empty[reading]);
      reading = ring.stage;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < C::kAtoms * C::kHalves; i++) wgmma_hold(acc[i / C::kHalves][i % C::kHalves]);
    if (speaks) release<C>(&shared.empty[reading]);
#pragma unroll
    for (int i = 0; i < C::kAtoms * C::kHalves; i++) {
      const int m = i / C::kHalves, half = i % C::kHalves;
      store_rows<C::kColumns>(acc[m][half], p, tile, tile.row + (first_atom + m) * kAtomM, tile.column + left + half * C::kColumns);
    }
  }
}

template <class C>
HEBATRON_DEVICE void sync_all() {
  if (C::kCluster > 1) {
    warp_sync();  // barrier.cluster is .aligned: a warp comes to it together
    cluster_sync();
  } else {
    block_sync();
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    multiply(HEBATRON_GRID_CONSTANT(TensorMap) map_a, HEBATRON_GRID_CONSTANT(TensorMap) map_b,
             HEBATRON_GRID_CONSTANT(Problem) p) {
  HEBATRON_DYNAMIC_SHARED(bytes);
  const Shared<C> shared(bytes);
  if (threadIdx.x < kWarp) count_tiles<C::kTileM * C::kCluster>(p, shared.first);
  if (threadIdx.x == kWarp) {
    tma_prefetch(&map_b);
    if (!C::kGather) tma_prefetch(&map_a);
    for (int s = 0; s < C::kStages; s++) {
      mbarrier_init(&shared.full[s], C::kGather ? 1 + kProducers : 1);  // b's bytes, and each thread's copies of a
      mbarrier_init(&shared.empty[s], C::kCluster * C::kConsumers / kWarp);
    }
    mbarrier_fence_init();
  }
  sync_all<C>();
  if (threadIdx.x < kProducers) {
    registers_decrease<Registers<C::kGroups>::kProducer>();
    produce<C>(map_a, map_b, p, shared);
  } else {
    registers_increase<Registers<C::kGroups>::kConsumer>();
    consume<C>(p, shared);
  }
  if (C::kCluster > 1) {  // the neighbour may still copy into this block and arrive at its barriers
    warp_sync();
    cluster_sync();
  }
}

template <class C>
void run(const char* op, const GroupedGemmArgs& args, const Exec& exec) {
  constexpr uint64_t kBytes = sizeof(__nv_bfloat16);
  // The stride over a single expert means nothing, and may be anything.
  const int64_t across = C::kBKMajor ? args.n : args.k;
  const int64_t expert_stride = args.experts > 1 ? args.b_expert_stride : across * args.b_stride;
  TensorMapShape b;
  b.rank = 3;
  b.dim[0] = uint64_t(C::kBKMajor ? args.k : args.n), b.dim[1] = uint64_t(across), b.dim[2] = uint64_t(args.experts);
  b.stride[0] = uint64_t(args.b_stride) * kBytes, b.stride[1] = uint64_t(expert_stride) * kBytes;
  b.box[0] = 64, b.box[1] = (C::kBKMajor ? C::kTileN : kStepK) / C::kCluster;
  const TensorMap map_b = tensor_map(op, args.b, b);
  TensorMap map_a = map_b;  // unused when gathering
  if (!C::kGather) {
    TensorMapShape a;
    a.dim[0] = uint64_t(args.k), a.dim[1] = uint64_t(args.a_rows);
    a.stride[0] = uint64_t(args.a_stride) * kBytes;
    a.box[0] = kStepK, a.box[1] = C::kTileM;
    map_a = tensor_map(op, args.a, a);
  }
  Problem problem;
  problem.a = static_cast<const uint4*>(args.a), problem.a_stride = uint32_t(args.a_stride / 8);
  problem.rows_of_a = args.rows_of_a, problem.offsets = args.offsets, problem.scale = args.scale;
  problem.kept = static_cast<const __nv_bfloat16*>(args.kept), problem.pieces = static_cast<float*>(exec.workspace);
  problem.out = static_cast<__nv_bfloat16*>(args.out);
  problem.rows = int(args.rows), problem.experts = int(args.experts), problem.n = int(args.n), problem.k = int(args.k);
  problem.relu2 = args.relu2;
  const int64_t most = (ceil_div(args.rows, C::kTileM * C::kCluster) + args.experts) * ceil_div(args.n, C::kTileN);
  const int64_t clusters = sm_count(exec) / C::kCluster, wanted = most < clusters ? most : clusters;
  const LaunchShape shape{dim3(unsigned((wanted > 0 ? wanted : 1) * C::kCluster)), dim3(C::kThreads), kBytesShared, C::kCluster};
  launch(op, multiply<C>, shape, exec, map_a, map_b, problem);
  if (args.kept) launch_sum_pieces(op, args, ceil_div(args.n, C::kColumns), exec);
}

}  // namespace hebatron::cuda::sm90
