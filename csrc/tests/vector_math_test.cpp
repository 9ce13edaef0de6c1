// Tests of the elementary functions against double precision; exits with the number of failures.
#include "../vector_math.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "expect.h"

namespace {

using namespace nrt_fast;

constexpr float INFINITE = std::numeric_limits<float>::infinity();

VECTOR_CLONES void exp_all(const float* x, int64_t size, float* result) {
  for (int64_t i = 0; i < size; ++i) {
    result[i] = exp_of(x[i]);
  }
}

std::vector<float> exps(const std::vector<float>& x) {
  std::vector<float> result(x.size());
  exp_all(x.data(), static_cast<int64_t>(x.size()), result.data());
  return result;
}

void test_accuracy() {
  std::vector<float> x;
  for (int i = -86900; i <= 88722; ++i) {
    x.push_back(static_cast<float>(i) * 0.001f);
  }
  x.push_back(88.72283f);
  const std::vector<float> ours = exps(x);
  double worst = 0.0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp(static_cast<double>(x[i]));
    worst = std::max(worst, std::abs(ours[i] - exact) / std::ldexp(1.0, std::ilogb(exact) - 23));
  }
  expect(worst < 1.2, "exp to 1.2 ulp from the smallest to the largest result");
}

void test_ends() {
  const std::vector<float> low = exps(std::vector<float>{-INFINITE, -1e30f, -200.0f, -104.0f, -87.5f});
  expect(low == std::vector<float>(5, 0.0f), "exp of -inf and of what is too low is 0");
  const std::vector<float> high = exps(std::vector<float>{88.73f, 89.0f, 200.0f, 1e30f, INFINITE});
  expect(high == std::vector<float>(5, INFINITE), "exp of inf and of what is too high is inf");
  expect(exps({0.0f, -0.0f, 1e-30f}) == std::vector<float>(3, 1.0f), "exp of 0 is 1");
}

void test_nan() {
  std::vector<float> x;
  for (const uint32_t payload : {0x7fc00000u, 0x7fc00001u, 0x7fffffffu, 0xffffffffu, 0xffc000ffu}) {
    x.insert(x.end(), 8, float_of(payload));
  }
  const std::vector<float> ours = exps(x);
  expect(std::all_of(ours.begin(), ours.end(), [](float y) { return y != y; }), "any NaN stays NaN");
}

void test_bf16() {
  expect(to_bf16(1.0f) == 0x3f80 && from_bf16(0x3f80) == 1.0f, "1 is exact");
  expect(to_bf16(float_of(0x3f808000)) == 0x3f80 && to_bf16(float_of(0x3f818000)) == 0x3f82, "ties go to even");
  expect(to_bf16(INFINITE) == 0x7f80 && to_bf16(float_of(0xffffffff)) == 0x7fc0, "inf and NaN stay");
}

}  // namespace

int main() {
  test_accuracy();
  test_ends();
  test_nan();
  test_bf16();
  return failures();
}
