// The boundary to torch, on its stable ABI: schemas, checks of dtype and shape, allocation of the results.
// No meta kernels: the results' sizes depend on the data, and packing runs on the host before any graph.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "pack.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tensor in contiguous memory, once its dtype and shape are as expected; size -1 stands for any length.
Tensor checked_int64(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  const bool shape_fits = sizes.size() == shape.size() &&
      std::equal(shape.begin(), shape.end(), sizes.begin(), [](int64_t a, int64_t b) { return a < 0 || a == b; });
  if (shape_fits && tensor.scalar_type() == ScalarType::Long) {
    return torch::stable::contiguous(tensor);
  }
  std::ostringstream message;
  message << name << ": expected int64 of shape [";
  const char* separator = "";
  for (const int64_t size : shape) {
    message << separator << (size < 0 ? "*" : std::to_string(size));
    separator = ", ";
  }
  throw std::invalid_argument(message.str() + "]");
}

Tensor empty_int64(const Tensor& like, int64_t length) {
  return torch::stable::new_empty(like, {length}, ScalarType::Long);
}

Tensor pack_bins(const Tensor& cost_M, int64_t budget) {
  const Tensor cost = checked_int64("cost_M", cost_M, {-1});
  Tensor bin_M = empty_int64(cost, cost.numel());
  nrt_fast::pack_bins(cost.const_data_ptr<int64_t>(), cost.numel(), budget, bin_M.mutable_data_ptr<int64_t>());
  return bin_M;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pack_index(
    const Tensor& entries_M3, const Tensor& cu_prompts, const Tensor& cu_traces) {
  const Tensor entries = checked_int64("entries_M3", entries_M3, {-1, 3});
  const Tensor prompts = checked_int64("cu_prompts", cu_prompts, {-1});
  const Tensor traces = checked_int64("cu_traces", cu_traces, {-1});
  const nrt_fast::PackInput input{
      entries.const_data_ptr<int64_t>(), entries.size(0), prompts.const_data_ptr<int64_t>(), prompts.numel() - 1,
      traces.const_data_ptr<int64_t>(), traces.numel() - 1};
  const nrt_fast::PackSize size = nrt_fast::pack_size(input);
  Tensor source_T = empty_int64(entries, size.num_tokens);
  Tensor positions_T = empty_int64(entries, size.num_tokens);
  Tensor cu_seqlens = torch::stable::new_empty(entries, {size.num_segments + 1}, ScalarType::Int);
  Tensor hidden_A = empty_int64(entries, size.num_loss_tokens);
  Tensor rows_A = empty_int64(entries, size.num_loss_tokens);
  nrt_fast::pack_index(
      input,
      {source_T.mutable_data_ptr<int64_t>(), positions_T.mutable_data_ptr<int64_t>(),
       cu_seqlens.mutable_data_ptr<int32_t>(), hidden_A.mutable_data_ptr<int64_t>(),
       rows_A.mutable_data_ptr<int64_t>()});
  return {source_T, positions_T, cu_seqlens, hidden_A, rows_A};
}

}  // namespace

STABLE_TORCH_LIBRARY(nrt_fast, library) {
  library.def("pack_bins(Tensor cost_M, int budget) -> Tensor");
  library.def(
      "pack_index(Tensor entries_M3, Tensor cu_prompts, Tensor cu_traces)"
      " -> (Tensor source_T, Tensor positions_T, Tensor cu_seqlens, Tensor hidden_A, Tensor rows_A)");
}

STABLE_TORCH_LIBRARY_IMPL(nrt_fast, CPU, library) {
  library.impl("pack_bins", TORCH_BOX(&pack_bins));
  library.impl("pack_index", TORCH_BOX(&pack_index));
}
