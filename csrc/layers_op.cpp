// The boundary of the layers' element-wise ops to torch: schemas, checks, results, threads. The Meta kernels are in
// Python (nrt_fast/fakes.py), and what pairs a forward with its backward (nrt_fast/backward.py).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "layers.h"
#include "torch_check.h"

namespace {

using nrt_fast::checked;
using nrt_fast::empty;
using nrt_fast::HeadView;
using nrt_fast::PageView;
using nrt_fast::RowView;
using nrt_fast::ScalarType;
using nrt_fast::Tensor;
using nrt_fast::with_element;

constexpr int64_t kElementsPerTask = 32768;  // some 10 us: less is not worth a thread

template <typename Function>
void for_rows(int64_t num_rows, int64_t row_size, const Function& function) {
  const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, row_size));
  torch::stable::parallel_for(0, num_rows, rows_per_task, function);
}

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* data_of(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// [..., D] whose rows are dense and lie in at most two axes of any strides; copied only if they are not.
Tensor with_dense_rows(const Tensor& x) {
  return x.dim() <= 3 && x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

template <typename T>
RowView<T> rows_of(const Tensor& x) {
  const int64_t dim = x.dim(), D = x.size(dim - 1);
  if (dim == 3) {
    return {data_of<T>(x), x.size(1), x.stride(0), x.stride(1)};
  }
  return {data_of<T>(x), 1, dim == 2 ? x.stride(0) : D, 0};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight_D, double eps) {
  if (x.dim() == 0) {
    nrt_fast::fail("x: expected at least one axis");
  }
  const ScalarType dtype = x.scalar_type();
  const int64_t D = x.size(x.dim() - 1);
  const Tensor dense = with_dense_rows(x), weight = checked("weight_D", weight_D, dtype, {D});
  Tensor result = torch::stable::new_empty(x, x.sizes(), dtype);
  with_element("x", dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(D ? x.numel() / D : 0, D, [&](int64_t begin, int64_t end) {
      nrt_fast::rms_norm(
          rows_of<T>(dense), data_of<T>(weight), D, static_cast<float>(eps), begin, end, data_of<T>(result));
    });
  });
  return result;
}

// An upstream gradient; its rows may lie anywhere, or all be one.
template <typename Sizes>
Tensor checked_gradient(const char* name, const Tensor& gradient, ScalarType dtype, const Sizes& expected) {
  const auto sizes = gradient.sizes();
  if (gradient.scalar_type() != dtype || !std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end())) {
    nrt_fast::fail(std::string(name) + ": expected the dtype and the shape of what it is a gradient of");
  }
  return with_dense_rows(gradient);
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& x, const Tensor& weight_D, double eps, const Tensor& grad_normed,
    const std::optional<Tensor>& grad_x_too) {
  if (x.dim() == 0) {
    nrt_fast::fail("x: expected at least one axis");
  }
  const ScalarType dtype = x.scalar_type();
  const int64_t D = x.size(x.dim() - 1), num_rows = D ? x.numel() / D : 0;
  const int64_t num_blocks = (num_rows + nrt_fast::kNormBlock - 1) / nrt_fast::kNormBlock;
  const Tensor dense = with_dense_rows(x), weight = checked("weight_D", weight_D, dtype, {D});
  const Tensor normed = checked_gradient("grad_normed", grad_normed, dtype, x.sizes());
  const auto too =
      grad_x_too ? std::optional(checked_gradient("grad_x_too", *grad_x_too, dtype, x.sizes())) : std::nullopt;
  Tensor grad_x = torch::stable::new_empty(x, x.sizes(), dtype), grad_weight = empty(x, {D}, dtype);
  Tensor partials = empty(x, {num_blocks, D}, ScalarType::Float);
  with_element("x", dtype, [&](auto element) {
    using T = decltype(element);
    const nrt_fast::NormBackward<T> arguments{
        rows_of<T>(dense), data_of<T>(weight), rows_of<T>(normed), too ? rows_of<T>(*too) : RowView<T>{},
        num_rows, D, static_cast<float>(eps), data_of<T>(grad_x), data_of<float>(partials)};
    for_rows(num_blocks, nrt_fast::kNormBlock * D, [&](int64_t begin, int64_t end) {
      nrt_fast::rms_norm_backward(arguments, begin, end);
    });
    nrt_fast::sum_norm_blocks(data_of<float>(partials), num_blocks, D, data_of<T>(grad_weight));
  });
  return {grad_x, grad_weight};
}

