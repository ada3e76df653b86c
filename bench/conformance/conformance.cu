// Every primitive of csrc/cuda/prim.cuh in a kernel of its own, so that hardware and emulator can be compared bit by bit.
// One source, two programs: nvcc makes the one for a Hopper GPU, g++ with -DHEBATRON_EMULATOR the one for the CPU.
//
//   conformance --list              the names of the cases
//   conformance OUT NAME...         runs these cases and appends each one's record to OUT as soon as it is done:
//                                   "case NAME ULPS BYTES\n" and the bytes, or "fail NAME 0 BYTES\n" and the message
//
// A case that fails ends the program: after a fault a CUDA context answers nothing more. bench/gpu_conformance.py starts it
// again with the rest, compares the two records, and names the first byte that differs.
#include "async.cuh"
#include "tma.cuh"
#include "warp.cuh"
#include "wgmma.cuh"

namespace {

using namespace hebatron::conformance;

Cases all_cases() {
  Cases cases;
  add_warp_cases(cases);
  add_async_cases(cases);
  add_tma_cases(cases);
  add_wgmma_cases(cases);
  return cases;
}

void write_record(std::FILE* file, const char* kind, const Case& which, const void* bytes, size_t count) {
  std::fprintf(file, "%s %s %u %zu\n", kind, which.name.c_str(), which.ulps, count);
  if (std::fwrite(bytes, 1, count, file) != count || std::fflush(file)) {
    std::perror("conformance: writing a record");
    std::exit(2);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Cases cases = all_cases();
  if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
    for (const Case& each : cases) std::printf("%s\n", each.name.c_str());
    return 0;
  }
  if (argc < 3) {
    std::fprintf(stderr, "usage: conformance --list | conformance OUT NAME...\n");
    return 2;
  }
  std::FILE* file = std::fopen(argv[1], "ab");
  if (!file) {
    std::perror(argv[1]);
    return 2;
  }
  for (int i = 2; i < argc; i++) {
    const Case* found = nullptr;
    for (const Case& each : cases)
      if (each.name == argv[i]) found = &each;
    if (!found) {
      std::fprintf(stderr, "conformance: no case is called %s\n", argv[i]);
      return 2;
    }
    try {
      const Bytes bytes = found->run();
      write_record(file, "case", *found, bytes.data(), bytes.size());
    } catch (const std::exception& error) {
      write_record(file, "fail", *found, error.what(), std::strlen(error.what()));
      return 1;
    }
  }
  return 0;
}
