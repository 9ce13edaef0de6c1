#include "softmax_tile.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "panel_gemm.h"
#include "transpose.h"
#include "vector_math.h"

namespace nrt_fast {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = -200.0f;  // exp of it is 0, and it times 0 is 0, unlike -inf times 0

// Kahan's sum, per lane: many small terms beside one near 1 would all be rounded the same way.
struct Compensated {
  float sum[kPanel] = {};
  float excess[kPanel] = {};

  ALWAYS_INLINE void add(const float* terms) {
    for (int64_t n = 0; n < kPanel; ++n) {
      const float term = terms[n] - excess[n];
      const float next = sum[n] + term;
      excess[n] = (next - sum[n]) - term;
      sum[n] = next;
    }
  }
};

// Transposes [num_rows, kPanel] words into [kPanel, num_rows], rows ld words apart, four by four.
ALWAYS_INLINE void transpose(const void* source, int64_t num_rows, void* result, int64_t ld) {
  constexpr int64_t kWord = sizeof(uint32_t);
  for (int64_t n = 0; n < kPanel; n += kTransposed) {
    for (int64_t v = 0; v < num_rows; v += kTransposed) {
      transpose_block(
          static_cast<const char*>(source) + (v * kPanel + n) * kWord, kPanel * kWord,
          static_cast<char*>(result) + (n * ld + v) * kWord, ld * kWord);
    }
  }
}

}  // namespace

VECTOR_CLONES void reduce_tile(
    const float* tile, int64_t num_rows, const float* inv_temperature, const OnlineSoftmax& result) {
  constexpr int64_t kBlock = 8;  // rows added up plainly
  float scale[kPanel], peak[kPanel], total[kPanel], moment[kPanel];
  Compensated total_sum, moment_sum;
  for (int64_t n = 0; n < kPanel; ++n) {
    scale[n] = inv_temperature[n];
    peak[n] = -kInfinity;
  }
  for (int64_t v = 0; v < num_rows; ++v) {
    for (int64_t n = 0; n < kPanel; ++n) {
      const float x = tile[v * kPanel + n] * scale[n];
      peak[n] = peak[n] < x ? x : peak[n];
    }
  }
  for (int64_t n = 0; n < kPanel; ++n) {
    result.peak[n] = peak[n];
    peak[n] = finite_peak(peak[n]);
  }
  for (int64_t block = 0; block < num_rows; block += kBlock) {
    std::fill_n(total, kPanel, 0.0f);
    std::fill_n(moment, kPanel, 0.0f);
    for (int64_t v = block; v < std::min(num_rows, block + kBlock); ++v) {
      for (int64_t n = 0; n < kPanel; ++n) {
        const float x = tile[v * kPanel + n] * scale[n] - peak[n];
        const float p = exp_of(x);
        total[n] += p;
        moment[n] += at_least(x, kLowest) * p;
      }
    }
    total_sum.add(total);
    moment_sum.add(moment);
  }
  std::copy_n(total_sum.sum, kPanel, result.total);
  std::copy_n(moment_sum.sum, kPanel, result.moment);
}

VECTOR_CLONES void merge_tiles(
    const OnlineSoftmax& tiles, int64_t stride, int64_t num_tiles, const OnlineSoftmax& result) {
  float peak[kPanel], total[kPanel], moment[kPanel];
  Compensated total_sum, moment_sum;
  std::fill_n(peak, kPanel, -kInfinity);
  for (int64_t t = 0; t < num_tiles; ++t) {
    for (int64_t n = 0; n < kPanel; ++n) {
      peak[n] = std::max(peak[n], tiles.peak[t * stride + n]);
    }
  }
  for (int64_t t = 0; t < num_tiles; ++t) {
    for (int64_t n = 0; n < kPanel; ++n) {
      const float ahead = tiles.peak[t * stride + n] - finite_peak(peak[n]);
      const float weight = exp_of(ahead);
      const float part = tiles.total[t * stride + n];
      total[n] = weight * part;
      moment[n] = weight * (tiles.moment[t * stride + n] + at_least(ahead, kLowest) * part);
    }
    total_sum.add(total);
    moment_sum.add(moment);
  }
  std::copy_n(peak, kPanel, result.peak);
  std::copy_n(total_sum.sum, kPanel, result.total);
  std::copy_n(moment_sum.sum, kPanel, result.moment);
}

VECTOR_CLONES void gradient_tile(const float* tile, int64_t num_rows, const LossSlope& slope, float* gradient) {
  float scale[kPanel], peak[kPanel], logsum[kPanel], entropy[kPanel], by_logprob[kPanel], by_entropy[kPanel];
  for (int64_t n = 0; n < kPanel; ++n) {
    scale[n] = slope.inv_temperature[n];
    peak[n] = slope.peak[n];
    logsum[n] = slope.logsum[n];
    entropy[n] = slope.entropy[n];
    by_logprob[n] = slope.by_logprob[n];
    by_entropy[n] = slope.by_entropy[n];
  }
  for (int64_t v = 0; v < num_rows; ++v) {
    for (int64_t n = 0; n < kPanel; ++n) {
      const float log_p = (tile[v * kPanel + n] * scale[n] - peak[n]) - logsum[n];
      const float by_x = by_logprob[n] + by_entropy[n] * (at_least(log_p, kLowest) + entropy[n]);
      const float g = -scale[n] * (exp_of(log_p) * by_x);
      gradient[v * kPanel + n] = by_logprob[n] == 0.0f && by_entropy[n] == 0.0f ? 0.0f : g;
    }
  }
}

VECTOR_CLONES void round_block(
    const float* block, float* rows, int64_t ld_rows, float* columns, int64_t ld_columns) {
  for (int64_t v = 0; v < kPanel; ++v) {
    std::copy_n(block + v * kPanel, kPanel, rows + v * ld_rows);
  }
  transpose(block, kPanel, columns, ld_columns);
}

// The transpose moves pairs, a 32-bit word each.
VECTOR_CLONES void round_block(
    const float* block, uint16_t* rows, int64_t ld_rows, uint16_t* columns, int64_t ld_columns) {
  uint32_t pairs[kPanel / 2 * kPanel];
  for (int64_t v = 0; v < kPanel; v += 2) {
    for (int64_t n = 0; n < kPanel; ++n) {
      const uint16_t even = to_bf16(block[v * kPanel + n]), odd = to_bf16(block[(v + 1) * kPanel + n]);
      rows[v * ld_rows + n] = even;
      rows[(v + 1) * ld_rows + n] = odd;
      pairs[v / 2 * kPanel + n] = even | uint32_t{odd} << 16;
    }
  }
  transpose(pairs, kPanel / 2, columns, ld_columns / 2);
}

void round_to(const float* source, int64_t size, float* result) {
  std::copy_n(source, size, result);
}

VECTOR_CLONES void round_to(const float* source, int64_t size, uint16_t* result) {
  for (int64_t i = 0; i < size; ++i) {
    result[i] = to_bf16(source[i]);
  }
}

}  // namespace nrt_fast
