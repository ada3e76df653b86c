// What      y_t = act(bias + sum_w weight[w] * x_(t-K+w)), K = W - 1, inside each sequence, with each sequence's last K inputs;
//           the backward; one token for every sequence.
// Grid      forward and backward: a warp walks a run of 16 to 128 tokens over 32 packs of channels, four runs a block, then blocks
//           for the states; the taps' inputs stay in registers. One token: 64 threads, a pack a thread, sequences in turn.
//           7.5 KB of static shared memory in the backward; 156 registers at most, no spill (nvcc 13.0, sm_80 and sm_90a).
// Traffic   forward: x read and y written once, K of every run's tokens twice. backward: x and grad_y read once, grad_x written
//           once, a partial row of the weights' gradient written and read for 64 to 512 tokens.
// Roofline  DRAM. 65,536 tokens x 6,144 channels bf16: 1.61 GB, 537 us forward at 3.0 TB/s (H100); 2.42 GB and 31 MB of partial
//           rows, 816 us backward; one token of 64 sequences, 6.3 MB, 2.1 us.
// Measured  never run on hardware.
// Limits    fp32 and bf16; 1 to 8 taps, four by packs of 16 bytes where every row starts on one, others by single elements;
//           int64 offsets. A cu_seqlens that does not rise from 0 to the tokens gives a wrong result, never a fault.
// Why so    the grid depends on the number of tokens and sequences alone: nothing of cu_seqlens is read on the host, and a run
//           looks for its sequence itself. The backward walks down: a token's gradient is whole as soon as its own output's
//           is known, so a sequence's end is nothing but zeros behind it, and a run recomputes K outputs of its neighbour.
#include "cuda/rows.cuh"
#include "hebatron/ops.h"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "causal_conv1d[cuda]";
constexpr const char* kUpdateOp = "causal_conv1d_update[cuda]";
constexpr int kCommonTaps = 4;  // every Nemotron-3's
constexpr int kMostTaps = 8;
constexpr int kWarps = 4;
constexpr int kBlocksPerSm = 3;  // 168 registers a thread; left to itself nvcc takes 128 for some and spills
constexpr int kAhead = 4;        // tokens whose loads are in flight together
constexpr int kUpdateThreads = 64;
constexpr int64_t kUpdateRows = 128;  // blocks for one pack of channels: those of more sequences read the weights once

int64_t blocks_of(int64_t count, int64_t each) { return (count + each - 1) / each; }

// Tokens of a run. Longer ones would be summed less accurately than torch does: the weights' gradient is plain fp32 inside.
int64_t run_of(int64_t tokens) {
  const int64_t wanted = blocks_of(tokens, 128);
  return wanted < 16 ? 16 : wanted > 128 ? 128 : wanted;
}

// A pack in one access: nvcc 13 takes the stores of `store` apart here, into words and halves.
template <int kCount, class T>
HEBATRON_DEVICE void put(T* p, const float (&v)[kCount]) {
  uint32_t words[kCount];
  if constexpr (kCount == 1)
    return store<1>(p, v);
  else if constexpr (sizeof(T) == 4)
    memcpy(words, v, sizeof v);
  else
#pragma unroll
    for (int i = 0; i < kCount; i += 2) words[i / 2] = pack_bf16(v[i], v[i + 1]);
  if constexpr (sizeof(T) * kCount == 16)
    store_streaming(p, uint4{words[0], words[1], words[2], words[3]});
  else if constexpr (kCount > 1)
    store_streaming(p, uint2{words[0], words[1]});
}

// What a thread sees of its channels: the tokens of one sequence, and behind its beginning the inputs before it.
template <class T, int kCount>
struct Inputs {
  const ConvArgs& a;
  int64_t channel, sequence, begin, end;

