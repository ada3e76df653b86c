// What ssd_scan_bwd.cpp keeps while it works, and the states of a task: computed again as the forward did, transposed.
#pragma once
#include "cpu/ssd_chunk.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

constexpr int64_t kSegment = 64;    // chunks whose entering states are kept; 32 costs 8 % more products at 4,096 tokens
constexpr int64_t kLeastTasks = 4;  // where there are fewer groups, their heads are split and grad_B, grad_C added after

static int64_t head_parts(const SsdScanArgs& a) {
  return std::min((kLeastTasks + a.groups - 1) / a.groups, a.heads / a.groups);
}

template <class T>
struct Scratch {
  int64_t width_P, width_S, steps;  // padded rows of x and B; elements of a panel over a chunk's tokens
  int64_t panel, head_state;        // elements of a panel and of the whole of one head's state
  T *B_rows, *C_rows, *B_columns, *B_steps, *C_steps, *score_rows;  // of the group
  T *x_rows, *dy_rows, *x_columns, *x_to_end, *dy_steps, *dy_from_start, *weights, *grad_packed, *grad_columns;  // of a head
  T* entering;                                                    // kSegment x heads states
  float *scores, *grad_scores, *decays, *rows, *grad_B, *grad_C;  // of the group; decays and rows of a head
  float *state, *grad_state, *bounds;                             // heads; heads; segments x heads
  int64_t bytes;

  Scratch(const SsdScanArgs& a, char* base) {
    int64_t longest = 0;
    for (int64_t q = 0; q < a.sequences; q++) longest = std::max<int64_t>(longest, a.cu_seqlens[q + 1] - a.cu_seqlens[q]);
    const int64_t chunks = (longest + a.chunk - 1) / a.chunk, segments = (chunks + kSegment - 1) / kSegment;
    const int64_t panels_P = panels_of(a.head_dim), panels_S = panels_of(a.state_dim);
    const int64_t parts = head_parts(a), heads = (a.heads / a.groups + parts - 1) / parts;
    width_P = panels_P * kTileColumns, width_S = panels_S * kTileColumns, steps = panel_elements<T>(kChunk);
    panel = panel_elements<T>(a.head_dim), head_state = panels_S * panel;
    Carver carve{base};
    for (T** rows : {&B_rows, &C_rows}) *rows = carve.take<T>(kChunk * width_S);
    for (T** rows : {&x_rows, &dy_rows}) *rows = carve.take<T>(kChunk * width_P);
    for (T** packed : {&B_steps, &C_steps}) *packed = carve.take<T>(panels_S * steps);
    for (T** packed : {&x_to_end, &dy_steps, &dy_from_start}) *packed = carve.take<T>(panels_P * steps);
    B_columns = carve.take<T>(panels_of(kChunk) * panel_elements<T>(a.state_dim));
    x_columns = carve.take<T>(panels_of(kChunk) * panel);
    weights = carve.take<T>(panels_of(kChunk) * steps);
    score_rows = carve.take<T>(kChunk * kChunk);
    for (float** square : {&scores, &grad_scores, &decays}) *square = carve.take<float>(kChunk * kChunk);
    rows = carve.take<float>(kChunk * kTileColumns);
    for (float** sums : {&grad_B, &grad_C}) *sums = carve.take<float>(kChunk * width_S);
    state = carve.take<float>(heads * head_state);
    grad_state = carve.take<float>(heads * head_state);
    bounds = carve.take<float>(segments * heads * head_state);
    entering = carve.take<T>(std::min(kSegment, chunks) * heads * head_state);
    grad_packed = carve.take<T>(head_state);
    grad_columns = carve.take<T>(panels_P * panel_elements<T>(a.state_dim));
    bytes = carve.bytes;
  }
};

// The heads of one task in one chunk of its sequence.
struct Chunk {
  int64_t group, part, first, heads, begin, n;
};

// state: P rows in panels over S, as they are multiplied; rows between head_dim and a whole unit are zero.
template <class T>
static void load_state(const SsdScanArgs& a, const Scratch<T>& w, float* state, const float* from) {
  std::memset(state, 0, size_t(w.head_state) * sizeof(float));
  if (from)
    for (int64_t p = 0; p < a.head_dim; p++)
      for (int64_t s = 0; s < a.state_dim; s += kTileColumns)
        std::memcpy(state + s / kTileColumns * w.panel + p * kTileColumns, from + p * a.state_dim + s,
                    size_t(std::min<int64_t>(kTileColumns, a.state_dim - s)) * sizeof(float));
}

template <class T>
static void store_state(const SsdScanArgs& a, const Scratch<T>& w, const float* state, float* to) {
  for (int64_t p = 0; p < a.head_dim; p++)
    for (int64_t s = 0; s < a.state_dim; s += kTileColumns)
      std::memcpy(to + p * a.state_dim + s, state + s / kTileColumns * w.panel + p * kTileColumns,
                  size_t(std::min<int64_t>(kTileColumns, a.state_dim - s)) * sizeof(float));
}

// state = total state + rows^T columns over the n tokens of a chunk.
template <class T>
static void update_state(const SsdScanArgs& a, const Scratch<T>& w, float* state, float total, const T* rows, const T* columns,
                         int64_t n) {
  for (int64_t s = 0; s < panels_of(a.state_dim); s++)
    for (int64_t p = 0; p < a.head_dim; p += kTileColumns)
      multiply(state + s * w.panel + p * kTileColumns, kTileColumns, std::min<int64_t>(kTileColumns, a.head_dim - p), total,
               over_tokens(rows + p / kTileColumns * w.steps, 0, columns + s * w.steps, n));
}

template <class T>
static void advance_states(const SsdScanArgs& a, const Scratch<T>& w, const Chunk& c) {
  pack_steps(w.B_steps, (const T*)a.B + c.begin * a.B_stride + c.group * a.state_dim, a.B_stride, c.n, a.state_dim);
  for (int64_t slot = 0; slot < c.heads; slot++) {
    const int64_t head = c.first + slot;
    const Steps steps(a, head, c.begin, c.n);
    pack_scaled<T>(w.x_to_end, steps.dt_to_end, nullptr, nullptr, (const T*)a.x + c.begin * a.x_stride + head * a.head_dim,
                   a.x_stride, c.n, a.head_dim);
    update_state(a, w, w.state + slot * w.head_state, steps.total, w.x_to_end, w.B_steps, c.n);
  }
}

// values . packed over a head's state. Sums of 16 terms first: one chain of 128 would be the largest error of grad_A.
template <class T>
static float dot_with_packed(const float* values, const T* packed, int64_t count) {
  Vec total = set1(0.0f);
  for (int64_t begin = 0; begin < count; begin += 16 * kTileColumns) {
    Vec sums[kTileVectors] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    for (int64_t i = begin; i < std::min(count, begin + 16 * kTileColumns); i += kUnit<T> * kTileColumns)
      for (int j = 0; j < kTileVectors; j++) {
        const Units unit = load_units(packed + i + kUnit<T> * j * kLanes);
        const Vec first = load(values + i + j * kLanes);
        if constexpr (kUnit<T> == 1)
          sums[j] = fma(first, as_float(unit), sums[j]);
        else
          sums[j] = fma(load(values + i + kTileColumns + j * kLanes), second_of(unit), fma(first, first_of(unit), sums[j]));
      }
    total = total + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return sum(total);
}

}  // namespace
}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
