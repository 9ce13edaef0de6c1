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
template <typename... T>
ALWAYS_INLINE float sum_of_products(int64_t size, const T*... factors) {
  constexpr int64_t kLanes = 64;
  float sum[kLanes] = {};
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t num = std::min(kLanes, size - i);
    if (num == kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) {
        sum[l] += (value_of(factors[i + l]) * ...);
      }
    } else {
      for (int64_t l = 0; l < num; ++l) {
        sum[l] += (value_of(factors[i + l]) * ...);
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
ALWAYS_INLINE float inverse_rms(const T* x, int64_t D, float eps) {
  return 1.0f / std::sqrt(sum_of_products(D, x, x) / static_cast<float>(D) + eps);
}

template <typename T>
ALWAYS_INLINE void norm_row(const T* x, const T* weight, int64_t D, float eps, T* __restrict result) {
  const float scale = inverse_rms(x, D, eps);
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
    T* __restrict row = sum + i * D;
    for (int64_t d = 0; d < D; ++d) {
      row[d] = rounded<T>(value_of(a[d]) + value_of(b[d]));
    }
    norm_row<T>(row, weight, D, eps, result + i * D);
  }
}

// With y = x / rms: dx = (w dy - y mean(w dy y)) / rms, and the row's part of the weight's gradient, dy times y as it
// was rounded. 1 / rms is summed again rather than kept: the row is read for the mean anyway.
template <typename T>
ALWAYS_INLINE void norm_row_backward(
    const T* x, const T* weight, const T* grad, const T* more, int64_t D, float eps, T* __restrict grad_x,
    float* __restrict grad_weight) {
  const float scale = inverse_rms(x, D, eps);
  const float mean = sum_of_products(D, grad, weight, x) * scale / static_cast<float>(D);
  for (int64_t d = 0; d < D; ++d) {
    const float normed = value_of(x[d]) * scale, upstream = value_of(grad[d]);
    const float grad_row = scale * (upstream * value_of(weight[d]) - normed * mean);
    grad_x[d] = rounded<T>(more ? grad_row + value_of(more[d]) : grad_row);
    grad_weight[d] += upstream * round_trip<T>(normed);
  }
}

template <typename T>
ALWAYS_INLINE void norm_blocks_backward(const NormBackward<T>& arguments, int64_t begin, int64_t end) {
  const auto& [x, weight, grad_normed, grad_x_too, num_rows, D, eps, grad_x, partials] = arguments;
  for (int64_t block = begin; block < end; ++block) {
    float* partial = partials + block * D;
    std::fill_n(partial, D, 0.0f);
    for (int64_t i = block * kNormBlock; i < std::min(num_rows, (block + 1) * kNormBlock); ++i) {
      const T* more = grad_x_too.data ? grad_x_too.row(i) : nullptr;
      norm_row_backward(x.row(i), weight, grad_normed.row(i), more, D, eps, grad_x + i * D, partial);
    }
  }
}

template <typename T>
ALWAYS_INLINE void sum_blocks(float* partials, int64_t num_blocks, int64_t D, T* result) {
  for (int64_t step = 1; step < num_blocks; step *= 2) {
    for (int64_t i = 0; i + step < num_blocks; i += 2 * step) {
      float *sum = partials + i * D, *other = sum + step * D;
      for (int64_t d = 0; d < D; ++d) {
        sum[d] += other[d];
      }
    }
  }
  for (int64_t d = 0; d < D; ++d) {
    result[d] = rounded<T>(num_blocks ? partials[d] : 0.0f);
  }
}

template <typename T>
ALWAYS_INLINE void swiglu_rows(const RowView<T>& gate_up, int64_t F, int64_t begin, int64_t end, T* result) {
  for (int64_t i = begin; i < end; ++i) {
    const T *gate = gate_up.row(2 * i), *up = gate_up.row(2 * i + 1);
    T* __restrict row = result + i * F;
    for (int64_t f = 0; f < F; ++f) {
      const float x = value_of(gate[f]);
      row[f] = rounded<T>(round_trip<T>(x / (1.0f + exp_of(-x))) * value_of(up[f]));
    }
  }
}

template <typename T>
ALWAYS_INLINE void swiglu_rows_backward(
    const RowView<T>& gate_up, const RowView<T>& grad, int64_t F, int64_t begin, int64_t end, T* result) {
  for (int64_t i = begin; i < end; ++i) {
    const T *gate = gate_up.row(2 * i), *up = gate_up.row(2 * i + 1), *upstream = grad.row(i);
    T *__restrict grad_gate = result + 2 * i * F, *__restrict grad_up = grad_gate + F;
    for (int64_t f = 0; f < F; ++f) {
      const float x = value_of(gate[f]), dy = value_of(upstream[f]);
      const float sigmoid = 1.0f / (1.0f + exp_of(-x)), silu = x * sigmoid;
      grad_gate[f] = rounded<T>(dy * value_of(up[f]) * (sigmoid + silu * (1.0f - sigmoid)));
      grad_up[f] = rounded<T>(dy * silu);
    }
  }
}

template <bool kBackward = false, typename T>
ALWAYS_INLINE void rotate_head(const T* x, const T* cos, const T* sin, int64_t F, T* __restrict result) {
  for (int64_t f = 0; f < F; ++f) {
    const float first = value_of(x[f]), second = value_of(x[F + f]), c = value_of(cos[f]), s = value_of(sin[f]);
    if constexpr (kBackward) {
      result[f] = rounded<T>(first * c + second * s);
      result[F + f] = rounded<T>(second * c - first * s);
    } else {
      result[f] = rounded<T>(round_trip<T>(first * c) - round_trip<T>(second * s));
      result[F + f] = rounded<T>(round_trip<T>(second * c) + round_trip<T>(first * s));
    }
  }
}

template <bool kBackward, typename T>
ALWAYS_INLINE void rotate_tokens(const Rotate<T>& arguments, int64_t begin, int64_t end) {
  const auto& [q, k, cos, sin, F, q_result, k_result] = arguments;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t h = 0; h < q.num_heads; ++h) {
      rotate_head<kBackward>(q.head(t, h), cos + t * F, sin + t * F, F, q_result.head(t, h));
    }
    for (int64_t h = 0; h < k.num_heads; ++h) {
      rotate_head<kBackward>(k.head(t, h), cos + t * F, sin + t * F, F, k_result.head(t, h));
    }
  }
}

