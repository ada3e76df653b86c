// cp.async: copies that a thread starts and waits for by groups, or lets arrive at an mbarrier.
#include "cases.h"

namespace hebatron::cases {
namespace {

constexpr int kTiles = 6, kThreads = 64, kStages = 3;

// ---- a pipeline of three stages; every thread copies 16 bytes of a tile and sums another thread's ----
enum class Staged { right, no_wait, one_group_less, no_sync_after_wait, no_sync_before_reuse, left_open, misaligned };

template <Staged bug>
__global__ void staged(const float4* in, float* out) {
  HEBATRON_SHARED(float4, stage, kStages * kThreads);
  const int t = threadIdx.x;
  const auto copy = [&](int tile) {
    const int skew = bug == Staged::misaligned ? 4 : 0;
    if (tile < kTiles) cp_async_16(smem_address(stage + tile % kStages * kThreads + t) + skew, in + tile * kThreads + t, true);  // LINE: staged.copy
    cp_async_commit();  // an empty group at the end keeps the count the same
  };
  float sum = 0;
  for (int tile = 0; tile < kStages - 1; tile++) copy(tile);
  for (int tile = 0; tile < kTiles; tile++) {
    if (bug == Staged::one_group_less) cp_async_wait<kStages - 1>();
    else if (bug != Staged::no_wait) cp_async_wait<kStages - 2>();
    if (bug != Staged::no_sync_after_wait) block_sync();
    const float4 v = stage[tile % kStages * kThreads + kThreads - 1 - t];  // LINE: staged.read
    sum += float(tile + 1) * (v.x + v.y + v.z + v.w);
    if (bug == Staged::no_sync_after_wait) block_sync();
    copy(bug == Staged::no_sync_before_reuse ? tile + kStages : tile + kStages - 1);
  }
  if (bug != Staged::left_open) cp_async_wait<0>();
  else cp_async_16(smem_address(stage + t), in + t, true);
  out[t] = sum;  // LINE: staged.end
}
template <Staged bug>
void run_staged() {
  Tensor<float4> in("in", kTiles * kThreads, [](size_t i) { return float4{small(i), small(2 * i), small(3 * i), 1}; });
  Tensor<float> out("out", kThreads);
  run(staged<bug>, 1, kThreads, 0, 1, in.get(), out.get());
  out.expect([](size_t t) {
    float sum = 0;
    for (size_t tile = 0; tile < kTiles; tile++) {
      const size_t i = tile * kThreads + kThreads - 1 - t;
      sum += float(tile + 1) * (small(i) + small(2 * i) + small(3 * i) + 1);
    }
    return sum;
  });
}

// ---- one warp gathers rows through an index list for another; its copies arrive at an mbarrier ----
enum class Gather { right, no_wait_on_full, no_wait_on_empty };

template <Gather bug>
__global__ void gather(const float4* in, const int* rows, float4* out) {
  HEBATRON_SHARED(float4, buffer, kWarp);
  HEBATRON_SHARED(uint64_t, barriers, 2);
  uint64_t *full = barriers, *empty = barriers + 1;
  const int lane = lane_id();
  if (threadIdx.x == 0) {
    mbarrier_init(full, kWarp);
    mbarrier_init(empty, kWarp);
  }
  block_sync();
  for (int tile = 0; tile < kTiles; tile++) {
    if (threadIdx.x < kWarp) {
      if (bug != Gather::no_wait_on_empty) mbarrier_wait(empty, (tile & 1) ^ 1);
      const int row = rows[tile * kWarp + lane];
      cp_async_16(smem_address(buffer + lane), in + (row < 0 ? 0 : row), row >= 0);  // LINE: gather.copy
      cp_async_arrive(full);                                                         // LINE: gather.arrive
    } else {
      if (bug != Gather::no_wait_on_full) mbarrier_wait(full, tile & 1);
      out[tile * kWarp + lane] = buffer[31 - lane];  // LINE: gather.read
      mbarrier_arrive(empty);
    }
  }
  cp_async_wait_all();
}
template <Gather bug>
void run_gather() {
  Tensor<float4> in("in", 50, [](size_t i) { return float4{float(i), 0, 0, 0}; }), out("out", kTiles * kWarp);
  Tensor<int> rows("rows", kTiles * kWarp, [](size_t i) { return i % 5 == 0 ? -1 : int(i * 37 % 50); });
  run(gather<bug>, 1, 64, 0, 1, in.get(), rows.get(), out.get());
  for (size_t i = 0; i < kTiles * kWarp; i++) {
    const int row = rows.get()[i / 32 * 32 + 31 - i % 32];
    if (out.get()[i].x != (row < 0 ? 0 : float(row))) throw std::runtime_error("wrong: out[" + std::to_string(i) + "]");
  }
}

}  // namespace

void add_copy_cases(Cases& cases) {
  cases.push_back({"staged", run_staged<Staged::right>});
  cases.push_back({"staged/no_wait", run_staged<Staged::no_wait>});
  cases.push_back({"staged/one_group_less", run_staged<Staged::one_group_less>});
  cases.push_back({"staged/no_sync_after_wait", run_staged<Staged::no_sync_after_wait>});
  cases.push_back({"staged/no_sync_before_reuse", run_staged<Staged::no_sync_before_reuse>});
  cases.push_back({"staged/left_open", run_staged<Staged::left_open>});
  cases.push_back({"staged/misaligned", run_staged<Staged::misaligned>});
  cases.push_back({"gather", run_gather<Gather::right>});
  cases.push_back({"gather/no_wait_on_full", run_gather<Gather::no_wait_on_full>});
  cases.push_back({"gather/no_wait_on_empty", run_gather<Gather::no_wait_on_empty>});
}

}  // namespace hebatron::cases
