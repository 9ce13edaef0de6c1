// Counter-based uniform numbers, free of torch: raw pointers, sizes and strides, CPU memory.
#pragma once

#include <cstdint>

namespace nrt_fast {

constexpr int PHILOX_AXES = 4;

// One counter of each number, read by its strides in elements: 0 along an axis on which it is constant.
struct PhiloxCounter {
  const int64_t* data;
  int64_t stride[PHILOX_AXES];
};

struct PhiloxInput {
  uint64_t key;
  uint32_t step;
  int64_t size[PHILOX_AXES];  // of the result, 1 for axes it does not have
  PhiloxCounter position, trace, prompt;
};

// Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, on the counter words
// (position, trace, prompt, step), of which the low 32 bits count. Writes the numbers from `begin` to `end` in the
// order of the result's dense memory: 53 bits in [0, 1), made of the first two words of the output.
//   uniform  [size[0] * size[1] * size[2] * size[3]], written
void philox_uniform(const PhiloxInput& input, int64_t begin, int64_t end, double* uniform);

}  // namespace nrt_fast
