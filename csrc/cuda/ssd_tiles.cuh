// What the kernels of ssd_scan share: where a block stands among the packed sequences, the steps of a chunk, tiles in shared
// memory and their products. A head is taken in slices of 64 of its columns. A chunk is a tile's tokens at most and the unit
// of every product; a segment is 16 chunks and the unit of a block; both count from their sequence's start.
#pragma once
#include "cuda/grouped_gemm.cuh"  // transpose_quad
#include "cuda/ssd.cuh"

namespace hebatron::cuda {
namespace {

using bf16 = __nv_bfloat16;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kP = 64;               // columns of a slice of a head: 16 a warp where the state is multiplied
constexpr int kS = 128;              // values of a row of the state at most
constexpr int kSegmentChunks = 16;   // 1,024 tokens: 256 blocks at 4,096 tokens of 64 heads. States of segments of half the
                                     // length move 0.54 GB more at 65,536 tokens
template <class T>
constexpr int kTokens = sizeof(T) == 2 ? 64 : 32;  // of a tile; fp32 tiles of 64 would need 192 KB of shared memory
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLowestLog = -192.0;  // of a token: 2^-150 is 0 in fp32, and sums over a chunk stay exact

HEBATRON_DEVICE int least(int a, int b) { return a < b ? a : b; }

template <class T>
HEBATRON_DEVICE int chunk_tokens(const SsdScanArgs& a) {
  return least(int(a.chunk), kTokens<T>);
}
template <class T>
int64_t chunk_length(const SsdScanArgs& a) {
  return a.chunk < kTokens<T> ? a.chunk : kTokens<T>;
}
inline int64_t slices_of(const SsdScanArgs& a) { return (a.head_dim + kP - 1) / kP; }

// Runs of `length` tokens (a chunk, a segment), each in a slot of its own: sequence q's first is cu_seqlens[q] / length + q. No two
// sequences meet there, and the host needs none of their lengths: so many slots hold all, at most `sequences` of them empty.
inline int64_t slots_of(const SsdScanArgs& a, int64_t length) { return a.tokens / length + a.sequences; }

// Where sequence q starts, and the last one ends. No table is one sequence: to write one would take a launch.
HEBATRON_DEVICE int start_of(const SsdScanArgs& a, int64_t q) { return a.cu_seqlens ? a.cu_seqlens[q] : q ? int(a.tokens) : 0; }

// The sequence and the number within it of run `slot` of so many tokens; see slots_of.
struct Run {
  int64_t sequence, begin;  // begin: its first token
  int number, tokens;       // tokens <= 0: an empty slot
  bool last;                // of its sequence

  HEBATRON_DEVICE Run(const SsdScanArgs& a, int64_t slot, int length) {
    int64_t low = 0, high = a.sequences;  // the last sequence whose first slot is not behind this one: in [low, high)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (start_of(a, middle) / length + middle <= slot ? low : high) = middle;
    }
    const int first = start_of(a, low);
    sequence = low;
    number = int(slot - (first / length + low));
    begin = first + int64_t(number) * length;
    const int64_t left = start_of(a, low + 1) - begin;
    tokens = int(left < length ? left : length);
    last = left <= length;
  }
};

// Where a block stands: a slice of a head, a segment of a sequence.
struct Place : Run {
  int head, group, column, columns;  // of the slice: the first, and how many the head has from there
  int64_t slot;

  HEBATRON_DEVICE Place(const SsdScanArgs& a, int chunk, int slices)
      : Run(a, blockIdx.x / unsigned(int(a.heads) * slices), chunk * kSegmentChunks) {
    const int inner = int(a.heads) * slices, rest = int(blockIdx.x) % inner;
    slot = int(blockIdx.x) / inner;
    head = rest / slices;
    column = rest % slices * kP;
    columns = least(kP, int(a.head_dim) - column);
    group = head / int(a.heads / a.groups);
  }
};

// The steps of one head in one chunk. Logs of decays are base 2 and in two parts, high + low: behind one large step both of
// a difference are large and close, and in one part the rounding would be most of what is left.
template <class T>
struct Steps {
  float high[kTokens<T>], low[kTokens<T>];  // log of the decay from the chunk's start through each token
  float dt[kTokens<T>];                     // 0 past the chunk's end, where the logs stay as they are
  float carry[kTokens<T>];                  // what a token's part of the state is multiplied with on its way out of the chunk:
                                            // dt times the decay to the end; on the way back the decay from the start