std::tuple<Tensor, Tensor> add_rms_norm(
    const Tensor& x_TD, const Tensor& residual_TD, const Tensor& weight_D, double eps) {
  const ScalarType dtype = x_TD.scalar_type();
  const Tensor x = nrt_fast::checked_rows("x_TD", x_TD, dtype, -1);
  const int64_t T_ = x.size(0), D = x.size(1);
  const Tensor residual = nrt_fast::checked_rows("residual_TD", residual_TD, dtype, D);
  const Tensor weight = checked("weight_D", weight_D, dtype, {D});
  if (residual.size(0) != T_) {
    nrt_fast::fail("residual_TD: expected " + std::to_string(T_) + " rows, as x has");
  }
  Tensor result = empty(x, {T_, D}, dtype), sum = empty(x, {T_, D}, dtype);
  with_element("x_TD", dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(T_, D, [&](int64_t begin, int64_t end) {
      nrt_fast::add_rms_norm(
          rows_of<T>(x), rows_of<T>(residual), data_of<T>(weight), D, static_cast<float>(eps), begin, end,
          data_of<T>(result), data_of<T>(sum));
    });
  });
  return {result, sum};
}

Tensor swiglu(const Tensor& gate_up_T2F) {
  const ScalarType dtype = gate_up_T2F.scalar_type();
  if (gate_up_T2F.dim() != 3 || gate_up_T2F.size(1) != 2) {
    nrt_fast::fail("gate_up_T2F: expected shape [T, 2, F]");
  }
  const Tensor gate_up = with_dense_rows(gate_up_T2F);
  const int64_t F = gate_up.size(2);
  Tensor result = empty(gate_up, {gate_up.size(0), F}, dtype);
  with_element("gate_up_T2F", dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(gate_up.size(0), F, [&](int64_t begin, int64_t end) {
      nrt_fast::swiglu(rows_of<T>(gate_up), F, begin, end, data_of<T>(result));
    });
  });
  return result;
}

Tensor swiglu_backward(const Tensor& gate_up_T2F, const Tensor& grad_TF) {
  const ScalarType dtype = gate_up_T2F.scalar_type();
  if (gate_up_T2F.dim() != 3 || gate_up_T2F.size(1) != 2) {
    nrt_fast::fail("gate_up_T2F: expected shape [T, 2, F]");
  }
  const Tensor gate_up = with_dense_rows(gate_up_T2F);
  const int64_t T_ = gate_up.size(0), F = gate_up.size(2);
  const Tensor grad = checked_gradient("grad_TF", grad_TF, dtype, std::array<int64_t, 2>{T_, F});
  Tensor grad_gate_up = empty(gate_up, {T_, 2, F}, dtype);
  with_element("gate_up_T2F", dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(T_, 2 * F, [&](int64_t begin, int64_t end) {
      nrt_fast::swiglu_backward(
          rows_of<T>(gate_up), rows_of<T>(grad), F, begin, end, data_of<T>(grad_gate_up));
    });
  });
  return grad_gate_up;
}

// [num_tokens, *, head_size] whose heads are dense; copied only if they are not.
Tensor checked_heads(
    const char* name, const Tensor& heads, ScalarType dtype, int64_t num_tokens, int64_t num_heads,
    int64_t head_size) {
  const bool fits = heads.dim() == 3 && heads.scalar_type() == dtype && heads.size(0) == num_tokens &&
      (num_heads < 0 || heads.size(1) == num_heads) && heads.size(2) == head_size && heads.stride(2) == 1;
  return fits ? heads : checked(name, heads, dtype, {num_tokens, num_heads, head_size});
}

template <typename T>
HeadView<const T> heads_of(const Tensor& heads) {
  return {data_of<T>(heads), heads.size(1), heads.stride(0), heads.stride(1)};
}