  HEBATRON_DEVICE int64_t bound(int64_t q) const {
    const int64_t at = a.cu_seqlens ? int64_t(a.cu_seqlens[q]) : q ? a.tokens : 0;
    return at < 0 ? 0 : at > a.tokens ? a.tokens : at;
  }
  HEBATRON_DEVICE void take(int64_t q) {
    sequence = q;
    begin = bound(q);
    end = bound(q + 1) > begin ? bound(q + 1) : begin;
  }
  // The sequence of token t: the last that begins at or before it, which is never an empty one.
  HEBATRON_DEVICE void find(int64_t t) {
    int64_t low = 0, high = a.sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (bound(middle) <= t ? low : high) = middle;
    }
    take(low);
  }
  HEBATRON_DEVICE void read(int64_t t, float (&out)[kCount]) const {
    const int64_t before = a.taps - 1 + t - begin;
    const T* row = t >= begin              ? static_cast<const T*>(a.x) + t * a.x_stride
                   : a.past && before >= 0 ? static_cast<const T*>(a.past) + (sequence * (a.taps - 1) + before) * a.channels
                                           : nullptr;
#pragma unroll
    for (int i = 0; i < kCount; i++) out[i] = 0.0f;
    if (row) load<kCount>(row + channel, out);
  }
};

// The taps of a thread's channels: the last a.taps of kTaps rows, oldest first.
template <int kTaps, int kCount>
struct Filter {
  float weight[kTaps][kCount], bias[kCount];
  int taps;

  HEBATRON_DEVICE int skipped() const { return kTaps == kCommonTaps ? 0 : kTaps - taps; }
  HEBATRON_DEVICE void read_bias(const float* from) {
#pragma unroll
    for (int i = 0; i < kCount; i++) bias[i] = 0.0f;
    if (from) load<kCount>(from, bias);
  }
  HEBATRON_DEVICE void read_rows(const ConvArgs& a, int64_t channel) {  // of (taps, channels)
    taps = int(a.taps);
#pragma unroll
    for (int w = 0; w < kTaps; w++)
      if (w >= skipped()) load<kCount>(a.weight + (w - skipped()) * a.channels + channel, weight[w]);
    read_bias(a.bias ? a.bias + channel : nullptr);
  }
  HEBATRON_DEVICE void read_columns(const ConvUpdateArgs& a, int64_t channel) {  // of (channels, taps)
    taps = int(a.taps);
    const float* from = a.weight + channel * a.taps;
    if constexpr (kCount == 1) {
#pragma unroll
      for (int w = 0; w < kTaps; w++)
        if (w >= skipped()) weight[w][0] = from[w - skipped()];
    } else {
      float flat[kTaps * kCount];
      load<kTaps * kCount>(from, flat);
#pragma unroll
      for (int at = 0; at < kTaps * kCount; at++) weight[at % kTaps][at / kTaps] = flat[at];
    }
    read_bias(a.bias ? a.bias + channel : nullptr);
  }
  // The output of the token whose inputs are x[j] .. x[j + kTaps - 1], before the activation. One order everywhere: prefill and
  // one token agree to the bit.
  template <int kRows>
  HEBATRON_DEVICE void weigh(const float (&x)[kRows][kCount], int j, float (&out)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; i++) out[i] = 0.0f;
#pragma unroll
    for (int w = 0; w < kTaps; w++) {
      if (w < skipped()) continue;
#pragma unroll
      for (int i = 0; i < kCount; i++) out[i] += weight[w][i] * x[j + w][i];
    }
#pragma unroll
    for (int i = 0; i < kCount; i++) out[i] += bias[i];
  }
};

template <int kCount>
HEBATRON_DEVICE void activate(bool silu, float (&v)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) v[i] *= silu ? sigmoid(v[i]) : 1.0f;
}

