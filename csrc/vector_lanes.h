// Vectors of L floats by GCC's extension: loads, stores, sums of lanes, 2^x. No pragma once: a kernel includes this
// once per instruction set, within the namespace that it compiles for it.

template <int L>
struct LanesOf {
  typedef float Float __attribute__((vector_size(4 * L)));
  typedef int32_t Int __attribute__((vector_size(4 * L)));
  typedef uint16_t Half __attribute__((vector_size(2 * L)));
};
template <int L>
using Float = typename LanesOf<L>::Float;
template <int L>
using Int = typename LanesOf<L>::Int;

template <int L>
inline Float<L> load(const float* from) {
  Float<L> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

// bf16 is the upper half of a float.
template <int L>
inline Float<L> load(const uint16_t* from) {
  typename LanesOf<L>::Half half;
  __builtin_memcpy(&half, from, sizeof(half));
  const Int<L> bits = __builtin_convertvector(half, Int<L>) << 16;
  return reinterpret_cast<Float<L>>(bits);
}

template <int L>
inline void store(float* to, Float<L> value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

// Halves added up until four lanes are left.
template <int L>
inline Float<4> fold(Float<L> x) {
  if constexpr (L == 16) {
    return fold<8>(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
  } else if constexpr (L == 8) {
    return fold<4>(__builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7));
  } else if constexpr (L == 4) {
    return x;
  } else {
    return Float<4>{x[0], 0, 0, 0};
  }
}

// The sums of four vectors' lanes.
template <int L>
inline Float<4> sums(Float<L> x0, Float<L> x1, Float<L> x2, Float<L> x3) {
  const Float<4> a = fold<L>(x0), b = fold<L>(x1), c = fold<L>(x2), d = fold<L>(x3);
  const Float<4> ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Float<4> cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// 2^x for x <= 0, to 1e-7 of its value: 2^round(x) times a minimax polynomial of the rest. Under 2^-126: zero. It is
// apart from exp_of of vector_math.h, which made scoring some 5% slower.
template <int L>
inline Float<L> exp2_of(Float<L> x) {
  const Float<L> floor = Float<L>{} - 126.0f;
  const Float<L> clipped = x < floor ? floor : x;  // NaN stays
  const Float<L> rounded = (clipped + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: the fraction falls off
  const Float<L> f = clipped - rounded;
  Float<L> power = f * 1.534581179e-4f + 1.339993142e-3f;
  power = power * f + 9.61848896e-3f;
  power = power * f + 5.550328776e-2f;
  power = power * f + 2.402264689e-1f;
  power = power * f + 6.931472057e-1f;
  power = power * f + 1.0f;
  const Int<L> bits = (__builtin_convertvector(rounded, Int<L>) + 127) << 23;
  power *= reinterpret_cast<Float<L>>(bits);
  return x < floor ? Float<L>{} : power;
}

inline float exp2_of(float x) {
  return exp2_of<4>(Float<4>{x, x, x, x})[0];
}
