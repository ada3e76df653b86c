// Clusters: blocks that see each other's shared memory, and one TMA load that fills all of theirs.
#include "cases.h"

namespace hebatron::cases {
namespace {

// ---- every block reads what its right neighbour wrote, then writes into the left one's memory ----
enum class Ring { right, no_sync_before_read, no_sync_before_write, no_sync_at_end, block_sync_only, rank_outside };

template <Ring bug>
__global__ void ring(const uint32_t* in, uint32_t* out) {
  HEBATRON_SHARED(uint32_t, mine, kWarp);
  const uint32_t lane = uint32_t(lane_id()), size = cluster_size(), next = (cluster_rank() + 1) % size;
  mine[lane] = in[blockIdx.x * kWarp + lane];  // LINE: ring.write
  if (bug == Ring::block_sync_only) block_sync();
  else if (bug != Ring::no_sync_before_read) cluster_sync();
  const uint32_t target = bug == Ring::rank_outside ? size : next;
  const uint32_t v = load_cluster(map_to_rank(smem_address(mine + lane), target));  // LINE: ring.read
  if (bug != Ring::no_sync_before_write) cluster_sync();
  if (bug == Ring::no_sync_at_end && cluster_rank() == 0) return;
  store_cluster(map_to_rank(smem_address(mine + 31 - lane), next), 2 * v);  // LINE: ring.remote_write
  if (bug == Ring::no_sync_at_end) return;
  cluster_sync();
  out[blockIdx.x * kWarp + lane] = mine[lane];
}
template <Ring bug, unsigned kSize>
void run_ring() {
  Tensor<uint32_t> in("in", 8 * kWarp, [](size_t i) { return uint32_t(i); }), out("out", 8 * kWarp);
  run(ring<bug>, 8, kWarp, 0, kSize, in.get(), out.get());
  if (bug == Ring::no_sync_at_end) return;  // the results are not written
  out.expect([](size_t i) { return uint32_t(2 * (i / 32 * 32 + 31 - i % 32)); });  // what came from here, doubled, came back
}

// ---- multicast: rank 0 loads a tile into every block; each block tells rank 0 when it has read it ----
enum class Cast { right, no_cluster_sync, no_wait_on_empty, rank_outside };

template <Cast bug>
__global__ void multicast(HEBATRON_GRID_CONSTANT(TensorMap) map, float* out) {
  HEBATRON_DYNAMIC_SHARED(tile);
  HEBATRON_SHARED(uint64_t, full, 1);
  HEBATRON_SHARED(uint64_t, empty, 1);
  const uint32_t lane = uint32_t(lane_id()), rank = cluster_rank(), size = cluster_size();
  if (lane == 0) {
    mbarrier_init(full, 1);  // LINE: multicast.init
    mbarrier_init(empty, size);
    mbarrier_fence_init();
  }
  if (bug == Cast::no_cluster_sync) warp_sync();
  else cluster_sync();
  for (int round = 0; round < 3; round++) {
    if (lane == 0) {
      mbarrier_arrive_expect(full, 512);
      if (rank == 0) {
        if (bug != Cast::no_wait_on_empty) mbarrier_wait(empty, (round & 1) ^ 1);
        const uint16_t everyone = uint16_t((1 << (size + (bug == Cast::rank_outside ? 1 : 0))) - 1);
        tma_load_2d_multicast(tile, &map, full, 0, round * 4, everyone);  // LINE: multicast.load
      }
    }
    mbarrier_wait(full, round & 1);
    float sum = 0;
    for (int row = 0; row < 4; row++) sum += reinterpret_cast<const float*>(tile)[row * 32 + lane];  // LINE: multicast.read
    warp_sync();
    if (lane == 0) mbarrier_arrive_rank(empty, 0);
    out[(blockIdx.x * 3 + round) * 32 + lane] = sum;
  }
  cluster_sync();
}
template <Cast bug, unsigned kSize>
void run_multicast() {
  Tensor<float> in("in", 12 * 32, small), out("out", 4 * 3 * 32);
  TensorMapShape shape;
  shape.dim[0] = 32;
  shape.dim[1] = 12;
  shape.stride[0] = 128;
  shape.box[0] = 32;
  shape.box[1] = 4;
  shape.dtype = DType::f32;
  shape.swizzle = Swizzle::none;
  run(multicast<bug>, 4, kWarp, 512, kSize, tensor_map("case", in.get(), shape), out.get());
  out.expect([](size_t i) {
    float sum = 0;
    for (size_t row = 0; row < 4; row++) sum += small((i / 32 % 3 * 4 + row) * 32 + i % 32);
    return sum;
  });
}

}  // namespace

void add_cluster_cases(Cases& cases) {
  cases.push_back({"ring_of_2", run_ring<Ring::right, 2>});
  cases.push_back({"ring_of_4", run_ring<Ring::right, 4>});
  cases.push_back({"ring/no_sync_before_read", run_ring<Ring::no_sync_before_read, 2>});
  cases.push_back({"ring/no_sync_before_write", run_ring<Ring::no_sync_before_write, 2>});
  cases.push_back({"ring/no_sync_at_end", run_ring<Ring::no_sync_at_end, 2>});
  cases.push_back({"ring/block_sync_only", run_ring<Ring::block_sync_only, 4>});
  cases.push_back({"ring/rank_outside", run_ring<Ring::rank_outside, 2>});
  cases.push_back({"multicast_to_2", run_multicast<Cast::right, 2>});
  cases.push_back({"multicast_to_4", run_multicast<Cast::right, 4>});
  cases.push_back({"multicast/no_cluster_sync", run_multicast<Cast::no_cluster_sync, 2>});
  cases.push_back({"multicast/no_wait_on_empty", run_multicast<Cast::no_wait_on_empty, 2>});
  cases.push_back({"multicast/rank_outside", run_multicast<Cast::rank_outside, 2>});
}

}  // namespace hebatron::cases