template <class T, int kTaps, int kCount>
HEBATRON_DEVICE void walk(const ConvArgs& a, Inputs<T, kCount>& in, int64_t first, int64_t last) {
  constexpr int kPast = kTaps - 1;
  Filter<kTaps, kCount> filter;
  filter.read_rows(a, in.channel);
  for (int64_t t = first; t < last;) {
    in.find(t);
    const int64_t stop = in.end > t && in.end < last ? in.end : last;
    float x[kPast + kAhead][kCount];
#pragma unroll
    for (int k = 0; k < kPast; k++) in.read(t - kPast + k, x[k]);
    for (; t < stop; t += kAhead) {
#pragma unroll
      for (int j = 0; j < kAhead; j++)
        if (t + j < stop) load<kCount>(static_cast<const T*>(a.x) + (t + j) * a.x_stride + in.channel, x[kPast + j]);
#pragma unroll
      for (int j = 0; j < kAhead; j++) {
        if (t + j >= stop) break;
        float y[kCount];
        filter.weigh(x, j, y);
        activate(a.silu, y);
        put<kCount>(static_cast<T*>(a.y) + (t + j) * a.channels + in.channel, y);
      }
#pragma unroll
      for (int k = 0; k < kPast; k++)
#pragma unroll
        for (int i = 0; i < kCount; i++) x[k][i] = x[kAhead + k][i];
    }
    t = stop;
  }
}

// Runs of tokens, a warp each, then rows of the last inputs.
template <class T, int kTaps, int kCount>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocksPerSm) forward(const ConvArgs a, int64_t run, int64_t runs) {
  Inputs<T, kCount> in{a, (int64_t(blockIdx.y) * kWarp + lane_id()) * kCount, 0, 0, 0};
  if (in.channel >= a.channels) return;
  const int64_t item = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp, row = item - runs, history = a.taps - 1;
  if (item < runs) {
    const int64_t last = (item + 1) * run;
    walk<T, kTaps>(a, in, item * run, last < a.tokens ? last : a.tokens);
  } else if (row < a.sequences * history) {
    in.take(row / history);
    float value[kCount];
    in.read(in.end - history + row % history, value);
    put<kCount>(static_cast<T*>(a.last) + row * a.channels + in.channel, value);
  }
}

// The gradient of output t before the activation, from that behind it and the inputs x[j] .. x[j + kTaps - 1].
template <class T, int kTaps, int kCount, int kRows>
HEBATRON_DEVICE void differentiate(const ConvArgs& a, const Filter<kTaps, kCount>& filter, const float (&x)[kRows][kCount], int j,
                                   float (&grad)[kCount]) {
  if (!a.silu) return;
  float v[kCount];
  filter.weigh(x, j, v);
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    const float s = sigmoid(v[i]);
    grad[i] *= s * (1.0f + v[i] * (1.0f - s));
  }
}

template <int kTaps, int kCount>
struct Sums {
  float weight[kTaps][kCount] = {}, bias[kCount] = {};
};

