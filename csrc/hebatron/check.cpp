#include <stdexcept>

#include "hebatron/types.h"

namespace hebatron {

void fail(const std::string& message) { throw std::invalid_argument(message); }

void check(bool ok, const char* op, const char* what, int64_t got) {
  if (!ok) fail(std::string(op) + ": " + what + ", got " + std::to_string(got));
}

}  // namespace hebatron
