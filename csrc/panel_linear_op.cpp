// The boundary of linear layers on packed weights to torch: schemas, checks, results, threads over tiles.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "aten_product.h"
#include "panel_linear.h"
#include "torch_check.h"

namespace {

using nrt_fast::ceil_div;
using nrt_fast::checked;
using nrt_fast::empty;
using nrt_fast::kGroup;
using nrt_fast::kPanel;
using nrt_fast::LinearOperands;
using nrt_fast::ScalarType;
using nrt_fast::Tensor;
using nrt_fast::uncopied;
using nrt_fast::with_element;

// A task takes some 15 us, at 100 operations or 10 bytes a nanosecond: less is not worth a thread.
constexpr int64_t kTaskNanoseconds = 15000;

int64_t tiles_per_task(int64_t tile_operations, int64_t tile_bytes) {
  const int64_t nanoseconds = std::max<int64_t>({1, tile_operations / 100, tile_bytes / 10});
  return ceil_div(kTaskNanoseconds, nanoseconds);
}

template <typename T>
const Tensor& checked_panels(const Tensor& panels, ScalarType dtype, int64_t num_outputs, int64_t num_inputs) {
  return uncopied(
      "panels", panels, dtype, {ceil_div(num_outputs, kPanel), ceil_div(num_inputs, kGroup<T>), kPanel, kGroup<T>});
}

void pack_panels(std::vector<Tensor> weights, const Tensor& panels) {
  if (weights.empty()) {
    throw std::invalid_argument("weights: expected at least one");
  }
  const ScalarType dtype = panels.scalar_type();
  int64_t num_outputs = 0, K = weights[0].dim() == 2 ? weights[0].size(1) : -1;
  for (Tensor& weight : weights) {
    weight = nrt_fast::checked_rows("weights", weight, dtype, K);
    num_outputs += weight.size(0);
  }
  with_element("panels", dtype, [&](auto element) {
    using T = decltype(element);
    T* const packed = static_cast<T*>(checked_panels<T>(panels, dtype, num_outputs, K).mutable_data_ptr());
    std::vector<nrt_fast::WeightRows<T>> rows;
    for (const Tensor& weight : weights) {
      rows.push_back({static_cast<const T*>(weight.const_data_ptr()), weight.stride(0), weight.size(0)});
    }
    const int64_t panel_bytes = kPanel * std::max<int64_t>(1, K) * sizeof(T);
    torch::stable::parallel_for(
        0, ceil_div(num_outputs, kPanel), tiles_per_task(0, panel_bytes),
        [&](int64_t first, int64_t end) { nrt_fast::pack_weights<T>(rows, K, first, end, packed); });
  });
}

template <typename T, typename Result>
void fill(
    const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias, int64_t num_outputs, Tensor& result) {
  const LinearOperands<T> operands{
      static_cast<const T*>(x.const_data_ptr()), x.size(0) > 1 ? x.stride(0) : x.size(1), x.size(0),
      static_cast<const T*>(panels.const_data_ptr()), bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr,
      num_outputs, x.size(1)};
  Result* const out = static_cast<Result*>(result.mutable_data_ptr());
  const int64_t tile_rows = std::min(operands.num_rows, operands.kTileRows), panel_size = kPanel * operands.depth;
  const auto product = nrt_fast::choose_product<T>();
  torch::stable::parallel_for(
      0, operands.num_tiles(), tiles_per_task(2 * tile_rows * panel_size, panel_size * sizeof(T)),
      [&](int64_t first, int64_t end) {
        nrt_fast::panel_linear(operands, product, first, end, out);
        nrt_fast::release_product();
      });
}

// With a column of zeros, where a depth that is no multiple of kGroup needs one.
Tensor padded(const Tensor& x, int64_t depth) {
  if (x.size(1) == depth) {
    return x;
  }
  Tensor wide = torch::stable::new_zeros(x, {x.size(0), depth});
  Tensor target = torch::stable::narrow(wide, 1, 0, x.size(1));
  torch::stable::copy_(target, x);
  return wide;
}

template <bool kWideResult>
Tensor linear(
    const Tensor& x_TK, const Tensor& panels, const std::optional<Tensor>& bias_N, int64_t num_outputs) {
  const ScalarType dtype = x_TK.scalar_type();
  const Tensor x = nrt_fast::checked_rows("x_TK", x_TK, dtype, -1);
  if (x.size(1) < 1 || num_outputs < 1) {
    throw std::invalid_argument("x_TK, num_outputs: expected at least one input and one output");
  }
  const auto bias = bias_N ? std::optional(checked("bias_N", *bias_N, dtype, {num_outputs})) : std::nullopt;
  Tensor result = empty(x, {x.size(0), num_outputs}, kWideResult ? ScalarType::Float : dtype);
  with_element("x_TK", dtype, [&](auto element) {
    using T = decltype(element);
    using Result = std::conditional_t<kWideResult, float, T>;
    checked_panels<T>(panels, dtype, num_outputs, x.size(1));
    fill<T, Result>(padded(x, nrt_fast::round_up(x.size(1), kGroup<T>)), panels, bias, num_outputs, result);
  });
  return result;
}

Tensor panel_linear(
    const Tensor& x_TK, const Tensor& panels, std::optional<Tensor> bias_N, int64_t num_outputs) {
  return linear<false>(x_TK, panels, bias_N, num_outputs);
}

Tensor panel_logits(const Tensor& x_TK, const Tensor& panels, int64_t num_outputs) {
  return linear<true>(x_TK, panels, std::nullopt, num_outputs);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nrt_fast, library) {
  library.def("pack_panels(Tensor[] weights, Tensor(a!) panels) -> ()");
  library.def("panel_linear(Tensor x_TK, Tensor panels, Tensor? bias_N, int num_outputs) -> Tensor");
  library.def("panel_logits(Tensor x_TK, Tensor panels, int num_outputs) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(nrt_fast, CPU, library) {
  library.impl("pack_panels", TORCH_BOX(&pack_panels));
  library.impl("panel_linear", TORCH_BOX(&panel_linear));
  library.impl("panel_logits", TORCH_BOX(&panel_logits));
}
