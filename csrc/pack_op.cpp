// The boundary of packing to torch: schemas, checks of dtype and shape, allocation of the results.
// No meta kernels: the results' sizes depend on the data, and packing runs on the host before any graph.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "pack.h"
#include "pack_gather_torch.h"
#include "torch_check.h"

namespace {

using nrt_fast::checked;
using nrt_fast::empty;
using nrt_fast::ScalarType;
using nrt_fast::Tensor;

constexpr int64_t MIN_TOKENS_PER_THREAD = 16384;  // less is written before a second thread has woken up

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
  const std::vector<nrt_fast::PackSize> sizes = nrt_fast::pack_sizes(input);
  const nrt_fast::PackSize& size = sizes.back();
  Tensor source_T = empty(entries, {size.num_tokens}, ScalarType::Long);
  Tensor positions_T = empty(entries, {size.num_tokens}, ScalarType::Long);
  Tensor cu_seqlens = empty(entries, {size.num_segments + 1}, ScalarType::Int);
  Tensor hidden_A = empty(entries, {size.num_loss_tokens}, ScalarType::Long);
  Tensor rows_A = empty(entries, {size.num_loss_tokens}, ScalarType::Long);
  const nrt_fast::PackOutput output{
      source_T.mutable_data_ptr<int64_t>(), positions_T.mutable_data_ptr<int64_t>(),
      cu_seqlens.mutable_data_ptr<int32_t>(), hidden_A.mutable_data_ptr<int64_t>(),
      rows_A.mutable_data_ptr<int64_t>()};
  const int64_t num_entries = entries.size(0);
  const int64_t grain = 1 + MIN_TOKENS_PER_THREAD * num_entries / std::max<int64_t>(size.num_tokens, 1);
  torch::stable::parallel_for(0, num_entries, grain, [&](int64_t begin, int64_t end) {
    nrt_fast::pack_index(input, sizes, begin, end, output);
  });
  if (num_entries == 0) {
    nrt_fast::pack_index(input, sizes, 0, 0, output);
  }
  return {source_T, positions_T, cu_seqlens, hidden_A, rows_A};
}

void run_pack_gather(const nrt_fast::GatherInput& input, const nrt_fast::GatherOutput& output, const Tensor&) {
  nrt_fast::pack_gather(input, output);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nrt_fast, library) {
  library.def("pack_bins(Tensor cost_M, int budget) -> Tensor");
  library.def(
      "pack_index(Tensor entries_M3, Tensor cu_prompts, Tensor cu_traces)"
      " -> (Tensor source_T, Tensor positions_T, Tensor cu_seqlens, Tensor hidden_A, Tensor rows_A)");
  library.def(
      "pack_gather(Tensor prompt_ids_U, Tensor targets_A, Tensor inv_temperature_A, Tensor weight_A,"
      " Tensor old_logprobs_A, Tensor kind_A, Tensor source_T, Tensor rows_B)"
      " -> (Tensor tokens_T, Tensor targets_B, Tensor inv_temperature_B, Tensor weight_B, Tensor old_logprobs_B,"
      " Tensor kind_B)");
}

STABLE_TORCH_LIBRARY_IMPL(nrt_fast, CPU, library) {
  library.impl("pack_bins", TORCH_BOX(&pack_bins));
  library.impl("pack_index", TORCH_BOX(&pack_index));
  library.impl("pack_gather", TORCH_BOX(&nrt_fast::pack_gather_on<run_pack_gather>));
}