// A run from its last token down. x[j] is token base - K + j, grad[j] the gradient of output base + j.
template <class T, int kTaps, int kCount>
HEBATRON_DEVICE void walk_back(const ConvBwdArgs& b, Inputs<T, kCount>& in, int64_t first, int64_t last, Sums<kTaps, kCount>& sums) {
  constexpr int kPast = kTaps - 1;
  const ConvArgs& a = b.forward;
  const int64_t history = a.taps - 1;
  Filter<kTaps, kCount> filter;
  filter.read_rows(a, in.channel);
  for (int64_t top = last; top > first;) {
    in.find(top - 1);
    const int64_t low = in.begin > first && in.begin < top ? in.begin : first;
    int64_t high = top;
    if (top == last && in.end > last) high = in.end < last + history ? in.end : last + history;
    float x[kAhead + kPast][kCount], grad[kAhead + kPast][kCount];
#pragma unroll
    for (int k = 0; k < kPast; k++) {
      in.read(high - kPast + k, x[kAhead + k]);
#pragma unroll
      for (int i = 0; i < kCount; i++) grad[kAhead + k][i] = 0.0f;
    }
    for (int64_t base = high - kAhead; base + kAhead > low; base -= kAhead) {
#pragma unroll
      for (int j = 0; j < kAhead; j++) {
        if (base + j < low) continue;
        in.read(base - kPast + j, x[j]);
        load<kCount>(static_cast<const T*>(b.grad_y) + (base + j) * a.channels + in.channel, grad[j]);
      }
#pragma unroll
      for (int j = kAhead - 1; j >= 0; j--) {
        const int64_t t = base + j;
        if (t < low) break;
        differentiate<T>(a, filter, x, j, grad[j]);
        if (t >= last) continue;
        float total[kCount] = {};
        if (t + history >= in.end && t < in.end)
          load<kCount>(static_cast<const T*>(b.grad_last) + (in.sequence * history + t + history - in.end) * a.channels + in.channel, total);
#pragma unroll
        for (int w = 0; w < kTaps; w++) {
          if (w < filter.skipped()) continue;
#pragma unroll
          for (int i = 0; i < kCount; i++) {
            sums.weight[w][i] += grad[j][i] * x[j + w][i];
            total[i] += filter.weight[w][i] * grad[j + kPast - w][i];
          }
        }
#pragma unroll
        for (int i = 0; i < kCount; i++) sums.bias[i] += grad[j][i];
        put<kCount>(static_cast<T*>(b.grad_x) + t * a.channels + in.channel, total);
      }
#pragma unroll
      for (int k = kPast - 1; k >= 0; k--)
#pragma unroll
        for (int i = 0; i < kCount; i++) {
          x[kAhead + k][i] = x[k][i];
          grad[kAhead + k][i] = grad[k][i];
        }
    }
    top = low;
  }
}

// The gradient of what was before one sequence: x[m] is the token K - m before its beginning, grad[i] that of its output i.
template <class T, int kTaps, int kCount>
HEBATRON_DEVICE void before(const ConvBwdArgs& b, Inputs<T, kCount>& in, int64_t sequence) {
  constexpr int kPast = kTaps - 1;
  const ConvArgs& a = b.forward;
  const int64_t history = a.taps - 1;
  in.take(sequence);
  const int64_t tokens = in.end - in.begin;
  Filter<kTaps, kCount> filter;
  filter.read_rows(a, in.channel);
  float x[2 * kPast][kCount], grad[kPast][kCount];
#pragma unroll
  for (int m = 0; m < 2 * kPast; m++)
    if (m < kPast + tokens) in.read(in.begin - kPast + m, x[m]);
#pragma unroll
  for (int i = 0; i < kPast; i++) {
#pragma unroll
    for (int c = 0; c < kCount; c++) grad[i][c] = 0.0f;
    if (i >= tokens) continue;
    load<kCount>(static_cast<const T*>(b.grad_y) + (in.begin + i) * a.channels + in.channel, grad[i]);
    differentiate<T>(a, filter, x, i, grad[i]);
  }
#pragma unroll
  for (int m = 0; m < kPast; m++) {
    const int64_t row = m - filter.skipped();
    if (row < 0) continue;
    float total[kCount] = {};
    if (row >= tokens)
      load<kCount>(static_cast<const T*>(b.grad_last) + (sequence * history + row - tokens) * a.channels + in.channel, total);
#pragma unroll
    for (int w = 0; w <= m; w++) {
      if (w < filter.skipped()) continue;
#pragma unroll
      for (int c = 0; c < kCount; c++) total[c] += filter.weight[w][c] * grad[m - w][c];
    }
    put<kCount>(static_cast<T*>(b.grad_past) + (sequence * history + row) * a.channels + in.channel, total);
  }
}

