// What the tests of the torch-free core share. main returns failures(): how many expectations did not hold.
#pragma once

#include <cstdio>
#include <stdexcept>

inline int num_failures = 0;

inline void expect(bool condition, const char* what) {
  if (!condition) {
    std::printf("FAILED: %s\n", what);
    ++num_failures;
  }
}

template <typename Function>
void expect_invalid(Function function, const char* what) {
  try {
    function();
    expect(false, what);
  } catch (const std::invalid_argument&) {
  }
}

inline int failures() {
  std::printf("%d failures\n", num_failures);
  return num_failures;
}
