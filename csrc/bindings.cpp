// With bindings.h the only file that knows Python. Compiled once per module (_cpu, _cuda, _emu); every argument is
// keyword-only, tensors come as integers (data pointers), the GIL is released while a kernel runs.
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings.h"
#include "bindings_attention.h"
#include "bindings_moe.h"
#include "hebatron/ops.h"
#ifdef HEBATRON_MODULE_CPU
#include "cpu/dispatch.h"
namespace backend = hebatron::cpu;
#define HEBATRON_MODULE_OPS HEBATRON_CPU_OPS
#else
#include "cuda/grouped_gemm.h"
#ifdef HEBATRON_EMULATOR
#include "emulator.h"
#else
#include "cuda/device.h"
#endif
namespace backend = hebatron::cuda;
#define HEBATRON_MODULE_OPS HEBATRON_CUDA_OPS
#endif

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

static SsdScanArgs read_ssd_scan(Reader& in, bool outputs) {
  SsdScanArgs a{};
  a.tokens = in.integer("tokens");
  a.sequences = in.integer("sequences");
  a.heads = in.integer("heads");
  a.head_dim = in.integer("head_dim");
  a.groups = in.integer("groups");
  a.state_dim = in.integer("state_dim");
  a.chunk = in.integer("chunk");
  a.workers = in.integer("workers");
  a.dt_min = in.real("dt_min");
  a.dt_max = in.real("dt_max");
  a.dtype = in.dtype("dtype");
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
  a.cu_seqlens = (const int32_t*)in.pointer("cu_seqlens");
  a.initial = (const float*)in.pointer("initial");
  if (outputs) {
    a.y = in.pointer("y");
    a.last = (float*)in.pointer("last");
  }
  return a;
}

static SsdScanArgs read(Reader& in, SsdScanArgs*) { return read_ssd_scan(in, true); }

