// The boundary of packed attention to torch: schemas, checks of dtype and shape, results, threads.
// The Meta kernels are in Python (nrt_fast/fakes.py).
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <functional>
#include <optional>
#include <tuple>

#include "packed_attention.h"
#include "torch_check.h"

namespace {

using nrt_fast::checked;
using nrt_fast::empty;
using nrt_fast::PackedInput;
using nrt_fast::ScalarType;
using nrt_fast::SoftmaxStats;
using nrt_fast::Strided;
using nrt_fast::Tensor;

void run_on_all_threads(const std::function<void()>& work) {
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) { work(); });
}

// The tensor where it lies, whatever its strides.
Strided strided(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  if (sizes.size() != shape.size() || tensor.scalar_type() != dtype ||
      !std::equal(shape.begin(), shape.end(), sizes.begin())) {
    checked(name, tensor, dtype, shape);  // throws
  }
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

struct Arguments {
  Arguments(
      const Tensor& q_THE, const Tensor& k_TKE, const Tensor& v_TKE, const Tensor& starts_S, const Tensor& lens_S,
      const Tensor& root_S, std::optional<int64_t> window)
      : dtype(q_THE.scalar_type()), starts(checked("starts_S", starts_S, ScalarType::Long, {-1})),
        lens(checked("lens_S", lens_S, ScalarType::Long, {starts.numel()})),
        roots(checked("root_S", root_S, ScalarType::Long, {starts.numel()})) {
    nrt_fast::with_element("q_THE", dtype, [](auto) {});
    if (q_THE.dim() != 3 || k_TKE.dim() != 3) {
      throw std::invalid_argument("q_THE and k_TKE: expected three axes, tokens, heads and width");
    }
    if (window && *window < 1) {
      throw std::invalid_argument("window " + std::to_string(*window) + ": expected at least 1");
    }
    const int64_t T = q_THE.size(0), H = q_THE.size(1), K = k_TKE.size(1), E = q_THE.size(2);
    input = {
        strided("q_THE", q_THE, dtype, {T, H, E}), strided("k_TKE", k_TKE, dtype, {T, K, E}),
        strided("v_TKE", v_TKE, dtype, {T, K, E}), dtype == ScalarType::BFloat16, starts.const_data_ptr<int64_t>(),
        lens.const_data_ptr<int64_t>(), roots.const_data_ptr<int64_t>(), starts.numel(), T, H, K, E,
        window.value_or(0), static_cast<float>(1.0 / std::sqrt(static_cast<double>(E)))};
    nrt_fast::check_packed_attention(input);
  }

  ScalarType dtype;
  Tensor starts, lens, roots;
  PackedInput input;
};

std::tuple<Tensor, Tensor> packed_attention(
    const Tensor& q_THE, const Tensor& k_TKE, const Tensor& v_TKE, const Tensor& starts_S, const Tensor& lens_S,
    const Tensor& root_S, std::optional<int64_t> window) {
  const Arguments arguments(q_THE, k_TKE, v_TKE, starts_S, lens_S, root_S, window);
  const int64_t T = q_THE.size(0), H = q_THE.size(1), E = q_THE.size(2);
  const Tensor out_THE = empty(q_THE, {T, H, E}, arguments.dtype);
  Tensor stats_2HT = empty(q_THE, {2, H, T}, ScalarType::Float);
  float* stats = stats_2HT.mutable_data_ptr<float>();
  nrt_fast::packed_attention(
      arguments.input, strided("out_THE", out_THE, arguments.dtype, {T, H, E}), {stats, stats + H * T},
      run_on_all_threads);
  return {out_THE, stats_2HT};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(
    const Tensor& q_THE, const Tensor& k_TKE, const Tensor& v_TKE, const Tensor& out_THE, const Tensor& stats_2HT,
    const Tensor& grad_THE, const Tensor& starts_S, const Tensor& lens_S, const Tensor& root_S,
    std::optional<int64_t> window) {
  const Arguments arguments(q_THE, k_TKE, v_TKE, starts_S, lens_S, root_S, window);
  const ScalarType dtype = arguments.dtype;
  const int64_t T = q_THE.size(0), H = q_THE.size(1), K = k_TKE.size(1), E = q_THE.size(2);
  const Tensor stats = checked("stats_2HT", stats_2HT, ScalarType::Float, {2, H, T});
  float* peak = const_cast<float*>(stats.const_data_ptr<float>());
  const Tensor grad_q = empty(q_THE, {T, H, E}, dtype);
  const Tensor grad_k = empty(k_TKE, {T, K, E}, dtype);
  const Tensor grad_v = empty(v_TKE, {T, K, E}, dtype);
  nrt_fast::packed_attention_backward(
      arguments.input, {peak, peak + H * T},
      {strided("out_THE", out_THE, dtype, {T, H, E}), strided("grad_THE", grad_THE, dtype, {T, H, E}),
       strided("grad_q_THE", grad_q, dtype, {T, H, E}), strided("grad_k_TKE", grad_k, dtype, {T, K, E}),
       strided("grad_v_TKE", grad_v, dtype, {T, K, E})},
      run_on_all_threads);
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nrt_fast, library) {
  library.def(
      "packed_attention(Tensor q_THE, Tensor k_TKE, Tensor v_TKE, Tensor starts_S, Tensor lens_S, Tensor root_S,"
      " int? window=None) -> (Tensor out_THE, Tensor stats_2HT)");
  library.def(
      "packed_attention_backward(Tensor q_THE, Tensor k_TKE, Tensor v_TKE, Tensor out_THE, Tensor stats_2HT,"
      " Tensor grad_THE, Tensor starts_S, Tensor lens_S, Tensor root_S, int? window=None)"
      " -> (Tensor grad_q_THE, Tensor grad_k_TKE, Tensor grad_v_TKE)");
}

STABLE_TORCH_LIBRARY_IMPL(nrt_fast, CPU, library) {
  library.impl("packed_attention", TORCH_BOX(&packed_attention));
  library.impl("packed_attention_backward", TORCH_BOX(&packed_attention_backward));
}
