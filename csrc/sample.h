// Sampling of one id per row of logits, free of torch: raw pointers and sizes, CPU memory.
#pragma once

#include <cstdint>

namespace nrt_fast {

struct SampleInput {
  const float* logits;  // [N, num_ids]
  int64_t num_ids;
  const double* uniform;  // [N] in [0, 1)
  const float* floor;     // [N], or null: ids with a lower logit are not drawn
  double temperature;     // 0: the likeliest id
};

// Inverts the cumulative distribution of softmax(logits / temperature), cut off under the floor, for the rows from
// `begin` to `end`; the log-probability is that of the distribution that is not cut off. An id without probability is
// never drawn. A row with a NaN or +inf, or of -inf alone, gets id 0 and NaN; one wholly under its floor gets id 0.
// Needs no memory that grows with num_ids but 12 bytes for each 512 of them.
//   ids      [N], written
//   logprob  [N], written
void sample_logprob(const SampleInput& input, int64_t begin, int64_t end, int64_t* ids, float* logprob);

}  // namespace nrt_fast
