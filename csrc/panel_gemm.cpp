#include "panel_gemm.h"

#include <cstring>

#include "transpose.h"
#include "vector_math.h"

namespace nrt_fast {
namespace {

// Every CPU has registers of 16 bytes; a block of C, 6 rows by 2 of them, stays there.
typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
constexpr int64_t kRows = 6;
constexpr int64_t kLanes = 4;
constexpr int64_t kVectors = 2;

template <typename Vector>
ALWAYS_INLINE Vector load(const void* source) {
  Vector vector;
  std::memcpy(&vector, source, sizeof vector);
  return vector;
}

// sum[r, v] += A[r, k] B[k, v] over the k of one word.
ALWAYS_INLINE void add_word(const float* const (&A)[kRows], int64_t k, const float* B, Floats (&sum)[kRows][kVectors]) {
  const Floats b[kVectors] = {load<Floats>(B), load<Floats>(B + kLanes)};
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
    sum[r][0] += A[r][k] * b[0];
    sum[r][1] += A[r][k] * b[1];
  }
}

ALWAYS_INLINE void add_word(
    const uint16_t* const (&A)[kRows], int64_t k, const uint16_t* B, Floats (&sum)[kRows][kVectors]) {
#pragma GCC unroll 2
  for (int64_t v = 0; v < kVectors; ++v) {
    const Words pairs = load<Words>(B + 2 * kLanes * v);
    const Floats low = reinterpret_cast<Floats>(pairs << 16), high = reinterpret_cast<Floats>(pairs & 0xffff0000u);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      sum[r][v] += from_bf16(A[r][k]) * low;
      sum[r][v] += from_bf16(A[r][k + 1]) * high;
    }
  }
}

// At most kRows rows. Missing ones repeat the last: code for fewer could be compiled to other roundings.
template <typename T>
ALWAYS_INLINE void product_rows(
    int64_t num_rows, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, float* C, int64_t ldc, bool add) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const T* row[kRows];
  for (int64_t r = 0; r < kRows; ++r) {
    row[r] = A + std::min(r, num_rows - 1) * lda;
  }
  for (int64_t n = 0; n < N; n += kWidth) {
    Floats sum[kRows][kVectors] = {};
    for (int64_t k = 0; k < K; k += kGroup<T>) {
      add_word(row, k, B + k * kPanel + n * kGroup<T>, sum);
    }
    float rows[kRows][kWidth];
    std::memcpy(rows, sum, sizeof rows);
    for (int64_t r = 0; r < num_rows; ++r) {
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
  for (int64_t m = 0; m < M; m += kRows) {
    product_rows(std::min(M - m, kRows), N, K, A + m * lda, lda, B, C + m * ldc, ldc, add);
  }
}

ALWAYS_INLINE void interleave(const uint16_t* even, const uint16_t* odd, int64_t size, uint16_t* pairs) {
  for (int64_t n = 0; n < size; ++n) {
    const uint32_t pair = even[n] | uint32_t{odd[n]} << 16;
    std::memcpy(pairs + 2 * n, &pair, sizeof pair);
  }
}

// Words of a row-major [N, K], rows ld bytes apart, to columns of a panel. A few rows at a time, four cache lines of
// each: rows 4 KiB apart share the same few places of the first-level cache, where 16 KiB of the panel stay.
ALWAYS_INLINE void transpose_words(const char* rows, int64_t ld, int64_t K, int64_t N, char* panel) {
  constexpr int64_t kWord = sizeof(uint32_t), kBlock = 64, kRow = kPanel * kWord;
  for (int64_t block = 0; block < K; block += kBlock) {
    const int64_t end = std::min(K, block + kBlock), whole_end = block + (end - block) / kTransposed * kTransposed;
    const int64_t whole_N = N / kTransposed * kTransposed;
    for (int64_t n = 0; n < whole_N; n += kTransposed) {
      for (int64_t k = block; k < whole_end; k += kTransposed) {
        transpose_block(rows + n * ld + k * kWord, ld, panel + k * kRow + n * kWord, kRow);
      }
    }
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t k = n < whole_N ? whole_end : block; k < end; ++k) {
        std::memcpy(panel + k * kRow + n * kWord, rows + n * ld + k * kWord, kWord);
      }
    }
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

VECTOR_CLONES void pack_transposed(const float* rows, int64_t ld, int64_t K, int64_t N, float* panel) {
  transpose_words(
      reinterpret_cast<const char*>(rows), ld * sizeof(float), K, N, reinterpret_cast<char*>(panel));
}

VECTOR_CLONES void pack_transposed(const uint16_t* rows, int64_t ld, int64_t K, int64_t N, uint16_t* panel) {
  transpose_words(
      reinterpret_cast<const char*>(rows), ld * sizeof(uint16_t), K / 2, N, reinterpret_cast<char*>(panel));
  for (int64_t n = 0; K % 2 && n < N; ++n) {
    panel[(K / 2 * kPanel + n) * 2] = rows[n * ld + K - 1];
    panel[(K / 2 * kPanel + n) * 2 + 1] = 0;
  }
}

}  // namespace nrt_fast
