// What      y = rms_norm((x + residual) * silu(gate)) * weight per group of columns, and its backward.
// Grid      (row blocks, groups); 32 to 512 threads so that a thread holds at most four packs of 16 bytes (or 16 single
//           elements) in registers, the forward's all on their way before one is used; 128 bytes of static shared memory; 124
//           registers at most, no spill (nvcc 13.0, sm_80 and sm_90a).
// Traffic   forward: reads x [+ residual + gate] and writes y [+ sum] once. backward: reads the inputs and grad_y once.
// Roofline  DRAM bound. 65,536 x 2,688 bf16 with a residual: 1.41 GB, 470 us at 3.0 TB/s (H100).
// Measured  never run on hardware.
// Limits    fp32 and bf16; a group of at most 2,048 packs or 8,192 single elements; int64 offsets. Packs of 16 bytes
//           where every row starts on 16 bytes, single elements elsewhere.
// Why so    the weight gradient is added over rows inside a block, written as one partial row per block and summed in
//           a fixed order by a second kernel: no atomics, the same bits every run and on every device.
#include "cuda/rows.cuh"
#include "hebatron/ops.h"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "rms_norm[cuda]";
constexpr int64_t kMaxPartials = 512;  // rows of the weight gradient's workspace: 512 x 2,688 floats = 5.5 MB
constexpr int64_t kBlockRows = 16;

int64_t partials(int64_t rows) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  return blocks < kMaxPartials ? blocks : kMaxPartials;
}

// One thread's packs of one group of one row: the gated sum in `value`.
template <class T, int kCount>
struct Slice {
  static constexpr int kReads = kPacks<kCount> / kAtOnce<kCount>;
  float value[kPacks<kCount>][kCount];

  // What a pack's gated sum is made of, as it was rounded.
  HEBATRON_DEVICE void read_sum(const RmsNormArgs& a, int64_t row, int64_t column, float (&sum)[kCount]) const {
    load<kCount>(static_cast<const T*>(a.x) + row * a.x_stride + column, sum);
    if (!a.residual) return;
    float other[kCount];
    load<kCount>(static_cast<const T*>(a.residual) + row * a.residual_stride + column, other);
#pragma unroll
    for (int i = 0; i < kCount; i++) sum[i] = rounded<T>(sum[i] + other[i]);
  }

  // Multiplies x + residual with the gate; the sum of its squares.
  HEBATRON_DEVICE static float take(const RmsNormArgs& a, const float (&gate)[kCount], float (&v)[kCount]) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      if (a.gate) v[i] *= gate[i] * sigmoid(gate[i]);
      squares += v[i] * v[i];
    }
    return squares;
  }

  // Reads one pack after another, returns the thread's sum of squares.
  HEBATRON_DEVICE float read(const RmsNormArgs& a, int64_t row, int64_t begin) {
    float squares = 0.0f;
#pragma unroll
    for (int p = 0; p < kPacks<kCount>; p++) {
      const int64_t k = (int64_t(p) * blockDim.x + threadIdx.x) * kCount;
      if (k >= a.group) break;
      read_sum(a, row, begin + k, value[p]);
      float gate[kCount] = {};
      if (a.gate) load<kCount>(static_cast<const T*>(a.gate) + row * a.gate_stride + begin + k, gate);
      squares += take(a, gate, value[p]);
    }
    return squares;
  }

  // The same of whole packs, all in flight together; writes x + residual where it is asked for.
  HEBATRON_DEVICE float read_and_store(const RmsNormArgs& a, int64_t row, int64_t begin) {
    RowPacks<T, kCount> x[kReads], residual[kReads], gates[kReads];
    float squares = 0.0f;
#pragma unroll
    for (int r = 0; r < kReads; r++) {
      const int first = r * kAtOnce<kCount>;
      x[r].read(static_cast<const T*>(a.x) + row * a.x_stride + begin, a.group, first);
      if (a.residual) residual[r].read(static_cast<const T*>(a.residual) + row * a.residual_stride + begin, a.group, first);
      if (a.gate) gates[r].read(static_cast<const T*>(a.gate) + row * a.gate_stride + begin, a.group, first);
#pragma unroll
      for (int p = 0; p < kAtOnce<kCount>; p++) {
        const int64_t k = (int64_t(first + p) * blockDim.x + threadIdx.x) * kCount;
        float (&v)[kCount] = value[first + p];
        float gate[kCount];
#pragma unroll
        for (int i = 0; i < kCount; i++) {
          v[i] = a.residual ? rounded<T>(x[r](p, i) + residual[r](p, i)) : x[r](p, i);
          gate[i] = gates[r](p, i);
        }
        if (a.sum && k < a.group) store<kCount>(static_cast<T*>(a.sum) + row * a.width + begin + k, v);
        squares += take(a, gate, v);
      }
    }
    return squares;
  }
};

