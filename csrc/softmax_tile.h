// Row-local arithmetic on one tile of transposed logits, [vocabulary rows, kPanel tokens]: a token is a lane, so that
// nothing is summed across a vector. x stands for inv_temperature logit. Arrays without a size have kPanel elements.
#pragma once

#include <cstdint>

namespace nrt_fast {

// What is known of softmax(x) of a token from some of its logits.
struct OnlineSoftmax {
  float* peak;   // max x
  float* total;  // sum exp(x - peak)
  float* moment;  // sum (x - peak) exp(x - peak)
};

// Of one tile. Logits of -inf count as probability 0; NaN, and inf, make total NaN.
void reduce_tile(const float* tile, int64_t num_rows, const float* inv_temperature, const OnlineSoftmax& result);

// Of num_tiles tiles, whose results lie stride elements apart, in their order.
void merge_tiles(const OnlineSoftmax& tiles, int64_t stride, int64_t num_tiles, const OnlineSoftmax& result);

// How the loss depends on the logits of a token, per lane.
struct LossSlope {
  const float* inv_temperature;
  const float* peak;
  const float* logsum;      // log sum exp(x - peak)
  const float* entropy;     // of softmax(x)
  const float* by_logprob;  // d loss / d logprob; where this and by_entropy are 0, so is the gradient, come what may
  const float* by_entropy;
};

// d loss / d logit of the tile, apart from the target's own term, by_logprob inv_temperature.
void gradient_tile(const float* tile, int64_t num_rows, const LossSlope& slope, float* gradient);

// A block of kPanel x kPanel gradients in the operands' dtype, rounded once, and its transpose.
void round_block(const float* block, float* rows, int64_t ld_rows, float* columns, int64_t ld_columns);
void round_block(const float* block, uint16_t* rows, int64_t ld_rows, uint16_t* columns, int64_t ld_columns);

// The nearest value of the dtype, ties to even.
void round_to(const float* source, int64_t size, float* result);
void round_to(const float* source, int64_t size, uint16_t* result);

}  // namespace nrt_fast
