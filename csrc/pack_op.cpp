// The boundary of packing to torch: schemas, checks of dtype and shape, allocation of the results.
// No meta kernels: the results' sizes depend on the data, and packing runs on the host before any graph.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "pack.h"
#include "torch_check.h"

namespace {

using nrt_fast::checked;
using nrt_fast::empty;
using nrt_fast::ScalarType;
using nrt_fast::Tensor;

Tensor pack_bins(const Tensor& cost_M, int64_t budget) {
  const Tensor cost = checked("cost_M", cost_M, ScalarType::Long, {-1});
  Tensor bin_M = empty(cost, {cost.numel()}, ScalarType::Long);
  nrt_fast::pack_bins(cost.const_data_ptr<int64_t>(), cost.numel(), budget, bin_M.mutable_data_ptr<int64_t>());
  return bin_M;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pack_index(
    const Tensor& entries_M3, const Tensor& cu_prompts, const Tensor& cu_traces) {
  const Tensor entries = checked("entries_M3", entries_M3, ScalarType::Long, {-1, 3});
  const Tensor prompts = checked("cu_prompts", cu_prompts, ScalarType::Long, {-1});
  const Tensor traces = checked("cu_traces", cu_traces, ScalarType::Long, {-1});
  const nrt_fast::PackInput input{
      entries.const_data_ptr<int64_t>(), entries.size(0), prompts.const_data_ptr<int64_t>(), prompts.numel() - 1,
      traces.const_data_ptr<int64_t>(), traces.numel() - 1};
  const nrt_fast::PackSize size = nrt_fast::pack_size(input);
  Tensor source_T = empty(entries, {size.num_tokens}, ScalarType::Long);
  Tensor positions_T = empty(entries, {size.num_tokens}, ScalarType::Long);
  Tensor cu_seqlens = empty(entries, {size.num_segments + 1}, ScalarType::Int);
  Tensor hidden_A = empty(entries, {size.num_loss_tokens}, ScalarType::Long);
  Tensor rows_A = empty(entries, {size.num_loss_tokens}, ScalarType::Long);
  nrt_fast::pack_index(
      input,
      {source_T.mutable_data_ptr<int64_t>(), positions_T.mutable_data_ptr<int64_t>(),
       cu_seqlens.mutable_data_ptr<int32_t>(), hidden_A.mutable_data_ptr<int64_t>(),
       rows_A.mutable_data_ptr<int64_t>()});
  return {source_T, positions_T, cu_seqlens, hidden_A, rows_A};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nrt_fast, library) {
  library.def("pack_bins(Tensor cost_M, int budget) -> Tensor");
  library.def(
      "pack_index(Tensor entries_M3, Tensor cu_prompts, Tensor cu_traces)"
      " -> (Tensor source_T, Tensor positions_T, Tensor cu_seqlens, Tensor hidden_A, Tensor rows_A)");
}

STABLE_TORCH_LIBRARY_IMPL(nrt_fast, CPU, library) {
  library.impl("pack_bins", TORCH_BOX(&pack_bins));
  library.impl("pack_index", TORCH_BOX(&pack_index));
}
