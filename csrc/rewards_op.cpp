// The boundary of rewards to torch: schema, checks of dtype and shape, allocation of the results, threads.
// The Meta kernel is in Python (nrt_fast/fakes.py).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rewards.h"
#include "torch_check.h"

namespace {

using nrt_fast::checked;
using nrt_fast::empty;
using nrt_fast::ScalarType;
using nrt_fast::Tensor;

constexpr int64_t SCORES_PER_THREAD = 16384;  // under some 10 us of work a second thread costs more than it saves

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> aggregate_rewards(
    const Tensor& logc_C, const Tensor& logb_A, const Tensor& closed_N, const Tensor& cu_answers,
    const Tensor& cu_groups, const Tensor& cu_scores, std::string reward, std::string reward_scale,
    std::string reward_clip, std::string advantage, std::string answer_weight, double std_floor, bool drop_cut_reward,
    double format_coef) {
  const nrt_fast::RewardChoices choices = nrt_fast::reward_choices(
      reward, reward_scale, reward_clip, advantage, answer_weight, std_floor, drop_cut_reward, format_coef);
  const Tensor logc = checked("logc_C", logc_C, ScalarType::Float, {-1});
  const Tensor logb = checked("logb_A", logb_A, ScalarType::Float, {-1});
  const Tensor closed = checked("closed_N", closed_N, ScalarType::Bool, {-1});
  const Tensor answers = checked("cu_answers", cu_answers, ScalarType::Long, {-1});
  const Tensor groups = checked("cu_groups", cu_groups, ScalarType::Long, {answers.numel()});
  const Tensor scores = checked("cu_scores", cu_scores, ScalarType::Long, {answers.numel()});
  const int64_t P = answers.numel() - 1, N = closed.numel(), C = logc.numel();
  const nrt_fast::RewardInput input{
      logc.const_data_ptr<float>(), C, logb.const_data_ptr<float>(), logb.numel(), closed.const_data_ptr<bool>(), N,
      answers.const_data_ptr<int64_t>(), groups.const_data_ptr<int64_t>(), scores.const_data_ptr<int64_t>(), P};
  nrt_fast::check_rewards(input);
  Tensor reward_N = empty(logc, {N}, ScalarType::Float), base_P = empty(logc, {P}, ScalarType::Float);
  Tensor shaped_N = empty(logc, {N}, ScalarType::Float), advantage_N = empty(logc, {N}, ScalarType::Float);
  Tensor signal_P = empty(logc, {P}, ScalarType::Bool), token_weight_C = empty(logc, {C}, ScalarType::Float);
  const nrt_fast::RewardOutput output{
      reward_N.mutable_data_ptr<float>(), base_P.mutable_data_ptr<float>(), shaped_N.mutable_data_ptr<float>(),
      advantage_N.mutable_data_ptr<float>(), signal_P.mutable_data_ptr<bool>(),
      token_weight_C.mutable_data_ptr<float>()};
  const int64_t grain = 1 + SCORES_PER_THREAD * P / (C + 1);
  torch::stable::parallel_for(0, P, grain, [&](int64_t first, int64_t end) {
    nrt_fast::aggregate_rewards(input, choices, first, end, output);
  });
  return {reward_N, base_P, shaped_N, advantage_N, signal_P, token_weight_C};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nrt_fast, library) {
  library.def(
      "aggregate_rewards(Tensor logc_C, Tensor logb_A, Tensor closed_N, Tensor cu_answers, Tensor cu_groups,"
      " Tensor cu_scores, str reward, str reward_scale, str reward_clip, str advantage, str answer_weight,"
      " float std_floor, bool drop_cut_reward, float format_coef) -> (Tensor reward_N, Tensor base_P,"
      " Tensor shaped_N, Tensor advantage_N, Tensor signal_P, Tensor token_weight_C)");
}

STABLE_TORCH_LIBRARY_IMPL(nrt_fast, CPU, library) {
  library.impl("aggregate_rewards", TORCH_BOX(&aggregate_rewards));
}
