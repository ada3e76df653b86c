// grouped_gemm_fwd and grouped_gemm_wgrad on CUDA: checks the arguments and gives them to one of the implementations. One
// that is asked for by name is run or refused, never replaced; the automatic choice is a pure function of the arguments
// and the compute capability, so it is tested without a GPU.
#include "cuda/grouped_gemm.h"

#include "cuda/prim.cuh"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "grouped_gemm[cuda]";

const char* name_of(GroupedGemm implementation) {
  switch (implementation) {
    case GroupedGemm::sm80:
      return "sm80";
    case GroupedGemm::sm90a:
      return "sm90a";
    case GroupedGemm::cutlass:
      return "cutlass";
    case GroupedGemm::automatic:
      return "automatic";
  }
  return "unknown";
}

std::string sizes(const GroupedGemmArgs& args) {
  const auto text = [](int64_t v) { return std::to_string(v); };
  return text(args.rows) + " rows, " + text(args.experts) + " experts, n " + text(args.n) + ", k " + text(args.k) +
         ", tile " + text(args.tile_m) + "x" + text(args.tile_n);
}

void check_args(const GroupedGemmArgs& args) {
  check(args.rows >= 0 && args.rows <= 0x7fffffff, kOp, "rows must be between 0 and 2^31 - 1", args.rows);
  check(args.a_rows >= 0, kOp, "a_rows must be >= 0", args.a_rows);
  const bool indexed = args.rows_of_a || args.rows == 0;  // an empty list may be null
  check(indexed || args.a_rows == args.rows, kOp, "a_rows must equal rows without rows_of_a", args.a_rows);
  check(args.dtype == DType::bf16, kOp, "dtype must be bfloat16", int64_t(args.dtype));
  check(args.experts >= 0, kOp, "experts must be >= 0", args.experts);
  check(args.n >= 0, kOp, "n must be >= 0", args.n);
  check(args.k >= 0, kOp, "k must be >= 0", args.k);
  const bool named = args.implementation != GroupedGemm::automatic;
  check(named || args.tile_m == 0, kOp, "tile_m must be 0 without an implementation", args.tile_m);
  check(named || args.tile_n == 0, kOp, "tile_n must be 0 without an implementation", args.tile_n);
  const bool whole = !args.kept || (args.relu2 && args.scale && args.row_sums);
  check(whole, kOp, "kept must come with relu2, scale and row_sums; relu2", args.relu2);
  check(args.kept || !args.row_sums, kOp, "row_sums must be null without kept; rows", args.rows);
}

void check_pointers(const GroupedGemmArgs& args, const Exec& exec) {
  check_pointer(kOp, "a", args.a, exec);
  check_pointer(kOp, "b", args.b, exec);
  check_pointer(kOp, "offsets", args.offsets, exec);
  check_pointer(kOp, "out", args.out, exec);
  if (args.rows_of_a) check_pointer(kOp, "rows_of_a", args.rows_of_a, exec);
  if (args.scale) check_pointer(kOp, "scale", args.scale, exec);
  if (args.kept) check_pointer(kOp, "kept", args.kept, exec);
  if (args.row_sums) check_pointer(kOp, "row_sums", args.row_sums, exec);
}

// ---- the gradient of the weights ----

constexpr const char* kWgrad = "grouped_gemm_wgrad[cuda]";

std::string sizes(const GroupedGemmWgradArgs& args) {
  const auto text = [](int64_t v) { return std::to_string(v); };
  return text(args.rows) + " rows, " + text(args.experts) + " experts, m " + text(args.m) + ", n " + text(args.n) +
         ", tile " + text(args.tile_m) + "x" + text(args.tile_n);
}

void check_args(const GroupedGemmWgradArgs& args) {
  check(args.rows >= 0 && args.rows <= 0x7fffffff, kWgrad, "rows must be between 0 and 2^31 - 1", args.rows);
  check(args.a_rows >= 0, kWgrad, "a_rows must be >= 0", args.a_rows);
  const bool indexed = args.rows_of_a || args.rows == 0;
  check(indexed || args.a_rows == args.rows, kWgrad, "a_rows must equal rows without rows_of_a", args.a_rows);
  check(args.experts >= 0, kWgrad, "experts must be >= 0", args.experts);
  check(args.m >= 0, kWgrad, "m must be >= 0", args.m);
  check(args.n >= 0, kWgrad, "n must be >= 0", args.n);
  const bool named = args.implementation != GroupedGemm::automatic;
  check(named || (args.tile_m == 0 && args.tile_n == 0), kWgrad, "the tile must be 0x0 without an implementation, tile_m", args.tile_m);
}

}  // namespace

// sm90a where it can, else sm80; never the baseline. Throws with every reason when neither can.
template <class Args>
static GroupedGemm choose(const char* op, const Args& args, int compute_capability,
                          const char* (*refuse)(GroupedGemm, const Args&, int)) {
  std::string reasons;
  for (GroupedGemm candidate : {GroupedGemm::sm90a, GroupedGemm::sm80}) {
    const char* reason = refuse(candidate, args, compute_capability);
    if (!reason) return candidate;
    reasons += std::string(reasons.empty() ? "" : "; ") + name_of(candidate) + ": " + reason;
  }
  fail(std::string(op) + ": the arguments must suit an implementation (" + reasons + "), got " + sizes(args));
}

#ifndef HEBATRON_CUTLASS
const char* refuse_grouped_gemm_cutlass(const GroupedGemmArgs&) {
  return "CUTLASS headers were not given at build time (HEBATRON_CUTLASS_DIR)";
}
int64_t grouped_gemm_cutlass_workspace(const GroupedGemmArgs&) { return 0; }
void grouped_gemm_cutlass(const GroupedGemmArgs& args, const Exec&) {
  fail(std::string(kOp) + ": " + refuse_grouped_gemm_cutlass(args));
}
#endif

