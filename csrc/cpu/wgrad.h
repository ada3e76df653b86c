// What the products that sum over the rows of an expert share, grad_up and grad_down of moe_mlp and grouped_gemm's gradient of
// its weights: an operand's rows packed as panels over them, and one such operand transposed times a panel of the other.
#pragma once
#include "cpu/gemm.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

// Panels over rows: `height` rows of an expert, padded to whole units, in panels of 64 columns behind one another. padded[e]:
// where the rows of expert e begin when each before it is padded.
template <class T>
static void pad_rows(const int64_t* begin, int64_t experts, int64_t* padded) {
  padded[0] = 0;
  for (int64_t e = 0; e < experts; e++) padded[e + 1] = padded[e] + units_of<T>(begin[e + 1] - begin[e]) * kUnit<T>;
}
static inline int64_t padded_columns(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }
// The elements of all experts' panels, at most.
template <class T>
static int64_t steps_elements(int64_t rows, int64_t experts, int64_t width) {
  return (rows + experts * (kUnit<T> - 1)) * padded_columns(width);
}
// Where the panel of expert e that begins at this column lies.
template <class T>
static T* steps_at(T* steps, const int64_t* padded, int64_t e, int64_t width, int64_t column) {
  return steps + padded[e] * padded_columns(width) + (padded[e + 1] - padded[e]) * column;
}

// The rows of panels over an expert's rows (A transposed, `width` of them) times such a panel (B): finish(m, rows, sums).
template <class T, class Finish>
static void transposed_product(const T* steps, int64_t height, int64_t width, int64_t k, const T* panel, int vectors, const Finish& finish) {
  alignas(64) float sums[kTileRows * kTileColumns];
  Strip strip{{}, 0, 0, k, true};
  for (int64_t m = 0; m < width; m += strip.count) {
    const int64_t column = m / kTileColumns * kTileColumns, columns = std::min<int64_t>(kTileColumns, width - column);
    strip.count = int(std::min<int64_t>(kTileRows, column + columns - m));  // the next panel may be of another width
    strip.ak = vectors_of(columns) * kLanes * kUnit<T>;
    for (int i = 0; i < strip.count; i++) strip.rows[i] = steps + height * column + (m - column + i) * kUnit<T>;
    (std::is_same_v<T, float> ? strip_product_f32 : strip_product_bf16)(strip, panel, vectors, sums);
    finish(m, strip.count, sums);
  }
}

// out[m][n] = the sums of `count` rows from m on, rounded to the dtype of the weights; S is that dtype.
template <class S>
static void write_gradient(void* grad, int64_t offset, int64_t width, int64_t columns, int count, const float* sums) {
  for (int i = 0; i < count; i++)
    for_lanes(columns, [&](int64_t c, int n) {
      S* to = (S*)grad + offset + i * width + c;
      const Vec v = load_lanes(sums + i * kTileColumns + c, n);
      n == kLanes ? stream(to, v) : store(to, v, n);
    });
}
static void write_gradient(DType dtype, void* grad, int64_t offset, int64_t width, int64_t columns, int count, const float* sums) {
  dtype == DType::f32 ? write_gradient<float>(grad, offset, width, columns, count, sums)
                      : write_gradient<bf16>(grad, offset, width, columns, count, sums);
}

}  // namespace
}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
