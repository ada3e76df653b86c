// The door for Python: cases by name, in one process, through ctypes.
#include "cases.h"

namespace {

using namespace hebatron::cases;

const Cases& all_cases() {
  static const Cases all = [] {
    Cases cases;
    add_thread_cases(cases);
    add_grid_cases(cases);
    add_copy_cases(cases);
    add_pipeline_cases(cases);
    add_matrix_cases(cases);
    add_store_cases(cases);
    add_cluster_cases(cases);
    add_offset_cases(cases);
    add_conformance_cases(cases);
    return cases;
  }();
  return all;
}

std::string answer;

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const char* case_names() {
  answer.clear();
  for (const Case& each : all_cases()) answer += each.name + "\n";
  return answer.c_str();
}

// Null when the case ran and its result was right; else the emulator's report, or "wrong: ...".
EXPORTED const char* run_case(const char* name, int mode, uint64_t seed, int sms) {
  emulator::options() = {};
  emulator::options().mode = static_cast<emulator::Mode>(mode);
  emulator::options().seed = seed;
  emulator::options().sms = sms;
  emulator::forget_memory();
  emulator::take_statistics();
  output.clear();
  const Case* found = nullptr;
  for (const Case& each : all_cases())
    if (each.name == name) found = &each;
  try {
    if (!found) throw std::runtime_error(std::string("no case is called ") + name);
    found->run();
    return nullptr;
  } catch (const std::exception& error) {
    answer = error.what();
    return answer.c_str();
  }
}

EXPORTED const uint8_t* case_output(uint64_t* bytes) {
  *bytes = output.size();
  return output.data();
}

// Of the last case: launches, switches between threads, asynchronous operations, matrix operations.
EXPORTED void case_statistics(uint64_t* four) {
  const emulator::Statistics s = emulator::take_statistics();
  const uint64_t values[4] = {s.launches, s.switches, s.async_operations, s.matrix_operations};
  std::memcpy(four, values, sizeof values);
}
