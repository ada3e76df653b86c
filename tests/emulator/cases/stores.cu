// TMA stores: shared memory is read some time after the issue, device memory written later still.
#include "cases.h"

namespace hebatron::cases {
namespace {

constexpr int kTiles = 4, kThreads = 64;

// ---- tile after tile through one buffer ----
enum class Out { right, no_proxy_fence, no_sync, no_wait_read, no_commit, left_unread, past_tensor, misaligned };

template <Out bug>
__global__ void tile_out(const float* in, float* out) {
  HEBATRON_SHARED(float4, buffer, kThreads / 4);
  float* const tile = reinterpret_cast<float*>(buffer);
  const int t = threadIdx.x;
  for (int i = 0; i < kTiles; i++) {
    tile[t] = in[i * kThreads + t] + 1;  // LINE: tile_out.write
    if (bug != Out::no_proxy_fence) fence_proxy_async();
    if (bug != Out::no_sync) block_sync();
    if (t == 0) {
      const int shift = bug == Out::past_tensor && i == kTiles - 1 ? 4 : bug == Out::misaligned ? 1 : 0;
      tma_store_1d(out + i * kThreads + shift, tile, kThreads * 4);  // LINE: tile_out.store
      if (bug != Out::no_commit) tma_commit();
      if (bug != Out::no_wait_read && !(bug == Out::left_unread && i == kTiles - 1)) tma_wait_read<0>();
    }
    block_sync();  // LINE: tile_out.end
  }
  if (t == 0 && bug != Out::left_unread) tma_wait<0>();
}
template <Out bug>
void run_tile_out() {
  Tensor<float> in("in", kTiles * kThreads, small), out("out", kTiles * kThreads);
  run(tile_out<bug>, 1, kThreads, 0, 1, in.get(), out.get());
  out.expect([](size_t i) { return small(i) + 1; });
}

// ---- a TMA tile store of 2 dimensions that the tensor's edges clip, and additions of several blocks to one place ----
template <class T>
__global__ void tile_add(HEBATRON_GRID_CONSTANT(TensorMap) map, const T* in, int x, int y) {
  HEBATRON_DYNAMIC_SHARED(smem);
  T* const tile = reinterpret_cast<T*>(smem);
  for (int i = threadIdx.x; i < 16 * 8; i += blockDim.x) tile[i] = in[i];
  fence_proxy_async();
  block_sync();
  if (threadIdx.x == 0) {
    tma_reduce_add_2d(&map, tile, x, y);
    tma_commit();
    tma_wait<0>();
  }
}
void run_tile_add() {
  Tensor<float> in("in", 16 * 8, small), out("out", 20 * 12);
  TensorMapShape shape;
  shape.dim[0] = 20;
  shape.dim[1] = 12;
  shape.stride[0] = 80;
  shape.box[0] = 16;
  shape.box[1] = 8;
  shape.dtype = DType::f32;
  shape.swizzle = Swizzle::none;
  const TensorMap map = tensor_map("case", out.get(), shape);
  run(tile_add<float>, 5, 32, 16 * 8 * 4, 1, map, in.get(), 8, -3);  // 12 columns and 5 rows of the box lie inside
  out.expect([](size_t i) {
    const size_t x = i % 20, y = i / 20;
    return x >= 8 && y < 5 ? 5 * small((y + 3) * 16 + x - 8) : 0.0f;
  });
}

// ---- two blocks store, one reads: device memory written by TMA needs the wait, then a release ----
enum class Publish { right, no_wait };

template <Publish bug>
__global__ void publish(float* middle, uint32_t* flag, float* out) {
  HEBATRON_SHARED(float4, buffer, 8);
  float* const tile = reinterpret_cast<float*>(buffer);
  const int lane = lane_id();
  if (blockIdx.x == 0) {
    tile[lane] = float(lane);
    fence_proxy_async();
    warp_sync();
    if (lane == 0) {
      tma_store_1d(middle, tile, 128);  // LINE: publish.store
      tma_commit();
      if (bug == Publish::right) tma_wait<0>();
      else tma_wait_read<0>();  // says only that shared memory was read
      store_release(flag, 1u);
    }
  } else {
    if (lane == 0)
      while (load_acquire(flag) == 0) {
      }
    warp_sync();
    out[lane] = middle[lane];  // LINE: publish.read
  }
}
template <Publish bug>
void run_publish() {
  Tensor<float> middle("middle", kWarp), out("out", kWarp);
  Tensor<uint32_t> flag("flag", 1);
  run(publish<bug>, 2, kWarp, 0, 1, middle.get(), flag.get(), out.get());
  out.expect([](size_t i) { return float(i); });
}

}  // namespace

void add_store_cases(Cases& cases) {
  cases.push_back({"tile_out", run_tile_out<Out::right>});
  cases.push_back({"tile_out/no_proxy_fence", run_tile_out<Out::no_proxy_fence>});
  cases.push_back({"tile_out/no_sync", run_tile_out<Out::no_sync>});
  cases.push_back({"tile_out/no_wait_read", run_tile_out<Out::no_wait_read>});
  cases.push_back({"tile_out/no_commit", run_tile_out<Out::no_commit>});
  cases.push_back({"tile_out/left_unread", run_tile_out<Out::left_unread>});
  cases.push_back({"tile_out/past_tensor", run_tile_out<Out::past_tensor>});
  cases.push_back({"tile_out/misaligned", run_tile_out<Out::misaligned>});
  cases.push_back({"tile_add", run_tile_add});
  cases.push_back({"publish", run_publish<Publish::right>});
  cases.push_back({"publish/no_wait", run_publish<Publish::no_wait>});
}

}  // namespace hebatron::cases
