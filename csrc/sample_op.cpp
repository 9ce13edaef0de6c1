// The boundary of sampling to torch: schema, checks of dtype and shape, allocation of the results, threads over rows.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "sample.h"
#include "torch_check.h"

namespace {

using nrt_fast::checked;
using nrt_fast::empty;
using nrt_fast::ScalarType;
using nrt_fast::Tensor;

constexpr int64_t LOGITS_PER_TASK = 32768;  // some 5 us: less is not worth a thread

std::tuple<Tensor, Tensor> sample_logprob(
    const Tensor& logits_NV, const Tensor& uniform_N, double temperature, std::optional<Tensor> floor_N) {
  if (!(temperature >= 0.0)) {
    throw std::invalid_argument("temperature: expected a number from 0, got " + std::to_string(temperature));
  }
  const Tensor logits =
      checked("logits_NV", torch::stable::to(logits_NV, ScalarType::Float), ScalarType::Float, {-1, -1});
  const int64_t num_rows = logits.size(0);
  const int64_t num_ids = logits.size(1);
  const Tensor uniform = checked("uniform_N", uniform_N, ScalarType::Double, {num_rows});
  const Tensor floor = floor_N ? checked("floor_N", *floor_N, ScalarType::Float, {num_rows}) : uniform;
  Tensor ids_N = empty(logits, {num_rows}, ScalarType::Long);
  Tensor logprob_N = empty(logits, {num_rows}, ScalarType::Float);
  const nrt_fast::SampleInput input{
      logits.const_data_ptr<float>(), num_ids, uniform.const_data_ptr<double>(),
      floor_N ? floor.const_data_ptr<float>() : nullptr, temperature};
  int64_t* const ids = ids_N.mutable_data_ptr<int64_t>();
  float* const logprob = logprob_N.mutable_data_ptr<float>();
  const int64_t rows_per_task = std::max<int64_t>(1, LOGITS_PER_TASK / std::max<int64_t>(1, num_ids));
  torch::stable::parallel_for(0, num_rows, rows_per_task, [&](int64_t begin, int64_t end) {
    nrt_fast::sample_logprob(input, begin, end, ids, logprob);
  });
  return {ids_N, logprob_N};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nrt_fast, library) {
  library.def(
      "sample_logprob(Tensor logits_NV, Tensor uniform_N, float temperature, Tensor? floor_N=None)"
      " -> (Tensor ids_N, Tensor logprob_N)");
}

STABLE_TORCH_LIBRARY_IMPL(nrt_fast, CPU, library) {
  library.impl("sample_logprob", TORCH_BOX(&sample_logprob));
}
