// The element-wise pieces of a decoder layer, forward only, free of torch. T is float, or uint16_t that holds bf16.
// Values are rounded where PyTorch's own expression rounds them. A row's result does not depend on other rows.
#pragma once

#include <cstdint>

namespace nrt_fast {

// Rows of D elements, num_inner of them in each of the outer blocks; strides in elements.
template <typename T>
struct RowView {
  const T* data;
  int64_t num_inner, outer_stride, inner_stride;

  const T* row(int64_t i) const { return data + i / num_inner * outer_stride + i % num_inner * inner_stride; }
};

// result[i] = x[i] / sqrt(mean(x[i]^2) + eps) weight, of rows [begin, end); the result's rows are dense.
void rms_norm(
    const RowView<float>& x, const float* weight, int64_t D, float eps, int64_t begin, int64_t end, float* result);
void rms_norm(
    const RowView<uint16_t>& x, const uint16_t* weight, int64_t D, float eps, int64_t begin, int64_t end,
    uint16_t* result);

// sum = x + residual, and its norm.
void add_rms_norm(
    const RowView<float>& x, const RowView<float>& residual, const float* weight, int64_t D, float eps, int64_t begin,
    int64_t end, float* result, float* sum);
void add_rms_norm(
    const RowView<uint16_t>& x, const RowView<uint16_t>& residual, const uint16_t* weight, int64_t D, float eps,
    int64_t begin, int64_t end, uint16_t* result, uint16_t* sum);

// result[i] = silu(gate) up of pairs of rows of F elements, gate first.
void swiglu(const RowView<float>& gate_up, int64_t F, int64_t begin, int64_t end, float* result);
void swiglu(const RowView<uint16_t>& gate_up, int64_t F, int64_t begin, int64_t end, uint16_t* result);

// Heads of some tokens; strides in elements.
template <typename T>
struct HeadView {
  T* data;
  int64_t num_heads, token_stride, head_stride;

  T* head(int64_t token, int64_t index) const { return data + token * token_stride + index * head_stride; }
};

// A paged cache; strides in elements.
template <typename T>
struct PageView {
  T* data;
  int64_t page_stride, head_stride, slot_stride;
};

template <typename T>
struct RotateWrite {
  HeadView<const T> q, k, v;
  const T *cos, *sin;  // [num_tokens, F]
  int64_t F;           // half a head
  PageView<T> k_pages, v_pages;
  const int64_t *page, *slot;  // [num_tokens], within the cache
  HeadView<T> rotated;
};

// Tokens [begin, end): rotated q to the result; rotated k and v to the cache.
void rotate_write(const RotateWrite<float>& arguments, int64_t begin, int64_t end);
void rotate_write(const RotateWrite<uint16_t>& arguments, int64_t begin, int64_t end);

}  // namespace nrt_fast
