// Log-probabilities of targets under softmax(inv_temperature hidden weight^T), and the loss on them with its gradients,
// free of torch. Logits are made transposed, tile by tile, 512 words of the vocabulary by 64 tokens, and meet their
// online softmax while they are in the cache. Results do not depend on the number of threads: tiles are fixed, and what
// they give is merged in their order. A target outside [0, V) gives NaN.
#pragma once

#include <cstdint>
#include <functional>

#include "panel_gemm.h"
#include "token_loss.h"

namespace nrt_fast {

// Runs a function on some threads at once, at least one, and returns when all are done.
using Parallel = std::function<void(const std::function<void()>&)>;

// T is float, or uint16_t that holds bf16.
template <typename T>
struct LinearInput {
  const T* hidden;  // [N, D], rows ld_hidden apart
  int64_t ld_hidden;
  const T* weight;  // [V, D], rows ld_weight apart
  int64_t ld_weight;
  const int64_t* target;         // [N]
  const float* inv_temperature;  // [N], or null: 1
  int64_t N, V, D;
};

struct LogprobOutput {
  float* logprob;    // [N]
  float* logsumexp;  // [N], or null
  float* entropy;    // [N], or null
};

// Memory beyond this: a copy of 2048 hidden states, and 12 bytes for each of them and each tile of the vocabulary.
template <typename T>
void linear_logprob(
    const LinearInput<T>& input, PanelProduct<T> product, const Parallel& parallel, const LogprobOutput& output);

struct LossInput {
  const float* token_weight;       // [N]
  const bool* policy;              // [N]
  const float* old_logprob;        // [N], or null
  const float* reference_logprob;  // [N], or null
  LossTerms terms;
};

template <typename T>
struct LossOutput {
  float* loss;         // [1]
  float* logprob;      // [N]
  float* entropy;      // [N]
  T* grad_hidden;      // [N, D]
  float* grad_weight;  // [V, D], added to; or null
};

// Three matrix products: the fp32 logits of a chunk of rows stay, at most 64 MiB where 64 rows allow it; their gradient
// is rounded once, to T; gradients add up in fp32.
template <typename T>
void linear_logprob_loss(
    const LinearInput<T>& input, const LossInput& loss, PanelProduct<T> product, const Parallel& parallel,
    const LossOutput<T>& output);

}  // namespace nrt_fast
