#include "layers.h"

#include <algorithm>
#include <cmath>

#include "vector_math.h"

namespace nrt_fast {
namespace {

ALWAYS_INLINE float value_of(float x) { return x; }
ALWAYS_INLINE float value_of(uint16_t x) { return from_bf16(x); }

template <typename T>
ALWAYS_INLINE T rounded(float x);

template <>
ALWAYS_INLINE float rounded<float>(float x) { return x; }

template <>
ALWAYS_INLINE uint16_t rounded<uint16_t>(float x) { return to_bf16(x); }

// To T and back.
template <typename T>
ALWAYS_INLINE float round_trip(float x) { return value_of(rounded<T>(x)); }

// In partial sums that lie side by side, for a sum across a vector is neither fast nor accurate.
template <typename T>
ALWAYS_INLINE float sum_of_squares(const T* x, int64_t size) {
  constexpr int64_t kLanes = 64;
  float sum[kLanes] = {};
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t num = std::min(kLanes, size - i);
    if (num == kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) {
        sum[l] += value_of(x[i + l]) * value_of(x[i + l]);
      }
    } else {
      for (int64_t l = 0; l < num; ++l) {
        sum[l] += value_of(x[i + l]) * value_of(x[i + l]);
      }
    }
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) {
      sum[l] += sum[l + half];
    }
  }
  return sum[0];
}

template <typename T>
ALWAYS_INLINE void norm_row(const T* x, const T* weight, int64_t D, float eps, T* result) {
  const float scale = 1.0f / std::sqrt(sum_of_squares(x, D) / static_cast<float>(D) + eps);
  for (int64_t d = 0; d < D; ++d) {
    result[d] = rounded<T>(value_of(weight[d]) * round_trip<T>(value_of(x[d]) * scale));
  }
}

template <typename T>
ALWAYS_INLINE void norm_rows(
    const RowView<T>& x, const T* weight, int64_t D, float eps, int64_t begin, int64_t end, T* result) {
  for (int64_t i = begin; i < end; ++i) {
    norm_row(x.row(i), weight, D, eps, result + i * D);
  }
}

template <typename T>
ALWAYS_INLINE void add_norm_rows(
    const RowView<T>& x, const RowView<T>& residual, const T* weight, int64_t D, float eps, int64_t begin, int64_t end,
    T* result, T* sum) {
  for (int64_t i = begin; i < end; ++i) {
    const T *a = x.row(i), *b = residual.row(i);
    T* row = sum + i * D;
    for (int64_t d = 0; d < D; ++d) {
      row[d] = rounded<T>(value_of(a[d]) + value_of(b[d]));
    }
    norm_row<T>(row, weight, D, eps, result + i * D);
  }
}

template <typename T>
ALWAYS_INLINE void swiglu_rows(const RowView<T>& gate_up, int64_t F, int64_t begin, int64_t end, T* result) {
  for (int64_t i = begin; i < end; ++i) {
    const T *gate = gate_up.row(2 * i), *up = gate_up.row(2 * i + 1);
    T* row = result + i * F;
    for (int64_t f = 0; f < F; ++f) {
      const float x = value_of(gate[f]);
      row[f] = rounded<T>(round_trip<T>(x / (1.0f + exp_of(-x))) * value_of(up[f]));
    }
  }
}

template <typename T>
ALWAYS_INLINE void rotate_head(const T* x, const T* cos, const T* sin, int64_t F, T* result) {
  for (int64_t f = 0; f < F; ++f) {
    const float first = value_of(x[f]), second = value_of(x[F + f]), c = value_of(cos[f]), s = value_of(sin[f]);
    result[f] = rounded<T>(round_trip<T>(first * c) - round_trip<T>(second * s));
    result[F + f] = rounded<T>(round_trip<T>(second * c) + round_trip<T>(first * s));
  }
}

template <typename T>
ALWAYS_INLINE void rotate_tokens(const RotateWrite<T>& arguments, int64_t begin, int64_t end) {
  const auto& [q, k, v, cos, sin, F, k_pages, v_pages, page, slot, rotated] = arguments;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t h = 0; h < q.num_heads; ++h) {
      rotate_head(q.head(t, h), cos + t * F, sin + t * F, F, rotated.head(t, h));
    }
    T* k_slot = k_pages.data + page[t] * k_pages.page_stride + slot[t] * k_pages.slot_stride;
    T* v_slot = v_pages.data + page[t] * v_pages.page_stride + slot[t] * v_pages.slot_stride;
    for (int64_t h = 0; h < k.num_heads; ++h) {
      rotate_head(k.head(t, h), cos + t * F, sin + t * F, F, k_slot + h * k_pages.head_stride);
      std::copy_n(v.head(t, h), 2 * F, v_slot + h * v_pages.head_stride);
    }
  }
}

}  // namespace

VECTOR_CLONES void rms_norm(
    const RowView<float>& x, const float* weight, int64_t D, float eps, int64_t begin, int64_t end, float* result) {
  norm_rows(x, weight, D, eps, begin, end, result);
}

VECTOR_CLONES void rms_norm(
    const RowView<uint16_t>& x, const uint16_t* weight, int64_t D, float eps, int64_t begin, int64_t end,
    uint16_t* result) {
  norm_rows(x, weight, D, eps, begin, end, result);
}

VECTOR_CLONES void add_rms_norm(
    const RowView<float>& x, const RowView<float>& residual, const float* weight, int64_t D, float eps, int64_t begin,
    int64_t end, float* result, float* sum) {
  add_norm_rows(x, residual, weight, D, eps, begin, end, result, sum);
}

VECTOR_CLONES void add_rms_norm(
    const RowView<uint16_t>& x, const RowView<uint16_t>& residual, const uint16_t* weight, int64_t D, float eps,
    int64_t begin, int64_t end, uint16_t* result, uint16_t* sum) {
  add_norm_rows(x, residual, weight, D, eps, begin, end, result, sum);
}

VECTOR_CLONES void swiglu(const RowView<float>& gate_up, int64_t F, int64_t begin, int64_t end, float* result) {
  swiglu_rows(gate_up, F, begin, end, result);
}

VECTOR_CLONES void swiglu(const RowView<uint16_t>& gate_up, int64_t F, int64_t begin, int64_t end, uint16_t* result) {
  swiglu_rows(gate_up, F, begin, end, result);
}

VECTOR_CLONES UNCONTRACTED void rotate_write(const RotateWrite<float>& arguments, int64_t begin, int64_t end) {
  rotate_tokens(arguments, begin, end);
}

VECTOR_CLONES void rotate_write(const RotateWrite<uint16_t>& arguments, int64_t begin, int64_t end) {
  rotate_tokens(arguments, begin, end);
}

}  // namespace nrt_fast
