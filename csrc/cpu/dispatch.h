// The choice of ISA, made once, when the package is imported, from cpuid and HEBATRON_ISA, changed only by set_isa.
#pragma once
#include <string>
#include <vector>

namespace hebatron::cpu {
std::vector<std::string> compiled_isas();   // weakest first
std::vector<std::string> available_isas();  // those this machine can run
std::string current_isa();
void set_isa(const std::string& name);
}  // namespace hebatron::cpu
