// The only file that knows Python. Compiled once per module (_cpu, _cuda); every argument is keyword-only, tensors come
// as integers (data pointers), the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "hebatron/ops.h"
#ifdef HEBATRON_MODULE_CPU
#include "cpu/dispatch.h"
namespace backend = hebatron::cpu;
#define HEBATRON_MODULE_OPS HEBATRON_OPS
#else
#include "cuda/device.h"
namespace backend = hebatron::cuda;
#define HEBATRON_MODULE_OPS HEBATRON_CUDA_OPS
#endif

namespace py = pybind11;
using namespace hebatron;
using Ptr = uintptr_t;

static DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  fail("dtype must be float32 or bfloat16, got " + name);
}

static Exec exec_of(const py::kwargs& kw) {
  auto integer = [&](const char* key) { return kw.contains(key) ? kw[key].cast<int64_t>() : int64_t(0); };
  Exec e;
  e.device = kw.contains("device") ? kw["device"].cast<int>() : -1;
  e.stream = (void*)integer("stream");
  e.workspace = (void*)integer("workspace");
  e.bytes_workspace = integer("bytes_workspace");
  e.threads = kw.contains("threads") ? kw["threads"].cast<int>() : 1;
  check(e.threads >= 1, "exec", "threads must be >= 1", e.threads);
  return e;
}

// Reads one operator's arguments from keywords; an unknown keyword is an error, a missing one names itself.
class Reader {
 public:
  explicit Reader(const py::kwargs& kw) : kw_(kw) {}
  int64_t integer(const char* key) { return get(key).cast<int64_t>(); }
  double real(const char* key) { return get(key).cast<double>(); }
  DType dtype(const char* key) { return dtype_of(get(key).cast<std::string>()); }
  void* pointer(const char* key) {
    py::object value = get(key);
    return value.is_none() ? nullptr : (void*)value.cast<Ptr>();
  }
  void finish() const {
    static const char* const exec_keys[] = {"device", "stream", "workspace", "bytes_workspace", "threads"};
    size_t known = seen_;
    for (const char* key : exec_keys) known += kw_.contains(key);
    if (known != kw_.size()) fail("unexpected keyword among: " + std::string(py::str(py::list(kw_))));
  }

 private:
  py::object get(const char* key) {
    if (!kw_.contains(key)) fail(std::string("missing keyword ") + key);
    seen_++;
    return kw_[key];
  }
  const py::kwargs& kw_;
  size_t seen_ = 0;
};

static RmsNormArgs read_rms_norm(Reader& in, bool outputs) {
  RmsNormArgs a{};
  a.rows = in.integer("rows");
  a.width = in.integer("width");
  a.group = in.integer("group");
  a.eps = in.real("eps");
  a.dtype = in.dtype("dtype");
  a.weight_dtype = in.dtype("weight_dtype");
  a.x = in.pointer("x");
  a.x_stride = in.integer("x_stride");
  a.residual = in.pointer("residual");
  a.residual_stride = in.integer("residual_stride");
  a.gate = in.pointer("gate");
  a.gate_stride = in.integer("gate_stride");
  a.weight = in.pointer("weight");
  if (outputs) {
    a.y = in.pointer("y");
    a.sum = in.pointer("sum");
  }
  return a;
}

static RmsNormArgs read(Reader& in, RmsNormArgs*) { return read_rms_norm(in, true); }

static RmsNormBwdArgs read(Reader& in, RmsNormBwdArgs*) {
  RmsNormBwdArgs b{};
  b.forward = read_rms_norm(in, false);
  b.grad_y = in.pointer("grad_y");
  b.grad_sum = in.pointer("grad_sum");
  b.grad_input = in.pointer("grad_input");
  b.grad_gate = in.pointer("grad_gate");
  b.grad_weight = (float*)in.pointer("grad_weight");
  return b;
}

