// x W^T + bias with W packed into panels beforehand, free of torch. T is float, or uint16_t that holds bf16; sums are
// fp32 and rounded once. An output depends on its own row of x and on the weights alone, bit for bit: each is summed in
// the same order, whatever rows and threads there are beside.
#pragma once

#include <cstdint>
#include <vector>

#include "panel_gemm.h"

namespace nrt_fast {

template <typename T>
struct WeightRows {
  const T* rows;  // [num_rows, K], ld apart
  int64_t ld, num_rows;
};

// Packs panels [first, end) of the rows of all weights one after another; columns beyond the last row are 0.
// panels: [ceil(N / kPanel), ceil(K / kGroup), kPanel, kGroup].
template <typename T>
void pack_weights(const std::vector<WeightRows<T>>& weights, int64_t K, int64_t first, int64_t end, T* panels);

template <typename T>
struct LinearOperands {
  const T* x;  // [num_rows, depth], rows ldx apart
  int64_t ldx, num_rows;
  const T* panels;
  const T* bias;  // [num_outputs], or null
  int64_t num_outputs;
  int64_t depth;  // a multiple of kGroup

  int64_t num_panels() const { return ceil_div(num_outputs, kPanel); }
  int64_t num_tiles() const { return num_panels() * ceil_div(num_rows, kTileRows); }

  static constexpr int64_t kTileRows = 64;
};

// Tiles [first, end) of the result, which is [num_rows, num_outputs]: of one panel after another, kTileRows at a time.
template <typename T, typename Result>
void panel_linear(
    const LinearOperands<T>& operands, PanelProduct<T> product, int64_t first, int64_t end, Result* result);

}  // namespace nrt_fast
