// What      s = sigmoid(logits); ids = the best top_k of s + bias, inside the best groups; weights = scale s / sum s; and
//           the backward to the logits.
// Grid      blocks of tokens over the threads; a token's experts lie in L1.
// Traffic   the logits once; what is written is small beside them.
// Roofline  compute: one fp64 exponential per logit.
// Measured  never on its own; python bench/bench_moe.py times it inside its callers.
// Limits    fp32 and bf16 logits; any number of experts and groups.
// Why so    the sigmoid is taken in fp64 and rounded once, eight at a time for any number of experts, so that equal logits
//           tie wherever they stand; the chosen stay sorted by insertion, which for 6 of 128 is one comparison an expert.
#include <cmath>

#include "cpu/gemm.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

constexpr int kEight = 8;

// e^x to about 1 ulp for -708 <= x <= 709, beyond that the value there; NaN stays. |r| <= ln2/2, Taylor to degree 13.
static inline double exp_double(double x) {
  x = x < -708.0 ? -708.0 : x > 709.0 ? 709.0 : x;
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer in the low bits
  const double shifted = x * 1.4426950408889634 + kShift, n = shifted - kShift;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  int64_t bits;
  std::memcpy(&bits, &shifted, 8);
  bits = int64_t(uint64_t(bits) << 52) + 0x3ff0000000000000;
  double scale;
  std::memcpy(&scale, &bits, 8);
  return p * scale;
}

// What one thread needs for a token.
struct Token {
  double* score;    // experts, rounded up to eight
  float* rated;     // the same
  float* total;     // groups
  int64_t* groups;  // kept groups
  bool* kept;       // groups
  int64_t* ids;     // top_k, for the backward
  Token(const MoeRouteArgs& a, Workspace& w) {
    const int64_t padded = (a.experts + kEight - 1) / kEight * kEight;
    score = w.take<double>(padded);
    rated = w.take<float>(padded);
    total = w.take<float>(a.groups);
    groups = w.take<int64_t>(a.kept_groups);
    kept = w.take<bool>(a.groups);
    ids = w.take<int64_t>(a.top_k);
  }
};
static int64_t bytes_of_token(const MoeRouteArgs& a) {
  Workspace space{nullptr};
  Token token(a, space);
  return space.bytes;
}

static inline bool better(float a, float b) { return a > b || (a != a && b == b); }  // NaN before every number

// The indices of the `count` best of value[0, n), best first, equals by index: inserts i into the sorted list.
static inline void insert(int64_t* best, int64_t& filled, int64_t count, const float* value, int64_t i) {
  if (filled == count && !better(value[i], value[best[count - 1]])) return;
  int64_t at = filled < count ? filled++ : count - 1;
  for (; at > 0 && better(value[i], value[best[at - 1]]); at--) best[at] = best[at - 1];
  best[at] = i;
}

template <class T>
static void scores(const MoeRouteArgs& a, const T* logits, const Token& token) {
  for (int64_t begin = 0; begin < a.experts; begin += kEight) {
    const int64_t filled = std::min<int64_t>(kEight, a.experts - begin);
    double x[kEight] = {}, s[kEight];
    float bias[kEight] = {};
    for (int64_t i = 0; i < filled; i++) x[i] = double(to_float(logits[begin + i])), bias[i] = a.bias[begin + i];
    for (int i = 0; i < kEight; i++) s[i] = 1.0 / (1.0 + exp_double(-x[i]));
    for (int i = 0; i < kEight; i++) token.score[begin + i] = s[i], token.rated[begin + i] = float(s[i]) + bias[i];
  }
}

static void choose(const MoeRouteArgs& a, const Token& token, int64_t* ids) {
  const int64_t size = a.experts / a.groups;
  int64_t kept = 0, filled = 0;
  if (a.groups == 1) {
    for (int64_t e = 0; e < a.experts; e++) insert(ids, filled, a.top_k, token.rated, e);
    return;
  }
  for (int64_t g = 0; g < a.groups; g++) {
    int64_t pair[2], two = 0;
    for (int64_t e = g * size; e < (g + 1) * size; e++) insert(pair, two, 2, token.rated, e);
    token.total[g] = token.rated[pair[0]] + token.rated[pair[1]];
  }
  for (int64_t g = 0; g < a.groups; g++) insert(token.groups, kept, a.kept_groups, token.total, g);
  for (int64_t g = 0; g < a.groups; g++) token.kept[g] = false;
  for (int64_t i = 0; i < kept; i++) token.kept[token.groups[i]] = true;
  for (int64_t e = 0; e < a.experts; e++)
    if (token.kept[e / size]) insert(ids, filled, a.top_k, token.rated, e);
}

template <class T>
static void route(const MoeRouteArgs& a, int64_t t, const Token& token, int64_t* ids) {
  scores(a, (const T*)a.logits + t * a.logits_stride, token);
  choose(a, token, ids);
}