// Runs of tokens, four a block, whose sums of the weights' gradient become one partial row; then sequences, a warp each.
template <class T, int kTaps, int kCount>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocksPerSm) backward(const ConvBwdArgs b, int64_t run, int64_t runs, float* partial) {
  constexpr int kSums = (kTaps + 1) * kCount;
  HEBATRON_SHARED(float, others, (kWarps - 1) * kSums * kWarp);
  const ConvArgs& a = b.forward;
  Inputs<T, kCount> in{a, (int64_t(blockIdx.y) * kWarp + lane_id()) * kCount, 0, 0, 0};
  const bool inside = in.channel < a.channels;
  const int warp = threadIdx.x / kWarp;
  const int64_t blocks = (runs + kWarps - 1) / kWarps;
  if (blockIdx.x >= blocks) {
    const int64_t sequence = (blockIdx.x - blocks) * kWarps + warp;
    if (inside && sequence < a.sequences) before<T, kTaps>(b, in, sequence);
    return;
  }
  Sums<kTaps, kCount> sums;
  const int64_t item = int64_t(blockIdx.x) * kWarps + warp, last = (item + 1) * run;
  if (inside && item < runs) walk_back<T, kTaps>(b, in, item * run, last < a.tokens ? last : a.tokens, sums);
  float* mine = others + (warp - 1) * kSums * kWarp + lane_id();
  if (warp > 0) {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
#pragma unroll
      for (int w = 0; w < kTaps; w++) mine[(w * kCount + i) * kWarp] = sums.weight[w][i];
      mine[(kTaps * kCount + i) * kWarp] = sums.bias[i];
    }
  }
  block_sync();
  if (warp > 0 || !inside) return;
#pragma unroll
  for (int i = 0; i < kCount; i++) {
#pragma unroll
    for (int other = 0; other < kWarps - 1; other++) {
      const float* theirs = others + other * kSums * kWarp + lane_id();
#pragma unroll
      for (int w = 0; w < kTaps; w++) sums.weight[w][i] += theirs[(w * kCount + i) * kWarp];
      sums.bias[i] += theirs[(kTaps * kCount + i) * kWarp];
    }
  }
  float* row = partial + blockIdx.x * (a.taps + 1) * a.channels + in.channel;
  const int64_t skipped = kTaps - a.taps;
#pragma unroll
  for (int w = 0; w < kTaps; w++)
    if (w >= skipped) store<kCount>(row + (w - skipped) * a.channels, sums.weight[w]);
  store<kCount>(row + a.taps * a.channels, sums.bias);
}

// In fp64: as accurate for a million tokens as for a thousand, and nothing beside the reading.
__global__ void sum_partials(const float* partial, int64_t count, int64_t weights, int64_t channels, float* grad_weight, float* grad_bias) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, width = weights + channels;
  if (column >= width) return;
  double total = 0.0;
#pragma unroll 4
  for (int64_t p = 0; p < count; p++) total += partial[p * width + column];
  *(column < weights ? grad_weight + column : grad_bias + column - weights) = float(total);
}

template <class T, int kTaps, int kCount>
__global__ void __launch_bounds__(kUpdateThreads) update(const ConvUpdateArgs a) {
  constexpr int kPast = kTaps - 1;
  const int64_t channel = (int64_t(blockIdx.x) * kUpdateThreads + threadIdx.x) * kCount;
  if (channel >= a.channels) return;
  Filter<kTaps, kCount> filter;
  filter.read_columns(a, channel);
  const int skipped = filter.skipped();
  for (int64_t q = blockIdx.y; q < a.sequences; q += gridDim.y) {
    T* state = static_cast<T*>(a.state) + (q * a.channels + channel) * (a.taps - 1);
    float x[kTaps][kCount], y[kCount];
    load<kCount>(static_cast<const T*>(a.x) + q * a.x_stride + channel, x[kPast]);
    if constexpr (kCount == 1) {
#pragma unroll
      for (int k = 0; k < kPast; k++)
        if (k >= skipped) x[k][0] = widen(state[k - skipped]);
#pragma unroll
      for (int k = 0; k < kPast; k++)
        if (k >= skipped) narrow(x[k + 1][0], state[k - skipped]);
    } else {
      float flat[kPast][kCount];  // a channel's past inputs lie together: element i * K + k is input k of channel i
#pragma unroll
      for (int part = 0; part < kPast; part++) load<kCount>(state + part * kCount, flat[part]);
#pragma unroll
      for (int at = 0; at < kPast * kCount; at++) x[at % kPast][at / kPast] = flat[at / kCount][at % kCount];
#pragma unroll
      for (int at = 0; at < kPast * kCount; at++) flat[at / kCount][at % kCount] = x[at % kPast + 1][at / kPast];
#pragma unroll
      for (int part = 0; part < kPast; part++) store<kCount>(state + part * kCount, flat[part]);
    }
    filter.weigh(x, 0, y);
    activate(a.silu, y);
    put<kCount>(static_cast<T*>(a.y) + q * a.channels + channel, y);
  }
}

