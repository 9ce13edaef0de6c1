// Matrix products of cache-sized tiles, C (+)= A B with B packed into panels, free of torch. Elements are fp32, or bf16
// in uint16_t; sums are fp32. An element of C depends on its row of A and its column of B alone, not on their
// neighbours.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

namespace nrt_fast {

constexpr int64_t kPanel = 64;  // columns of a panel: four AVX-512 registers

// Neighbours along K in a 32-bit word, which dot-product instructions take together.
template <typename T>
constexpr int64_t kGroup = sizeof(float) / sizeof(T);

constexpr int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

constexpr int64_t ceil_div(int64_t size, int64_t divisor) {
  return (size + divisor - 1) / divisor;
}

// Uninitialised memory on its own cache lines.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), kAlignment))) {}
  operator T*() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
};

// C[M, N] (+)= A[M, K] B with N <= kPanel and K a multiple of kGroup; B is one panel, [K / kGroup, kPanel, kGroup].
template <typename T>
using PanelProduct = void (*)(
    int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, float* C, int64_t ldc, bool add);

// The product for any CPU.
void portable_product(
    int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, float* C, int64_t ldc, bool add);
void portable_product(
    int64_t M, int64_t N, int64_t K, const uint16_t* A, int64_t lda, const uint16_t* B, float* C, int64_t ldc,
    bool add);

// Packs a row-major [K, N] into panels of padded_K rows one after another; what is beyond K and N is 0.
void pack(const float* rows, int64_t ld, int64_t K, int64_t N, int64_t padded_K, float* panels);
void pack(const uint16_t* rows, int64_t ld, int64_t K, int64_t N, int64_t padded_K, uint16_t* panels);

// Packs the transpose of a row-major [N, K] into N columns of a panel, from the one that panel points to; an odd K of
// bf16 is padded with 0.
void pack_transposed(const float* rows, int64_t ld, int64_t K, int64_t N, float* panel);
void pack_transposed(const uint16_t* rows, int64_t ld, int64_t K, int64_t N, uint16_t* panel);

// C[M, N] (+)= A[M, K] times N / kPanel panels of K rows, in steps of K that leave a panel in the second-level cache.
template <typename T>
void multiply(
    PanelProduct<T> product, int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* panels, float* C,
    int64_t ldc, bool add) {
  constexpr int64_t kStep = 1024 * kGroup<T>;
  for (int64_t n = 0; n < N; n += kPanel) {
    for (int64_t k = 0; k < K; k += kStep) {
      product(M, std::min(N - n, kPanel), std::min(K - k, kStep), A + k, lda, panels + n * K + k * kPanel, C + n, ldc,
              add || k > 0);
    }
  }
}

}  // namespace nrt_fast
