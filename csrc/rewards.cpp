#include "rewards.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <vector>

#include "check.h"
#include "vector_math.h"

namespace nrt_fast {

VECTOR_CLONES double sum_of(const float* x, int64_t size);
VECTOR_CLONES void exp_terms(const float* logc, const float* shift, const float* share, int64_t size, float* term);

namespace {

constexpr float MIN_LOG_B = -20.0f;
constexpr int64_t LANES = 32;

template <typename Choice>
Choice choice_of(const char* name, const std::string& value, std::initializer_list<const char*> allowed) {
  const auto found = std::find(allowed.begin(), allowed.end(), value);
  if (found != allowed.end()) {
    return static_cast<Choice>(found - allowed.begin());
  }
  std::string message = std::string(name) + ": expected one of ";
  for (const char* choice : allowed) {
    message += std::string(choice == *allowed.begin() ? "" : ", ") + choice;
  }
  fail(message + ", got " + value);
}

inline float clamped(float logb) {
  logb = logb < MIN_LOG_B ? MIN_LOG_B : logb;
  return logb > 0.0f ? 0.0f : logb;
}

// How the answer tokens of one prompt add up to R; buffers serve prompt after prompt.
class Formula {
 public:
  Formula(const RewardChoices& choices, const float* logc, const float* logb, int64_t num_traces, int64_t num_tokens)
      : choices_(choices), num_tokens_(num_tokens), length_(std::max<int64_t>(num_tokens, 1)), logb_(num_tokens),
        share_(num_tokens), shift_(num_tokens), term_(num_tokens) {
    std::transform(logb, logb + num_tokens, logb_.begin(), clamped);
    if (choices.reward == Reward::r3) {
      set_spreads(logc, num_traces);
    } else if (is_weighted()) {
      set_weights();
    }
  }

  // R of one trace; where the derived token weights are asked for, they go there.
  float reward(const float* logc, float* derived) {
    float* term = derived == nullptr ? term_.data() : derived;
    if (is_weighted()) {
      exp_terms(logc, shift_.data(), share_.data(), num_tokens_, term);
      return static_cast<float>(sum_of(term, num_tokens_));
    }
    if (choices_.reward == Reward::r3) {
      for (int64_t i = 0; i < num_tokens_; ++i) {
        term_[i] = share_[i] * (logc[i] - logb_[i]);
      }
      const double reward = sum_of(term_.data(), num_tokens_);
      if (derived != nullptr) {
        std::copy(share_.begin(), share_.end(), derived);
      }
      return static_cast<float>(reward);
    }
    const double total = sum_of(logc, num_tokens_);
    const bool logp = choices_.reward == Reward::logp;
    const double share = choices_.reward == Reward::gm ? 1.0 / length_ : 1.0;
    const double reward = logp ? total : std::exp(total * share);
    if (derived != nullptr) {
      std::fill(derived, derived + num_tokens_, logp ? 1.0f : static_cast<float>(reward * share));
    }
    return static_cast<float>(reward);
  }

  float base(const float* logb) {
    if (choices_.reward == Reward::r3) {
      return static_cast<float>(0.0 * sum_of(logb, num_tokens_));  // one trace alone has no spread
    }
    return reward(logb, nullptr);
  }

 private:
  bool is_weighted() const {
    return choices_.reward == Reward::am || choices_.reward == Reward::ws_inv || choices_.reward == Reward::ws_log;
  }

  // R = sum of share exp(log c - shift).
  void set_weights() {
    const bool inverse = choices_.reward == Reward::ws_inv;
    for (int64_t i = 0; i < num_tokens_; ++i) {
      share_[i] = choices_.reward == Reward::am ? 1.0f : inverse ? std::exp(-logb_[i]) : -logb_[i];
      shift_[i] = inverse ? logb_[i] : 0.0f;
    }
    const bool by_length = choices_.scale == RewardScale::length;
    const double total = by_length ? length_ : at_least(sum_of(share_.data(), num_tokens_), TINY);
    for (float& share : share_) {
      share = static_cast<float>((inverse ? 1.0 : share) / total);
    }
  }

  // R = sum of share (log c - log b), the share in proportion to the spread over the group.
  void set_spreads(const float* logc, int64_t num_traces) {
    std::vector<double> mean(num_tokens_), square(num_tokens_);
    // Measured from the first trace, equal ones spread by exactly 0.
    for (int64_t i = num_tokens_; i < num_traces * num_tokens_; i += num_tokens_) {
      for (int64_t k = 0; k < num_tokens_; ++k) {
        mean[k] += (static_cast<double>(logc[i + k]) - logc[k]) / num_traces;
      }
    }
    for (int64_t i = 0; i < num_traces * num_tokens_; i += num_tokens_) {
      for (int64_t k = 0; k < num_tokens_; ++k) {
        const double centred = static_cast<double>(logc[i + k]) - logc[k] - mean[k];
        square[k] += centred * centred;
      }
    }
    for (int64_t k = 0; k < num_tokens_; ++k) {
      share_[k] = static_cast<float>(std::sqrt(square[k] / at_least(num_traces - 1.0, 1.0)));
    }
    const double total = at_least(sum_of(share_.data(), num_tokens_), TINY) * length_;
    for (float& share : share_) {
      share = static_cast<float>(share / total);
    }
  }

  static constexpr double TINY = std::numeric_limits<float>::min();