void check_shape(const char* op, int64_t channels, int64_t taps, int64_t sequences) {
  check(channels >= 0 && channels <= 65535 * kWarp, op, "channels must be between 0 and 2,097,120", channels);
  check(taps >= 1 && taps <= kMostTaps, op, "taps must be between 1 and 8", taps);
  check(sequences >= 0 && sequences <= 1 << 28, op, "sequences must be between 0 and 2^28", sequences);
}

void check_args(const ConvArgs& a) {
  check_shape(kOp, a.channels, a.taps, a.sequences);
  check(a.tokens >= 0, kOp, "tokens must be >= 0", a.tokens);
  check(a.tokens == 0 || a.sequences > 0, kOp, "sequences must be > 0 where there are tokens", a.sequences);
  check(a.cu_seqlens || a.sequences == 1, kOp, "sequences must be 1 without cu_seqlens", a.sequences);
}

int64_t runs_of(const ConvArgs& a) { return blocks_of(a.tokens, run_of(a.tokens)); }

template <int kCount>
LaunchShape shape_for(const ConvArgs& a, int64_t blocks) {
  return {dim3(unsigned(blocks), unsigned(blocks_of(a.channels, kWarp * kCount))), dim3(kWarps * kWarp)};
}

template <class T, int kTaps, int kCount>
void run(const ConvArgs& a, const Exec& exec) {
  const int64_t runs = runs_of(a), blocks = blocks_of(runs + a.sequences * (a.taps - 1), kWarps);
  if (blocks) launch(kOp, forward<T, kTaps, kCount>, shape_for<kCount>(a, blocks), exec, a, run_of(a.tokens), runs);
}

template <class T, int kTaps, int kCount>
void run(const ConvBwdArgs& b, const Exec& exec) {
  const ConvArgs& a = b.forward;
  float* partial = static_cast<float*>(exec.workspace);
  const int64_t runs = runs_of(a), count = blocks_of(runs, kWarps), blocks = count + (b.grad_past ? blocks_of(a.sequences, kWarps) : 0);
  if (blocks) launch(kOp, backward<T, kTaps, kCount>, shape_for<kCount>(a, blocks), exec, b, run_of(a.tokens), runs, partial);
  const LaunchShape columns{dim3(unsigned(blocks_of((a.taps + 1) * a.channels, 128))), dim3(128)};
  launch(kOp, sum_partials, columns, exec, partial, count, a.taps * a.channels, a.channels, b.grad_weight, b.grad_bias);
}

template <class T, int kTaps, int kCount>
void run(const ConvUpdateArgs& a, const Exec& exec) {
  const int64_t rows = a.sequences < kUpdateRows ? a.sequences : kUpdateRows;
  const LaunchShape shape{dim3(unsigned(blocks_of(a.channels, kUpdateThreads * kCount)), unsigned(rows)), dim3(kUpdateThreads)};
  launch(kUpdateOp, update<T, kTaps, kCount>, shape, exec, a);
}

