// Attention of packed groups, forward and backward, free of torch: a prompt sees itself, a trace sees its prompt and
// itself, all of it causal. Bad input throws std::invalid_argument before anything is read.
#pragma once

#include <cstdint>
#include <functional>

namespace nrt_fast {

// [tokens, heads, dim] of floats, or of bf16, anywhere in memory; strides in elements.
struct Strided {
  void* data;
  int64_t token, head, element;
};

// Segments in the order of their tokens, none of them empty: of each group its prompt, then its traces.
struct PackedInput {
  Strided q, k, v;
  bool is_bfloat16;  // of q, k, v, the result and all gradients; else they are float
  const int64_t* starts;  // [num_segments] first tokens
  const int64_t* lens;  // [num_segments]
  const int64_t* roots;  // [num_segments] the segment of the prompt; a prompt's own number for a prompt
  int64_t num_segments, num_tokens, num_heads, num_kv_heads, head_dim;
  int64_t window;  // positions that a token sees, its own included; 0: all
  float scale;
};

// Of each softmax its largest score, before the scale, and the sum of 2^(scale log2(e) (score - largest)): two numbers,
// for one log-sum-exp of 10^4 would be rounded to 10^-3.
struct SoftmaxStats {
  float* peak;  // [num_heads, num_tokens]
  float* sum;  // likewise
};

struct PackedGradients {
  Strided out, grad;  // the result, and the gradient of it
  Strided q, k, v;  // what is written; like all that is written, dense in the last axis
};

void check_packed_attention(const PackedInput& input);

// Calls work() once on each of some threads.
using OnAllThreads = std::function<void(const std::function<void()>& work)>;

// No bit of the results depends on the threads.
void packed_attention(const PackedInput& input, Strided out, SoftmaxStats stats, const OnAllThreads& on_all_threads);
void packed_attention_backward(
    const PackedInput& input, SoftmaxStats stats, const PackedGradients& gradients, const OnAllThreads& on_all_threads);

}  // namespace nrt_fast
