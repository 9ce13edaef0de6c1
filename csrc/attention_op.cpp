// The boundary of attention to torch: schema, checks of dtype and shape, allocation of the result, threads.
// The Meta kernel is in Python (nrt_fast/fakes.py).
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>

#include "attention.h"
#include "torch_check.h"

namespace {

using nrt_fast::checked;
using nrt_fast::ScalarType;
using nrt_fast::Tensor;
using nrt_fast::uncopied;

Tensor prefix_attention(
    const Tensor& q_THE, const Tensor& prefix_k_NKSE, const Tensor& prefix_v_NKSE, const Tensor& prefix_pages_PX,
    const Tensor& prefix_lens_P, const Tensor& own_k_MKZE, const Tensor& own_v_MKZE, const Tensor& own_pages_BY,
    const Tensor& own_lens_B, const Tensor& cu_q, const Tensor& cu_rows, int64_t max_q, int64_t max_rows,
    std::optional<int64_t> window, std::optional<double> scale) {
  const ScalarType dtype = q_THE.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16) {
    throw std::invalid_argument(std::string("q_THE: expected float32 or bfloat16, got ") + nrt_fast::name_of(dtype));
  }
  if (window && *window < 1) {
    throw std::invalid_argument("window " + std::to_string(*window) + ": expected at least 1");
  }
  const Tensor q = checked("q_THE", q_THE, dtype, {-1, -1, -1});
  const int64_t E = q.size(2), K = own_k_MKZE.size(1), P = prefix_lens_P.numel(), B = own_lens_B.numel();
  const int64_t N = prefix_k_NKSE.size(0), S = prefix_k_NKSE.size(2);
  const int64_t M = own_k_MKZE.size(0), Z = own_k_MKZE.size(2);
  const Tensor prefix_pages = checked("prefix_pages_PX", prefix_pages_PX, ScalarType::Int, {P, -1});
  const Tensor prefix_lens = checked("prefix_lens_P", prefix_lens_P, ScalarType::Int, {P});
  const Tensor own_pages = checked("own_pages_BY", own_pages_BY, ScalarType::Int, {B, -1});
  const Tensor own_lens = checked("own_lens_B", own_lens_B, ScalarType::Int, {B});
  const Tensor offsets_q = checked("cu_q", cu_q, ScalarType::Int, {B + 1});
  const Tensor offsets_rows = checked("cu_rows", cu_rows, ScalarType::Int, {P + 1});
  const nrt_fast::AttentionInput input{
      q.const_data_ptr(), dtype == ScalarType::BFloat16,
      {uncopied("prefix_k_NKSE", prefix_k_NKSE, dtype, {N, K, S, E}).const_data_ptr(),
       uncopied("prefix_v_NKSE", prefix_v_NKSE, dtype, {N, K, S, E}).const_data_ptr(), N, S,
       prefix_pages.const_data_ptr<int32_t>(), prefix_pages.size(1), prefix_lens.const_data_ptr<int32_t>()},
      {uncopied("own_k_MKZE", own_k_MKZE, dtype, {M, K, Z, E}).const_data_ptr(),
       uncopied("own_v_MKZE", own_v_MKZE, dtype, {M, K, Z, E}).const_data_ptr(), M, Z,
       own_pages.const_data_ptr<int32_t>(), own_pages.size(1), own_lens.const_data_ptr<int32_t>()},
      offsets_q.const_data_ptr<int32_t>(), offsets_rows.const_data_ptr<int32_t>(), q.size(0), B, P, q.size(1), K, E,
      max_q, max_rows, window.value_or(0),
      static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(E))))};
  nrt_fast::check_attention(input);
  Tensor out_THE = torch::stable::empty_like(q);
  void* out = out_THE.mutable_data_ptr();
  const std::vector<nrt_fast::TokenTile> tiles = nrt_fast::token_tiles(input);
  torch::stable::parallel_for(0, tiles.size() * K, 1, [&](int64_t first, int64_t end) {
    nrt_fast::attend(input, tiles, first, end, out);
  });
  return out_THE;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nrt_fast, library) {
  library.def(
      "prefix_attention(Tensor q_THE, Tensor prefix_k_NKSE, Tensor prefix_v_NKSE, Tensor prefix_pages_PX,"
      " Tensor prefix_lens_P, Tensor own_k_MKZE, Tensor own_v_MKZE, Tensor own_pages_BY, Tensor own_lens_B,"
      " Tensor cu_q, Tensor cu_rows, int max_q, int max_rows, int? window=None, float? scale=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(nrt_fast, CPU, library) {
  library.impl("prefix_attention", TORCH_BOX(&prefix_attention));
}
