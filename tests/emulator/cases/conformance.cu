// The conformance cases of bench/, a kernel for every primitive, as cases here: in every mode they must give the same bytes.
#include "cases.h"

#include "../../../bench/conformance/async.cuh"
#include "../../../bench/conformance/tma.cuh"
#include "../../../bench/conformance/warp.cuh"
#include "../../../bench/conformance/wgmma.cuh"

namespace hebatron::cases {
namespace {

const conformance::Cases& conformance_cases() {
  static const conformance::Cases all = [] {
    conformance::Cases cases;
    conformance::add_warp_cases(cases);
    conformance::add_async_cases(cases);
    conformance::add_tma_cases(cases);
    conformance::add_wgmma_cases(cases);
    return cases;
  }();
  return all;
}

}  // namespace

void add_conformance_cases(Cases& cases) {
  for (const conformance::Case& each : conformance_cases()) cases.push_back({"conformance/" + each.name, [run = each.run] { output = run(); }});
}

}  // namespace hebatron::cases
