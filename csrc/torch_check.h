// What the boundaries to torch share: checks of dtype and shape, allocation of results. torch's stable ABI only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace nrt_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool: return "bool";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    default: return "another dtype";
  }
}

// The tensor in contiguous memory, once its dtype and shape are as expected; size -1 stands for any length.
inline Tensor checked(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  const bool shape_fits = sizes.size() == shape.size() &&
      std::equal(shape.begin(), shape.end(), sizes.begin(), [](int64_t a, int64_t b) { return a < 0 || a == b; });
  if (shape_fits && tensor.scalar_type() == dtype) {
    return torch::stable::contiguous(tensor);
  }
  std::ostringstream message;
  message << name << ": expected " << name_of(dtype) << " of shape [";
  const char* separator = "";
  for (const int64_t size : shape) {
    message << separator << (size < 0 ? "*" : std::to_string(size));
    separator = ", ";
  }
  throw std::invalid_argument(message.str() + "]");
}

// The same of the tensor itself, which is written in place or too large to copy.
inline const Tensor& uncopied(
    const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape) {
  if (!tensor.is_contiguous()) {
    throw std::invalid_argument(std::string(name) + ": expected contiguous memory");
  }
  checked(name, tensor, dtype, shape);
  return tensor;
}

// A matrix whose rows are dense, wherever they lie; copied only if they are not.
inline Tensor checked_rows(const char* name, const Tensor& matrix, ScalarType dtype, int64_t num_columns) {
  const bool dense = matrix.dim() == 2 && matrix.stride(1) == 1 && matrix.stride(0) >= matrix.size(1);
  if (dense && matrix.scalar_type() == dtype && (num_columns < 0 || matrix.size(1) == num_columns)) {
    return matrix;
  }
  return checked(name, matrix, dtype, {-1, num_columns});
}

// Calls function(T()) with the element type of the dtype: float, or uint16_t that holds bf16.
template <typename Function>
void with_element(const char* name, ScalarType dtype, const Function& function) {
  if (dtype == ScalarType::Float) {
    function(float{});
  } else if (dtype == ScalarType::BFloat16) {
    function(uint16_t{});
  } else {
    throw std::invalid_argument(
        std::string(name) + ": expected float32 or bfloat16, got " + name_of(dtype) +
        "; the reference takes other dtypes");
  }
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

}  // namespace nrt_fast
