// One block: barriers, warps, bounds.
#include "cases.h"

namespace hebatron::cases {
namespace {

// ---- a block exchanges values through shared memory ----
enum class Reverse { right, no_block_sync, unwritten, past_shared, past_tensor, before_tensor };

template <Reverse bug>
__global__ void reverse(const float* in, float* out) {
  HEBATRON_SHARED(float, tile, 64);
  const int t = threadIdx.x, past = bug == Reverse::past_shared, shift = bug == Reverse::past_tensor ? 1 : bug == Reverse::before_tensor ? -1 : 0;
  if (bug != Reverse::unwritten || t != 17) tile[t + past] = in[t];  // LINE: reverse.write
  if (bug != Reverse::no_block_sync) block_sync();
  const float v = tile[63 - t];  // LINE: reverse.read
  out[t + shift] = v;            // LINE: reverse.out
}
template <Reverse bug>
void run_reverse() {
  Tensor<float> in("in", 64, small), out("out", 64);
  run(reverse<bug>, 1, 64, 0, 1, in.get(), out.get());
  out.expect([](size_t i) { return small(63 - i); });
}

// ---- a warp does the same: its lanes are not in step, and a shuffle orders no memory ----
enum class Swap { right, no_warp_sync, shuffle_for_sync };

template <Swap bug>
__global__ void swap(const float* in, float* out) {
  HEBATRON_SHARED(float, tile, kWarp);
  const int lane = lane_id();
  tile[lane] = in[lane];  // LINE: swap.write
  if (bug == Swap::right) warp_sync();
  if (bug == Swap::shuffle_for_sync) shfl_xor(lane, 1);
  out[lane] = tile[lane ^ 1];  // LINE: swap.read
}
template <Swap bug>
void run_swap() {
  Tensor<float> in("in", kWarp, small), out("out", kWarp);
  run(swap<bug>, 1, kWarp, 0, 1, in.get(), out.get());
  out.expect([](size_t i) { return small(i ^ 1); });
}

// ---- named barriers: one warp fills a buffer for another, twice ----
enum class Handover { right, no_full, no_empty, wrong_count };

template <Handover bug>
__global__ void handover(const float* in, float* out) {
  HEBATRON_SHARED(float, buffer, kWarp);
  constexpr int kFull = 1, kEmpty = 2;
  const int lane = lane_id();
  for (int round = 0; round < 4; round++) {
    if (threadIdx.x < kWarp) {
      if (round && bug != Handover::no_empty) named_barrier_sync(kEmpty, 64);
      buffer[lane] = in[round * kWarp + lane];  // LINE: handover.write
      named_barrier_arrive(kFull, 64);          // LINE: handover.arrive
    } else {
      if (bug != Handover::no_full) named_barrier_sync(kFull, bug == Handover::wrong_count ? 32 : 64);  // LINE: handover.full
      out[round * kWarp + lane] = buffer[31 - lane];  // LINE: handover.read
      if (round < 3 && bug != Handover::no_empty) named_barrier_arrive(kEmpty, 64);
    }
  }
}
template <Handover bug>
void run_handover() {
  Tensor<float> in("in", 4 * kWarp, small), out("out", 4 * kWarp);
  run(handover<bug>, 1, 64, 0, 1, in.get(), out.get());
  out.expect([](size_t i) { return small(i / 32 * 32 + 31 - i % 32); });
}

// ---- collectives that not everyone reaches ----
__global__ void half_a_warp(float* out) {
  float v = float(lane_id());
  if (lane_id() < 16) v = shfl_xor(v, 1);  // LINE: half_a_warp.shuffle
  out[lane_id()] = v;
}
void run_half_a_warp() {
  Tensor<float> out("out", kWarp);
  run(half_a_warp, 1, kWarp, 0, 1, out.get());
}

__global__ void two_collectives(uint32_t* out) {
  uint32_t v;
  if (lane_id() < 16)
    v = shfl_xor(7u, 1);  // LINE: two_collectives.shuffle
  else
    v = ballot(true);  // LINE: two_collectives.ballot
  out[lane_id()] = v;
}
void run_two_collectives() {
  Tensor<uint32_t> out("out", kWarp);
  run(two_collectives, 1, kWarp, 0, 1, out.get());
}

__global__ void half_a_block(float* out) {
  if (threadIdx.x < 32) block_sync();  // LINE: half_a_block.sync
  out[threadIdx.x] = 1;
}
void run_half_a_block() {
  Tensor<float> out("out", 64);
  run(half_a_block, 1, 64, 0, 1, out.get());
}

// ---- what the C++ of a thread does wrong: found by the compiler's own checks ----
__global__ void local_array(const int* in, float* out) {
  float local[4] = {1, 2, 3, 4};
  local[in[0]] = 5;  // LINE: local_array.index
  out[0] = local[0] + local[1] + local[2] + local[3];
}
void run_local_array() {
  Tensor<int> in("in", 1, [](size_t) { return 4; });
  Tensor<float> out("out", 1);
  run(local_array, 1, 1, 0, 1, in.get(), out.get());
}

__global__ void shift(const int* in, int* out) { out[0] = 1 << in[0]; }  // LINE: shift
void run_shift() {
  Tensor<int> in("in", 1, [](size_t) { return 32; }), out("out", 1);
  run(shift, 1, 1, 0, 1, in.get(), out.get());
}

__global__ void overflow(const int* in, int* out) { out[0] = in[0] * in[0]; }  // LINE: overflow
void run_overflow() {
  Tensor<int> in("in", 1, [](size_t) { return 65536; }), out("out", 1);
  run(overflow, 1, 1, 0, 1, in.get(), out.get());
}

__global__ void misaligned(const float* in, float* out) {
  const float4 v = *reinterpret_cast<const float4*>(in + 4 * threadIdx.x + 1);  // LINE: misaligned
  out[threadIdx.x] = v.x + v.y + v.z + v.w;
}
void run_misaligned() {
  Tensor<float> in("in", 132, small), out("out", 32);
  run(misaligned, 1, kWarp, 0, 1, in.get(), out.get());
}

// ---- static shared memory beside all the dynamic memory that a block may have, less one unit of 1,024 bytes or not ----
template <int kLeft>
__global__ void both_memories(float* out) {
  HEBATRON_DYNAMIC_SHARED(dynamic);
  HEBATRON_SHARED(float, fixed, kWarp);  // LINE: both_memories
  fixed[threadIdx.x] = 1.0f;
  reinterpret_cast<float*>(dynamic)[threadIdx.x] = 2.0f;
  out[threadIdx.x] = fixed[threadIdx.x] + reinterpret_cast<float*>(dynamic)[threadIdx.x];
}
template <int kLeft>
void run_both_memories() {
  Tensor<float> out("out", kWarp);
  run(both_memories<kLeft>, 1, kWarp, 232448 - kLeft, 1, out.get());
  out.expect([](size_t) { return 3.0f; });
}

// ---- registers of a warpgroup ----
// 384 threads have 168 each: what one warpgroup gives, the other two take.
template <int kFewer, int kMore>
__global__ void registers(float* out) {
  if (threadIdx.x < kWarpgroup) {
    registers_decrease<kFewer>();  // LINE: registers.fewer
  } else {
    registers_increase<kMore>();  // LINE: registers.more
  }
  out[threadIdx.x] = 1;
}
template <int kFewer, int kMore>
void run_registers() {
  Tensor<float> out("out", 384);
  run(registers<kFewer, kMore>, 1, 384, 0, 1, out.get());
  out.expect([](size_t) { return 1.0f; });
}

__global__ void one_warp_decreases(float* out) {
  if (threadIdx.x < kWarp) registers_decrease<40>();  // LINE: one_warp_decreases
  out[threadIdx.x] = 1;
}
void run_one_warp_decreases() {
  Tensor<float> out("out", 128);
  run(one_warp_decreases, 1, 128, 0, 1, out.get());
}

}  // namespace

void add_thread_cases(Cases& cases) {
  cases.push_back({"reverse", run_reverse<Reverse::right>});
  cases.push_back({"reverse/no_block_sync", run_reverse<Reverse::no_block_sync>});
  cases.push_back({"reverse/unwritten", run_reverse<Reverse::unwritten>});
  cases.push_back({"reverse/past_shared", run_reverse<Reverse::past_shared>});
  cases.push_back({"reverse/past_tensor", run_reverse<Reverse::past_tensor>});
  cases.push_back({"reverse/before_tensor", run_reverse<Reverse::before_tensor>});
  cases.push_back({"swap", run_swap<Swap::right>});
  cases.push_back({"swap/no_warp_sync", run_swap<Swap::no_warp_sync>});
  cases.push_back({"swap/shuffle_for_sync", run_swap<Swap::shuffle_for_sync>});
  cases.push_back({"handover", run_handover<Handover::right>});
  cases.push_back({"handover/no_full", run_handover<Handover::no_full>});
  cases.push_back({"handover/no_empty", run_handover<Handover::no_empty>});
  cases.push_back({"handover/wrong_count", run_handover<Handover::wrong_count>});
  cases.push_back({"collective/half_a_warp", run_half_a_warp});
  cases.push_back({"collective/two_kinds", run_two_collectives});
  cases.push_back({"collective/half_a_block", run_half_a_block});
  cases.push_back({"language/local_array", run_local_array});
  cases.push_back({"language/shift", run_shift});
  cases.push_back({"language/overflow", run_overflow});
  cases.push_back({"language/misaligned", run_misaligned});
  cases.push_back({"both_memories", run_both_memories<1024>});
  cases.push_back({"both_memories/no_room_for_alignment", run_both_memories<512>});
  cases.push_back({"registers", run_registers<40, 232>});
  cases.push_back({"registers/not_of_8", run_registers<44, 232>});
  cases.push_back({"registers/too_many", run_registers<40, 240>});
  cases.push_back({"registers/no_decrease", run_registers<176, 168>});
  cases.push_back({"registers/one_warp", run_one_warp_decreases});
}

}  // namespace hebatron::cases