template <class T, class W, int kCount>
__global__ void __launch_bounds__(kMaxRowThreads, 1) forward(const RmsNormArgs a) {
  HEBATRON_SHARED(float, slots, kWarp);
  const int64_t begin = int64_t(blockIdx.y) * a.group;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    Slice<T, kCount> in;
    const float squares = in.read_and_store(a, row, begin);
    RowPacks<W, kCount> weight[kPacks<kCount> / kAtOnce<kCount>];  // on its way while the block meets
#pragma unroll
    for (int first = 0; first < kPacks<kCount>; first += kAtOnce<kCount>)
      weight[first / kAtOnce<kCount>].read(static_cast<const W*>(a.weight) + begin, a.group, first);
    const float scale = rsqrt_approx(block_sum(squares, slots) / float(a.group) + float(a.eps));
#pragma unroll
    for (int p = 0; p < kPacks<kCount>; p++) {
      const int64_t k = (int64_t(p) * blockDim.x + threadIdx.x) * kCount;
      float y[kCount];
#pragma unroll
      for (int i = 0; i < kCount; i++) y[i] = weight[p / kAtOnce<kCount>](p % kAtOnce<kCount>, i) * (in.value[p][i] * scale);
      if (k < a.group) store<kCount>(static_cast<T*>(a.y) + row * a.width + begin + k, y);
    }
  }
}

// du = rms^-1 * (d - n * mean(d * n)) with n the normalised value and d = grad_y * weight. The gate and the sum are
// read again for the last step: keeping them beside the value and the weight gradient spills.
template <class T, class W, int kCount>
__global__ void __launch_bounds__(kMaxRowThreads, 1) backward(const RmsNormBwdArgs b, float* partial) {
  HEBATRON_SHARED(float, slots, kWarp);
  const RmsNormArgs& a = b.forward;
  const int64_t begin = int64_t(blockIdx.y) * a.group;
  float grad_weight[kPacks<kCount>][kCount] = {};
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    Slice<T, kCount> in;
    const float scale = rsqrt_approx(block_sum(in.read(a, row, begin), slots) / float(a.group) + float(a.eps));
    const T* grad_y = static_cast<const T*>(b.grad_y) + row * a.width + begin;
    float dots = 0.0f;
#pragma unroll
    for (int p = 0; p < kPacks<kCount>; p++) {
      const int64_t k = (int64_t(p) * blockDim.x + threadIdx.x) * kCount;
      if (k >= a.group) break;
      float dy[kCount], weight[kCount];
      load<kCount>(grad_y + k, dy);
      load<kCount>(static_cast<const W*>(a.weight) + begin + k, weight);
#pragma unroll
      for (int i = 0; i < kCount; i++) {
        grad_weight[p][i] += dy[i] * in.value[p][i] * scale;
        dots += dy[i] * weight[i] * in.value[p][i] * scale;
      }
    }
    const float mean = block_sum(dots, slots) / float(a.group);
#pragma unroll
    for (int p = 0; p < kPacks<kCount>; p++) {
      const int64_t k = (int64_t(p) * blockDim.x + threadIdx.x) * kCount;
      if (k >= a.group) break;
      const int64_t at = row * a.width + begin + k;
      float dy[kCount], weight[kCount], grad[kCount];
      load<kCount>(grad_y + k, dy);
      load<kCount>(static_cast<const W*>(a.weight) + begin + k, weight);
#pragma unroll
      for (int i = 0; i < kCount; i++) grad[i] = scale * (dy[i] * weight[i] - in.value[p][i] * scale * mean);
      if (a.gate) {
        float gate[kCount], sum[kCount], grad_gate[kCount];
        load<kCount>(static_cast<const T*>(a.gate) + row * a.gate_stride + begin + k, gate);
        in.read_sum(a, row, begin + k, sum);
#pragma unroll
        for (int i = 0; i < kCount; i++) {
          const float s = sigmoid(gate[i]);
          grad_gate[i] = grad[i] * sum[i] * s * (1.0f + gate[i] * (1.0f - s));
          grad[i] *= gate[i] * s;
        }
        store<kCount>(static_cast<T*>(b.grad_gate) + at, grad_gate);
      }
      if (b.grad_sum) {
        float more[kCount];
        load<kCount>(static_cast<const T*>(b.grad_sum) + at, more);
#pragma unroll
        for (int i = 0; i < kCount; i++) grad[i] += more[i];
      }
      store<kCount>(static_cast<T*>(b.grad_input) + at, grad);
    }
  }
#pragma unroll
  for (int p = 0; p < kPacks<kCount>; p++) {
    const int64_t k = (int64_t(p) * blockDim.x + threadIdx.x) * kCount;
    if (k < a.group) store<kCount>(partial + blockIdx.x * a.width + begin + k, grad_weight[p]);
  }
}

