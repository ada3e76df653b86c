// The states between chunks, forward, and their gradients, backward: what each segment adds to a state of zeros, from that the
// states that enter the segments, and from those, for the backward, the ones that enter each chunk.
#pragma once
#include "cuda/ssd_tiles.cuh"

namespace hebatron::cuda {
namespace {

// One direction of a walk over chunks. Backward, a segment's state is entered at its end: from grad_last, to grad_initial.
struct Walk {
  bool back;
  const void *rows, *columns;  // x and B; backward grad_y and C
  int64_t rows_stride, columns_stride;
  const float* outer;  // sequences, heads, head_dim, state_dim: what enters a sequence; null: zeros
  float* inner;        // the same: what leaves it; or null
  float* states;       // by segment's slot and head: what the segment adds, then what enters it
  float* decays;       // the same
  void* chunks;        // by chunk's slot and head: what enters the chunk, in the operands' dtype
};

template <class T>
struct WalkMemory {
  static constexpr int kStageElements = kTokens<T> * (kP + kS);
  static constexpr int kBytes = 2 * kStageElements * int(sizeof(T)) + int(sizeof(Steps<T>));
};

HEBATRON_DEVICE int64_t state_size(const SsdScanArgs& a) { return a.head_dim * a.state_dim; }

// What enters a segment, or null for zeros. The outermost one has it from outside.
HEBATRON_DEVICE const float* entering(const SsdScanArgs& a, const Walk& w, const Place& at) {
  if (w.back ? !at.last : at.number > 0) return w.states + (at.slot * a.heads + at.head) * state_size(a);
  return w.outer ? w.outer + (at.sequence * a.heads + at.head) * state_size(a) : nullptr;
}

// A segment's chunks in their order. Without kKeep from zeros, and what is left at the end is written; with it from what enters
// the segment, and what enters every chunk is written. blockIdx.y is the direction.
template <class T, bool kKeep>
__global__ void __launch_bounds__(kThreads, kKeep ? 2 : 3) walk(const SsdScanArgs a, const Walk forward, const Walk backward, int slices) {
  HEBATRON_DYNAMIC_SHARED(memory);
  using Memory = WalkMemory<T>;
  const Walk w = blockIdx.y ? backward : forward;
  const int chunk = chunk_tokens<T>(a), warp = threadIdx.x / kWarp;
  const Place at(a, chunk, slices);
  if (at.tokens <= 0) return;
  T* const stages = reinterpret_cast<T*>(memory);
  Steps<T>& steps = *reinterpret_cast<Steps<T>*>(memory + 2 * Memory::kStageElements * sizeof(T));
  const auto row_tile = [&](int turn) { return Tile<T, kP>{stages + turn % 2 * Memory::kStageElements}; };
  const auto column_tile = [&](int turn) { return Tile<T, kS>{stages + turn % 2 * Memory::kStageElements + kTokens<T> * kP}; };
  const T* const rows = static_cast<const T*>(w.rows) + at.begin * w.rows_stride + at.head * a.head_dim + at.column;
  const T* const columns = static_cast<const T*>(w.columns) + at.begin * w.columns_stride + at.group * a.state_dim;
  const int chunks = (at.tokens + chunk - 1) / chunk;
  const auto first_of = [&](int turn) { return (w.back ? chunks - 1 - turn : turn) * chunk; };
  const auto load = [&](int turn) {
    const int first = first_of(turn), count = least(chunk, at.tokens - first);
    row_tile(turn).template load<kTokens<T>>(rows + first * w.rows_stride, w.rows_stride, count, at.columns);
    column_tile(turn).template load<kTokens<T>>(columns + first * w.columns_stride, w.columns_stride, count, int(a.state_dim));
    cp_async_commit();
  };
  LaneSteps<T> mine;
  const auto find = [&](int turn) {
    const int count = least(chunk, at.tokens - first_of(turn));
    mine.read(a, at.head, at.begin + first_of(turn), count);
    mine.find(a, at.head, count, w.back);
  };
  load(0);
  if (warp == 0) find(0);
  State state = {};
  const int64_t offset = (int64_t(at.column) + warp * 16) * a.state_dim;
  const int height = at.columns - warp * 16, width = int(a.state_dim);
  if (kKeep) {
    const float* const from = entering(a, w, at);
    if (from) load_rows(from + offset, a.state_dim, state, height, width);
  }
  double log = 0.0;
  for (int turn = 0; turn < chunks; turn++) {
    cp_async_wait<0>();
    block_sync();  // this chunk's tiles are here, and nobody reads the last one's any more
    if (warp == 0) {
      mine.write(steps);
      log += mine.total;
    }
    if (turn + 1 < chunks) load(turn + 1);
    block_sync();
    if (warp == 0 && turn + 1 < chunks) find(turn + 1);
    if (kKeep) {
      const int64_t slot = start_of(a, at.sequence) / chunk + at.sequence + at.number * kSegmentChunks + first_of(turn) / chunk;
      store_rows(static_cast<T*>(w.chunks) + (slot * a.heads + at.head) * state_size(a) + offset, a.state_dim, state, height, width);
      if (turn + 1 == chunks) break;
    }
    advance(state, steps, row_tile(turn), column_tile(turn), warp);
  }
  if (kKeep) return;
  const int64_t where = at.slot * a.heads + at.head;
  store_rows(w.states + where * state_size(a) + offset, a.state_dim, state, height, width);
  if (threadIdx.x == 0 && at.column == 0) w.decays[where] = exp2_approx(float(log));
}

// From what segments add to the states that enter them, in place (not the outermost, which has its own), and what leaves.
constexpr int kCombineThreads = 256;
constexpr int kAhead = 4;  // segments whose states are read before the first is written

__global__ void __launch_bounds__(kCombineThreads) combine(const SsdScanArgs a, const Walk forward, const Walk backward, int length) {
  const Walk w = blockIdx.z ? backward : forward;
  const int64_t all = a.heads * state_size(a), element = (int64_t(blockIdx.x) * kCombineThreads + threadIdx.x) * 4;
  if (element >= all) return;
  const int64_t head = element / state_size(a);
  for (int64_t q = blockIdx.y; q < a.sequences; q += gridDim.y) {
    const int first = start_of(a, q), count = (start_of(a, q + 1) - first + length - 1) / length;
    const auto slot = [&](int turn) { return first / length + q + (w.back ? count - 1 - turn : turn); };
    float h[4] = {};
    if (w.outer) load<4>(w.outer + q * all + element, h);
    for (int begin = 0; begin < count; begin += kAhead) {
      float added[kAhead][4], decay[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; i++)
        if (begin + i < count) {
          load<4>(w.states + slot(begin + i) * all + element, added[i]);
          decay[i] = w.decays[slot(begin + i) * a.heads + head];
        }
#pragma unroll
      for (int i = 0; i < kAhead; i++)
        if (begin + i < count) {
          if (begin + i > 0) store_whole(w.states + slot(begin + i) * all + element, h);
#pragma unroll
          for (int e = 0; e < 4; e++) h[e] = decay[i] * h[e] + added[i][e];
        }
    }
    if (w.inner) store_whole(w.inner + q * all + element, h);
  }
}

inline Walk forward_walk(const SsdScanArgs& a) {
  Walk w{};
  w.rows = a.x, w.rows_stride = a.x_stride, w.columns = a.B, w.columns_stride = a.B_stride;
  w.outer = a.initial, w.inner = a.last;
  return w;
}

// Sizes of the workspace's parts, from the arguments alone.
template <class T>
struct Segments {
  int64_t length, slots, bytes_states, bytes_decays;
  explicit Segments(const SsdScanArgs& a) {
    length = chunk_length<T>(a) * kSegmentChunks;
    slots = slots_of(a, length);
    const auto padded = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
    bytes_states = padded(slots * a.heads * a.head_dim * a.state_dim * int64_t(sizeof(float)));
    bytes_decays = padded(slots * a.heads * int64_t(sizeof(float)));
  }
  int64_t bytes() const { return bytes_states + bytes_decays; }
  void place(Walk& w, char* base) const {
    w.states = reinterpret_cast<float*>(base);
    w.decays = reinterpret_cast<float*>(base + bytes_states);
  }
  dim3 blocks(const SsdScanArgs& a, unsigned directions) const { return dim3(unsigned(slots * a.heads * slices_of(a)), directions); }
};

// The states that enter the segments, of one direction or of both.
template <class T>
void run_segments(const char* op, const SsdScanArgs& a, const Walk& forward, const Walk& backward, unsigned directions, const Exec& exec) {
  const Segments<T> segments(a);
  const LaunchShape shape{segments.blocks(a, directions), dim3(kThreads), WalkMemory<T>::kBytes};
  if (a.tokens) launch(op, walk<T, false>, shape, exec, a, forward, backward, int(slices_of(a)));
  const int64_t packs = (a.heads * a.head_dim * a.state_dim / 4 + kCombineThreads - 1) / kCombineThreads;
  const dim3 grid(unsigned(packs), unsigned(a.sequences < 65535 ? a.sequences : 65535), directions);
  launch(op, combine, LaunchShape{grid, dim3(kCombineThreads)}, exec, a, forward, backward, int(segments.length));
}

}  // namespace
}  // namespace hebatron::cuda