template <typename T>
HeadView<T> dense_heads_of(Tensor& heads) {
  return {data_of<T>(heads), heads.size(1), heads.stride(0), heads.stride(1)};
}

void check_half_a_head(const Tensor& cos_TF, int64_t E) {
  if (cos_TF.dim() != 2 || 2 * cos_TF.size(1) != E) {
    nrt_fast::fail("cos_TF: expected F=" + std::to_string(E / 2) + ", half a head");
  }
}

// turn(Rotate, begin, end) of all tokens.
template <typename Turn>
std::tuple<Tensor, Tensor> turned(
    const Tensor& q_THE, const Tensor& k_TKE, const Tensor& cos_TF, const Tensor& sin_TF, const Turn& turn) {
  const ScalarType dtype = q_THE.scalar_type();
  const int64_t T_ = q_THE.size(0), E = q_THE.size(2), F = E / 2;
  check_half_a_head(cos_TF, E);
  const Tensor q = checked_heads("q_THE", q_THE, dtype, T_, -1, E);
  const Tensor k = checked_heads("k_TKE", k_TKE, dtype, T_, -1, E);
  const Tensor cos = checked("cos_TF", cos_TF, dtype, {T_, F}), sin = checked("sin_TF", sin_TF, dtype, {T_, F});
  Tensor q_result = empty(q, {T_, q.size(1), E}, dtype), k_result = empty(k, {T_, k.size(1), E}, dtype);
  with_element("q_THE", dtype, [&](auto element) {
    using T = decltype(element);
    const nrt_fast::Rotate<T> arguments{
        heads_of<T>(q), heads_of<T>(k), data_of<T>(cos), data_of<T>(sin), F, dense_heads_of<T>(q_result),
        dense_heads_of<T>(k_result)};
    for_rows(T_, (q.size(1) + k.size(1)) * E, [&](int64_t begin, int64_t end) { turn(arguments, begin, end); });
  });
  return {q_result, k_result};
}

std::tuple<Tensor, Tensor> rotate(
    const Tensor& q_THE, const Tensor& k_TKE, const Tensor& cos_TF, const Tensor& sin_TF) {
  return turned(q_THE, k_TKE, cos_TF, sin_TF, [](const auto& arguments, int64_t begin, int64_t end) {
    nrt_fast::rotate(arguments, begin, end);
  });
}

std::tuple<Tensor, Tensor> rotate_backward(
    const Tensor& q_THE, const Tensor& k_TKE, const Tensor& cos_TF, const Tensor& sin_TF) {
  return turned(q_THE, k_TKE, cos_TF, sin_TF, [](const auto& arguments, int64_t begin, int64_t end) {
    nrt_fast::rotate_backward(arguments, begin, end);
  });
}

// A layer of a cache, written in place: of any strides, as long as heads are dense.
const Tensor& checked_pages(
    const char* name, const Tensor& pages, ScalarType dtype, int64_t num_heads, int64_t head_size) {
  if (pages.dim() != 4 || pages.scalar_type() != dtype || pages.size(1) != num_heads || pages.size(3) != head_size ||
      pages.stride(3) != 1) {
    nrt_fast::fail(
        std::string(name) + ": expected " + nrt_fast::name_of(dtype) + " of shape [*, " + std::to_string(num_heads) +
        ", *, " + std::to_string(head_size) + "], dense in its last axis");
  }
  return pages;
}

template <typename T>
PageView<T> pages_of(const Tensor& pages) {
  return {static_cast<T*>(pages.mutable_data_ptr()), pages.stride(0), pages.stride(1), pages.stride(2)};
}

// Indices below a limit, int32 or int64.
std::vector<int64_t> checked_indices(const char* name, const Tensor& indices, int64_t size, int64_t limit) {
  const bool wide = indices.scalar_type() == ScalarType::Long;
  const Tensor dense = checked(name, indices, wide ? ScalarType::Long : ScalarType::Int, {size});
  std::vector<int64_t> result(size);
  if (wide) {
    std::copy_n(dense.const_data_ptr<int64_t>(), size, result.begin());
  } else {
    std::copy_n(dense.const_data_ptr<int32_t>(), size, result.begin());
  }
  for (int64_t i = 0; i < size; ++i) {
    if (result[i] < 0 || result[i] >= limit) {
      nrt_fast::fail(nrt_fast::at(name, i, result[i]) + ": expected 0 to " + std::to_string(limit - 1));
    }
  }
  return result;
}

