// The tensor copy engine: loads with and without swizzle inside, across and outside the tensor's edges, multicast in a
// cluster, stores and additions that the edges clip. What a load left in shared memory is recorded as raw bytes.
#pragma once
#include <thread>

#include "harness.h"

namespace hebatron::conformance {

HEBATRON_DEVICE void copy_words(uint32_t* to, const uint32_t* from, uint32_t count) {
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

// Corners of the boxes that the cases move: inside, across each edge, before the origin, wholly outside.
struct Corner {
  int x, y, z;
};
struct Corners {
  int count;
  Corner at[8];
};

struct TensorCase {
  TensorMapShape shape;
  Corners corners;
  uint32_t bytes_element() const { return shape.dtype == DType::f32 ? 4 : 2; }
  size_t bytes_tensor() const { return shape.stride[shape.rank - 2] * shape.dim[shape.rank - 1]; }
  uint32_t bytes_box() const { return shape.box[0] * shape.box[1] * shape.box[2] * bytes_element(); }
};

// dims, row pitch in bytes (slices lie dims[1] rows apart), box.
inline TensorCase tensor_case(DType dtype, Swizzle swizzle, int rank, const std::vector<uint64_t>& dim, uint64_t bytes_pitch,
                              const std::vector<uint32_t>& box, const std::vector<Corner>& corners) {
  TensorCase t;
  t.shape.rank = rank;
  t.shape.dtype = dtype;
  t.shape.swizzle = swizzle;
  for (int i = 0; i < rank; i++) {
    t.shape.dim[i] = dim[i];
    t.shape.box[i] = box[i];
  }
  t.shape.stride[0] = bytes_pitch;
  t.shape.stride[1] = bytes_pitch * t.shape.dim[1];
  t.corners.count = int(corners.size());
  for (size_t i = 0; i < corners.size(); i++) t.corners.at[i] = corners[i];
  return t;
}

// 37 x 72 bf16 with rows of 144 bytes; 20 x 40 fp32; 3 x 20 x 72 bf16. The same numbers stand in expected.py.
inline TensorCase matrix_bf16(Swizzle swizzle) {
  const std::vector<uint32_t> box = swizzle == Swizzle::k128 ? std::vector<uint32_t>{64, 16} : std::vector<uint32_t>{24, 5};
  return tensor_case(DType::bf16, swizzle, 2, {72, 37}, 144, box, {{0, 0, 0}, {8, 30, 0}, {-8, -5, 0}, {40, 3, 0}, {80, 0, 0}, {0, 37, 0}});
}
inline TensorCase matrix_f32(Swizzle swizzle) {
  return tensor_case(DType::f32, swizzle, 2, {40, 20}, 176, {32, 8}, {{0, 0, 0}, {16, 15, 0}, {-4, -1, 0}, {39, 19, 0}});
}
inline TensorCase stack_bf16() {
  return tensor_case(DType::bf16, Swizzle::k128, 3, {72, 20, 3}, 144, {64, 8, 2}, {{0, 0, 0}, {8, 16, 1}, {64, -3, 2}, {0, 4, -1}, {0, 0, 3}});
}

// Loads
template <int kRank>
__global__ void tensor_loads(HEBATRON_GRID_CONSTANT(TensorMap) map, const Corners corners, uint32_t bytes_box, uint32_t* out) {
  HEBATRON_DYNAMIC_SHARED(smem);
  HEBATRON_SHARED(uint64_t, barrier, 1);
  uint32_t* words = reinterpret_cast<uint32_t*>(smem);
  if (threadIdx.x == 0) {
    tma_prefetch(&map);
    mbarrier_init(barrier, 1);
    mbarrier_fence_init();
  }
  block_sync();
  for (int c = 0; c < corners.count; c++) {
    const Corner at = corners.at[c];
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(barrier, bytes_box);  // the whole box, also where the engine fills with zeros
      if (kRank == 2)
        tma_load_2d(smem, &map, barrier, at.x, at.y);
      else
        tma_load_3d(smem, &map, barrier, at.x, at.y, at.z);
    }
    mbarrier_wait(barrier, c % 2);
    copy_words(out + c * (bytes_box / 4), words, bytes_box / 4);
    block_sync();
  }
}
template <int kRank>
Bytes run_loads(const TensorCase& t, uint32_t seed) {
  const Buffer<uint32_t> tensor(noise_words(seed, t.bytes_tensor() / 4)), out(t.corners.count * t.bytes_box() / 4);
  const TensorMap map = tensor_map(kOp, tensor.get(), t.shape);
  run(tensor_loads<kRank>, shape_of(1, 128, int(t.bytes_box())), map, t.corners, t.bytes_box(), out.get());
  return out.read();
}
inline Bytes run_load_bf16_swizzle() { return run_loads<2>(matrix_bf16(Swizzle::k128), 40); }
inline Bytes run_load_bf16() { return run_loads<2>(matrix_bf16(Swizzle::none), 41); }
inline Bytes run_load_f32_swizzle() { return run_loads<2>(matrix_f32(Swizzle::k128), 42); }
inline Bytes run_load_f32() { return run_loads<2>(matrix_f32(Swizzle::none), 43); }
inline Bytes run_load_3d() { return run_loads<3>(stack_bf16(), 44); }

// Queries, keys and values as attention has them: rows by head and token, at an address that is a multiple of 16 and no more, heads
// next to each other or, `heads_apart`, tokens: then the strides fall from one dimension to the next.
template <bool heads_apart>
Bytes run_load_heads() {
  constexpr int kHeads = 3, kTokens = 21, kDim = 128;
  TensorCase t = tensor_case(DType::bf16, Swizzle::k128, 3, {kDim, kHeads, kTokens}, 0, {64, 1, 16}, {{0, 0, 0}, {64, 2, 3}, {64, 1, 10}, {0, 2, 21}});
  t.shape.stride[0] = heads_apart ? kTokens * kDim * 2 : kDim * 2;
  t.shape.stride[1] = heads_apart ? kDim * 2 : kHeads * kDim * 2;
  const Buffer<uint32_t> tensor(noise_words(57, 4 + kHeads * kTokens * kDim / 2)), out(t.corners.count * t.bytes_box() / 4);
  const TensorMap map = tensor_map(kOp, tensor.get() + 4, t.shape);
  run(tensor_loads<3>, shape_of(1, 128, int(t.bytes_box())), map, t.corners, t.bytes_box(), out.get());
  return out.read();
}
// The map is made in a thread that has called nothing of CUDA before: the driver makes it, and looks for a context.
inline Bytes run_load_fresh_thread() {
  const TensorCase t = stack_bf16();
  const Buffer<uint32_t> tensor(noise_words(58, t.bytes_tensor() / 4)), out(t.corners.count * t.bytes_box() / 4);
  TensorMap map;
  std::string failure;
  std::thread([&] {
    try {
      const DeviceGuard guard(on_device());
      map = tensor_map(kOp, tensor.get(), t.shape);
    } catch (const std::exception& error) {
      failure = error.what();
    }
  }).join();
  if (!failure.empty()) throw std::runtime_error(failure);
  run(tensor_loads<3>, shape_of(1, 128, int(t.bytes_box())), map, t.corners, t.bytes_box(), out.get());
  return out.read();
}

// Each block of a cluster takes one box from rank 0 for all and one from the last rank for the even ranks.
template <int kRank>
__global__ void tensor_multicast(HEBATRON_GRID_CONSTANT(TensorMap) map, const Corners corners, uint32_t bytes_box, uint32_t* out) {
  HEBATRON_DYNAMIC_SHARED(smem);
  HEBATRON_SHARED(uint64_t, barrier, 1);
  uint32_t* words = reinterpret_cast<uint32_t*>(smem);
  const uint32_t rank = cluster_rank(), size = cluster_size();
  const bool even = rank % 2 == 0;
  for (uint32_t i = threadIdx.x; i < bytes_box / 2; i += blockDim.x) words[i] = ~0u;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect(barrier, even ? 2 * bytes_box : bytes_box);
  }
  fence_proxy_async();
  cluster_sync();
  if (threadIdx.x == 0) {
    const uint16_t everyone = uint16_t((1u << size) - 1), evens = everyone & 0x5555;
    const Corner first = corners.at[blockIdx.x / size], second = corners.at[blockIdx.x / size + 1];
    if (kRank == 2) {
      if (rank == 0) tma_load_2d_multicast(smem, &map, barrier, first.x, first.y, everyone);
      if (rank == size - 1) tma_load_2d_multicast(smem + bytes_box, &map, barrier, second.x, second.y, evens);
    } else {
      if (rank == 0) tma_load_3d_multicast(smem, &map, barrier, first.x, first.y, first.z, everyone);
      if (rank == size - 1) tma_load_3d_multicast(smem + bytes_box, &map, barrier, second.x, second.y, second.z, evens);
    }
  }
  mbarrier_wait(barrier, 0);
  copy_words(out + blockIdx.x * (bytes_box / 2), words, bytes_box / 2);
  cluster_sync();
}
template <int kRank, unsigned kCluster>
Bytes run_multicast() {
  const TensorCase t = kRank == 2 ? matrix_bf16(Swizzle::k128) : stack_bf16();
  const Buffer<uint32_t> tensor(noise_words(45, t.bytes_tensor() / 4)), out(2 * kCluster * t.bytes_box() / 2);
  const TensorMap map = tensor_map(kOp, tensor.get(), t.shape);
  run(tensor_multicast<kRank>, shape_of(2 * kCluster, 128, int(2 * t.bytes_box()), kCluster), map, t.corners, t.bytes_box(), out.get());
  return out.read();
}

