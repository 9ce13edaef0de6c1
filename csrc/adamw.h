// AdamW on one flat tensor and the norm of its gradient, free of torch: raw pointers and sizes, CPU memory.
// Results are the same bits for any division of the work into tasks and on any x86-64.
#pragma once

#include <cstdint>

namespace nrt_fast {

struct AdamwTensors {
  float* weight;      // [n], or null where the master is kept in two halves:
  uint16_t* high;     // [n] bits of the bf16 weight, the fp32 master's nearest (ties away from zero), or null
  int16_t* low;       // [n] bits of the master minus those of the weight, or null
  float* grad;        // [n], 0 afterwards
  float* first;       // [n]
  float* second;      // [n]
};

// What does not depend on the element:
//   first  += take1 (g - first),  second = keep2 second + take2 g g,  with g = grad_scale grad
//   master  = decay master - rate first / (sqrt(inv_bias2 second) + eps);  decay only before num_decayed
struct AdamwFactors {
  float rate, decay, eps, take1, keep2, take2, inv_bias2, grad_scale;
  int64_t num_decayed;
};

// Updates the elements from `begin` to `end`; where grad_scale is NaN, it only clears their gradient.
void adamw(const AdamwTensors& tensors, const AdamwFactors& factors, int64_t begin, int64_t end);

// The sum of squares of `size` numbers, in fp64.
double squared_norm(const float* x, int64_t size);

}  // namespace nrt_fast
