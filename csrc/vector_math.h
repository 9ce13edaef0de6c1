// Elementary functions of a float without branches or calls, for loops that vectorise.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "vector_clones.h"

namespace nrt_fast {

ALWAYS_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

ALWAYS_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// bf16 is the upper half of a float.
ALWAYS_INLINE float from_bf16(uint16_t half) {
  return float_of(uint32_t{half} << 16);
}

// To nearest, ties to even.
ALWAYS_INLINE uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// Unlike std::max, keeps a NaN whichever way round the arguments are thought of: x < least is false for it.
template <typename T>
ALWAYS_INLINE T at_least(T x, T least) {
  return x < least ? least : x;
}

// The peak of a softmax, to subtract: -inf - -inf would be NaN.
ALWAYS_INLINE float finite_peak(float peak) {
  return peak == -std::numeric_limits<float>::infinity() ? 0.0f : peak;
}

// exp(x) to 1.2 ulp for every x, -inf and inf included; NaN stays NaN, whatever its payload. Results under 1.7e-38, all
// subnormal ones among them, are 0. exp(x) = 2^(n - 1) 2 exp(r) with x = n log(2) + r: the halved power and the doubled
// polynomial reach the largest floats. At the ends the exponent bits of the power become those of 0 and of inf.
ALWAYS_INLINE float exp_of(float x) {
  constexpr float kShift = 12582912.0f + 126.0f;  // 1.5 * 2^23 + 126: a sum's low bits hold round(x / log(2)) + 126
  x = x < -87.5f ? -87.5f : x;
  x = x > 89.5f ? 89.5f : x;
  const float shifted = x * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log(2) in two parts, the first one short
  float y = 2.7629078831e-3f;  // minimax, to 3e-9
  y = y * r + 1.67374909e-2f;
  y = y * r + 8.33367780e-2f;
  y = y * r + 3.33330423e-1f;
  y = y * r + 9.99999881e-1f;
  y = y * r + 2.0f;
  y = y * r + 2.0f;
  return y * float_of(bits_of(shifted) << 23);
}

}  // namespace nrt_fast