  HEBATRON_DEVICE float log(int i) const { return high[i] + low[i]; }
  HEBATRON_DEVICE float log_between(int j, int i) const { return (high[i] - high[j]) + (low[i] - low[j]); }
  HEBATRON_DEVICE float total() const { return exp2_approx(log(kTokens<T> - 1)); }
};

// A warp's own part of them: lane l has tokens l * kPer and on.
template <class T>
struct LaneSteps {
  static constexpr int kPer = kTokens<T> / kWarp;
  float raw[kPer], dt[kPer], high[kPer], low[kPer], carry[kPer];
  double total;  // log of the chunk's decay

  HEBATRON_DEVICE void read(const SsdScanArgs& a, int head, int64_t begin, int count) {
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int i = lane_id() * kPer + k;
      raw[k] = i < count ? a.dt[(begin + i) * a.heads + head] : 0.0f;
    }
  }
  HEBATRON_DEVICE void find(const SsdScanArgs& a, int head, int count, bool back = false) {
    const float bias = a.dt_bias ? a.dt_bias[head] : 0.0f;
    const double rate = double(a.A[head]) * kLog2E;
    double sum[kPer], before = 0.0;
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      raw[k] += bias;
      dt[k] = lane_id() * kPer + k < count ? step_of(raw[k], float(a.dt_min), float(a.dt_max)) : 0.0f;
      const double log = double(dt[k]) * rate;
      sum[k] = before += log < kLowestLog ? kLowestLog : log;
    }
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {  // the sums of the lanes before
      const double other = shfl_up(before, offset);
      before += lane_id() >= offset ? other : 0.0;
    }
    total = shfl(before, kWarp - 1);
    before -= sum[kPer - 1];
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const double log = before + sum[k];
      high[k] = float(log);
      low[k] = float(log - double(high[k]));
      carry[k] = back ? exp2_approx(float(log)) : dt[k] * exp2_approx(float(total - log));
    }
  }
  HEBATRON_DEVICE void write(Steps<T>& to) const {
#pragma unroll
    for (int k = 0; k < kPer; k++) {
      const int i = lane_id() * kPer + k;
      to.high[i] = high[k], to.low[i] = low[k], to.dt[i] = dt[k], to.carry[i] = carry[k];
    }
  }
};

// A tile in shared memory: rows of kColumns elements in pieces of 16 bytes, piece c of row r at place c ^ r % 8 of it. 8 rows
// at one piece (a matrix of ldmatrix) and 8 pieces of one row (a quarter warp's cp.async) both fall into the 8 different
// 16-byte columns of the 32 banks.
template <class T, int kColumns>
struct Tile {
  static constexpr int kPer = 16 / int(sizeof(T)), kPieces = kColumns / kPer;
  T* at;

  HEBATRON_DEVICE uint32_t piece(int row, int column) const {
    return smem_address(at) + uint32_t(row * kPieces + (column / kPer ^ row % 8)) * 16;
  }
  HEBATRON_DEVICE T& operator()(int row, int column) const {
    return at[row * kColumns + (column / kPer ^ row % 8) * kPer + column % kPer];
  }
  // Its first kRows rows from rows of `from` that lie `stride` apart; zeros past `rows` and `columns`. One address a thread,
  // which walks: an address a piece in registers, kept over the chunks, spills.
  template <int kRows, int kLoaders = kThreads>
  HEBATRON_DEVICE void load(const T* from, int64_t stride, int rows, int columns) const {
    constexpr int kStep = kLoaders / kPieces;  // rows
    const int row = threadIdx.x / kPieces, column = threadIdx.x % kPieces * kPer;
    const T* p = from + row * stride + column;
#pragma unroll
    for (int i = 0; i < kRows / kStep; i++, p += kStep * stride) {
      const bool in = row + i * kStep < rows && column < columns;
      cp_async_16(piece(row + i * kStep, column), in ? p : from, in);
    }
  }
};

// 16 x 16 elements of a left factor in the registers of a warp: lane 4 g + q has rows g and g + 8 and columns 2 q, 2 q + 1,
// 2 q + 8 and 2 q + 9, as an accumulator of two pieces of 8 columns does.
template <class T>
struct Left;

template <>
struct Left<bf16> {
  uint32_t r[4];

  template <int kColumns>
  HEBATRON_DEVICE void rows(const Tile<bf16, kColumns>& t, int row, int column) {
    ldmatrix_x4(r, t.piece(row + lane_id() % 16, column ^ lane_id() / 16 * 8));
  }
  template <int kColumns>
  HEBATRON_DEVICE void transposed(const Tile<bf16, kColumns>& t, int row, int column) {  // of the tile's
    ldmatrix_x4_trans(r, t.piece(row + lane_id() % 8 + lane_id() / 16 * 8, column ^ lane_id() / 8 % 2 * 8));
  }
  HEBATRON_DEVICE void from(const float (&v)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) r[i] = pack_bf16(v[i / 2][i % 2 * 2], v[i / 2][i % 2 * 2 + 1]);
  }
  HEBATRON_DEVICE void scale_columns(const float* by) {
    by += lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; i++)
      r[i] = pack_bf16(unpack_bf16(r[i], 0) * by[i / 2 * 8], unpack_bf16(r[i], 1) * by[i / 2 * 8 + 1]);
  }
};