__global__ void sum_partials(const float* partial, int64_t count, int64_t width, float* grad_weight) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= width) return;
  float total = 0.0f;
  for (int64_t p = 0; p < count; p++) total += partial[p * width + column];
  grad_weight[column] = total;
}

template <int kCount>
int threads_for(const RmsNormArgs& a) {
  return threads_for_row<kCount>(kOp, "group must fit one block", a.group);
}

void check_args(const RmsNormArgs& a) {
  check(a.rows >= 0, kOp, "rows must be >= 0", a.rows);
  check(a.group > 0 && a.width % a.group == 0, kOp, "group must divide the width", a.group);
  check(a.width / a.group <= 65535, kOp, "groups must be at most 65,535", a.width / a.group);
}

void check_inputs(const RmsNormArgs& a, const Exec& exec) {
  check(a.x && a.weight, kOp, "x and weight must be given", 0);
  check_pointers(kOp, {{"x", a.x}, {"residual", a.residual}, {"gate", a.gate}, {"weight", a.weight}}, exec);
}

template <class T, class W, int kCount>
void run_forward(const RmsNormArgs& a, const Exec& exec) {
  const int64_t rows = a.rows < kMaxRowBlocks ? a.rows : kMaxRowBlocks;
  const LaunchShape shape{dim3(unsigned(rows), unsigned(a.width / a.group)), dim3(threads_for<kCount>(a))};
  launch("rms_norm", forward<T, W, kCount>, shape, exec, a);
}

template <class T, class W, int kCount>
void run_backward(const RmsNormBwdArgs& b, const Exec& exec) {
  const RmsNormArgs& a = b.forward;
  const int64_t count = partials(a.rows);
  float* partial = static_cast<float*>(exec.workspace);
  const LaunchShape shape{dim3(unsigned(count), unsigned(a.width / a.group)), dim3(threads_for<kCount>(a))};
  launch("rms_norm", backward<T, W, kCount>, shape, exec, b, partial);
  const LaunchShape columns{dim3(unsigned((a.width + 127) / 128)), dim3(128)};
  launch("rms_norm", sum_partials, columns, exec, partial, count, a.width, b.grad_weight);
}

// Whether every row of every tensor starts on a whole pack, so that packs may be used; `others`: the backward's addresses.
auto packs_of(const RmsNormArgs& a, uintptr_t others = 0) {
  const uintptr_t addresses = others | addresses_of({a.x, a.residual, a.gate, a.weight, a.y, a.sum});
  const int64_t strides = a.x_stride | a.residual_stride | a.gate_stride | a.group;
  return [=](int count) { return addresses % 16 == 0 && strides % count == 0; };
}

}  // namespace

int64_t rms_norm_fwd_workspace(const RmsNormArgs&) { return 0; }

void rms_norm_fwd(const RmsNormArgs& a, const Exec& exec) {
  check_args(a);
  if (a.rows == 0) return;
  DeviceGuard guard(exec);
  check_inputs(a, exec);
  check_pointers(kOp, {{"y", a.y}, {"sum", a.sum}}, exec);
  const auto packs = packs_of(a);
  HEBATRON_BY_DTYPES(run_forward, packs, a.dtype, a.weight_dtype, a, exec)
}

int64_t rms_norm_bwd_workspace(const RmsNormBwdArgs& b) {
  return partials(b.forward.rows) * b.forward.width * int64_t(sizeof(float));
}

void rms_norm_bwd(const RmsNormBwdArgs& b, const Exec& exec) {
  const RmsNormArgs& a = b.forward;
  check_args(a);
  check(exec.bytes_workspace >= rms_norm_bwd_workspace(b), kOp, "workspace is too small",
        exec.bytes_workspace);
  check(reinterpret_cast<uintptr_t>(exec.workspace) % 16 == 0, kOp, "workspace must start on 16 bytes",
        int64_t(reinterpret_cast<uintptr_t>(exec.workspace)));
  DeviceGuard guard(exec);
  check_pointers(kOp, {{"grad_weight", b.grad_weight}}, exec);
  if (a.rows == 0) {
    fill_zero("rms_norm", b.grad_weight, size_t(a.width) * sizeof(float), exec);
    return;
  }
  check_inputs(a, exec);
  check_pointers(kOp, {{"grad_y", b.grad_y}, {"grad_sum", b.grad_sum}, {"grad_input", b.grad_input}, {"grad_gate", b.grad_gate},
                  {"workspace", exec.workspace}}, exec);
  const auto packs = packs_of(a, addresses_of({b.grad_y, b.grad_sum, b.grad_input, b.grad_gate}));
  HEBATRON_BY_DTYPES(run_backward, packs, a.dtype, a.weight_dtype, b, exec)
}

}  // namespace hebatron::cuda
