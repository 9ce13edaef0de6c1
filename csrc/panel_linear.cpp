#include "panel_linear.h"

#include "vector_math.h"

namespace nrt_fast {
namespace {

ALWAYS_INLINE void widen(const float* source, int64_t size, float* result) {
  std::copy_n(source, size, result);
}

ALWAYS_INLINE void widen(const uint16_t* source, int64_t size, float* result) {
  for (int64_t i = 0; i < size; ++i) {
    result[i] = from_bf16(source[i]);
  }
}

// result = tile + bias; rows of the tile are kPanel long, those of the result ld apart.
VECTOR_CLONES void add_bias(
    const float* tile, const float* bias, int64_t num_rows, int64_t width, float* result, int64_t ld) {
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t n = 0; n < width; ++n) {
      result[r * ld + n] = tile[r * kPanel + n] + bias[n];
    }
  }
}

VECTOR_CLONES void add_bias(
    const float* tile, const float* bias, int64_t num_rows, int64_t width, uint16_t* result, int64_t ld) {
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t n = 0; n < width; ++n) {
      result[r * ld + n] = to_bf16(tile[r * kPanel + n] + bias[n]);
    }
  }
}

}  // namespace

template <typename T>
void pack_weights(const std::vector<WeightRows<T>>& weights, int64_t K, int64_t first, int64_t end, T* panels) {
  const int64_t panel_size = round_up(K, kGroup<T>) * kPanel;
  int64_t begin = 0;  // of this weight's rows among all
  for (const WeightRows<T>& weight : weights) {
    const int64_t last = std::min(begin + weight.num_rows, end * kPanel);
    for (int64_t n = std::max(begin, first * kPanel); n < last;) {
      const int64_t column = n % kPanel, num = std::min(kPanel - column, last - n);
      T* panel = panels + n / kPanel * panel_size;
      pack_transposed(weight.rows + (n - begin) * weight.ld, weight.ld, K, num, panel + column * kGroup<T>);
      n += num;
    }
    begin += weight.num_rows;
  }
  for (int64_t n = std::max(begin, first * kPanel); n < end * kPanel; ++n) {
    T* word = panels + n / kPanel * panel_size + n % kPanel * kGroup<T>;
    for (int64_t k = 0; k < panel_size; k += kPanel * kGroup<T>) {
      std::fill_n(word + k, kGroup<T>, T(0));
    }
  }
}

template <typename T, typename Result>
void panel_linear(
    const LinearOperands<T>& operands, PanelProduct<T> product, int64_t first, int64_t end, Result* result) {
  constexpr int64_t kRows = LinearOperands<T>::kTileRows;
  const auto& [x, ldx, num_rows, panels, bias, num_outputs, depth] = operands;
  const int64_t num_blocks = ceil_div(num_rows, kRows);
  alignas(64) float tile[kRows * kPanel], wide_bias[kPanel] = {};
  for (int64_t i = first; i < end; ++i) {
    const int64_t n = i / num_blocks * kPanel, row = i % num_blocks * kRows;
    const int64_t rows = std::min(kRows, num_rows - row), width = std::min(kPanel, num_outputs - n);
    if (bias) {
      widen(bias + n, width, wide_bias);
    }
    multiply(product, rows, kPanel, depth, x + row * ldx, ldx, panels + n * depth, tile, kPanel, false);
    add_bias(tile, wide_bias, rows, width, result + row * num_outputs + n, num_outputs);
  }
}

template void pack_weights(const std::vector<WeightRows<float>>&, int64_t, int64_t, int64_t, float*);
template void pack_weights(const std::vector<WeightRows<uint16_t>>&, int64_t, int64_t, int64_t, uint16_t*);
template void panel_linear(const LinearOperands<float>&, PanelProduct<float>, int64_t, int64_t, float*);
template void panel_linear(const LinearOperands<uint16_t>&, PanelProduct<uint16_t>, int64_t, int64_t, float*);
template void panel_linear(const LinearOperands<uint16_t>&, PanelProduct<uint16_t>, int64_t, int64_t, uint16_t*);

}  // namespace nrt_fast