// Stores and additions: box c of `in` lies in shared memory as it is and goes to corner c.
enum class Write { store, add };
template <int kRank, Write kWrite>
__global__ void tensor_writes(HEBATRON_GRID_CONSTANT(TensorMap) map, const Corners corners, uint32_t bytes_box, const uint32_t* in) {
  HEBATRON_DYNAMIC_SHARED(smem);
  uint32_t* words = reinterpret_cast<uint32_t*>(smem);
  for (int c = 0; c < corners.count; c++) {
    copy_words(words, in + c * (bytes_box / 4), bytes_box / 4);
    fence_proxy_async();
    block_sync();
    if (threadIdx.x == 0) {
      const Corner at = corners.at[c];
      if (kWrite == Write::add)
        tma_reduce_add_2d(&map, smem, at.x, at.y);
      else if (kRank == 2)
        tma_store_2d(&map, smem, at.x, at.y);
      else
        tma_store_3d(&map, smem, at.x, at.y, at.z);
      tma_commit();
      if (c % 2)
        tma_wait<0>();  // written: the next store may overlap this one
      else
        tma_wait_read<0>();  // read: the shared memory is free again
    }
    block_sync();
  }
  if (threadIdx.x == 0) tma_wait<0>();
}
// Boxes that do not overlap: two stores to one place have no order.
inline Corners apart(const TensorCase& t) {
  Corners c = t.corners;
  if (t.shape.rank == 3) return Corners{3, {{0, 0, 0}, {8, 16, 1}, {64, -3, 2}}};
  c = Corners{4, {{0, 0, 0}, {int(t.shape.box[0]), 0, 0}, {-4, int(t.shape.box[1]) * 2, 0}, {int(t.shape.dim[0]), 0, 0}}};
  if (t.shape.dtype == DType::bf16) c.at[2].x = -8;
  return c;
}
template <int kRank>
Bytes run_stores(const TensorCase& t, uint32_t seed) {
  const Buffer<uint32_t> in(noise_words(seed, 4 * t.bytes_box() / 4)), tensor(t.bytes_tensor() / 4);
  const TensorMap map = tensor_map(kOp, tensor.get(), t.shape);
  run(tensor_writes<kRank, Write::store>, shape_of(1, 128, int(t.bytes_box())), map, apart(t), t.bytes_box(), in.get());
  return tensor.read();
}
inline Bytes run_store_bf16_swizzle() { return run_stores<2>(matrix_bf16(Swizzle::k128), 46); }
inline Bytes run_store_bf16() { return run_stores<2>(matrix_bf16(Swizzle::none), 47); }
inline Bytes run_store_f32() { return run_stores<2>(matrix_f32(Swizzle::none), 48); }
inline Bytes run_store_3d() { return run_stores<3>(stack_bf16(), 49); }

