// The boundary of the counter-based numbers to torch: schema, checks, broadcasting by strides, threads over numbers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "check.h"
#include "philox.h"
#include "torch_check.h"

namespace {

using nrt_fast::PHILOX_AXES;
using nrt_fast::ScalarType;
using nrt_fast::Tensor;

constexpr int64_t NUMBERS_PER_TASK = 32768;  // some 0.1 ms: less is not worth a thread

// Widens the sizes of the result to those of a counter, aligned at the last axis as broadcasting does.
void broadcast(const char* name, const Tensor& counter, int64_t* result_size) {
  if (counter.scalar_type() != ScalarType::Long || counter.dim() > PHILOX_AXES) {
    nrt_fast::fail(
        std::string(name) + ": expected int64 of at most " + std::to_string(PHILOX_AXES) + " axes, got " +
        nrt_fast::name_of(counter.scalar_type()) + " of " + std::to_string(counter.dim()));
  }
  const auto sizes = counter.sizes();
  int64_t* joint = result_size + PHILOX_AXES - sizes.size();
  for (const int64_t size : sizes) {
    if (size != 1 && *joint != 1 && size != *joint) {
      nrt_fast::fail(
          std::string(name) + ": expected a size of 1 or " + std::to_string(*joint) +
          ", that of an earlier counter's axis, got " + std::to_string(size));
    }
    *joint = *joint == 1 ? size : *joint;
    ++joint;
  }
}

nrt_fast::PhiloxCounter strided(const Tensor& counter) {
  nrt_fast::PhiloxCounter result{counter.const_data_ptr<int64_t>(), {}};
  const auto sizes = counter.sizes(), strides = counter.strides();
  int64_t* const stride = result.stride + PHILOX_AXES - sizes.size();
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    stride[axis] = sizes[axis] == 1 ? 0 : strides[axis];
  }
  return result;
}

Tensor philox_uniform(
    int64_t seed, int64_t step, const Tensor& prompt, const Tensor& trace, const Tensor& position) {
  int64_t size[PHILOX_AXES];
  std::fill_n(size, PHILOX_AXES, 1);
  broadcast("prompt", prompt, size);
  broadcast("trace", trace, size);
  broadcast("position", position, size);
  const int64_t num_axes = std::max({prompt.dim(), trace.dim(), position.dim()});
  Tensor uniform = torch::stable::new_empty(
      prompt, {size + PHILOX_AXES - num_axes, static_cast<size_t>(num_axes)}, ScalarType::Double);
  nrt_fast::PhiloxInput input{
      static_cast<uint64_t>(seed), static_cast<uint32_t>(step), {}, strided(position), strided(trace), strided(prompt)};
  std::copy_n(size, PHILOX_AXES, input.size);
  double* const numbers = uniform.mutable_data_ptr<double>();
  torch::stable::parallel_for(0, uniform.numel(), NUMBERS_PER_TASK, [&](int64_t begin, int64_t end) {
    nrt_fast::philox_uniform(input, begin, end, numbers);
  });
  return uniform;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nrt_fast, library) {
  library.def("philox_uniform(int seed, int step, Tensor prompt, Tensor trace, Tensor position) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(nrt_fast, CPU, library) {
  library.impl("philox_uniform", TORCH_BOX(&philox_uniform));
}
