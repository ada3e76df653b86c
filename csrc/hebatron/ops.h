// The contract: one Args struct, one function and one workspace-size function per operator, with the same signature in
// cpu:: and cuda::. Strides are in elements and 64-bit; the last dimension of every tensor is contiguous unless its
// stride is named. Pointers may be null where the comment says "or null".
#pragma once
#include "hebatron/types.h"

namespace hebatron {

// y = rms_norm((x + residual) * silu(gate)) * weight over groups of `group` columns; sum = x + residual.
struct RmsNormArgs {
  int64_t rows, width, group;
  double eps;
  DType dtype, weight_dtype;
  const void* x;
  int64_t x_stride;
  const void* residual;  // or null
  int64_t residual_stride;
  const void* gate;  // or null
  int64_t gate_stride;
  const void* weight;  // width
  void* y;             // rows, width
  void* sum;           // rows, width; null when residual is null
};

// Gradients of the above. grad_input is the gradient of x and of the residual alike.
struct RmsNormBwdArgs {
  RmsNormArgs forward;    // y and sum unused
  const void* grad_y;     // rows, width, contiguous
  const void* grad_sum;   // rows, width, contiguous; or null
  void* grad_input;       // rows, width
  void* grad_gate;        // rows, width; null when gate is null
  float* grad_weight;     // width
};

// y_t = act(bias + sum_w weight[w] * x_(t-K+w)) inside each sequence, K = taps - 1; last = each sequence's last K inputs.
struct ConvArgs {
  int64_t tokens, channels, taps, sequences;
  bool silu;
  DType dtype;  // of x, past, y, last
  const void* x;
  int64_t x_stride;
  const void* past;           // sequences, K, channels: the inputs before each sequence, oldest first; on CUDA or null, which is zeros
  const float* weight;        // taps, channels
  const float* bias;          // channels, or null
  const int32_t* cu_seqlens;  // sequences + 1; on CUDA or null, which is one sequence of all tokens
  void* y;                    // tokens, channels
  void* last;                 // sequences, K, channels
};

// Gradients of the above.
struct ConvBwdArgs {
  ConvArgs forward;       // y and last unused
  const void* grad_y;     // tokens, channels, contiguous
  const void* grad_last;  // sequences, K, channels, contiguous
  void* grad_x;           // tokens, channels
  void* grad_past;        // sequences, K, channels; on CUDA or null
  float* grad_weight;     // taps, channels
  float* grad_bias;       // channels
};

// One token of the convolution for every sequence; state (sequences, channels, K) drops its oldest input and takes x.
struct ConvUpdateArgs {
  int64_t sequences, channels, taps;
  bool silu;
  DType dtype;
  const void* x;
  int64_t x_stride;
  void* state;
  const float* weight;  // channels, taps
  const float* bias;    // channels, or null
  void* y;              // sequences, channels
};

// h_t = exp(dt_t A) h_t-1 + dt_t x_t B_t^T, y_t = h_t C_t + D x_t in each sequence, with dt = clamp(softplus(dt + dt_bias),
// dt_min, dt_max). Rows of x are (heads, head_dim), of B and C (groups, state_dim).
struct SsdScanArgs {
  int64_t tokens, sequences, heads, head_dim, groups, state_dim;
  int64_t chunk;    // tokens of a chunk, at most 64; on CUDA at most 32 of fp32, and 16 chunks are a segment
  int64_t workers;  // on the CPU, threads at most: the workspace holds as many copies of their scratch
  double dt_min, dt_max;
  DType dtype;  // of x, B, C, y
  const void* x;
  int64_t x_stride;
  const float* dt;  // tokens, heads
  const float* A;   // heads
  const void* B;
  int64_t B_stride;
  const void* C;
  int64_t C_stride;
  const float* D;             // heads, or null
  const float* dt_bias;       // heads, or null
  const int32_t* cu_seqlens;  // sequences + 1; on CUDA null is one sequence
  const float* initial;       // sequences, heads, head_dim, state_dim, or null
  void* y;                    // tokens, heads, head_dim
  float* last;                // sequences, heads, head_dim, state_dim
};

// Gradients of the above.
struct SsdScanBwdArgs {
  SsdScanArgs forward;     // y and last unused
  const void* grad_y;      // tokens, heads, head_dim, contiguous
  const float* grad_last;  // sequences, heads, head_dim, state_dim, contiguous
  void* grad_x;            // tokens, heads, head_dim
  float* grad_dt;          // tokens, heads
  float* grad_A;           // heads
  void* grad_B;            // tokens, groups, state_dim
  void* grad_C;            // tokens, groups, state_dim
  float* grad_D;           // heads
  float* grad_dt_bias;     // heads
  float* grad_initial;     // sequences, heads, head_dim, state_dim, or null
};

// One token of the scan for every sequence: state = exp(dt A) state + dt x B^T, y = state C + D x, with
// dt = clamp(softplus(dt + dt_bias), dt_min, dt_max). Rows of x are (heads, head_dim), of B and C (groups, state_dim).
struct SsdUpdateArgs {
  int64_t sequences, heads, head_dim, groups, state_dim;
  double dt_min, dt_max;
  DType dtype;  // of x, B, C, y
  float* state;  // sequences, heads, head_dim, state_dim
  const void* x;
  int64_t x_stride;
  const float* dt;  // sequences, heads
  const float* A;   // heads
  const void* B;
  int64_t B_stride;
  const void* C;
  int64_t C_stride;
  const float* D;        // heads, or null
  const float* dt_bias;  // heads, or null
  void* y;               // sequences, heads, head_dim
};

// o = softmax(scale q k^T) v over the keys a query sees; query head h reads kv head h / (heads / kv_heads). The last query of
// a sequence stands at its last key. A row of q, k, v is one head of one token.
struct AttentionArgs {
  int64_t tokens_q, tokens_k, heads, kv_heads, head_dim, sequences;
  bool causal;
  int64_t window;  // the most recent keys that a query sees; tokens_q + tokens_k + 1 for all
  double scale;
  DType dtype;
  int64_t workers;  // the most threads that run: each has a scratch of its own in the workspace
  const void* q;
  int64_t q_stride, q_head_stride;
  const void* k;
  int64_t k_stride, k_head_stride;
  const void* v;
  int64_t v_stride, v_head_stride;
  const int32_t* cu_seqlens_q;  // sequences + 1
  const int32_t* cu_seqlens_k;  // sequences + 1
  void* o;     // tokens_q, heads, head_dim
  float* lse;  // tokens_q, heads: log(sum(exp(scale q k^T))), -inf where a query sees no key
};

// Gradients of the above, all contiguous.
struct AttentionBwdArgs {
  AttentionArgs forward;  // o and lse as the forward wrote them
  const void* grad_o;     // tokens_q, heads, head_dim
  void* grad_q;           // tokens_q, heads, head_dim
  void* grad_k;           // tokens_k, kv_heads, head_dim
  void* grad_v;           // tokens_k, kv_heads, head_dim
};

// Writes one key and value per sequence at position lengths[n] of its pages, then attends over them. Pages are blocks of
// block_size tokens: token t of sequence n is row t % block_size of block block_table[n][t / block_size].
struct AttentionDecodeArgs {
  int64_t sequences, heads, kv_heads, head_dim, block_size, max_blocks;
  int64_t window;  // the most recent keys that are seen; max_blocks * block_size + 1 for all
  double scale;
  DType dtype;
  int64_t workers;
  const void* q;
  int64_t q_stride, q_head_stride;
  const void* k_new;
  int64_t k_new_stride, k_new_head_stride;
  const void* v_new;
  int64_t v_new_stride, v_new_head_stride;
  void* keys;    // blocks, rows, kv_heads, head_dim
  void* values;  // the same strides
  int64_t block_stride, row_stride, head_stride;
  const int32_t* block_table;  // sequences, max_blocks
  const int32_t* lengths;      // sequences: tokens before the new one
  void* o;                     // sequences, heads, head_dim
};

// losses[t] = logsumexp(z_t) - z_t[targets[t]] with z = x weight^T; 0 where the target is ignore_index.
struct LossArgs {
  int64_t tokens, entries, width, ignore_index;
  DType dtype;  // of x and weight
  int64_t workers;
  const void* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  const int64_t* targets;
  int64_t targets_stride;
  float* losses;  // tokens
  float* lse;     // tokens: logsumexp(z_t), 0 where ignored
  float* z;       // null, or the logits of the tokens that count, in order, for the backward: tokens, z_stride
  int64_t z_stride;
};

// Gradients of the above, contiguous.
struct LossBwdArgs {
  LossArgs forward;       // lse and z as the forward wrote them; losses unused
  const float* upstream;  // tokens
  void* grad_x;           // tokens, width
  void* grad_weight;      // entries, width
};

// Rows of logits: losses[r] = logsumexp(z_r) - z_r[targets[r]], both 0 where the target is ignore_index. On CUDA, where the
// products around it are torch's.
struct CrossEntropyArgs {
  int64_t rows, entries, ignore_index;
  const float* logits;
  int64_t logits_stride;
  const int64_t* targets;
  int64_t targets_stride;
  float* losses;  // rows
  float* lse;     // rows
};

// In the place of columns of z, which are the entries [first, first + entries) of the vocabulary, their gradient
// upstream[r] (exp(z - lse[r]) - (the entry is targets[r])), 0 where ignored. A bf16 one lies in the first half of its row.
struct CrossEntropyBwdArgs {
  int64_t rows, entries, first, ignore_index;
  DType dtype;  // of the gradient
  float* logits;
  int64_t logits_stride;  // in fp32 elements
  const int64_t* targets;
  int64_t targets_stride;
  const float* lse;       // rows
  const float* upstream;  // rows
};

enum class GroupedGemm : int { automatic = 0, sm80 = 1, sm90a = 2, cutlass = 3 };

// out[r] = act(a[row(r)] b[e]) * scale[r] for the rows r of expert e, offsets[e-1] <= r < offsets[e]; row(r) = rows_of_a[r],
// or r where that is null; act is the identity or relu(.)^2. Rows past the last end become 0. fp32 accumulate.
struct GroupedGemmArgs {
  int64_t rows, a_rows, experts, n, k;
  int64_t workers;  // on the CPU at most so many threads: each has a part of the workspace
  DType dtype;      // of a, b and out; bf16 on CUDA
  bool relu2;
  const void* a;  // a_rows, k
  int64_t a_stride;
  const int32_t* rows_of_a;  // rows, each in [0, a_rows); or null, and then a_rows == rows
  const void* b;             // experts, n, k (b_k_major) or experts, k, n
  int64_t b_expert_stride, b_stride;
  bool b_k_major;            // whether k is the contiguous dimension of b
  const int32_t* offsets;    // experts: cumulative ends, rising, the last one at most rows
  const float* scale;        // rows, or null
  const void* kept;          // rows, n, contiguous; or null, always so on the CPU. With kept, relu2 and scale:
  float* row_sums;           // rows
  void* out;                 // rows, n, contiguous
  GroupedGemm implementation;
  int64_t tile_m, tile_n;  // 0, 0: the implementation chooses
};
// With kept, the way back through out' = relu(h)^2 * scale, whose out' is kept: for the gradient g = a b[e] of out',
// out = 2 sqrt(scale kept) g with the sign of scale, which is that of h, and row_sums[r] = sum over n of g kept / scale,
// that of scale. Both are 0 in a row whose scale is 0.

// out[e] = sum over the rows r of expert e of a[row(r)]^T b[r], fp32 accumulate: the gradient of the weights. Zeros for an
// expert without rows; rows past the last end count nowhere.
struct GroupedGemmWgradArgs {
  int64_t rows, a_rows, experts, m, n;
  int64_t workers;         // on the CPU at most so many threads: each has a part of the workspace
  DType dtype, out_dtype;  // of a and b; of out
  const void* a;           // a_rows, m
  int64_t a_stride;
  const int32_t* rows_of_a;  // rows, each in [0, a_rows); or null, and then a_rows == rows
  const void* b;             // rows, n
  int64_t b_stride;
  const int32_t* offsets;  // experts: cumulative ends, rising, the last one at most rows
  void* out;               // experts, m, n, contiguous; transposed: experts, n, m
  bool transposed;
  GroupedGemm implementation;
  int64_t tile_m, tile_n;  // 0, 0: the implementation chooses
};

// out = a B, one matrix.
struct LinearArgs {
  int64_t rows, n, k;
  int64_t workers;     // at most so many threads: each has a part of the workspace
  DType dtype;         // of a and of the factors
  DType weight_dtype;  // of b, fp32 or dtype: it is rounded to dtype
  DType out_dtype;
  const void* a;  // rows, k
  int64_t a_stride;
  const void* b;      // n, k (b_k_major) or k, n; packed: what moe_pack made of one expert
  int64_t b_stride;
  bool b_k_major, packed;
  void* out;  // rows, n, contiguous
};

// With s = sigmoid(logits): ids = the best top_k of s + bias among the experts of the kept_groups best groups (by the sum
// of their two best), weights = scale s[ids], divided by the sum of s[ids] with normalize; counts = tokens per expert.
struct MoeRouteArgs {
  int64_t tokens, experts, top_k, groups, kept_groups;
  int64_t workers;  // at most so many threads
  bool normalize;
  double scale;
  DType dtype;  // of the logits
  const void* logits;
  int64_t logits_stride;
  const float* bias;  // experts
  float* weights;     // tokens, top_k
  int64_t* ids;       // tokens, top_k
  int64_t* counts;    // experts
};

// Gradient of weights to the logits.
struct MoeRouteBwdArgs {
  MoeRouteArgs forward;       // weights, ids and counts unused
  const float* grad_weights;  // tokens, top_k
  void* grad_logits;          // tokens, experts
};

// The slots t * K + k sorted by their experts, then by slot: slot order[n] takes row n. An id outside [0, experts) sorts behind
// every expert, past the last end.
struct MoePermuteArgs {
  int64_t tokens, top_k, experts, width;
  DType dtype;         // of x and rows
  const void* x;       // or null: no rows
  int64_t x_stride;
  const int64_t* ids;  // tokens, top_k
  void* rows;          // tokens * top_k, width: x[order[n] / K]
  int64_t* order;      // tokens * top_k
  int32_t* position;   // tokens, top_k: the row of each slot
  int32_t* offsets;    // experts: cumulative ends
};

// y[t] = sum_k weights[t, k] rows[n] + shared[t] + residual[t] for the rows n of token t, summed in fp32 in the order of k and
// rounded once; normalized = rms_norm(y) * norm over the whole row, where norm is given.
struct MoeCombineArgs {
  int64_t tokens, top_k, width;
  double eps;
  DType dtype, norm_dtype;  // of rows, shared, residual, y and normalized; of norm
  const void* rows;         // tokens * top_k, width
  int64_t rows_stride;
  const int64_t* order;     // slot of each row; or null, and then
  const int32_t* position;  // row of each slot
  const float* weights;     // tokens, top_k, rounded to dtype as they are read; or null, which is 1
  const void* shared;       // or null
  int64_t shared_stride;
  const void* residual;  // or null
  int64_t residual_stride;
  const void* norm;  // width, or null
  void* y;           // tokens, width
  void* normalized;  // tokens, width; null when norm is null
};

// Gradients of y alone: to rows and weights. Those to shared and residual are grad_y itself.
struct MoeCombineBwdArgs {
  MoeCombineArgs forward;  // weights given; shared, residual, norm, y and normalized unused
  const void* grad_y;      // tokens, width, contiguous
  void* grad_rows;         // tokens * top_k, width
  float* grad_weights;     // tokens, top_k
};

// y[t] = sum_k weights[t, k] down[e] relu(up[e] x[t])^2 with e = ids[t, k]. Rows sorted by expert, then by slot t * K + k.
struct MoeMlpArgs {
  int64_t tokens, top_k, experts, width, expert_width;
  int64_t workers;     // at most so many threads: each has a part of the workspace
  DType dtype;         // of x, y and hidden
  DType weight_dtype;  // of up and down, on the CPU; fp32 weights are rounded to dtype as they are read. On CUDA up and down are
                       // bf16, and this is the dtype of their gradients
  bool packed;         // up and down come from moe_pack, as panels of dtype: strides and weight_dtype unused
  const void* x;
  int64_t x_stride;
  const int64_t* ids;    // tokens, top_k
  const float* weights;  // tokens, top_k
  const void* up;        // experts, expert_width, width
  int64_t up_expert_stride, up_stride;
  const void* down;  // experts, width, expert_width
  int64_t down_expert_stride, down_stride;
  void* y;       // tokens, width
  void* hidden;  // tokens * top_k, expert_width, for the backward; or null. Of the sorted rows, on the CPU up[e] x, on CUDA
                 // weight relu(up[e] x)^2: from that alone the gradients of up, down and the weight follow, each by one product
};

// Gradients of the above, from hidden.
struct MoeMlpBwdArgs {
  MoeMlpArgs forward;   // y unused
  const void* grad_y;   // tokens, width, contiguous
  void* grad_x;         // tokens, width; or null
  float* grad_weights;  // tokens, top_k
  void* grad_up;        // experts, expert_width, width; or null
  void* grad_down;      // experts, width, expert_width; or null
};

// The panels of (experts, n, k) weights for moe_mlp, behind a header of 64 bytes; with `unpack` the way back. packed has
// 64 bytes + experts * (k rounded up to a unit: 2 of bf16) * (n rounded up to 16) elements of dtype.
struct MoePackArgs {
  int64_t experts, n, k;
  bool unpack;
  DType dtype;         // of the panels, and of what is unpacked
  DType weight_dtype;  // of the weights
  const void* weights;
  int64_t expert_stride, stride;
  void* packed;
  void* unpacked;  // experts, n, k; or null
};

// One token of a whole layer for every sequence, y = x + mixer(rms_norm(x)), with matrices that moe_pack packed in dtype. Each
// is a row of the operators above, rounded where they round.
struct MambaStepArgs {
  int64_t sequences, width, heads, head_dim, groups, state_dim, taps;
  double eps, dt_min, dt_max;
  DType dtype;  // of x, y and conv_state
  const void* x;              // sequences, width
  const float* norm;          // width
  const void* in_proj;        // packed, to z (heads, head_dim), the convolution's channels (x, B, C) and dt (heads)
  void* conv_state;           // sequences, channels, taps - 1
  const float* conv_weight;   // channels, taps
  const float* conv_bias;     // channels, or null
  float* state;               // sequences, heads, head_dim, state_dim
  const float *A, *D, *dt_bias;  // heads
  const float* gate_norm;     // heads, head_dim; in groups
  const void* out_proj;       // packed
  void* y;                    // sequences, width
};
struct MoeStepArgs {
  int64_t tokens, width, experts, top_k, groups, kept_groups, expert_width, shared_width;
  bool normalize;
  double eps, scale;
  DType dtype;  // of x and y
  const void* x;                 // tokens, width
  const float* norm;             // width
  const void* router;            // packed in fp32
  const float* bias;             // experts
  const void *up, *down;         // packed
  const void *shared_up, *shared_down;  // packed
  void* y;                       // tokens, width
};
struct AttentionStepArgs {
  AttentionDecodeArgs decode;  // q, k_new, v_new and o unused
  int64_t width;
  double eps;
  const void* x;      // sequences, width
  const float* norm;  // width
  const void *q_proj, *k_proj, *v_proj, *o_proj;  // packed
  void* y;  // sequences, width
};

// One token of the whole model for every row: the layers one after another, hidden = rms_norm(x), logits = hidden head^T, rounded
// to dtype. Of a layer's arguments x, y, the number of rows and attention's workers are unused, with `lengths` its lengths,
// blocks and window too.
enum class LayerKind : int { mamba = 0, experts = 1, attention = 2 };
struct LayerStepArgs {
  LayerKind kind;
  MambaStepArgs mamba;
  MoeStepArgs experts;
  AttentionStepArgs attention;
};
struct DecodeStepArgs {
  int64_t count;
  const LayerStepArgs* layers;  // count
  int64_t rows, width, entries, blocks, max_blocks;
  double eps;
  DType dtype;         // of x, table, hidden and the packed head
  const void* x;       // rows, width; unused with ids
  const int64_t* ids;  // rows: rows of the table; or null
  const void* table;   // entries, width
  const int32_t* block_table;  // rows, max_blocks, each below `blocks`, for all attention layers; or null
  const int32_t* lengths;      // rows; or null
  const float* norm;  // width; null: hidden is the last layer's result, and there are no logits
  const void* head;   // packed: entries, width; or null
  void* hidden;       // rows, width
  float* logits;      // rows, entries
};

// The operators of each module: X(name, Args).
#define HEBATRON_CPU_OPS(X)                  \
  X(rms_norm_fwd, RmsNormArgs)               \
  X(rms_norm_bwd, RmsNormBwdArgs)            \
  X(causal_conv1d_fwd, ConvArgs)             \
  X(causal_conv1d_bwd, ConvBwdArgs)          \
  X(causal_conv1d_update, ConvUpdateArgs)    \
  X(ssd_scan_fwd, SsdScanArgs)               \
  X(ssd_scan_bwd, SsdScanBwdArgs)            \
  X(ssd_update, SsdUpdateArgs)               \
  X(grouped_gemm_fwd, GroupedGemmArgs)       \
  X(grouped_gemm_wgrad, GroupedGemmWgradArgs) \
  X(linear_fwd, LinearArgs)                  \
  X(moe_route_fwd, MoeRouteArgs)             \
  X(moe_route_bwd, MoeRouteBwdArgs)          \
  X(moe_pack, MoePackArgs)                   \
  X(moe_mlp_fwd, MoeMlpArgs)                 \
  X(moe_mlp_bwd, MoeMlpBwdArgs)              \
  X(attention_prefill_fwd, AttentionArgs)    \
  X(attention_prefill_bwd, AttentionBwdArgs) \
  X(attention_decode, AttentionDecodeArgs)   \
  X(mamba_step, MambaStepArgs)               \
  X(moe_step, MoeStepArgs)                   \
  X(attention_step, AttentionStepArgs)       \
  X(decode_step, DecodeStepArgs)             \
  X(linear_cross_entropy_fwd, LossArgs)      \
  X(linear_cross_entropy_bwd, LossBwdArgs)
#define HEBATRON_CUDA_OPS(X)                  \
  X(rms_norm_fwd, RmsNormArgs)                \
  X(rms_norm_bwd, RmsNormBwdArgs)             \
  X(causal_conv1d_fwd, ConvArgs)              \
  X(causal_conv1d_bwd, ConvBwdArgs)           \
  X(causal_conv1d_update, ConvUpdateArgs)     \
  X(ssd_scan_fwd, SsdScanArgs)                \
  X(ssd_scan_bwd, SsdScanBwdArgs)             \
  X(ssd_update, SsdUpdateArgs)                \
  X(cross_entropy_fwd, CrossEntropyArgs)      \
  X(cross_entropy_bwd, CrossEntropyBwdArgs)   \
  X(grouped_gemm_fwd, GroupedGemmArgs)        \
  X(grouped_gemm_wgrad, GroupedGemmWgradArgs) \
  X(moe_route_fwd, MoeRouteArgs)              \
  X(moe_route_bwd, MoeRouteBwdArgs)           \
  X(moe_permute_fwd, MoePermuteArgs)          \
  X(moe_combine_fwd, MoeCombineArgs)          \
  X(moe_combine_bwd, MoeCombineBwdArgs)       \
  X(moe_mlp_fwd, MoeMlpArgs)                  \
  X(moe_mlp_bwd, MoeMlpBwdArgs)               \
  X(moe_decode, MoeMlpArgs)                   \
  X(attention_decode, AttentionDecodeArgs)    \
  X(attention_prefill_fwd, AttentionArgs)     \
  X(attention_prefill_bwd, AttentionBwdArgs)

#define HEBATRON_DECLARE(name, Args)             \
  void name(const Args& args, const Exec& exec); \
  int64_t name##_workspace(const Args& args);

namespace cpu {
HEBATRON_CPU_OPS(HEBATRON_DECLARE)
}
namespace cuda {
HEBATRON_CUDA_OPS(HEBATRON_DECLARE)
}

}  // namespace hebatron
