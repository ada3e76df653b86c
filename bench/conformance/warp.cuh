// Warp and block collectives, order between blocks, clusters, conversions, approximate functions, dependent launches.
#pragma once
#include <cmath>

#include "harness.h"

namespace hebatron::conformance {

// Shuffles and votes: row r of `out` holds the 32 lanes' results of the r-th primitive.
__global__ void shuffles(const uint32_t* in, uint32_t* out) {
  const int lane = lane_id();
  const uint32_t v = in[lane];
  const float f = float(int(v % 1000) - 500);
  const uint32_t results[16] = {
      shfl(v, 5),
      shfl(v, (lane * 7 + 3) % kWarp),
      shfl_xor(v, 1),
      shfl_xor(v, 16),
      shfl_xor(v, 31),
      shfl_up(v, 1),
      shfl_up(v, 9),
      shfl_down(v, 1),
      shfl_down(v, 31),
      bits(shfl_xor(f, 8)),
      uint32_t(shfl(int(v), 31 - lane)),
      ballot(v & 1),
      uint32_t(any(v == in[7])),
      uint32_t(any(lane == kWarp)),
      uint32_t(all(lane < kWarp)),
      uint32_t(all(lane < kWarp - 1)),
  };
#pragma unroll
  for (int r = 0; r < 16; r++) out[r * kWarp + lane] = results[r];
  const uint32_t elected = ballot(elect_one());  // which lane is the hardware's choice; that it is one lane is not
  out[16 * kWarp + lane] = elected != 0 && (elected & (elected - 1)) == 0;
  out[17 * kWarp + lane] = bits(warp_sum(f));
  if (lane < 16) {
    out[18 * kWarp + lane] = 1;
  } else {
    out[18 * kWarp + lane] = uint32_t(population_count(v));
  }
  warp_sync();
}
inline Bytes run_shuffles() {
  const Buffer<uint32_t> in(noise_words(1, kWarp));
  const Buffer<uint32_t> out(19 * kWarp);
  run(shuffles, shape_of(1, kWarp), in.get(), out.get());
  return out.read();
}

// 256 threads exchange words through shared memory under each kind of block barrier.
__global__ void barriers(const uint32_t* in, uint32_t* out) {
  HEBATRON_SHARED(uint32_t, words, 256);
  HEBATRON_SHARED(float, slots, kWarp);
  const int t = threadIdx.x;
  words[t] = in[t];
  block_sync();
  out[t] = words[255 - t];
  block_sync();
  if (t < 128) {
    words[t] = in[256 + t];
    named_barrier_arrive(1, 256);
  } else {
    named_barrier_sync(1, 256);
    out[256 + t - 128] = words[(t * 5) % 128];
    words[t] = in[256 + t];
    named_barrier_sync(2, 128);  // among the second half only
    out[384 + t - 128] = words[128 + (t + 17) % 128];
  }
  block_sync();
  out[512 + t] = bits(block_sum(float(int(in[t] % 101) - 50), slots));
}
inline Bytes run_barriers() {
  const Buffer<uint32_t> in(noise_words(2, 512));
  const Buffer<uint32_t> out(768);
  run(barriers, shape_of(1, 256), in.get(), out.get());
  return out.read();
}

// The last block adds up what all wrote (tickets); each block adds to what the block before it published (look-back).
__global__ void tickets(const uint32_t* in, uint32_t* partial, uint32_t* ticket, uint32_t* flag, uint32_t* total, uint32_t* out) {
  if (threadIdx.x != 0) return;
  const uint32_t block = blockIdx.x;
  partial[block] = in[block];
  fence_gpu();
  if (atomic_add(ticket, 1u) == gridDim.x - 1) {
    fence_gpu();
    uint32_t sum = 0;
    for (uint32_t b = 0; b < gridDim.x; b++) sum += partial[b];
    out[0] = sum;
  }
  uint32_t before = 0;
  if (block > 0) {
    while (load_acquire(flag + block - 1) == 0) {
    }
    before = total[block - 1];
  }
  total[block] = before + in[block];
  store_release(flag + block, 1u);
  out[1 + block] = before + in[block];
}
inline Bytes run_tickets() {
  constexpr unsigned kBlocks = 16;
  const Buffer<uint32_t> in(noise_words(3, kBlocks));
  const Buffer<uint32_t> partial(kBlocks), total(kBlocks), out(1 + kBlocks);
  const Buffer<uint32_t> ticket(std::vector<uint32_t>(1, 0)), flag(std::vector<uint32_t>(kBlocks, 0));
  run(tickets, shape_of(kBlocks, kWarp), in.get(), partial.get(), ticket.get(), flag.get(), total.get(), out.get());
  return out.read();
}

// Results that do not depend on the order in which the threads come.
__global__ void atomics(const uint32_t* in, uint32_t* words, float* sum, uint32_t* seen) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  seen[i] = atomic_add(words + 0, 1u) < gridDim.x * blockDim.x;
  atomic_add(sum, float(int(in[i] % 101) - 50));
  atomic_max(words + 1, in[i]);
  const uint32_t before = atomic_exchange(words + 2, in[i]);
  atomic_add(words + 3, before);
  fence_block();
}
inline Bytes run_atomics() {
  const Buffer<uint32_t> in(noise_words(4, 256)), words(std::vector<uint32_t>(4, 0));
  const Buffer<float> sum(std::vector<float>(1, 0.0f));
  const Buffer<uint32_t> seen(256);
  run(atomics, shape_of(4, 64), in.get(), words.get(), sum.get(), seen.get());
  const Bytes raw = words.read();
  uint32_t found[4];
  std::memcpy(found, raw.data(), sizeof(found));
  // Everything put in by exchange came out again or is still there.
  const uint32_t result[3] = {found[0], found[1], found[2] + found[3]};
  Bytes out(reinterpret_cast<const uint8_t*>(result), reinterpret_cast<const uint8_t*>(result) + sizeof(result));
  for (const Bytes& part : {sum.read(), seen.read()}) out.insert(out.end(), part.begin(), part.end());
  return out;
}

