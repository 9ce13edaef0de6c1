// Rewards, advantages and answer weights of groups of traces, free of torch: raw pointers and sizes, CPU memory.
// The method's formulas are in docs/method.md, sections 2 and 3. Terms are fp32, sums fp64 and of fixed order, so that
// a group's results depend on the group alone.
#pragma once

#include <cstdint>
#include <string>

namespace nrt_fast {

enum class Reward { logp, prob, am, gm, ws_inv, ws_log, r3 };
enum class RewardScale { length, weight };
enum class RewardClip { none, zero, unit };
enum class Advantage { grpo, dr_grpo, rloo };
enum class AnswerWeight { fixed, derived, reward };

struct RewardChoices {
  Reward reward;
  RewardScale scale;
  RewardClip clip;
  Advantage advantage;
  AnswerWeight answer_weight;
  double std_floor;
  bool drop_cut_reward;
  float format_coef;
};

// The choices by their names; throws std::invalid_argument for a name that is none.
RewardChoices reward_choices(
    const std::string& reward, const std::string& scale, const std::string& clip, const std::string& advantage,
    const std::string& answer_weight, double std_floor, bool drop_cut_reward, double format_coef);

// Prefix sums have P + 1 entries and start at 0.
struct RewardInput {
  const float* logc;  // [C] log-probabilities of the answer, prompt after prompt, trace after trace
  int64_t num_scores;
  const float* logb;  // [A] the same after an empty trace, prompt after prompt
  int64_t num_tokens;
  const bool* closed;  // [N] the trace ended with the delimiter
  int64_t num_traces;
  const int64_t* cu_answers;  // into logb
  const int64_t* cu_groups;   // into closed
  const int64_t* cu_scores;   // into logc: a prompt has traces x answer tokens
  int64_t num_prompts;
};

struct RewardOutput {
  float* reward;     // [N] raw R
  float* base;       // [P] R of the empty trace
  float* shaped;     // [N] R after baseline, clip and format term
  float* advantage;  // [N]
  bool* signal;      // [P]
  float* token_weight;  // [C]
};

// Throws std::invalid_argument unless the prefix sums fit together and to the sizes.
void check_rewards(const RewardInput& input);

// Writes what belongs to prompts first to end - 1. The input must have passed check_rewards.
void aggregate_rewards(
    const RewardInput& input, const RewardChoices& choices, int64_t first, int64_t end, const RewardOutput& output);

}  // namespace nrt_fast