static SsdScanBwdArgs read(Reader& in, SsdScanBwdArgs*) {
  SsdScanBwdArgs b{};
  b.forward = read_ssd_scan(in, false);
  b.grad_y = in.pointer("grad_y");
  b.grad_last = (const float*)in.pointer("grad_last");
  b.grad_x = in.pointer("grad_x");
  b.grad_dt = (float*)in.pointer("grad_dt");
  b.grad_A = (float*)in.pointer("grad_A");
  b.grad_B = in.pointer("grad_B");
  b.grad_C = in.pointer("grad_C");
  b.grad_D = (float*)in.pointer("grad_D");
  b.grad_dt_bias = (float*)in.pointer("grad_dt_bias");
  b.grad_initial = (float*)in.pointer("grad_initial");
  return b;
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

#ifdef HEBATRON_MODULE_CPU
static LinearArgs read(Reader& in, LinearArgs*) {
  LinearArgs a{};
  a.rows = in.integer("rows");
  a.n = in.integer("n");
  a.k = in.integer("k");
  a.workers = in.integer("workers");
  a.dtype = in.dtype("dtype");
  a.weight_dtype = in.dtype("weight_dtype");
  a.out_dtype = in.dtype("out_dtype");
  a.a = in.pointer("a");
  a.a_stride = in.integer("a_stride");
  a.b = in.pointer("b");
  a.b_stride = in.integer("b_stride");
  a.b_k_major = in.integer("b_k_major") != 0;
  a.packed = in.integer("packed") != 0;
  a.out = in.pointer("out");
  return a;
}

static MoePackArgs read(Reader& in, MoePackArgs*) {
  MoePackArgs a{};
  a.experts = in.integer("experts");
  a.n = in.integer("n");
  a.k = in.integer("k");
  a.unpack = in.integer("unpack") != 0;
  a.dtype = in.dtype("dtype");
  a.weight_dtype = in.dtype("weight_dtype");
  a.weights = in.pointer("weights");
  a.expert_stride = in.integer("expert_stride");
  a.stride = in.integer("stride");
  a.packed = in.pointer("packed");
  a.unpacked = in.pointer("unpacked");
  return a;
}

static LossArgs read_loss(Reader& in, bool outputs) {
  LossArgs a{};
  a.tokens = in.integer("tokens");
  a.entries = in.integer("entries");
  a.width = in.integer("width");
  a.ignore_index = in.integer("ignore_index");
  a.dtype = in.dtype("dtype");
  a.workers = in.integer("workers");
  a.x = in.pointer("x");
  a.x_stride = in.integer("x_stride");
  a.weight = in.pointer("weight");
  a.weight_stride = in.integer("weight_stride");
  a.targets = (const int64_t*)in.pointer("targets");
  a.targets_stride = in.integer("targets_stride");
  if (outputs) a.losses = (float*)in.pointer("losses");
  a.lse = (float*)in.pointer("lse");
  a.z = (float*)in.pointer("z");
  a.z_stride = in.integer("z_stride");
  return a;
}

static LossArgs read(Reader& in, LossArgs*) { return read_loss(in, true); }

static LossBwdArgs read(Reader& in, LossBwdArgs*) {
  LossBwdArgs b{};
  b.forward = read_loss(in, false);
  b.upstream = (const float*)in.pointer("upstream");
  b.grad_x = in.pointer("grad_x");
  b.grad_weight = in.pointer("grad_weight");
  return b;
}

#include "bindings_steps.h"
#else
static CrossEntropyArgs read(Reader& in, CrossEntropyArgs*) {
  CrossEntropyArgs a{};
  a.rows = in.integer("rows");
  a.entries = in.integer("entries");
  a.ignore_index = in.integer("ignore_index");
  a.logits = (const float*)in.pointer("logits");
  a.logits_stride = in.integer("logits_stride");
  a.targets = (const int64_t*)in.pointer("targets");
  a.targets_stride = in.integer("targets_stride");
  a.losses = (float*)in.pointer("losses");
  a.lse = (float*)in.pointer("lse");
  return a;
}

static CrossEntropyBwdArgs read(Reader& in, CrossEntropyBwdArgs*) {
  CrossEntropyBwdArgs a{};
  a.rows = in.integer("rows");
  a.entries = in.integer("entries");
  a.first = in.integer("first");
  a.ignore_index = in.integer("ignore_index");
  a.dtype = in.dtype("dtype");
  a.logits = (float*)in.pointer("logits");
  a.logits_stride = in.integer("logits_stride");
  a.targets = (const int64_t*)in.pointer("targets");
  a.targets_stride = in.integer("targets_stride");
  a.lse = (const float*)in.pointer("lse");
  a.upstream = (const float*)in.pointer("upstream");
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

#ifndef HEBATRON_MODULE_CPU
// (use, multiprocessors, rows, experts, k, n) of a problem of the sm_90a kernels, and a measured one with its tile behind.
using TileRow = std::tuple<std::string, int64_t, int64_t, int64_t, int64_t, int64_t>;
using MeasuredRow = std::tuple<std::string, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

static cuda::TileUse use_of(const std::string& name) {
  if (name == "k_major") return cuda::TileUse::k_major;
  if (name == "n_major") return cuda::TileUse::n_major;
  if (name == "wgrad") return cuda::TileUse::wgrad;
  fail("sm90_tile: use must be k_major, n_major or wgrad, got " + name);
}

static std::pair<int64_t, int64_t> sm90_tile(const TileRow& row, const std::optional<std::vector<MeasuredRow>>& rows) {
  const auto& [use, sms, count, experts, k, n] = row;
  const cuda::TileProblem problem{use_of(use), count, experts, k, n, sms};
  std::vector<cuda::MeasuredTile> measured;
  if (rows)
    for (const auto& [its_use, its_sms, its_rows, its_experts, its_k, its_n, tile_m, tile_n] : *rows)
      measured.push_back({{use_of(its_use), its_rows, its_experts, its_k, its_n, its_sms}, {tile_m, tile_n}});
  const cuda::GroupedGemmTile tile = cuda::sm90_tile(problem, rows ? measured : cuda::measured_tiles());
  return {tile.m, tile.n};
}
#endif

#ifdef HEBATRON_EMULATOR
static const std::pair<const char*, emulator::Mode> kModes[] = {
    {"eager", emulator::Mode::eager}, {"lazy", emulator::Mode::lazy}, {"random", emulator::Mode::random}};

static py::dict emulator_options() {
  const emulator::Options& o = emulator::options();
  py::dict found;
  for (const auto& [name, mode] : kModes)
    if (mode == o.mode) found["mode"] = name;
  found["seed"] = o.seed;
  found["sms"] = o.sms;
  found["compute_capability"] = o.compute_capability;
  found["bytes_shared"] = o.bytes_shared;
  found["max_resident_threads"] = o.max_resident_threads;
  return found;
}

// Takes any of the options by name; a wrong one changes nothing.
static void configure_emulator(const py::kwargs& kw) {
  emulator::Options o = emulator::options();
  for (const auto& [key, value] : kw) {
    const std::string name = py::str(key);
    if (name == "mode") {
      const std::string wanted = py::str(value);
      const auto* found = std::find_if(std::begin(kModes), std::end(kModes), [&](const auto& m) { return wanted == m.first; });
      if (found == std::end(kModes)) fail("emulator: mode must be eager, lazy or random, got " + wanted);
      o.mode = found->second;
    } else if (name == "seed") {
      o.seed = value.cast<uint64_t>();
    } else {
      int* const option = name == "sms"                    ? &o.sms
                          : name == "compute_capability"   ? &o.compute_capability
                          : name == "bytes_shared"         ? &o.bytes_shared
                          : name == "max_resident_threads" ? &o.max_resident_threads
                                                           : nullptr;
      if (!option) fail("emulator: there is no option " + name);
      *option = value.cast<int>();
      check(*option >= 1, "emulator", (name + " must be >= 1").c_str(), *option);
    }
  }
  emulator::options() = o;
}

static py::dict emulator_statistics() {
  const emulator::Statistics s = emulator::take_statistics();
  py::dict found;
  found["launches"] = s.launches;
  found["switches"] = s.switches;
  found["async_operations"] = s.async_operations;
  found["matrix_operations"] = s.matrix_operations;
  return found;
}
#endif

PYBIND11_MODULE(HEBATRON_MODULE, m) {
// `name` runs an operator; `name_or_size` does so where the workspace suffices and returns 0, else only the bytes it needs.
#define HEBATRON_BIND(name, Args)                                                                                         \
  m.def(#name, [](const py::kwargs& kw) {                                                                                 \
    Args args = parse<Args>(kw);                                                                                          \
    Exec exec = exec_of(kw);                                                                                              \
    py::gil_scoped_release release;                                                                                       \
    backend::name(args, exec);                                                                                            \
  });                                                                                                                     \
  m.def(#name "_or_size", [](const py::kwargs& kw) {                                                                      \
    Args args = parse<Args>(kw);                                                                                          \
    Exec exec = exec_of(kw);                                                                                              \
    const int64_t needed = backend::name##_workspace(args);                                                               \
    if (needed > exec.bytes_workspace) return needed;                                                                     \
    py::gil_scoped_release release;                                                                                       \
    backend::name(args, exec);                                                                                            \
    return int64_t(0);                                                                                                    \
  });                                                                                                                     \
  m.def(#name "_workspace", [](const py::kwargs& kw) { return backend::name##_workspace(parse<Args>(kw)); });
  HEBATRON_MODULE_OPS(HEBATRON_BIND)
#ifdef HEBATRON_MODULE_CPU
  m.def("decode_layers", &decode_layers);
  m.def("compiled_isas", &cpu::compiled_isas);
  m.def("available_isas", &cpu::available_isas);
  m.def("current_isa", &cpu::current_isa);
  m.def("set_isa", &cpu::set_isa);
#else
  m.def("sm90_tile", &sm90_tile, py::arg("problem"), py::arg("measured") = py::none());
#endif
#ifdef HEBATRON_EMULATOR
  m.def("configure", &configure_emulator);
  m.def("options", &emulator_options);
  m.def("allow_memory", [](Ptr address, size_t bytes, const std::string& name) { emulator::allow_memory((const void*)address, bytes, name); });
  m.def("forget_memory", &emulator::forget_memory);
  m.def("take_statistics", &emulator_statistics);
  m.def("checked", &emulator::checked);
#elif !defined(HEBATRON_MODULE_CPU)
  m.def("device_count", &cuda::device_count);
  m.def("compiled_archs", &cuda::compiled_archs);
  m.def("kernels", &cuda::kernels);
  m.def("toolkit", &cuda::toolkit);
#endif
}
