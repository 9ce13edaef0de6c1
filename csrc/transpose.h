// Transposition of 32-bit words, which are floats or pairs of bf16.
#pragma once

#include <cstdint>
#include <cstring>

#include "vector_clones.h"

namespace nrt_fast {

constexpr int64_t kTransposed = 4;  // words a side of a block

// A block of 4 x 4 words; rows lie ld bytes apart. Registers of 16 bytes, which every CPU has.
ALWAYS_INLINE void transpose_block(const char* source, int64_t ld_source, char* result, int64_t ld_result) {
  typedef uint32_t Words __attribute__((vector_size(16)));
  Words row[4];
  for (int64_t i = 0; i < 4; ++i) {
    std::memcpy(&row[i], source + i * ld_source, sizeof row[i]);
  }
  const Words low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Words low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Words high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Words high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const Words column[4] = {
      __builtin_shufflevector(low01, low23, 0, 1, 4, 5), __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
      __builtin_shufflevector(high01, high23, 0, 1, 4, 5), __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int64_t i = 0; i < 4; ++i) {
    std::memcpy(result + i * ld_result, &column[i], sizeof column[i]);
  }
}

}  // namespace nrt_fast
