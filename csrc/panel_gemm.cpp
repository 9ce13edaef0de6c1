#include "panel_gemm.h"

#include <cstring>

#include "vector_math.h"

namespace nrt_fast {
namespace {

// Every CPU has registers of 16 bytes; a block of C, 6 rows by 2 of them, stays there.
typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
constexpr int64_t kLanes = 4;
constexpr int64_t kVectors = 2;

template <typename Vector>
ALWAYS_INLINE Vector load(const void* source) {
  Vector vector;
  std::memcpy(&vector, source, sizeof vector);
  return vector;
}

// sum[r, v] += A[r, k] B[k, v] over the k of one word.
template <int kRows>
ALWAYS_INLINE void add_word(const float* A, int64_t lda, const float* B, Floats (&sum)[kRows][kVectors]) {
  const Floats b[kVectors] = {load<Floats>(B), load<Floats>(B + kLanes)};
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
    sum[r][0] += A[r * lda] * b[0];
    sum[r][1] += A[r * lda] * b[1];
  }
}

template <int kRows>
ALWAYS_INLINE void add_word(const uint16_t* A, int64_t lda, const uint16_t* B, Floats (&sum)[kRows][kVectors]) {
#pragma GCC unroll 2
  for (int64_t v = 0; v < kVectors; ++v) {
    const Words pairs = load<Words>(B + 2 * kLanes * v);
    const Floats low = reinterpret_cast<Floats>(pairs << 16), high = reinterpret_cast<Floats>(pairs & 0xffff0000u);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      sum[r][v] += from_bf16(A[r * lda]) * low;
      sum[r][v] += from_bf16(A[r * lda + 1]) * high;
    }
  }
}

template <int kRows, typename T>
ALWAYS_INLINE void product_rows(
    int64_t N, int64_t K, const T* A, int64_t lda, const T* B, float* C, int64_t ldc, bool add) {
  constexpr int64_t kWidth = kVectors * kLanes;
  for (int64_t n = 0; n < N; n += kWidth) {
    Floats sum[kRows][kVectors] = {};
    for (int64_t k = 0; k < K; k += kGroup<T>) {
      add_word<kRows>(A + k, lda, B + k * kPanel + n * kGroup<T>, sum);
    }
    float rows[kRows][kWidth];
    std::memcpy(rows, sum, sizeof rows);
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t l = 0; l < std::min(N - n, kWidth); ++l) {
        float& c = C[r * ldc + n + l];
        c = (add ? c : 0.0f) + rows[r][l];
      }
    }
  }
}

template <typename T>
ALWAYS_INLINE void product(
    int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, float* C, int64_t ldc, bool add) {
  constexpr int kRows = 6;
  int64_t m = 0;
  for (; m + kRows <= M; m += kRows) {
    product_rows<kRows>(N, K, A + m * lda, lda, B, C + m * ldc, ldc, add);
  }
  for (; m < M; ++m) {
    product_rows<1>(N, K, A + m * lda, lda, B, C + m * ldc, ldc, add);
  }
}

ALWAYS_INLINE void interleave(const uint16_t* even, const uint16_t* odd, int64_t size, uint16_t* pairs) {
  for (int64_t n = 0; n < size; ++n) {
    const uint32_t pair = even[n] | uint32_t{odd[n]} << 16;
    std::memcpy(pairs + 2 * n, &pair, sizeof pair);
  }
}

}  // namespace

VECTOR_CLONES void portable_product(
    int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, float* C, int64_t ldc, bool add) {
  product(M, N, K, A, lda, B, C, ldc, add);
}

VECTOR_CLONES void portable_product(
    int64_t M, int64_t N, int64_t K, const uint16_t* A, int64_t lda, const uint16_t* B, float* C, int64_t ldc,
    bool add) {
  product(M, N, K, A, lda, B, C, ldc, add);
}

VECTOR_CLONES void pack(const float* rows, int64_t ld, int64_t K, int64_t N, int64_t padded_K, float* panels) {
  for (int64_t k = 0; k < padded_K; ++k) {
    for (int64_t n = 0; n < N; n += kPanel) {
      float* packed = panels + n * padded_K + k * kPanel;
      const int64_t num = k < K ? std::min(N - n, kPanel) : 0;
      std::copy_n(rows + (num ? k * ld + n : 0), num, packed);
      std::fill(packed + num, packed + kPanel, 0.0f);
    }
  }
}

VECTOR_CLONES void pack(
    const uint16_t* rows, int64_t ld, int64_t K, int64_t N, int64_t padded_K, uint16_t* panels) {
  const uint16_t zeros[kPanel] = {};
  for (int64_t k = 0; k < padded_K; k += 2) {
    for (int64_t n = 0; n < N; n += kPanel) {
      const uint16_t* even = k < K ? rows + k * ld + n : zeros;
      const uint16_t* odd = k + 1 < K ? rows + (k + 1) * ld + n : zeros;
      uint16_t* packed = panels + n * padded_K + k * kPanel;
      const int64_t num = std::min(N - n, kPanel);
      if (num == kPanel) {
        interleave(even, odd, kPanel, packed);
      } else {
        interleave(even, odd, num, packed);
        std::fill(packed + 2 * num, packed + 2 * kPanel, uint16_t{0});
      }
    }
  }
}

}  // namespace nrt_fast
