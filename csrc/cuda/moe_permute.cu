// What      the slots t * K + k sorted by their experts, then by slot (the order of a stable sort, to the bit): where every
//           expert ends, which slot each row takes and which row each slot got; then rows of x gathered in that order.
// Grid      count and place: 256 threads, blocks of 2,048 slots or more, at most 256 of them; a warp ranks a run of slots.
//           gather: a block a row, 32 to 256 threads. 21 KB of static shared memory (place); 32 registers.
// Traffic   ids three times (twice from L2), 8 to 24 bytes a slot written; gather: each row of x read K times and written.
// Roofline  DRAM and launches: 393,216 slots of 128 experts move 14 MB, 5 us at 3.0 TB/s (H100) beside two launches; the
//           rows of 2,688 bf16 then move 2.5 GB, 0.82 ms (x, read six times, is 0.35 GB and stays in L2 in part).
// Measured  never run on hardware.
// Limits    1 to 512 experts, fewer than 2^31 slots, any number of choices; rows of fp32 and bf16, packs of 16 bytes where
//           every row starts on 16 bytes. An id outside the experts sorts past the last end.
// Why so    no sort and no atomic whose order could show. Every block takes a contiguous run of slots and every warp of it
//           one of its own, so what lies before a slot is a sum of histograms and a rank among 32 lanes (nine ballots): a
//           block reads the whole table of histograms, 132 KB for 256 blocks, which spares a third launch.
#include "cuda/moe.h"
#include "cuda/rows.cuh"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "moe_permute[cuda]";
constexpr int kMaxExperts = 512;
constexpr int kMaxBins = kMaxExperts + 1;  // the last one holds ids that name no expert
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int64_t kLeastSlots = 2048;  // of a block
constexpr int64_t kMaxBlocks = 256;

struct Sort {
  const int64_t* ids;
  const float* weights;
  int64_t slots, slots_of_block;  // the latter a multiple of kThreads
  int top_k, experts, bits;  // bits of the largest bin
  int32_t* counts;  // blocks, experts + 1; null where one block does all
  MoeTables out;

  HEBATRON_DEVICE int bin(int64_t slot) const {
    const int64_t id = ids[slot];
    return id >= 0 && id < experts ? int(id) : experts;
  }
  HEBATRON_DEVICE int64_t end_of(int64_t begin, int64_t count) const { return begin + count < slots ? begin + count : slots; }
};

int64_t blocks_for(int64_t slots) {
  const int64_t blocks = (slots + kLeastSlots - 1) / kLeastSlots;
  return blocks < 1 ? 1 : blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

__global__ void __launch_bounds__(kThreads) count(const Sort s) {
  HEBATRON_SHARED(int32_t, tally, kMaxBins);
  for (int e = threadIdx.x; e <= s.experts; e += kThreads) tally[e] = 0;
  block_sync();
  const int64_t begin = blockIdx.x * s.slots_of_block, end = s.end_of(begin, s.slots_of_block);
  for (int64_t slot = begin + threadIdx.x; slot < end; slot += kThreads) atomic_add(&tally[s.bin(slot)], 1);
  block_sync();
  for (int e = threadIdx.x; e <= s.experts; e += kThreads) s.counts[int64_t(blockIdx.x) * (s.experts + 1) + e] = tally[e];
}

// The inclusive sums of value[0, count), by one warp.
HEBATRON_DEVICE void scan(int32_t* value, int count) {
  int32_t before = 0;
  for (int begin = 0; begin < count; begin += kWarp) {
    const int i = begin + lane_id();
    int32_t sum = i < count ? value[i] : 0;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int32_t other = shfl_up(sum, offset);
      if (lane_id() >= offset) sum += other;
    }
    sum += before;
    if (i < count) value[i] = sum;
    before = shfl(sum, kWarp - 1);
  }
}

// The lanes of `valid` with this lane's bin, bit by bit.
HEBATRON_DEVICE uint32_t peers_of(int bin, int bits, uint32_t valid) {
  uint32_t peers = valid;
  for (int bit = 0; bit < bits; bit++) {
    const bool set = bin >> bit & 1;
    const uint32_t with = ballot(set);
    peers &= set ? with : ~with;
  }
  return peers;
}

__global__ void __launch_bounds__(kThreads) place(const Sort s) {
  HEBATRON_SHARED(int32_t, next, kWarps * kMaxBins);  // by warp and bin: its slots, then the row of the next of them
  HEBATRON_SHARED(int32_t, ends, kMaxBins);
  HEBATRON_SHARED(int32_t, earlier, kMaxBins);  // slots of the bin in the blocks before
  const int bins = s.experts + 1, lane = lane_id();
  int32_t* mine = next + threadIdx.x / kWarp * kMaxBins;
  const int64_t share = s.slots_of_block / kWarps;
  const int64_t begin = blockIdx.x * s.slots_of_block + threadIdx.x / kWarp * share, end = s.end_of(begin, share);
  for (int e = lane; e < bins; e += kWarp) mine[e] = 0;
  warp_sync();
  for (int64_t slot = begin + lane; slot < end; slot += kWarp) atomic_add(&mine[s.bin(slot)], 1);
  block_sync();
  for (int e = threadIdx.x; e < bins; e += kThreads) {
    int32_t total = 0, before = 0;
    if (s.counts) {
      for (int b = 0; b < int(gridDim.x); b++) {
        const int32_t found = s.counts[int64_t(b) * bins + e];
        total += found;
        before += b < int(blockIdx.x) ? found : 0;
      }
    } else {
      for (int w = 0; w < kWarps; w++) total += next[w * kMaxBins + e];
    }
    ends[e] = total;
    earlier[e] = before;
  }
  block_sync();
  if (threadIdx.x < kWarp) scan(ends, bins);
  block_sync();
  for (int e = threadIdx.x; e < bins; e += kThreads) {
    if (blockIdx.x == 0 && e < s.experts) s.out.offsets[e] = ends[e];
    int32_t row = (e > 0 ? ends[e - 1] : 0) + earlier[e];
    for (int w = 0; w < kWarps; w++) {
      const int32_t found = next[w * kMaxBins + e];
      next[w * kMaxBins + e] = row;
      row += found;
    }
  }
  block_sync();
  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t slot = first + lane;
    const bool valid = slot < end;
    const int bin = valid ? s.bin(slot) : 0;
    const uint32_t peers = peers_of(bin, s.bits, ballot(valid));
    const int rank = population_count(peers & ((1u << lane) - 1));
    const int32_t row = valid ? mine[bin] + rank : 0;
    warp_sync();
    if (valid) {
      if (rank == 0) mine[bin] = row + population_count(peers);
      if (s.out.order) s.out.order[row] = slot;
      if (s.out.tokens) s.out.tokens[row] = int32_t(slot) / s.top_k;
      if (s.out.scale) s.out.scale[row] = s.weights[slot];
      if (s.out.position) s.out.position[slot] = row;
    }
    warp_sync();
  }
}