#ifdef HEBATRON_MODULE_CPU
static ConvArgs read_conv(Reader& in, bool outputs) {
  ConvArgs a{};
  a.tokens = in.integer("tokens");
  a.channels = in.integer("channels");
  a.taps = in.integer("taps");
  a.sequences = in.integer("sequences");
  a.silu = in.integer("silu") != 0;
  a.dtype = in.dtype("dtype");
  a.x = in.pointer("x");
  a.x_stride = in.integer("x_stride");
  a.past = in.pointer("past");
  a.weight = (const float*)in.pointer("weight");
  a.bias = (const float*)in.pointer("bias");
  a.cu_seqlens = (const int32_t*)in.pointer("cu_seqlens");
  if (outputs) {
    a.y = in.pointer("y");
    a.last = in.pointer("last");
  }
  return a;
}

static ConvArgs read(Reader& in, ConvArgs*) { return read_conv(in, true); }

static ConvBwdArgs read(Reader& in, ConvBwdArgs*) {
  ConvBwdArgs b{};
  b.forward = read_conv(in, false);
  b.grad_y = in.pointer("grad_y");
  b.grad_last = in.pointer("grad_last");
  b.grad_x = in.pointer("grad_x");
  b.grad_past = in.pointer("grad_past");
  b.grad_weight = (float*)in.pointer("grad_weight");
  b.grad_bias = (float*)in.pointer("grad_bias");
  return b;
}

static ConvUpdateArgs read(Reader& in, ConvUpdateArgs*) {
  ConvUpdateArgs a{};
  a.sequences = in.integer("sequences");
  a.channels = in.integer("channels");
  a.taps = in.integer("taps");
  a.silu = in.integer("silu") != 0;
  a.dtype = in.dtype("dtype");
  a.x = in.pointer("x");
  a.x_stride = in.integer("x_stride");
  a.state = in.pointer("state");
  a.weight = (const float*)in.pointer("weight");
  a.bias = (const float*)in.pointer("bias");
  a.y = in.pointer("y");
  return a;
}

static SsdUpdateArgs read(Reader& in, SsdUpdateArgs*) {
  SsdUpdateArgs a{};
  a.sequences = in.integer("sequences");
  a.heads = in.integer("heads");
  a.head_dim = in.integer("head_dim");
  a.groups = in.integer("groups");
  a.state_dim = in.integer("state_dim");
  a.dt_min = in.real("dt_min");
  a.dt_max = in.real("dt_max");
  a.dtype = in.dtype("dtype");
  a.state = (float*)in.pointer("state");
  a.x = in.pointer("x");
  a.x_stride = in.integer("x_stride");
  a.dt = (const float*)in.pointer("dt");
  a.A = (const float*)in.pointer("A");
  a.B = in.pointer("B");
  a.B_stride = in.integer("B_stride");
  a.C = in.pointer("C");
  a.C_stride = in.integer("C_stride");
  a.D = (const float*)in.pointer("D");
  a.dt_bias = (const float*)in.pointer("dt_bias");
  a.y = in.pointer("y");
  return a;
}
#endif

template <class Args>
static Args parse(const py::kwargs& kw) {
  Reader in(kw);
  Args args = read(in, (Args*)nullptr);
  in.finish();
  return args;
}

PYBIND11_MODULE(HEBATRON_MODULE, m) {
#define HEBATRON_BIND(name, Args)                                                                          \
  m.def(#name, [](const py::kwargs& kw) {                                                                  \
    Args args = parse<Args>(kw);                                                                           \
    Exec exec = exec_of(kw);                                                                               \
    py::gil_scoped_release release;                                                                        \
    backend::name(args, exec);                                                                             \
  });                                                                                                      \
  m.def(#name "_workspace", [](const py::kwargs& kw) { return backend::name##_workspace(parse<Args>(kw)); });
  HEBATRON_MODULE_OPS(HEBATRON_BIND)
#ifdef HEBATRON_MODULE_CPU
  m.def("compiled_isas", &cpu::compiled_isas);
  m.def("available_isas", &cpu::available_isas);
  m.def("current_isa", &cpu::current_isa);
  m.def("set_isa", &cpu::set_isa);
#else
  m.def("device_count", &cuda::device_count);
  m.def("compiled_archs", &cuda::compiled_archs);
  m.def("kernels", &cuda::kernels);
  m.def("toolkit", &cuda::toolkit);
#endif
}