__global__ void streaming(const uint4* in, uint4* out) {
  const uint4 v = load_streaming(in + (threadIdx.x ^ 3));
  uint2* halves = reinterpret_cast<uint2*>(out + threadIdx.x);
  switch (threadIdx.x % 4) {
    case 0:
      store_streaming(halves, uint2{v.x, v.y});
      return store_streaming(halves + 1, uint2{v.z, v.w});
    case 1:
      return store_streaming(out + threadIdx.x, v);
    case 2:
      store_vector(halves, uint2{v.x, v.y});
      return store_vector(halves + 1, uint2{v.z, v.w});
    default:
      store_vector(out + threadIdx.x, v);
  }
}
inline Bytes run_streaming() {
  const Buffer<uint32_t> in(noise_words(5, 64 * 4));
  const Buffer<uint32_t> out(64 * 4);
  run(streaming, shape_of(1, 64), reinterpret_cast<const uint4*>(in.get()), reinterpret_cast<uint4*>(out.get()));
  return out.read();
}

// Clusters: neighbours' shared memory read and written, and arrivals on every block's barrier.
__global__ void cluster_memory(const uint32_t* in, uint32_t* out) {
  HEBATRON_SHARED(uint32_t, mine, 64);
  HEBATRON_SHARED(uint64_t, barrier, 1);
  const uint32_t t = threadIdx.x, block = blockIdx.x, rank = cluster_rank(), size = cluster_size();
  mine[t] = in[block * 64 + t];
  if (t == 0) {
    mbarrier_init(barrier, size);
    mbarrier_fence_init();
  }
  cluster_sync();
  uint32_t* result = out + block * 132;
  result[t] = load_cluster(map_to_rank(smem_address(mine + t), (rank + 1) % size));
  cluster_sync();
  store_cluster(map_to_rank(smem_address(mine + 63 - t), (rank + 2) % size), in[block * 64 + t] + rank);
  cluster_sync();
  result[64 + t] = mine[t];
  if (t < size) mbarrier_arrive_rank(barrier, t);
  mbarrier_wait(barrier, 0);
  if (t == 0) {
    result[128] = rank;
    result[129] = size;
    result[130] = mbarrier_test(barrier, 0);
    result[131] = 0;
  }
  cluster_sync();  // no block leaves while another may still reach its memory
}
template <unsigned kCluster>
Bytes run_cluster_memory() {
  const Buffer<uint32_t> in(noise_words(6, 8 * 64));
  const Buffer<uint32_t> out(8 * 132);
  run(cluster_memory, shape_of(8, 64, 0, kCluster), in.get(), out.get());
  return out.read();
}

// bf16 and back: ties, overflow, denormals, infinities, NaN, and the packs that kernels move.
__global__ void conversions(const float* in, uint32_t* out) {
  const int t = threadIdx.x;
  float eight[8];
  load<8>(in + 8 * t, eight);
  __nv_bfloat16 narrowed[8];
  store<8>(reinterpret_cast<__nv_bfloat16*>(out) + 8 * t, eight);
#pragma unroll
  for (int i = 0; i < 8; i++) narrow(eight[i], narrowed[i]);
#pragma unroll
  for (int i = 0; i < 8; i++) out[128 + 8 * t + i] = bits(widen(narrowed[i]));
#pragma unroll
  for (int i = 0; i < 4; i++) out[384 + 4 * t + i] = pack_bf16(eight[2 * i], eight[2 * i + 1]);
}
inline std::vector<uint32_t> conversion_inputs() {
  std::vector<uint32_t> words = noise_words(7, 256);
  const uint32_t special[] = {0x00000000, 0x80000000, 0x3f808000, 0x3f818000, 0x3f808001, 0x3f807fff, 0x7f7fffff, 0xff7fffff,
                              0x7f800000, 0xff800000, 0x7fc00000, 0x00000001, 0x807fffff, 0x00008000, 0x00018000, 0x7f7f8000};
  for (size_t i = 0; i < sizeof(special) / sizeof(special[0]); i++) words[i] = special[i];
  for (size_t i = 16; i < words.size(); i++)
    if ((words[i] & 0x7f800000) == 0x7f800000) words[i] &= 0x807fffff;  // one NaN is enough
  return words;
}
inline Bytes run_conversions() {
  const Buffer<uint32_t> in(conversion_inputs());
  const Buffer<uint32_t> out(512);
  run(conversions, shape_of(1, 32), reinterpret_cast<const float*>(in.get()), out.get());
  return out.read();
}