template <>
struct Left<float> {
  float v[2][4];

  template <int kColumns>
  HEBATRON_DEVICE void rows(const Tile<float, kColumns>& t, int row, int column) {
#pragma unroll
    for (int i = 0; i < 8; i++)
      v[i / 4][i % 4] = t(row + lane_id() / 4 + i % 4 / 2 * 8, column + i / 4 * 8 + lane_id() % 4 * 2 + i % 2);
  }
  template <int kColumns>
  HEBATRON_DEVICE void transposed(const Tile<float, kColumns>& t, int row, int column) {
#pragma unroll
    for (int i = 0; i < 8; i++)
      v[i / 4][i % 4] = t(row + i / 4 * 8 + lane_id() % 4 * 2 + i % 2, column + lane_id() / 4 + i % 4 / 2 * 8);
  }
  HEBATRON_DEVICE void from(const float (&values)[2][4]) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i / 4][i % 4] = values[i / 4][i % 4];
  }
  HEBATRON_DEVICE void scale_columns(const float* by) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i / 4][i % 4] *= by[i / 4 * 8 + lane_id() % 4 * 2 + i % 2];
  }
};

// sum += left (16 x 16) times 16 rows of k by 8 kPieces columns of a tile. kByColumn: the tile's rows are the columns of the
// factor, k along them; else its rows are k. `column` and k: where in the tile.
template <bool kByColumn, int kPieces, int kColumns>
HEBATRON_DEVICE void multiply(float (&sum)[kPieces][4], const Left<bf16>& left, const Tile<bf16, kColumns>& t, int column, int k) {
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < kPieces; i += 2) {
    uint32_t r[4];
    if (kByColumn)
      ldmatrix_x4(r, t.piece(column + i * 8 + lane % 8 + lane / 16 * 8, k ^ lane / 8 % 2 * 8));
    else
      ldmatrix_x4_trans(r, t.piece(k + lane % 16, (column + i * 8) ^ lane / 16 * 8));
    const uint32_t first[2] = {r[0], r[1]}, second[2] = {r[2], r[3]};
    mma_m16n8k16(sum[i], left.r, first);
    mma_m16n8k16(sum[i + 1], left.r, second);
  }
}
// fp32 has no such instruction that keeps its bits: quads hand the left factor around, the right one is read where it lies.
template <bool kByColumn, int kPieces, int kColumns>
HEBATRON_DEVICE void multiply(float (&sum)[kPieces][4], const Left<float>& left, const Tile<float, kColumns>& t, int column, int k) {
  const int quad = lane_id() / 4 * 4, q = lane_id() % 4;
#pragma unroll
  for (int part = 0; part < 4; part++)
#pragma unroll 1
    for (int lane = 0; lane < 4; lane++) {
      const int n = k + part / 2 * 8 + lane * 2 + part % 2;
      const float upper = shfl(left.v[part / 2][part % 2], quad + lane), lower = shfl(left.v[part / 2][2 + part % 2], quad + lane);
#pragma unroll
      for (int i = 0; i < kPieces; i++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int c = column + i * 8 + q * 2 + e;
          const float right = kByColumn ? t(c, n) : t(n, c);
          sum[i][e] += upper * right;
          sum[i][2 + e] += lower * right;
        }
    }
}