// rows[n] = x[order[n] / K]; a word is what one access moves.
template <class Word>
__global__ void gather(const Word* x, int64_t x_stride, const int64_t* order, int64_t top_k, Word* rows, int64_t count, int64_t words) {
  for (int64_t n = blockIdx.x; n < count; n += gridDim.x) {
    const Word* from = x + order[n] / top_k * x_stride;
    for (int64_t i = threadIdx.x; i < words; i += blockDim.x) rows[n * words + i] = from[i];
  }
}

template <class Word>
void run_gather(const MoePermuteArgs& a, const Exec& exec) {
  const int64_t per_word = int64_t(sizeof(Word)) / (a.dtype == DType::f32 ? 4 : 2), words = a.width / per_word;
  const int64_t count = a.tokens * a.top_k, threads = (words + kWarp - 1) / kWarp * kWarp;
  const LaunchShape shape{dim3(unsigned(count < kMaxRowBlocks ? count : kMaxRowBlocks)), dim3(unsigned(threads < 256 ? threads : 256))};
  launch(kOp, gather<Word>, shape, exec, static_cast<const Word*>(a.x), a.x_stride / per_word, a.order, a.top_k,
         static_cast<Word*>(a.rows), count, words);
}

}  // namespace

void check_moe_tables(const char* op, int64_t tokens, int64_t top_k, int64_t experts) {
  check(tokens >= 0, op, "tokens must be >= 0", tokens);
  check(top_k > 0, op, "top_k must be > 0", top_k);
  check(tokens <= INT32_MAX / top_k, op, "tokens * top_k must be below 2^31, tokens", tokens);
  check(experts > 0 && experts <= kMaxExperts, op, "experts must be between 1 and 512", experts);
}

int64_t moe_tables_workspace(int64_t slots, int64_t experts) {
  const int64_t blocks = blocks_for(slots);
  return blocks > 1 ? blocks * (experts + 1) * int64_t(sizeof(int32_t)) : 0;
}

void moe_tables(const char* op, const int64_t* ids, const float* weights, int64_t slots, int64_t top_k, int64_t experts,
                const MoeTables& tables, void* workspace, const Exec& exec) {
  if (slots == 0) return fill_zero(op, tables.offsets, size_t(experts) * sizeof(int32_t), exec);
  const int64_t blocks = blocks_for(slots), each = (slots + blocks - 1) / blocks;
  Sort sort{ids, weights, slots, (each + kThreads - 1) / kThreads * kThreads, int(top_k), int(experts), 0, nullptr, tables};
  while (experts >> sort.bits) sort.bits++;
  const LaunchShape shape{dim3(unsigned(blocks)), dim3(kThreads)};
  if (blocks > 1) {
    sort.counts = static_cast<int32_t*>(workspace);
    launch(op, count, shape, exec, sort);
  }
  launch(op, place, shape, exec, sort);
}

int64_t moe_permute_fwd_workspace(const MoePermuteArgs& a) {
  check_moe_tables(kOp, a.tokens, a.top_k, a.experts);
  return moe_tables_workspace(a.tokens * a.top_k, a.experts);
}

void moe_permute_fwd(const MoePermuteArgs& a, const Exec& exec) {
  check(exec.bytes_workspace >= moe_permute_fwd_workspace(a), kOp, "workspace is too small", exec.bytes_workspace);
  check(a.width > 0, kOp, "width must be > 0", a.width);
  const DeviceGuard guard(exec);
  check_pointer(kOp, "offsets", a.offsets, exec);
  const int64_t slots = a.tokens * a.top_k;
  if (slots > 0)
    check_pointers(kOp, {{"ids", a.ids}, {"order", a.order}, {"position", a.position}, {"x", a.x}, {"rows", a.rows},
                         {"workspace", exec.workspace}}, exec);
  const MoeTables tables{a.order, nullptr, nullptr, a.position, a.offsets};
  moe_tables(kOp, a.ids, nullptr, slots, a.top_k, a.experts, tables, exec.workspace, exec);
  if (!a.x || slots == 0) return;
  const int64_t bytes = a.dtype == DType::f32 ? 4 : 2;
  const bool packs = (addresses_of({a.x, a.rows}) | uintptr_t(a.x_stride * bytes) | uintptr_t(a.width * bytes)) % 16 == 0;
  packs ? run_gather<uint4>(a, exec) : bytes == 4 ? run_gather<float>(a, exec) : run_gather<__nv_bfloat16>(a, exec);
}

}  // namespace hebatron::cuda