const char* refuse_grouped_gemm(GroupedGemm implementation, const GroupedGemmArgs& args, int compute_capability) {
  switch (implementation) {
    case GroupedGemm::sm80:
      return compute_capability < 80 ? "needs compute capability 8.0 or later" : refuse_grouped_gemm_sm80(args);
    case GroupedGemm::sm90a:
      return compute_capability != 90 ? "runs on compute capability 9.0 only" : refuse_grouped_gemm_sm90(args);
    case GroupedGemm::cutlass:
      return compute_capability != 90 ? "runs on compute capability 9.0 only" : refuse_grouped_gemm_cutlass(args);
    case GroupedGemm::automatic:
      break;
  }
  return "names no implementation";
}

GroupedGemm choose_grouped_gemm(const GroupedGemmArgs& args, int compute_capability) {
  return choose(kOp, args, compute_capability, refuse_grouped_gemm);
}

int64_t grouped_gemm_fwd_workspace(const GroupedGemmArgs& args) {
  if (args.kept) return (args.n + kPieceColumns - 1) / kPieceColumns * args.rows * int64_t(sizeof(float));
  return args.implementation == GroupedGemm::cutlass ? grouped_gemm_cutlass_workspace(args) : 0;
}

void grouped_gemm_fwd(const GroupedGemmArgs& args, const Exec& exec) {
  check_args(args);
  if (args.rows == 0 || (args.n == 0 && !args.kept)) return;
  const DeviceGuard guard(exec);
  if (args.n == 0 || args.a_rows == 0 || args.experts == 0 || args.k == 0) {  // no product has a term
    if (args.n > 0) {
      check_pointer(kOp, "out", args.out, exec);
      fill_zero(kOp, args.out, size_t(args.rows) * size_t(args.n) * sizeof(__nv_bfloat16), exec);
    }
    if (args.row_sums) {
      check_pointer(kOp, "row_sums", args.row_sums, exec);
      fill_zero(kOp, args.row_sums, size_t(args.rows) * sizeof(float), exec);
    }
    return;
  }
  check_pointers(args, exec);
  GroupedGemm chosen = args.implementation;
  if (chosen == GroupedGemm::automatic) {
    chosen = choose_grouped_gemm(args, compute_capability(exec));
  } else if (const char* reason = refuse_grouped_gemm(chosen, args, compute_capability(exec))) {
    fail("grouped_gemm[" + std::string(name_of(chosen)) + "]: " + reason + ", got " + sizes(args));
  }
  const int64_t bytes_needed = grouped_gemm_fwd_workspace(args);
  check(exec.bytes_workspace >= bytes_needed, kOp, "the workspace must be large enough, bytes", exec.bytes_workspace);
  switch (chosen) {
    case GroupedGemm::sm80:
      return grouped_gemm_sm80(args, exec);
    case GroupedGemm::sm90a:
      return grouped_gemm_sm90(args, exec);
    case GroupedGemm::cutlass:
      return grouped_gemm_cutlass(args, exec);
    case GroupedGemm::automatic:
      break;
  }
}

const char* refuse_grouped_gemm_wgrad(GroupedGemm implementation, const GroupedGemmWgradArgs& args, int compute_capability) {
  switch (implementation) {
    case GroupedGemm::sm80:
      return compute_capability < 80 ? "needs compute capability 8.0 or later" : refuse_grouped_gemm_wgrad_sm80(args);
    case GroupedGemm::sm90a:
      return compute_capability != 90 ? "runs on compute capability 9.0 only" : refuse_grouped_gemm_wgrad_sm90(args);
    case GroupedGemm::cutlass:
      return "CUTLASS's baseline has no gradient of the weights";
    case GroupedGemm::automatic:
      break;
  }
  return "names no implementation";
}

GroupedGemm choose_grouped_gemm_wgrad(const GroupedGemmWgradArgs& args, int compute_capability) {
  return choose(kWgrad, args, compute_capability, refuse_grouped_gemm_wgrad);
}

int64_t grouped_gemm_wgrad_workspace(const GroupedGemmWgradArgs&) { return 0; }

void grouped_gemm_wgrad(const GroupedGemmWgradArgs& args, const Exec& exec) {
  check_args(args);
  if (args.experts == 0 || args.m == 0 || args.n == 0) return;
  const DeviceGuard guard(exec);
  check_pointer(kWgrad, "out", args.out, exec);
  if (args.rows == 0 || args.a_rows == 0) {  // no product has a term
    const size_t bytes = args.out_dtype == DType::f32 ? sizeof(float) : sizeof(__nv_bfloat16);
    return fill_zero(kWgrad, args.out, size_t(args.experts) * size_t(args.m) * size_t(args.n) * bytes, exec);
  }
  check_pointer(kWgrad, "a", args.a, exec);
  check_pointer(kWgrad, "b", args.b, exec);
  check_pointer(kWgrad, "offsets", args.offsets, exec);
  if (args.rows_of_a) check_pointer(kWgrad, "rows_of_a", args.rows_of_a, exec);
  GroupedGemm chosen = args.implementation;
  if (chosen == GroupedGemm::automatic) {
    chosen = choose_grouped_gemm_wgrad(args, compute_capability(exec));
  } else if (const char* reason = refuse_grouped_gemm_wgrad(chosen, args, compute_capability(exec))) {
    fail("grouped_gemm_wgrad[" + std::string(name_of(chosen)) + "]: " + reason + ", got " + sizes(args));
  }
  chosen == GroupedGemm::sm90a ? grouped_gemm_wgrad_sm90(args, exec) : grouped_gemm_wgrad_sm80(args, exec);
}

}  // namespace hebatron::cuda
