// The boundary of pack_gather to torch that the host's and the GPU's share: checks and allocation.
#pragma once

#include <tuple>

#include "pack_gather.h"
#include "torch_check.h"

namespace nrt_fast {

using PackedTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <void (*Run)(const GatherInput&, const GatherOutput&, const Tensor& on_device)>
PackedTensors pack_gather_on(
    const Tensor& prompt_ids_U, const Tensor& targets_A, const Tensor& inv_temperature_A, const Tensor& weight_A,
    const Tensor& old_logprobs_A, const Tensor& kind_A, const Tensor& source_T, const Tensor& rows_B) {
  const auto here = [&](const char* name, const Tensor& tensor, ScalarType dtype, int64_t size) {
    if (tensor.device() != source_T.device()) {
      throw std::invalid_argument(std::string(name) + ": expected on the device of source_T");
    }
    return checked(name, tensor, dtype, {size});
  };
  const int64_t size = targets_A.numel();
  const Tensor prompt_ids = here("prompt_ids_U", prompt_ids_U, ScalarType::Long, -1);
  const Tensor targets = here("targets_A", targets_A, ScalarType::Long, size);
  const Tensor inv_temperature = here("inv_temperature_A", inv_temperature_A, ScalarType::Float, size);
  const Tensor weight = here("weight_A", weight_A, ScalarType::Float, size);
  const Tensor old_logprobs = here("old_logprobs_A", old_logprobs_A, ScalarType::Float, size);
  const Tensor kind = here("kind_A", kind_A, ScalarType::Char, size);
  const Tensor source = here("source_T", source_T, ScalarType::Long, -1);
  const Tensor rows = here("rows_B", rows_B, ScalarType::Long, -1);

  Tensor tokens_T = empty(source, {source.numel()}, ScalarType::Long);
  Tensor targets_B = empty(rows, {rows.numel()}, ScalarType::Long);
  Tensor inv_temperature_B = empty(rows, {rows.numel()}, ScalarType::Float);
  Tensor weight_B = empty(rows, {rows.numel()}, ScalarType::Float);
  Tensor old_logprobs_B = empty(rows, {rows.numel()}, ScalarType::Float);
  Tensor kind_B = empty(rows, {rows.numel()}, ScalarType::Char);
  const GatherInput input{
      prompt_ids.const_data_ptr<int64_t>(), prompt_ids.numel(), targets.const_data_ptr<int64_t>(),
      inv_temperature.const_data_ptr<float>(), weight.const_data_ptr<float>(), old_logprobs.const_data_ptr<float>(),
      kind.const_data_ptr<int8_t>(), size, source.const_data_ptr<int64_t>(), source.numel(), rows.const_data_ptr<int64_t>(), rows.numel()};
  const GatherOutput output{
      tokens_T.mutable_data_ptr<int64_t>(), targets_B.mutable_data_ptr<int64_t>(),
      inv_temperature_B.mutable_data_ptr<float>(), weight_B.mutable_data_ptr<float>(),
      old_logprobs_B.mutable_data_ptr<float>(), kind_B.mutable_data_ptr<int8_t>()};
  Run(input, output, source);
  return {tokens_T, targets_B, inv_temperature_B, weight_B, old_logprobs_B, kind_B};
}

}  // namespace nrt_fast