// kCount: elements of a pack, where all addresses and strides allow one.
template <class T, int kCount, class Args>
void run_by_taps(int64_t taps, uintptr_t addresses, int64_t strides, const Args& args, const Exec& exec) {
  if (taps != kCommonTaps) return run<T, kMostTaps, 1>(args, exec);
  if (addresses % 16 || strides % kCount) return run<T, kCommonTaps, 1>(args, exec);
  run<T, kCommonTaps, kCount>(args, exec);
}

}  // namespace

int64_t causal_conv1d_fwd_workspace(const ConvArgs&) { return 0; }

void causal_conv1d_fwd(const ConvArgs& a, const Exec& exec) {
  check_args(a);
  if (a.channels == 0) return;
  const DeviceGuard guard(exec);
  check_pointers(kOp, {{"x", a.x}, {"past", a.past}, {"weight", a.weight}, {"bias", a.bias}, {"cu_seqlens", a.cu_seqlens}, {"y", a.y},
                       {"last", a.last}}, exec);
  const uintptr_t addresses = addresses_of({a.x, a.past, a.weight, a.bias, a.y, a.last});
  a.dtype == DType::f32 ? run_by_taps<float, 4>(a.taps, addresses, a.x_stride | a.channels, a, exec)
                        : run_by_taps<__nv_bfloat16, 8>(a.taps, addresses, a.x_stride | a.channels, a, exec);
}

int64_t causal_conv1d_bwd_workspace(const ConvBwdArgs& b) {
  const ConvArgs& a = b.forward;
  return blocks_of(runs_of(a), kWarps) * (a.taps + 1) * a.channels * int64_t(sizeof(float));
}

void causal_conv1d_bwd(const ConvBwdArgs& b, const Exec& exec) {
  const ConvArgs& a = b.forward;
  check_args(a);
  if (a.channels == 0) return;
  check(exec.bytes_workspace >= causal_conv1d_bwd_workspace(b), kOp, "workspace is too small", exec.bytes_workspace);
  const DeviceGuard guard(exec);
  check_pointers(kOp, {{"x", a.x}, {"past", a.past}, {"weight", a.weight}, {"bias", a.bias}, {"cu_seqlens", a.cu_seqlens},
                       {"grad_y", b.grad_y}, {"grad_last", b.grad_last}, {"grad_x", b.grad_x}, {"grad_past", b.grad_past},
                       {"grad_weight", b.grad_weight}, {"grad_bias", b.grad_bias}, {"workspace", exec.workspace}}, exec);
  const uintptr_t addresses =
      addresses_of({a.x, a.past, a.weight, a.bias, b.grad_y, b.grad_last, b.grad_x, b.grad_past, exec.workspace});
  a.dtype == DType::f32 ? run_by_taps<float, 4>(a.taps, addresses, a.x_stride | a.channels, b, exec)
                        : run_by_taps<__nv_bfloat16, 4>(a.taps, addresses, a.x_stride | a.channels, b, exec);
}

int64_t causal_conv1d_update_workspace(const ConvUpdateArgs&) { return 0; }

void causal_conv1d_update(const ConvUpdateArgs& a, const Exec& exec) {
  check_shape(kUpdateOp, a.channels, a.taps, a.sequences);
  if (a.channels == 0 || a.sequences == 0) return;
  const DeviceGuard guard(exec);
  check_pointers(kUpdateOp, {{"x", a.x}, {"state", a.state}, {"weight", a.weight}, {"bias", a.bias}, {"y", a.y}}, exec);
  const uintptr_t addresses = addresses_of({a.x, a.state, a.weight, a.bias, a.y});
  a.dtype == DType::f32 ? run_by_taps<float, 4>(a.taps, addresses, a.x_stride | a.channels, a, exec)
                        : run_by_taps<__nv_bfloat16, 8>(a.taps, addresses, a.x_stride | a.channels, a, exec);
}

}  // namespace hebatron::cuda