  const RewardChoices& choices_;
  const int64_t num_tokens_;
  const double length_;
  std::vector<float> logb_, share_, shift_, term_;
};

float shaped_of(float reward, float base, bool closed, const RewardChoices& choices) {
  float shaped = choices.drop_cut_reward && !closed ? base : reward;
  if (choices.clip != RewardClip::none) {
    shaped = shaped - base < 0.0f ? 0.0f : shaped - base;
  }
  if (choices.clip == RewardClip::unit) {
    shaped = shaped > 1.0f ? 1.0f : shaped;
  }
  return (1.0f - choices.format_coef) * shaped + choices.format_coef * static_cast<float>(closed);
}

// Writes the advantages of one group; returns whether it carries a signal.
bool advantages_of(const float* shaped, int64_t num_traces, const RewardChoices& choices, float* advantage) {
  double mean = 0.0, square = 0.0;
  for (int64_t g = 1; g < num_traces; ++g) {
    mean += (static_cast<double>(shaped[g]) - shaped[0]) / num_traces;
  }
  for (int64_t g = 0; g < num_traces; ++g) {
    const double centred = static_cast<double>(shaped[g]) - shaped[0] - mean;
    square += centred * centred;
  }
  const double others = at_least(num_traces - 1.0, 1.0), std = std::sqrt(square / others);
  const bool signal = std > at_least(choices.std_floor, 0.0);
  const bool grpo = choices.advantage == Advantage::grpo, rloo = choices.advantage == Advantage::rloo;
  const double scale = !signal ? 0.0 : grpo ? 1.0 / std : rloo ? num_traces / others : 1.0;
  for (int64_t g = 0; g < num_traces; ++g) {
    advantage[g] = signal ? static_cast<float>((static_cast<double>(shaped[g]) - shaped[0] - mean) * scale) : 0.0f;
  }
  return signal;
}

}  // namespace

// Lanes are added up in order at the end, whatever the width of a vector.
double sum_of(const float* x, int64_t size) {
  double lane[LANES] = {};
  const int64_t whole = size / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    for (int64_t j = 0; j < LANES; ++j) {
      lane[j] += x[i + j];
    }
  }
  double sum = 0.0;
  for (const double part : lane) {
    sum += part;
  }
  for (int64_t i = whole; i < size; ++i) {
    sum += x[i];
  }
  return sum;
}

void exp_terms(const float* logc, const float* shift, const float* share, int64_t size, float* term) {
  for (int64_t i = 0; i < size; ++i) {
    term[i] = share[i] * exp_of(logc[i] - shift[i]);
  }
}

RewardChoices reward_choices(
    const std::string& reward, const std::string& scale, const std::string& clip, const std::string& advantage,
    const std::string& answer_weight, double std_floor, bool drop_cut_reward, double format_coef) {
  return {
      choice_of<Reward>("reward", reward, {"logp", "prob", "am", "gm", "ws_inv", "ws_log", "r3"}),
      choice_of<RewardScale>("reward_scale", scale, {"length", "weight"}),
      choice_of<RewardClip>("reward_clip", clip, {"none", "zero", "unit"}),
      choice_of<Advantage>("advantage", advantage, {"grpo", "dr_grpo", "rloo"}),
      choice_of<AnswerWeight>("answer_weight", answer_weight, {"fixed", "derived", "reward"}),
      std_floor, drop_cut_reward, static_cast<float>(format_coef)};
}

void check_rewards(const RewardInput& input) {
  check_offsets("cu_answers", input.cu_answers, input.num_prompts, input.num_tokens);
  check_offsets("cu_groups", input.cu_groups, input.num_prompts, input.num_traces);
  check_offsets("cu_scores", input.cu_scores, input.num_prompts, input.num_scores);
  for (int64_t p = 0; p < input.num_prompts; ++p) {
    const int64_t num_tokens = input.cu_answers[p + 1] - input.cu_answers[p];
    const int64_t num_traces = input.cu_groups[p + 1] - input.cu_groups[p];
    const int64_t num_scores = input.cu_scores[p + 1] - input.cu_scores[p];
    if (num_scores != num_traces * num_tokens) {
      fail("prompt " + std::to_string(p) + " has " + std::to_string(num_scores) + " scores: expected " +
           std::to_string(num_traces) + " traces x " + std::to_string(num_tokens) + " tokens");
    }
  }
}

void aggregate_rewards(
    const RewardInput& input, const RewardChoices& choices, int64_t first, int64_t end, const RewardOutput& output) {
  for (int64_t p = first; p < end; ++p) {
    const int64_t first_trace = input.cu_groups[p], num_traces = input.cu_groups[p + 1] - first_trace;
    const float* logb = input.logb + input.cu_answers[p];
    const int64_t num_tokens = input.cu_answers[p + 1] - input.cu_answers[p];
    const float* logc = input.logc + input.cu_scores[p];
    float* token_weight = output.token_weight + input.cu_scores[p];
    Formula formula(choices, logc, logb, num_traces, num_tokens);
    output.base[p] = formula.base(logb);
    for (int64_t g = 0; g < num_traces; ++g, logc += num_tokens, token_weight += num_tokens) {
      const bool derived = choices.answer_weight == AnswerWeight::derived;
      const float reward = formula.reward(logc, derived ? token_weight : nullptr);
      if (!derived) {
        const bool fixed = choices.answer_weight == AnswerWeight::fixed;
        std::fill(token_weight, token_weight + num_tokens, fixed ? 1.0f : reward);
      }
      const int64_t n = first_trace + g;
      output.reward[n] = reward;
      output.shaped[n] = shaped_of(reward, output.base[p], input.closed[n], choices);
    }
    output.signal[p] =
        advantages_of(output.shaped + first_trace, num_traces, choices, output.advantage + first_trace);
  }
}

}  // namespace nrt_fast
