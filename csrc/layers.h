// The element-wise pieces of a decoder layer, forward and backward, free of torch. T is float, or uint16_t that holds
// bf16. Forward rounds where PyTorch's own expression does, backward once. A row's result does not depend on others.
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

// A weight's gradient is a sum over rows: of each block in order, then of the blocks in pairs, so it is the same on any
// number of threads.
constexpr int64_t kNormBlock = 64;

template <typename T>
struct NormBackward {
  RowView<T> x;  // what was normed
  const T* weight;
  RowView<T> grad_normed, grad_x_too;  // grad_x_too: x's gradient from elsewhere; its data may be null
  int64_t num_rows, D;
  float eps;
  T* grad_x;        // [num_rows, D]
  float* partials;  // [blocks of kNormBlock rows, D]
};

// Rows of blocks [begin, end): the gradient of x, and these blocks' sums of the weight's.
void rms_norm_backward(const NormBackward<float>& arguments, int64_t begin, int64_t end);
void rms_norm_backward(const NormBackward<uint16_t>& arguments, int64_t begin, int64_t end);

// The sum of all blocks, which overwrites them.
void sum_norm_blocks(float* partials, int64_t num_blocks, int64_t D, float* grad_weight);
void sum_norm_blocks(float* partials, int64_t num_blocks, int64_t D, uint16_t* grad_weight);

// result[i] = silu(gate) up of pairs of rows of F elements, gate first.
void swiglu(const RowView<float>& gate_up, int64_t F, int64_t begin, int64_t end, float* result);
void swiglu(const RowView<uint16_t>& gate_up, int64_t F, int64_t begin, int64_t end, uint16_t* result);

// The gradient of gate and up, in dense pairs of rows.
void swiglu_backward(
    const RowView<float>& gate_up, const RowView<float>& grad, int64_t F, int64_t begin, int64_t end,
    float* grad_gate_up);
void swiglu_backward(
    const RowView<uint16_t>& gate_up, const RowView<uint16_t>& grad, int64_t F, int64_t begin, int64_t end,
    uint16_t* grad_gate_up);

// Heads of some tokens; strides in elements.
template <typename T>
struct HeadView {
  T* data;
  int64_t num_heads, token_stride, head_stride;

  T* head(int64_t token, int64_t index) const { return data + token * token_stride + index * head_stride; }
};

template <typename T>
struct Rotate {
  HeadView<const T> q, k;
  const T *cos, *sin;  // [num_tokens, F]
  int64_t F;           // half a head
  HeadView<T> q_result, k_result;
};

// Heads of tokens [begin, end), turned by their token's angles; backward turns gradients the other way.
void rotate(const Rotate<float>& arguments, int64_t begin, int64_t end);
void rotate(const Rotate<uint16_t>& arguments, int64_t begin, int64_t end);
void rotate_backward(const Rotate<float>& arguments, int64_t begin, int64_t end);
void rotate_backward(const Rotate<uint16_t>& arguments, int64_t begin, int64_t end);

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