template <typename T>
ALWAYS_INLINE void rotate_write_tokens(const RotateWrite<T>& arguments, int64_t begin, int64_t end) {
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

VECTOR_CLONES void rms_norm_backward(const NormBackward<float>& arguments, int64_t begin, int64_t end) {
  norm_blocks_backward(arguments, begin, end);
}

VECTOR_CLONES void rms_norm_backward(const NormBackward<uint16_t>& arguments, int64_t begin, int64_t end) {
  norm_blocks_backward(arguments, begin, end);
}

VECTOR_CLONES void sum_norm_blocks(float* partials, int64_t num_blocks, int64_t D, float* grad_weight) {
  sum_blocks(partials, num_blocks, D, grad_weight);
}

VECTOR_CLONES void sum_norm_blocks(float* partials, int64_t num_blocks, int64_t D, uint16_t* grad_weight) {
  sum_blocks(partials, num_blocks, D, grad_weight);
}

VECTOR_CLONES void swiglu_backward(
    const RowView<float>& gate_up, const RowView<float>& grad, int64_t F, int64_t begin, int64_t end,
    float* grad_gate_up) {
  swiglu_rows_backward(gate_up, grad, F, begin, end, grad_gate_up);
}

VECTOR_CLONES void swiglu_backward(
    const RowView<uint16_t>& gate_up, const RowView<uint16_t>& grad, int64_t F, int64_t begin, int64_t end,
    uint16_t* grad_gate_up) {
  swiglu_rows_backward(gate_up, grad, F, begin, end, grad_gate_up);
}

VECTOR_CLONES UNCONTRACTED void rotate(const Rotate<float>& arguments, int64_t begin, int64_t end) {
  rotate_tokens<false>(arguments, begin, end);
}

VECTOR_CLONES void rotate(const Rotate<uint16_t>& arguments, int64_t begin, int64_t end) {
  rotate_tokens<false>(arguments, begin, end);
}

VECTOR_CLONES void rotate_backward(const Rotate<float>& arguments, int64_t begin, int64_t end) {
  rotate_tokens<true>(arguments, begin, end);
}

VECTOR_CLONES void rotate_backward(const Rotate<uint16_t>& arguments, int64_t begin, int64_t end) {
  rotate_tokens<true>(arguments, begin, end);
}

VECTOR_CLONES UNCONTRACTED void rotate_write(const RotateWrite<float>& arguments, int64_t begin, int64_t end) {
  rotate_write_tokens(arguments, begin, end);
}

VECTOR_CLONES void rotate_write(const RotateWrite<uint16_t>& arguments, int64_t begin, int64_t end) {
  rotate_write_tokens(arguments, begin, end);
}

}  // namespace nrt_fast
