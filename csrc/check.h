// The errors of the torch-free core: std::invalid_argument with a message that names the argument and its value.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace nrt_fast {

[[noreturn]] inline void fail(const std::string& message) {
  throw std::invalid_argument(message);
}

inline std::string at(const std::string& name, int64_t index, int64_t value) {
  return name + "[" + std::to_string(index) + "] = " + std::to_string(value);
}

// offsets[num_spans + 1] start at 0 and never fall.
template <typename Index>
void check_offsets(const char* name, const Index* offsets, int64_t num_spans) {
  if (num_spans < 0) {
    fail(std::string(name) + " is empty: expected at least the offset 0");
  }
  if (offsets[0] != 0) {
    fail(at(name, 0, offsets[0]) + ": expected 0");
  }
  for (int64_t i = 1; i <= num_spans; ++i) {
    if (offsets[i] < offsets[i - 1]) {
      fail(at(name, i, offsets[i]) + ": expected at least " + std::to_string(offsets[i - 1]));
    }
  }
}

// And end at total.
template <typename Index>
void check_offsets(const char* name, const Index* offsets, int64_t num_spans, int64_t total) {
  check_offsets(name, offsets, num_spans);
  if (offsets[num_spans] != total) {
    fail(at(name, num_spans, offsets[num_spans]) + ": expected " + std::to_string(total));
  }
}

}  // namespace nrt_fast
