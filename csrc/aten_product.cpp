// brgemm is no part of torch's stable ABI, so it is a weak symbol, and is tried before it is used.
#include "aten_product.h"

#include <torch/headeronly/util/BFloat16.h>

#include <exception>
#include <type_traits>

namespace at::native::cpublas {

__attribute__((weak)) void brgemm(
    int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C, const float* A,
    const float* B, float* C, bool is_vnni);
__attribute__((weak)) void brgemm(
    int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C, const c10::BFloat16* A,
    const c10::BFloat16* B, float* C, bool is_vnni);
__attribute__((weak)) void brgemm_release(bool is_vnni);

}  // namespace at::native::cpublas

namespace nrt_fast {
namespace {

// What brgemm calls our elements.
template <typename T>
using Element = std::conditional_t<std::is_same_v<T, uint16_t>, c10::BFloat16, T>;

template <typename T>
void aten_product(
    int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, float* C, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(
      M, N, K, lda, kPanel, ldc, add, reinterpret_cast<const Element<T>*>(A),
      reinterpret_cast<const Element<T>*>(B), C, kGroup<T> > 1);
}

// Asked of bf16 alone, which throws: where oneDNN may not be used, fp32 falls back to the BLAS without a word, and there
// a row's rounding depends on how many rows there are.
bool has_brgemm() {
  void (*const brgemm)(
      int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const c10::BFloat16*, const c10::BFloat16*, float*,
      bool) = at::native::cpublas::brgemm;
  if (!brgemm || !at::native::cpublas::brgemm_release) {
    return false;
  }
  try {
    const uint16_t a[2] = {};
    const uint16_t b[2 * kPanel] = {};
    float c[kPanel];
    aten_product<uint16_t>(1, kPanel, 2, a, 2, b, c, kPanel, false);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace

template <typename T>
PanelProduct<T> choose_product() {
  return has_brgemm() ? PanelProduct<T>(aten_product<T>) : PanelProduct<T>(portable_product);
}

template PanelProduct<float> choose_product();
template PanelProduct<uint16_t> choose_product();

void release_product() {
  if (at::native::cpublas::brgemm_release) {
    at::native::cpublas::brgemm_release(true);
  }
}

}  // namespace nrt_fast