__global__ void approximations(float* out) {
  const int t = threadIdx.x;
  out[t] = exp2_approx(float(t - 128) * 0.117f);
  out[256 + t] = exp_approx(float(t - 128) * 0.0625f);
  out[512 + t] = rsqrt_approx(0.01f + float(t) * 1.37f);
  out[768 + t] = sqrt_approx(0.01f + float(t) * 1.37f);
}
inline Bytes run_approximations() {
  const Buffer<float> out(1024);
  run(approximations, shape_of(1, 256), out.get());
  return out.read();
}

// What softmax, gates and norms rely on at the ends of the range, where every chip must give the same.
__global__ void limits(const float* in, uint32_t* out) {
  const float v = in[threadIdx.x];
  const float results[7] = {exp2_approx(v),  exp_approx(v), rsqrt_approx(v), sqrt_approx(v), 1.0f / (1.0f + exp_approx(-v)),
                            fmaxf(v, 3.0f), v - v};
#pragma unroll
  for (int i = 0; i < 7; i++) out[threadIdx.x * 7 + i] = results[i] != results[i] ? 0x7fffffffu : bits(results[i]);
}
inline Bytes run_limits() {
  const Buffer<float> in(std::vector<float>{-INFINITY, INFINITY, NAN, 0.0f, -1000.0f});
  const Buffer<uint32_t> out(5 * 7);
  run(limits, shape_of(1, 5), in.get(), out.get());
  return out.read();
}

// The second kernel may start early and must see what the first one wrote.
__global__ void dependent_first(const uint32_t* in, uint32_t* middle) {
  grid_dependency_launch();
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  uint32_t v = in[i];
  for (int step = 0; step < 2000; step++) v = v * 1664525u + 1013904223u;
  middle[i] = v;
}
__global__ void dependent_second(const uint32_t* middle, uint32_t* out) {
  grid_dependency_wait();
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = middle[gridDim.x * blockDim.x - 1 - i] + i;
}
inline Bytes run_dependent_launch() {
  const Buffer<uint32_t> in(noise_words(8, 512)), middle(512), out(512);
  run(dependent_first, shape_of(4, 128), in.get(), middle.get());
  LaunchShape second = shape_of(4, 128);
  second.dependent = true;
  run(dependent_second, second, middle.get(), out.get());
  return out.read();
}

// Registers handed from one warpgroup to the others, which then hold more values at once than they were launched with: a
// register that was not theirs loses its value, and a sum that does not come out makes them wait for ever.
template <int kThreads, int kFewer, int kMore, int kHeld>
__global__ void __launch_bounds__(kThreads, 1) registers(const float* in, float* out) {
  if (threadIdx.x < kWarpgroup) {
    registers_decrease<kFewer>();
    out[threadIdx.x] = in[threadIdx.x];
  } else {
    registers_increase<kMore>();
    float held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; i++) held[i] = in[i * kThreads + threadIdx.x];
    wgmma_hold(held);  // all of them at once: they are loaded before and stored after
#pragma unroll
    for (int i = 0; i < kHeld; i++) out[i * kThreads + threadIdx.x] = held[i];
  }
}
template <int kThreads, int kFewer, int kMore, int kHeld>
Bytes run_registers() {
  const Buffer<float> in(small_floats(9, kHeld * kThreads)), out(kHeld * kThreads);
  run(registers<kThreads, kFewer, kMore, kHeld>, shape_of(1, kThreads), in.get(), out.get());
  return out.read();
}

inline void add_warp_cases(Cases& cases) {
  cases.push_back({"shuffles", run_shuffles});
  cases.push_back({"barriers", run_barriers});
  cases.push_back({"tickets", run_tickets});
  cases.push_back({"atomics", run_atomics});
  cases.push_back({"streaming", run_streaming});
  cases.push_back({"cluster2", run_cluster_memory<2>});
  cases.push_back({"cluster4", run_cluster_memory<4>});
  cases.push_back({"conversions", run_conversions});
  cases.push_back({"approximations", run_approximations, 16});  // exp_approx: 2 + 1.17 |x| units, |x| <= 8
  cases.push_back({"limits", run_limits});
  cases.push_back({"dependent_launch", run_dependent_launch});
  cases.push_back({"registers_384", run_registers<384, 40, 232, 208>});
  cases.push_back({"registers_512", run_registers<512, 56, 152, 136>});
}

}  // namespace hebatron::conformance
