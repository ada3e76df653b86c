// Many blocks: what orders them is a ticket or a flag, never the order in which they start.
#include "cases.h"

namespace hebatron::cases {
namespace {

constexpr unsigned kBlocks = 24;

// ---- two blocks, one word ----
__global__ void one_word(float* out) {
  if (threadIdx.x == 0) out[0] = float(blockIdx.x);  // LINE: one_word.write
}
void run_one_word() {
  Tensor<float> out("out", 1);
  run(one_word, 2, 32, 0, 1, out.get());
}

// ---- the last block adds up what all wrote ----
enum class Last { right, no_release, no_acquire, no_block_sync };

template <Last bug>
__global__ void last_block(const float* in, float* partial, uint32_t* ticket, float* out) {
  HEBATRON_SHARED(uint32_t, last, 1);
  const int t = threadIdx.x;
  partial[blockIdx.x * 32 + t] = 2 * in[blockIdx.x * 32 + t];  // LINE: last_block.write
  if (bug != Last::no_block_sync) block_sync();
  if (t == 0) {
    if (bug != Last::no_release) fence_gpu();
    last[0] = atomic_add(ticket, 1u) == gridDim.x - 1;
    if (bug != Last::no_acquire) fence_gpu();
  }
  block_sync();
  if (!last[0]) return;
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; b++) sum += partial[b * 32 + t];  // LINE: last_block.read
  out[t] = sum;
}
template <Last bug>
void run_last_block() {
  Tensor<float> in("in", kBlocks * 32, small), partial("partial", kBlocks * 32), out("out", 32);
  Tensor<uint32_t> ticket("ticket", 1);
  run(last_block<bug>, kBlocks, 32, 0, 1, in.get(), partial.get(), ticket.get(), out.get());
  out.expect([](size_t t) {
    float sum = 0;
    for (size_t b = 0; b < kBlocks; b++) sum += 2 * small(b * 32 + t);
    return sum;
  });
}

// ---- decoupled look-back: each block waits for the sum of all before it ----
enum class Lookback { right, relaxed_flag, flag_first, backwards };

template <Lookback bug>
__global__ void lookback(const float* in, float* sum, uint32_t* flag, float* out) {
  if (threadIdx.x) return;
  const unsigned b = blockIdx.x, before = bug == Lookback::backwards ? b + 1 : b - 1;
  float total = in[b];
  if (before < gridDim.x) {
    while (load_acquire(flag + before) == 0) {  // LINE: lookback.wait
    }
    total += sum[before];  // LINE: lookback.read
  }
  if (bug == Lookback::flag_first) store_release(flag + b, 1u);
  sum[b] = total;  // LINE: lookback.write
  if (bug == Lookback::relaxed_flag)
    atomic_exchange(flag + b, 1u);
  else if (bug != Lookback::flag_first)
    store_release(flag + b, 1u);
  out[b] = total;
}
template <Lookback bug>
void run_lookback() {
  emulator::options().max_resident_threads = 3 * 32;  // 3 of the 24 blocks at a time
  Tensor<float> in("in", kBlocks, small), sum("sum", kBlocks), out("out", kBlocks);
  Tensor<uint32_t> flag("flag", kBlocks);
  run(lookback<bug>, kBlocks, 32, 0, 1, in.get(), sum.get(), flag.get(), out.get());
  out.expect([](size_t b) {
    float total = 0;
    for (size_t i = 0; i <= b; i++) total += small(i);
    return total;
  });
}

// ---- a histogram by atomics, tiles by tickets: as many blocks as the chip holds take what is left ----
enum class Tickets { right, plain_add };

template <Tickets bug>
__global__ void histogram(const uint32_t* in, uint32_t tiles, uint32_t* ticket, uint32_t* bins) {
  HEBATRON_SHARED(uint32_t, tile, 1);
  while (true) {
    if (threadIdx.x == 0) tile[0] = atomic_add(ticket, 1u);
    block_sync();
    const uint32_t mine = tile[0];
    block_sync();
    if (mine >= tiles) return;
    uint32_t* bin = bins + in[mine * 32 + threadIdx.x] % 8;
    if (bug == Tickets::plain_add)
      *bin += 1;  // LINE: histogram.add
    else
      atomic_add(bin, 1u);
  }
}
template <Tickets bug>
void run_histogram() {
  constexpr uint32_t kTiles = 20;
  Tensor<uint32_t> in("in", kTiles * 32, [](size_t i) { return uint32_t(i); }), ticket("ticket", 1), bins("bins", 8);
  run(histogram<bug>, 4, 32, 0, 1, in.get(), kTiles, ticket.get(), bins.get());
  bins.expect([](size_t) { return kTiles * 4; });
}

// ---- units by tickets, of which the later ones read what the earlier ones left: whoever waits waits for blocks that run ----
enum class Relay { right, one_short };

template <Relay bug>
__global__ void relay(uint32_t parts, uint32_t sums, uint32_t* ticket, uint32_t* done, float* part, float* out) {
  HEBATRON_SHARED(uint32_t, unit, 1);
  const int t = threadIdx.x;
  const uint32_t enough = bug == Relay::one_short ? parts - 1 : parts;
  while (true) {
    if (t == 0) unit[0] = atomic_add(ticket, 1u);
    block_sync();
    const uint32_t mine = unit[0];
    block_sync();
    if (mine >= parts + sums) return;
    if (mine < parts) {
      part[mine * 32 + t] = small(mine);  // LINE: relay.part
      block_sync();
      if (t == 0) {
        fence_gpu();
        atomic_add(done, 1u);
      }
      continue;
    }
    if (t == 0)
      while (load_acquire(done) < enough) {
      }
    block_sync();
    float sum = 0;
    for (uint32_t p = 0; p < parts; p++) sum += part[p * 32 + t];  // LINE: relay.read
    out[(mine - parts) * 32 + t] = sum;
  }
}
template <Relay bug>
void run_relay() {
  constexpr uint32_t kParts = 16, kSums = 5;
  Tensor<uint32_t> ticket("ticket", 1), done("done", 1);
  Tensor<float> part("part", kParts * 32), out("out", kSums * 32);
  run(relay<bug>, 4, 32, 0, 1, kParts, kSums, ticket.get(), done.get(), part.get(), out.get());
  out.expect([](size_t) {
    float sum = 0;
    for (uint32_t p = 0; p < kParts; p++) sum += small(p);
    return sum;
  });
}

}  // namespace

void add_grid_cases(Cases& cases) {
  cases.push_back({"blocks/one_word", run_one_word});
  cases.push_back({"last_block", run_last_block<Last::right>});
  cases.push_back({"last_block/no_release", run_last_block<Last::no_release>});
  cases.push_back({"last_block/no_acquire", run_last_block<Last::no_acquire>});
  cases.push_back({"last_block/no_block_sync", run_last_block<Last::no_block_sync>});
  cases.push_back({"relay", run_relay<Relay::right>});
  cases.push_back({"relay/one_short", run_relay<Relay::one_short>});
  cases.push_back({"lookback", run_lookback<Lookback::right>});
  cases.push_back({"lookback/relaxed_flag", run_lookback<Lookback::relaxed_flag>});
  cases.push_back({"lookback/flag_first", run_lookback<Lookback::flag_first>});
  cases.push_back({"lookback/backwards", run_lookback<Lookback::backwards>});
  cases.push_back({"histogram", run_histogram<Tickets::right>});
  cases.push_back({"histogram/plain_add", run_histogram<Tickets::plain_add>});
}

}  // namespace hebatron::cases
