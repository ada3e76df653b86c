// ggml as a rival of bench/bench_moe.py, loaded by bench/moe_peers.py: routed products of bfloat16 weights on tensors of the
// caller's, which stay his and are neither copied nor packed. Built by bench/fetch_peers.sh, with llama.cpp's ggml.
//   product  out[t, k] = up[ids[t, k]] @ x[t]: ggml_mul_mat_id alone
//   layer    out[t] = sum over k of weights[t, k] * down[ids[t, k]] @ relu(up[ids[t, k]] @ x[t])^2: the operations that llama.cpp
//            builds for a layer of these experts, in its order
// x and out are fp32, as ggml wants them; it rounds the rows of a product's right side to bfloat16 itself.
#include <cstdint>
#include <vector>

#include "ggml-cpu.h"
#include "ggml.h"

namespace {

struct Rival {
  ggml_context* context;
  ggml_cgraph* graph;
  ggml_cplan plan;
  std::vector<uint8_t> work;
};

// A tensor over memory of the caller's: the context holds its header alone.
ggml_tensor* over(ggml_context* context, ggml_type type, int64_t n0, int64_t n1, int64_t n2, const void* data) {
  ggml_set_no_alloc(context, true);
  ggml_tensor* tensor = ggml_new_tensor_3d(context, type, n0, n1, n2);
  ggml_set_no_alloc(context, false);
  tensor->data = const_cast<void*>(data);
  return tensor;
}

// The last operation writes to the caller's memory; what it would have written to stays unused.
Rival* finish(ggml_context* context, ggml_tensor* last, float* out, int threads) {
  last->data = out;
  auto* rival = new Rival{context, ggml_new_graph(context), {}, {}};
  ggml_build_forward_expand(rival->graph, last);
  rival->plan = ggml_graph_plan(rival->graph, threads, nullptr);
  rival->work.resize(rival->plan.work_size);
  rival->plan.work_data = rival->work.data();
  return rival;
}

}  // namespace

// ids (tokens, top_k), up (experts, expert_width, width), down (experts, width, expert_width); down and weights may be null
// together: the product, and out is (tokens, top_k, expert_width), else (tokens, width).
extern "C" void* ggml_rival_open(int64_t tokens, int64_t top_k, int64_t experts, int64_t width, int64_t expert_width, int threads,
                                 const float* x, const int32_t* ids, const float* weights, const void* up, const void* down,
                                 float* out) {
  const int64_t floats = tokens * top_k * (3 * expert_width + 2 * width) + 2 * tokens * (top_k + 1) * width;
  ggml_init_params params = {};
  params.mem_size = size_t(floats) * sizeof(float) + (1 << 20);
  ggml_context* context = ggml_init(params);
  if (!context) return nullptr;
  ggml_tensor* x_T = over(context, GGML_TYPE_F32, width, 1, tokens, x);
  ggml_tensor* ids_T = over(context, GGML_TYPE_I32, top_k, tokens, 1, ids);
  ggml_tensor* up_E = over(context, GGML_TYPE_BF16, width, expert_width, experts, up);
  ggml_tensor* hidden = ggml_mul_mat_id(context, up_E, x_T, ids_T);
  if (!down) return finish(context, hidden, out, threads);

  ggml_tensor* down_E = over(context, GGML_TYPE_BF16, expert_width, width, experts, down);
  ggml_tensor* weights_T = over(context, GGML_TYPE_F32, 1, top_k, tokens, weights);
  ggml_tensor* rows = ggml_mul_mat_id(context, down_E, ggml_sqr(context, ggml_relu(context, hidden)), ids_T);
  rows = ggml_mul(context, rows, weights_T);
  ggml_tensor* sum = nullptr;
  for (int64_t k = 0; k < top_k; k++) {
    ggml_tensor* one = ggml_view_2d(context, rows, width, tokens, rows->nb[2], k * rows->nb[1]);
    sum = sum ? ggml_add(context, sum, one) : ggml_cont(context, one);
  }
  return finish(context, sum, out, threads);
}

extern "C" int ggml_rival_run(void* opened) {
  auto* rival = static_cast<Rival*>(opened);
  return ggml_graph_compute(rival->graph, &rival->plan);
}

extern "C" void ggml_rival_close(void* opened) {
  auto* rival = static_cast<Rival*>(opened);
  ggml_free(rival->context);
  delete rival;
}