// The words of 8 kPieces columns of rows g and g + 8 of an accumulator go to `to`, whose rows lie `stride` apart: `rows` of them
// from the warp's first, `columns` from the first. bf16 as 16 bytes a lane: quads exchange their pairs.
template <int kPieces>
HEBATRON_DEVICE void store_rows(bf16* to, int64_t stride, const float (&v)[kPieces][4], int rows, int columns) {
  const int g = lane_id() / 4, q = lane_id() % 4;
  static_assert(kPieces % 4 == 0, "a quad exchanges four pieces");
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < kPieces; i += 4) {
      uint32_t words[4];
#pragma unroll
      for (int k = 0; k < 4; k++) words[k] = pack_bf16(v[i + k][half * 2], v[i + k][half * 2 + 1]);
      transpose_quad(words);
      if (g + half * 8 < rows && (i + q) * 8 < columns)
        store_streaming(to + (g + half * 8) * stride + (i + q) * 8, uint4{words[0], words[1], words[2], words[3]});
    }
}
template <int kPieces>
HEBATRON_DEVICE void store_rows(float* to, int64_t stride, const float (&v)[kPieces][4], int rows, int columns) {
  const int g = lane_id() / 4, q = lane_id() % 4;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < kPieces; i++)
      if (g + half * 8 < rows && i * 8 < columns)
        *reinterpret_cast<float2*>(to + (g + half * 8) * stride + i * 8 + q * 2) = float2{v[i][half * 2], v[i][half * 2 + 1]};
}
template <int kPieces>
HEBATRON_DEVICE void load_rows(const float* from, int64_t stride, float (&v)[kPieces][4], int rows, int columns) {
  const int g = lane_id() / 4, q = lane_id() % 4;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      float2 pair{0.0f, 0.0f};
      if (g + half * 8 < rows && i * 8 < columns)
        pair = *reinterpret_cast<const float2*>(from + (g + half * 8) * stride + i * 8 + q * 2);
      v[i][half * 2] = pair.x, v[i][half * 2 + 1] = pair.y;
    }
}

// An accumulator's pieces as 16 rows of a tile.
template <int kPieces, int kColumns>
HEBATRON_DEVICE void to_tile(const Tile<bf16, kColumns>& t, int row, const float (&v)[kPieces][4]) {
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < kPieces; i++)
      *reinterpret_cast<uint32_t*>(&t(row + lane_id() / 4 + half * 8, i * 8 + lane_id() % 4 * 2)) =
          pack_bf16(v[i][half * 2], v[i][half * 2 + 1]);
}
template <int kPieces, int kColumns>
HEBATRON_DEVICE void to_tile(const Tile<float, kColumns>& t, int row, const float (&v)[kPieces][4]) {
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < kPieces; i++)
      *reinterpret_cast<float2*>(&t(row + lane_id() / 4 + half * 8, i * 8 + lane_id() % 4 * 2)) = float2{v[i][half * 2], v[i][half * 2 + 1]};
}

// A warp's 16 rows of the state, from 16 warp on: state = total state + x^T carry B over a chunk's tokens; on the way back the
// state's gradient, with those of y and C in place of x and B.
using State = float[kS / 8][4];
template <class T>
HEBATRON_DEVICE void advance(State& state, const Steps<T>& steps, const Tile<T, kP>& x, const Tile<T, kS>& B, int warp) {
  const float total = steps.total();
#pragma unroll
  for (int i = 0; i < kS / 8; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) state[i][e] *= total;
#pragma unroll
  for (int k = 0; k < kTokens<T>; k += 16) {
    Left<T> left;
    left.transposed(x, k, warp * 16);
    left.scale_columns(steps.carry + k);
    multiply<false>(state, left, B, 0, k);
  }
}

inline void check_scan(const char* op, const SsdScanArgs& a) {
  check_ssd_sizes(op, a.sequences, a.heads, a.head_dim, a.groups, a.state_dim);
  check(a.tokens >= 0 && a.tokens < int64_t(1) << 31, op, "tokens must be 0 to 2^31", a.tokens);
  check(a.sequences || !a.tokens, op, "sequences must be > 0 where there are tokens", a.tokens);
  check(a.cu_seqlens || a.sequences == 1, op, "cu_seqlens must be given for sequences other than one", a.sequences);
  check(a.head_dim % 8 == 0, op, "head_dim must be a multiple of 8", a.head_dim);
  check(a.state_dim % 8 == 0 && a.state_dim <= kS, op, "state_dim must be a multiple of 8 up to 128", a.state_dim);
  check(a.chunk >= 1 && a.chunk <= 64, op, "chunk must be between 1 and 64", a.chunk);
  const int64_t blocks = slots_of(a, a.chunk < 32 ? a.chunk : 32) * a.heads * slices_of(a);
  check(blocks < int64_t(1) << 31, op, "chunks * heads must be below 2^31", blocks);
}

// What is moved 16 bytes at a time starts on 16 bytes.
inline void check_rows(const char* op, const SsdScanArgs& a, std::initializer_list<const void*> others) {
  for (const int64_t stride : {a.x_stride, a.B_stride, a.C_stride})
    check(stride % (a.dtype == DType::f32 ? 4 : 8) == 0, op, "rows of x, B and C must start on 16 bytes, stride", stride);
  const uintptr_t addresses = addresses_of({a.x, a.B, a.C, a.initial}) | addresses_of(others);
  check(addresses % 16 == 0, op, "all tensors must start on a multiple of 16 bytes, address", int64_t(addresses % 16));
}

}  // namespace
}  // namespace hebatron::cuda
