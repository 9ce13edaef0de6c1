// The boundary of AdamW to torch: schemas, checks of dtype and shape, threads over blocks of elements.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "adamw.h"
#include "torch_check.h"

namespace {

using nrt_fast::checked;
using nrt_fast::empty;
using nrt_fast::ScalarType;
using nrt_fast::Tensor;
using nrt_fast::uncopied;

// Tasks are whole blocks, so what is rounded with what does not depend on the number of threads.
constexpr int64_t BLOCK = 16384;

template <typename Function>
void for_each_block(int64_t size, const Function& function) {
  const int64_t num_blocks = (size + BLOCK - 1) / BLOCK;
  torch::stable::parallel_for(0, num_blocks, 1, [&](int64_t first, int64_t end) {
    for (int64_t block = first; block < end; ++block) {
      function(block, block * BLOCK, std::min(size, (block + 1) * BLOCK));
    }
  });
}

void adamw(
    const Tensor& weight, std::optional<Tensor> remainder, const Tensor& grad, const Tensor& first,
    const Tensor& second, double lr, std::vector<double> betas, double eps, double weight_decay, int64_t num_decayed,
    int64_t step, const Tensor& grad_scale, std::optional<Tensor> first_absmax, std::optional<Tensor> second_absmax) {
  if (first_absmax || second_absmax) {
    throw std::invalid_argument("first: expected fp32 moments on a CPU, got 8-bit ones");
  }
  const int64_t size = grad.numel();
  uncopied("grad", grad, ScalarType::Float, {size});
  uncopied("first", first, ScalarType::Float, {size});
  uncopied("second", second, ScalarType::Float, {size});
  nrt_fast::AdamwTensors tensors{
      nullptr, nullptr, nullptr, grad.mutable_data_ptr<float>(), first.mutable_data_ptr<float>(),
      second.mutable_data_ptr<float>()};
  if (remainder) {
    uncopied("weight", weight, ScalarType::BFloat16, {size});
    uncopied("remainder", *remainder, ScalarType::Short, {size});
    tensors.high = static_cast<uint16_t*>(weight.mutable_data_ptr());
    tensors.low = remainder->mutable_data_ptr<int16_t>();
  } else {
    uncopied("weight", weight, ScalarType::Float, {size});
    tensors.weight = weight.mutable_data_ptr<float>();
  }
  const nrt_fast::AdamwFactors factors{
      static_cast<float>(lr / (1 - std::pow(betas.at(0), step))),
      static_cast<float>(1 - lr * weight_decay),
      static_cast<float>(eps),
      static_cast<float>(1 - betas.at(0)),
      static_cast<float>(betas.at(1)),
      static_cast<float>(1 - betas.at(1)),
      static_cast<float>(1 / (1 - std::pow(betas.at(1), step))),
      *checked("grad_scale", grad_scale, ScalarType::Float, {1}).const_data_ptr<float>(),
      num_decayed};
  for_each_block(size, [&](int64_t, int64_t begin, int64_t end) { nrt_fast::adamw(tensors, factors, begin, end); });
}

Tensor grad_norm(const Tensor& grad) {
  const Tensor dense = checked("grad", grad, ScalarType::Float, {-1});
  const float* const x = dense.const_data_ptr<float>();
  std::vector<double> squares((dense.numel() + BLOCK - 1) / BLOCK);
  for_each_block(dense.numel(), [&](int64_t block, int64_t begin, int64_t end) {
    squares[block] = nrt_fast::squared_norm(x + begin, end - begin);
  });
  double sum = 0.0;
  for (const double square : squares) {
    sum += square;
  }
  Tensor norm = empty(dense, {}, ScalarType::Float);
  *norm.mutable_data_ptr<float>() = static_cast<float>(std::sqrt(sum));
  return norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nrt_fast, library) {
  library.def(
      "adamw(Tensor(a!) weight, Tensor(b!)? remainder, Tensor(c!) grad, Tensor(d!) first, Tensor(e!) second,"
      " float lr, float[] betas, float eps, float weight_decay, int num_decayed, int step, Tensor grad_scale,"
      " Tensor(f!)? first_absmax=None, Tensor(g!)? second_absmax=None) -> ()");
  library.def("grad_norm(Tensor grad) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(nrt_fast, CPU, library) {
  library.impl("adamw", TORCH_BOX(&adamw));
  library.impl("grad_norm", TORCH_BOX(&grad_norm));
}