Tensor rotate_write(
    const Tensor& q_THE, const Tensor& k_TKE, const Tensor& v_TKE, const Tensor& cos_TF, const Tensor& sin_TF,
    const Tensor& k_pages_NKSE, const Tensor& v_pages_NKSE, const Tensor& page_T, const Tensor& slot_T) {
  const ScalarType dtype = q_THE.scalar_type();
  const int64_t T_ = q_THE.size(0), E = q_THE.size(2), F = E / 2;
  check_half_a_head(cos_TF, E);
  const Tensor q = checked_heads("q_THE", q_THE, dtype, T_, -1, E);
  const Tensor k = checked_heads("k_TKE", k_TKE, dtype, T_, -1, E);
  const Tensor v = checked_heads("v_TKE", v_TKE, dtype, T_, k.size(1), E);
  const Tensor cos = checked("cos_TF", cos_TF, dtype, {T_, F}), sin = checked("sin_TF", sin_TF, dtype, {T_, F});
  const Tensor& k_pages = checked_pages("k_pages_NKSE", k_pages_NKSE, dtype, k.size(1), E);
  const Tensor& v_pages = checked_pages("v_pages_NKSE", v_pages_NKSE, dtype, k.size(1), E);
  const auto pages = checked_indices("page_T", page_T, T_, std::min(k_pages.size(0), v_pages.size(0)));
  const auto slots = checked_indices("slot_T", slot_T, T_, std::min(k_pages.size(2), v_pages.size(2)));
  Tensor rotated = empty(q, {T_, q.size(1), E}, dtype);
  with_element("q_THE", dtype, [&](auto element) {
    using T = decltype(element);
    const nrt_fast::RotateWrite<T> arguments{
        heads_of<T>(q), heads_of<T>(k), heads_of<T>(v), data_of<T>(cos), data_of<T>(sin),
        F, pages_of<T>(k_pages), pages_of<T>(v_pages), pages.data(), slots.data(),
        dense_heads_of<T>(rotated)};
    for_rows(T_, (q.size(1) + 2 * k.size(1)) * E, [&](int64_t begin, int64_t end) {
      nrt_fast::rotate_write(arguments, begin, end);
    });
  });
  return rotated;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nrt_fast, library) {
  library.def("rms_norm(Tensor x, Tensor weight_D, float eps) -> Tensor");
  library.def(
      "add_rms_norm(Tensor x_TD, Tensor residual_TD, Tensor weight_D, float eps) -> (Tensor normed_TD, Tensor sum_TD)");
  library.def(
      "rms_norm_backward(Tensor x, Tensor weight_D, float eps, Tensor grad_normed, Tensor? grad_x_too=None)"
      " -> (Tensor grad_x, Tensor grad_weight_D)");
  library.def("swiglu(Tensor gate_up_T2F) -> Tensor");
  library.def("swiglu_backward(Tensor gate_up_T2F, Tensor grad_TF) -> Tensor");
  library.def("rotate(Tensor q_THE, Tensor k_TKE, Tensor cos_TF, Tensor sin_TF) -> (Tensor, Tensor)");
  library.def("rotate_backward(Tensor q_THE, Tensor k_TKE, Tensor cos_TF, Tensor sin_TF) -> (Tensor, Tensor)");
  library.def(
      "rotate_write(Tensor q_THE, Tensor k_TKE, Tensor v_TKE, Tensor cos_TF, Tensor sin_TF, Tensor(a!) k_pages_NKSE,"
      " Tensor(b!) v_pages_NKSE, Tensor page_T, Tensor slot_T) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(nrt_fast, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  library.impl("swiglu", TORCH_BOX(&swiglu));
  library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  library.impl("rotate", TORCH_BOX(&rotate));
  library.impl("rotate_backward", TORCH_BOX(&rotate_backward));
  library.impl("rotate_write", TORCH_BOX(&rotate_write));
}