// Additions may meet: integers give the same sum in every order.
inline Bytes run_add_f32() {
  const TensorCase t = matrix_f32(Swizzle::none);
  const Buffer<float> in(small_floats(50, t.corners.count * t.bytes_box() / 4)), tensor(small_floats(51, t.bytes_tensor() / 4));
  const TensorMap map = tensor_map(kOp, tensor.get(), t.shape);
  run(tensor_writes<2, Write::add>, shape_of(3, 128, int(t.bytes_box())), map, t.corners, t.bytes_box(),
      reinterpret_cast<const uint32_t*>(in.get()));
  return tensor.read();
}
inline Bytes run_add_bf16_swizzle() {
  const TensorCase t = matrix_bf16(Swizzle::k128);
  const Buffer<uint16_t> in(small_bf16(52, t.corners.count * t.bytes_box() / 2)), tensor(small_bf16(53, t.bytes_tensor() / 2));
  const TensorMap map = tensor_map(kOp, tensor.get(), t.shape);
  run(tensor_writes<2, Write::add>, shape_of(2, 128, int(t.bytes_box())), map, t.corners, t.bytes_box(),
      reinterpret_cast<const uint32_t*>(in.get()));
  return tensor.read();
}

// Bytes in a row: 2,048 in, out to another place, and added by two blocks to what is there.
__global__ void bulk(const uint32_t* in, uint32_t* out, float* sum) {
  HEBATRON_DYNAMIC_SHARED(smem);
  HEBATRON_SHARED(uint64_t, barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect(barrier, 2048 + 16);
    tma_load_1d(smem, in + 4, 2048, barrier);
    tma_load_1d(smem + 2048, in, 16, barrier);
  }
  block_sync();
  mbarrier_wait(barrier, 0);
  if (threadIdx.x == 0) {
    tma_store_1d(out + blockIdx.x * 516, smem + 2048, 16);
    tma_store_1d(out + blockIdx.x * 516 + 4, smem, 2048);
    tma_reduce_add_1d(sum, reinterpret_cast<const float*>(smem), 1024);
    tma_commit();
    tma_wait<0>();
  }
}
inline Bytes run_bulk() {
  std::vector<float> values = small_floats(54, 516);
  const Buffer<float> in(values), sum(small_floats(55, 256));
  const Buffer<uint32_t> out(2 * 516);
  run(bulk, shape_of(2, 128, 2048 + 16), reinterpret_cast<const uint32_t*>(in.get()), out.get(), sum.get());
  Bytes found = out.read();
  const Bytes sums = sum.read();
  found.insert(found.end(), sums.begin(), sums.end());
  return found;
}

