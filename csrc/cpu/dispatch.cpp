#include "cpu/dispatch.h"

#include <cstdlib>

#include "hebatron/ops.h"

#define HEBATRON_DECLARE_ISA(isa)    \
  namespace hebatron::isa {          \
  HEBATRON_CPU_OPS(HEBATRON_DECLARE) \
  }
HEBATRON_DECLARE_ISA(portable)
#ifdef HEBATRON_HAVE_AVX2
HEBATRON_DECLARE_ISA(avx2)
#endif
#ifdef HEBATRON_HAVE_AVX512
HEBATRON_DECLARE_ISA(avx512)
#endif
#ifdef HEBATRON_HAVE_AVX512_BF16
HEBATRON_DECLARE_ISA(avx512_bf16)
#endif

namespace hebatron::cpu {
namespace {

struct Table {
  const char* name;
  bool available;
#define HEBATRON_FIELD(name, Args)         \
  void (*name)(const Args&, const Exec&);  \
  int64_t (*name##_workspace)(const Args&);
  HEBATRON_CPU_OPS(HEBATRON_FIELD)
};

#define HEBATRON_PORTABLE_FIELD(name, Args) , portable::name, portable::name##_workspace
#define HEBATRON_AVX2_FIELD(name, Args) , avx2::name, avx2::name##_workspace
#define HEBATRON_AVX512_FIELD(name, Args) , avx512::name, avx512::name##_workspace
#define HEBATRON_AVX512_BF16_FIELD(name, Args) , avx512_bf16::name, avx512_bf16::name##_workspace

const std::vector<Table>& tables() {
#if defined(__x86_64__)
  [[maybe_unused]] static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  [[maybe_unused]] static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  static const std::vector<Table> all = {
      {"portable", true HEBATRON_CPU_OPS(HEBATRON_PORTABLE_FIELD)},
#ifdef HEBATRON_HAVE_AVX2
      {"avx2", has_avx2 HEBATRON_CPU_OPS(HEBATRON_AVX2_FIELD)},
#endif
#ifdef HEBATRON_HAVE_AVX512
      {"avx512", has_avx512 HEBATRON_CPU_OPS(HEBATRON_AVX512_FIELD)},
#endif
#ifdef HEBATRON_HAVE_AVX512_BF16
      {"avx512_bf16", has_avx512 && __builtin_cpu_supports("avx512bf16") HEBATRON_CPU_OPS(HEBATRON_AVX512_BF16_FIELD)},
#endif
  };
  return all;
}

const Table* find(const std::string& name) {
  std::string known;
  for (const Table& t : tables()) {
    if (name == t.name && t.available) return &t;
    if (t.available) known += (known.empty() ? "" : ", ") + std::string(t.name);
  }
  fail("HEBATRON_ISA must be one of " + known + " on this machine, got " + name);
}

const Table* chosen = nullptr;

const Table& table() {
  if (!chosen) {
    const char* wanted = std::getenv("HEBATRON_ISA");
    if (wanted && *wanted) {
      chosen = find(wanted);
    } else {
      for (const Table& t : tables())
        if (t.available) chosen = &t;
    }
  }
  return *chosen;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Table& t : tables()) names.push_back(t.name);
  return names;
}
std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Table& t : tables())
    if (t.available) names.push_back(t.name);
  return names;
}
std::string current_isa() { return table().name; }
void set_isa(const std::string& name) { chosen = find(name); }

#define HEBATRON_FORWARD(name, Args)                                               \
  void name(const Args& args, const Exec& exec) { table().name(args, exec); }      \
  int64_t name##_workspace(const Args& args) { return table().name##_workspace(args); }
HEBATRON_CPU_OPS(HEBATRON_FORWARD)

}  // namespace hebatron::cpu
