// No fused multiply-adds: vector bodies, scalar tails, both layouts of the weights and all processors round alike.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "adamw.h"

#include "vector_clones.h"

namespace nrt_fast {
namespace {

// Moves the moments and returns the new master; `decay` is 1 where nothing decays.
ALWAYS_INLINE float step(
    float master, float grad, float& first, float& second, const AdamwFactors& factors, float decay) {
  grad *= factors.grad_scale;
  first = first + factors.take1 * (grad - first);
  second = factors.keep2 * second + factors.take2 * grad * grad;
  return master * decay - factors.rate * first / (__builtin_sqrtf(second * factors.inv_bias2) + factors.eps);
}

VECTOR_CLONES
void update_whole(
    float* __restrict weight, float* __restrict grad, float* __restrict first, float* __restrict second,
    AdamwFactors factors, float decay, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    weight[i] = step(weight[i], grad[i], first[i], second[i], factors, decay);
    grad[i] = 0.0f;
  }
}

VECTOR_CLONES
void update_halves(
    uint16_t* __restrict high, int16_t* __restrict low, float* __restrict grad, float* __restrict first,
    float* __restrict second, AdamwFactors factors, float decay, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    uint32_t bits = (uint32_t(high[i]) << 16) + uint32_t(int32_t(low[i]));
    float master;
    __builtin_memcpy(&master, &bits, sizeof(bits));
    master = step(master, grad[i], first[i], second[i], factors, decay);
    __builtin_memcpy(&bits, &master, sizeof(bits));
    high[i] = uint16_t((bits + 0x8000) >> 16);
    low[i] = int16_t(bits - (uint32_t(high[i]) << 16));
    grad[i] = 0.0f;
  }
}

void update(
    const AdamwTensors& tensors, const AdamwFactors& factors, float decay, int64_t begin, int64_t end) {
  float* const grad = tensors.grad + begin;
  float* const first = tensors.first + begin;
  float* const second = tensors.second + begin;
  if (tensors.weight) {
    update_whole(tensors.weight + begin, grad, first, second, factors, decay, end - begin);
  } else {
    update_halves(tensors.high + begin, tensors.low + begin, grad, first, second, factors, decay, end - begin);
  }
}

}  // namespace

void adamw(const AdamwTensors& tensors, const AdamwFactors& factors, int64_t begin, int64_t end) {
  if (factors.grad_scale != factors.grad_scale) {
    __builtin_memset(tensors.grad + begin, 0, (end - begin) * sizeof(float));
    return;
  }
  const int64_t middle = factors.num_decayed < begin ? begin : factors.num_decayed > end ? end : factors.num_decayed;
  update(tensors, factors, factors.decay, begin, middle);
  update(tensors, factors, 1.0f, middle, end);
}

VECTOR_CLONES
double squared_norm(const float* x, int64_t size) {
  constexpr int64_t LANES = 32;
  typedef float Floats __attribute__((vector_size(4 * LANES)));
  typedef double Doubles __attribute__((vector_size(8 * LANES)));
  Doubles sums{};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    Floats values;
    __builtin_memcpy(&values, x + i, sizeof(values));
    const Doubles wide = __builtin_convertvector(values, Doubles);
    sums += wide * wide;
  }
  double sum = 0.0;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    sum += sums[lane];
  }
  for (; i < size; ++i) {
    sum += double(x[i]) * double(x[i]);
  }
  return sum;
}

}  // namespace nrt_fast