// What a thread wrote to global memory, loaded by the copy engine of the next block: fence_proxy_async_global.
__global__ void proxy_global(const uint32_t* in, uint32_t* middle, uint32_t* flag, uint32_t* out) {
  HEBATRON_DYNAMIC_SHARED(smem);
  HEBATRON_SHARED(uint64_t, barrier, 1);
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    for (int i = 0; i < 64; i++) middle[i] = in[i] ^ 0x5a5a5a5a;
    fence_proxy_async_global();
    store_release(flag, 1u);
    return;
  }
  mbarrier_init(barrier, 1);
  mbarrier_fence_init();
  while (load_acquire(flag) == 0) {
  }
  fence_proxy_async_global();
  mbarrier_arrive_expect(barrier, 256);
  tma_load_1d(smem, middle, 256, barrier);
  mbarrier_wait(barrier, 0);
  for (int i = 0; i < 64; i++) out[i] = reinterpret_cast<const uint32_t*>(smem)[i];
}
inline Bytes run_proxy_global() {
  const Buffer<uint32_t> in(noise_words(56, 64)), middle(64), flag(std::vector<uint32_t>(1, 0)), out(64);
  run(proxy_global, shape_of(2, kWarp, 256), in.get(), middle.get(), flag.get(), out.get());
  return out.read();
}

inline void add_tma_cases(Cases& cases) {
  cases.push_back({"tma_load_bf16_swizzle", run_load_bf16_swizzle});
  cases.push_back({"tma_load_bf16", run_load_bf16});
  cases.push_back({"tma_load_f32_swizzle", run_load_f32_swizzle});
  cases.push_back({"tma_load_f32", run_load_f32});
  cases.push_back({"tma_load_3d", run_load_3d});
  cases.push_back({"tma_load_heads", run_load_heads<false>});
  cases.push_back({"tma_load_heads_apart", run_load_heads<true>});
  cases.push_back({"tma_fresh_thread", run_load_fresh_thread});
  cases.push_back({"tma_multicast_2d_cluster2", run_multicast<2, 2>});
  cases.push_back({"tma_multicast_2d_cluster4", run_multicast<2, 4>});
  cases.push_back({"tma_multicast_3d_cluster2", run_multicast<3, 2>});
  cases.push_back({"tma_store_bf16_swizzle", run_store_bf16_swizzle});
  cases.push_back({"tma_store_bf16", run_store_bf16});
  cases.push_back({"tma_store_f32", run_store_f32});
  cases.push_back({"tma_store_3d", run_store_3d});
  cases.push_back({"tma_add_f32", run_add_f32});
  cases.push_back({"tma_add_bf16_swizzle", run_add_bf16_swizzle});
  cases.push_back({"bulk", run_bulk});
  cases.push_back({"proxy_global", run_proxy_global});
}

}  // namespace hebatron::conformance
