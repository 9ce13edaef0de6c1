// The loss of one token and its slopes, as nrt_fast.reference.logprob defines them: of a policy token
// trace_loss(logprob, exp(logprob - old), weight) + beta k3(logprob, reference) - entropy_coef entropy, of any other
// -weight logprob. A weight of 0 leaves out the first term, whatever the log-probabilities are.
#pragma once

#include <algorithm>
#include <cmath>

namespace nrt_fast {

enum class TraceLoss { cispo, ppo, reinforce };

struct LossTerms {
  TraceLoss trace_loss;
  float low, high;  // clip range of the ratio
  float beta;
  float entropy_coef;
  float scale;  // of everything
};

// What a token brings along; a null pointer stands for "not known": ratio 1, no KL term.
struct LossToken {
  float weight;
  bool policy;
  const float* old_logprob;
  const float* reference_logprob;
};

struct TokenLoss {
  float loss = 0.0f;
  float by_logprob = 0.0f;
  float by_entropy = 0.0f;
};

inline TokenLoss weighted_loss(const LossTerms& terms, const LossToken& token, float logprob) {
  constexpr float kMaxLogRatio = 20.0f;  // a ratio of 5e8: finite, so that inf never meets 0
  const float weight = token.weight;
  if (weight == 0.0f) {
    return {};
  }
  if (!token.policy || terms.trace_loss == TraceLoss::reinforce) {
    return {-weight * logprob, -weight, 0.0f};
  }
  const float log_ratio = token.old_logprob ? logprob - *token.old_logprob : 0.0f;
  const float ratio = std::exp(std::clamp(log_ratio, -kMaxLogRatio, kMaxLogRatio));
  const float clipped = std::clamp(ratio, terms.low, terms.high);
  const bool gone = weight > 0.0f ? ratio > terms.high : ratio < terms.low;
  if (terms.trace_loss == TraceLoss::ppo) {
    return {-weight * (gone ? clipped : ratio), gone ? 0.0f : -weight * ratio, 0.0f};
  }
  const float slope = gone ? 0.0f : -weight * clipped;
  return {slope * logprob, slope, 0.0f};
}

inline TokenLoss token_loss(const LossTerms& terms, const LossToken& token, float logprob, float entropy) {
  TokenLoss result = weighted_loss(terms, token, logprob);
  if (token.policy && token.reference_logprob) {
    const float difference = *token.reference_logprob - logprob;
    result.loss += terms.beta * (std::exp(difference) - difference - 1.0f);
    result.by_logprob += terms.beta * (1.0f - std::exp(difference));
  }
  if (token.policy) {
    result.loss -= terms.entropy_coef * entropy;
    result.by_entropy = -terms.entropy_coef;
  }
  return {terms.scale * result.loss, terms.scale * result.by_logprob, terms.scale * result.by_entropy};
}

}  // namespace nrt_fast