static double sum_of_chosen(const MoeRouteArgs& a, const Token& token, const int64_t* ids) {
  double total = 0.0;
  for (int64_t k = 0; k < a.top_k; k++) total += token.score[ids[k]];
  return total + 1e-20;
}

template <class T>
static void forward(const MoeRouteArgs& a, const Exec& exec) {
  Workspace space{(char*)exec.workspace};
  std::fill(a.counts, a.counts + a.experts, 0);
  const int threads = int(std::min<int64_t>({exec.threads, a.workers, std::max<int64_t>(1, a.tokens)}));
  const int64_t bytes = bytes_of_token(a);
  const auto tokens = [&](int64_t member, int64_t begin, int64_t end) {
    Workspace mine{space.base + member * bytes};
    const Token token(a, mine);
    for (int64_t t = begin; t < end; t++) {
      int64_t* ids = a.ids + t * a.top_k;
      route<T>(a, t, token, ids);
      const double scale = a.normalize ? a.scale / sum_of_chosen(a, token, ids) : a.scale;
      for (int64_t k = 0; k < a.top_k; k++) a.weights[t * a.top_k + k] = float(token.score[ids[k]] * scale);
    }
  };
  for_tasks(threads, threads, [&](int64_t n) { tokens(n, a.tokens * n / threads, a.tokens * (n + 1) / threads); });
  for (int64_t s = 0; s < a.tokens * a.top_k; s++) a.counts[a.ids[s]]++;
}

// With w_k = scale s_k / S and S = sum s: dlogit_k = scale / S (g_k - sum_j g_j s_j / S) s_k (1 - s_k).
template <class T>
static void backward(const MoeRouteBwdArgs& b, const Exec& exec) {
  const MoeRouteArgs& a = b.forward;
  Workspace space{(char*)exec.workspace};
  const int threads = int(std::min<int64_t>({exec.threads, a.workers, std::max<int64_t>(1, a.tokens)}));
  const int64_t bytes = bytes_of_token(a);
#pragma omp parallel num_threads(threads)
  {
    Workspace mine{space.base + worker() * bytes};
    const Token token(a, mine);
    int64_t* ids = token.ids;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.tokens; t++) {
      T* grad = (T*)b.grad_logits + t * a.experts;
      const float* upstream = b.grad_weights + t * a.top_k;
      route<T>(a, t, token, ids);
      std::memset((void*)grad, 0, size_t(a.experts) * sizeof(T));
      const double total = a.normalize ? sum_of_chosen(a, token, ids) : 1.0;
      double mean = 0.0;
      if (a.normalize)
        for (int64_t k = 0; k < a.top_k; k++) mean += upstream[k] * token.score[ids[k]] / total;
      for (int64_t k = 0; k < a.top_k; k++) {
        const double s = token.score[ids[k]];
        from_float(float(a.scale / total * (upstream[k] - mean) * s * (1.0 - s)), grad[ids[k]]);
      }
    }
  }
}

static void check_args(const MoeRouteArgs& a) {
  check(a.tokens >= 0, "moe_route", "tokens must be >= 0", a.tokens);
  check(a.workers > 0, "moe_route", "workers must be > 0", a.workers);
  check(a.groups > 0 && a.experts > 0 && a.experts % a.groups == 0, "moe_route", "groups must divide the experts", a.groups);
  check(a.groups == 1 || a.experts >= 2 * a.groups, "moe_route", "groups must have at least 2 experts, groups", a.groups);
  check(a.kept_groups > 0 && a.kept_groups <= a.groups, "moe_route", "kept_groups must be between 1 and the groups", a.kept_groups);
  check(a.top_k > 0 && a.top_k <= a.experts / a.groups * a.kept_groups, "moe_route", "top_k must be between 1 and the experts kept", a.top_k);
}

}  // namespace

int64_t moe_route_fwd_workspace(const MoeRouteArgs& a) {
  check_args(a);
  return a.workers * bytes_of_token(a);
}
void moe_route_fwd(const MoeRouteArgs& a, const Exec& exec) {
  check(exec.bytes_workspace >= moe_route_fwd_workspace(a), "moe_route", "workspace is too small", exec.bytes_workspace);
  a.dtype == DType::f32 ? forward<float>(a, exec) : forward<bf16>(a, exec);
}

int64_t moe_route_bwd_workspace(const MoeRouteBwdArgs& b) {
  check_args(b.forward);
  return b.forward.workers * bytes_of_token(b.forward);
}
void moe_route_bwd(const MoeRouteBwdArgs& b, const Exec& exec) {
  check(exec.bytes_workspace >= moe_route_bwd_workspace(b), "moe_route", "workspace is too small", exec.bytes_workspace);
  b.forward.dtype == DType::f32 ? backward<float>(b, exec) : backward<bf16>(b, exec);
}

}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
