// Tests of the torch-free core; exits with the number of failures.
#include "../rewards.h"

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "expect.h"

namespace {

using Floats = std::vector<float>;
using Ints = std::vector<int64_t>;

bool near(const Floats& ours, const std::vector<double>& expected) {
  bool all = ours.size() == expected.size();
  for (size_t i = 0; all && i < ours.size(); ++i) {
    all = std::abs(ours[i] - expected[i]) <= 1e-6 * (1 + std::abs(expected[i]));
  }
  return all;
}

struct Result {
  Floats reward, base, shaped, advantage;
  std::vector<bool> signal;
  Floats token_weight;
};

nrt_fast::RewardChoices choose(
    const char* reward, const char* clip = "none", const char* advantage = "dr_grpo", const char* scale = "length",
    const char* answer_weight = "derived", bool drop_cut_reward = false, double format_coef = 0.0) {
  return nrt_fast::reward_choices(
      reward, scale, clip, advantage, answer_weight, 0.0, drop_cut_reward, format_coef);
}

// Every trace is closed but the last. Prompts one at a time and from the last: they do not depend on one another.
Result aggregate(
    const nrt_fast::RewardChoices& choices, const Floats& logc, const Floats& logb, const Ints& cu_answers,
    const Ints& cu_groups, const Ints& cu_scores) {
  const size_t P = cu_answers.size() - 1, N = static_cast<size_t>(cu_groups.back());
  std::unique_ptr<bool[]> closed(new bool[N]), signal(new bool[P]);
  for (size_t n = 0; n < N; ++n) {
    closed[n] = n + 1 < N;
  }
  const nrt_fast::RewardInput input{
      logc.data(), static_cast<int64_t>(logc.size()), logb.data(), static_cast<int64_t>(logb.size()), closed.get(),
      static_cast<int64_t>(N), cu_answers.data(), cu_groups.data(), cu_scores.data(), static_cast<int64_t>(P)};
  nrt_fast::check_rewards(input);
  Result result{Floats(N), Floats(P), Floats(N), Floats(N), {}, Floats(logc.size())};
  for (int64_t p = static_cast<int64_t>(P) - 1; p >= 0; --p) {
    nrt_fast::aggregate_rewards(
        input, choices, p, p + 1,
        {result.reward.data(), result.base.data(), result.shaped.data(), result.advantage.data(), signal.get(),
         result.token_weight.data()});
  }
  result.signal.assign(signal.get(), signal.get() + P);
  return result;
}

// A prompt of two traces and two tokens, one of no trace, one of one trace and one token.
const Floats LOGC{-1.0f, -2.0f, -3.0f, -0.5f, -0.25f};
const Floats LOGB{-2.0f, -1.0f, -4.0f, -0.75f};
const Ints CU_ANSWERS{0, 2, 3, 4}, CU_GROUPS{0, 2, 2, 3}, CU_SCORES{0, 4, 4, 5};

Result aggregate(const nrt_fast::RewardChoices& choices) {
  return aggregate(choices, LOGC, LOGB, CU_ANSWERS, CU_GROUPS, CU_SCORES);
}

double e(double x) {
  return std::exp(x);
}

void test_rewards() {
  expect(near(aggregate(choose("logp")).reward, {-3, -3.5, -0.25}), "logp");
  expect(near(aggregate(choose("prob")).reward, {e(-3), e(-3.5), e(-0.25)}), "prob");
  expect(near(aggregate(choose("gm")).reward, {e(-1.5), e(-1.75), e(-0.25)}), "gm");
  expect(near(aggregate(choose("am")).token_weight, {e(-1) / 2, e(-2) / 2, e(-3) / 2, e(-0.5) / 2, e(-0.25)}), "am");
  expect(near(aggregate(choose("ws_inv")).reward, {(e(1) + e(-1)) / 2, (e(-1) + e(0.5)) / 2, e(0.5)}), "ws_inv");
  const Result ws_log = aggregate(choose("ws_log", "none", "grpo", "weight"));
  expect(near(ws_log.reward, {(2 * e(-1) + e(-2)) / 3, (2 * e(-3) + e(-0.5)) / 3, e(-0.25)}), "ws_log by weight");
  expect(near(ws_log.base, {(2 * e(-2) + e(-1)) / 3, e(-4), e(-0.75)}), "the empty trace, of an empty group too");
  expect(near({ws_log.advantage[0], ws_log.advantage[1]}, {std::sqrt(0.5), -std::sqrt(0.5)}), "grpo");
  const Result r3 = aggregate(choose("r3"));
  const double w = 2.0 / 3.5 / 2, v = 1.5 / 3.5 / 2;  // the spreads are sqrt(2) and 1.5 / sqrt(2)
  expect(near(r3.token_weight, {w, v, w, v, 0}), "r3's weights");
  expect(near(r3.reward, {w - v, -w + 0.5 * v, 0}), "r3");
  expect(near(r3.base, {0, 0, 0}), "r3 of one trace");
}

void test_shapes() {
  const Result zero = aggregate(choose("logp", "zero", "rloo", "length", "reward"));
  expect(near(zero.base, {-3, -4, -0.75}), "R_base");
  expect(near(zero.shaped, {0, 0, 0.5}), "clip at zero");
  expect(zero.signal == std::vector<bool>({false, false, false}), "no group has a spread");
  expect(near(zero.token_weight, {-3, -3, -3.5, -3.5, -0.25}), "answers weighted by R");
  expect(near(aggregate(choose("logp", "none", "rloo")).advantage, {0.5, -0.5, 0}), "rloo");
  const Result rlpr = aggregate(choose("am", "unit", "grpo", "length", "fixed", true, 0.1));
  expect(near({rlpr.shaped[2]}, {0}), "an open trace is dropped");
  const double gain = (e(-3) + e(-0.5) - e(-2) - e(-1)) / 2;
  expect(near({rlpr.shaped[1]}, {0.9 * gain + 0.1}), "the format term");
  expect(rlpr.token_weight == Floats(5, 1.0f), "fixed weights");
}

void test_hostile() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  expect(std::isnan(aggregate(choose("am"), {nan}, {-1.0f}, {0, 1}, {0, 1}, {0, 1}).reward[0]), "NaN of c stays");
  expect(std::isnan(aggregate(choose("ws_log"), {-1}, {nan}, {0, 1}, {0, 1}, {0, 1}).reward[0]), "NaN of b stays");
  expect(near(aggregate(choose("ws_inv"), {-92}, {-92}, {0, 1}, {0, 1}, {0, 1}).reward, {e(-72)}), "log b is clamped");
  expect(near(aggregate(choose("prob"), Floats(4096, -1e30f), {-1}, {0, 1}, {0, 4096}, {0, 4096}).reward,
              std::vector<double>(4096, 0.0)), "probabilities underflow to 0");
  const Floats equal(9, 123456.7f);
  expect(!aggregate(choose("logp"), equal, {0}, {0, 1}, {0, 9}, {0, 9}).signal[0], "equal rewards do not spread");
  expect(aggregate(choose("gm"), {}, {}, {0, 0}, {0, 2}, {0, 0}).reward == Floats(2, 1.0f), "an answer of no tokens");
  expect(aggregate(choose("gm"), {}, {}, {0}, {0}, {0}).base.empty(), "no prompt at all");
}

void test_bad_input() {
  expect_invalid([] { choose("best"); }, "an unknown reward");
  expect_invalid([] { aggregate(choose("am"), LOGC, LOGB, {1, 2, 3, 4}, CU_GROUPS, CU_SCORES); }, "not from 0");
  expect_invalid([] { aggregate(choose("am"), LOGC, LOGB, {0, 3, 2, 4}, CU_GROUPS, CU_SCORES); }, "descending");
  expect_invalid([] { aggregate(choose("am"), LOGC, LOGB, {0, 2, 3, 3}, CU_GROUPS, CU_SCORES); }, "too few tokens");
  expect_invalid([] { aggregate(choose("am"), LOGC, LOGB, CU_ANSWERS, CU_GROUPS, {0, 3, 4, 5}); }, "not a product");
}

}  // namespace

int main() {
  test_rewards();
  test_shapes();
  test_hostile();
  test_bad_input();
  return failures();
}
