// Tests of the torch-free sampler; exits with the number of failures.
#include "../sample.h"

#include <cmath>
#include <limits>
#include <vector>

#include "expect.h"

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr double JUST_UNDER_1 = 1.0 - 0x1p-53;

struct Draw {
  int64_t id;
  float logprob;
};

Draw draw(const std::vector<float>& logits, double uniform, double temperature, const float* floor = nullptr) {
  Draw result{-1, 0.0f};
  const nrt_fast::SampleInput input{
      logits.data(), static_cast<int64_t>(logits.size()), &uniform, floor, temperature};
  nrt_fast::sample_logprob(input, 0, 1, &result.id, &result.logprob);
  return result;
}

void test_draws() {
  for (const int64_t size : {1, 15, 16, 17, 511, 512, 513, 1300}) {
    const std::vector<float> flat(size, -3.0f);
    expect(draw(flat, 0.0, 1.0).id == 0, "the first id");
    expect(draw(flat, (size / 2 + 0.5) / size, 0.7).id == size / 2, "the id in the middle");
    expect(draw(flat, JUST_UNDER_1, 1.0).id == size - 1, "the last id");
    expect(std::fabs(draw(flat, 0.3, 1.0).logprob + std::log(double(size))) < 1e-6, "its log-probability");
    std::vector<float> peaked(size, -INFINITE);
    peaked[size / 3] = 1e4f;
    for (const double uniform : {0.0, 0.5, JUST_UNDER_1}) {
      expect(draw(peaked, uniform, 1.0).id == size / 3, "the only possible id");
    }
  }
}

void test_greedy() {
  std::vector<float> logits(1300, 1.0f);
  logits[700] = logits[1200] = 2.0f;
  expect(draw(logits, 0.9, 0.0).id == 700, "the lowest of the likeliest ids");
}

void test_floor() {
  std::vector<float> logits(1300, 0.0f);
  logits[5] = logits[900] = 1.0f;
  const float floor = 0.5f;
  expect(draw(logits, 0.49, 1.0, &floor).id == 5, "the first id above the floor");
  expect(draw(logits, 0.51, 1.0, &floor).id == 900, "the last id above the floor");
  const float above = 3.0f;
  expect(draw(logits, 0.51, 1.0, &above).id == 0, "no id above the floor");
}

void test_rows_without_a_distribution() {
  for (const float value : {std::nanf(""), INFINITE}) {
    std::vector<float> logits(1300, 0.0f);
    logits[600] = value;
    for (const double temperature : {0.0, 1.0}) {
      const Draw result = draw(logits, 0.9, temperature);
      expect(result.id == 0 && std::isnan(result.logprob), "NaN or infinity in the row");
    }
  }
  const Draw result = draw(std::vector<float>(20, -INFINITE), 0.9, 1.0);
  expect(result.id == 0 && std::isnan(result.logprob), "nothing in the row");
}

}  // namespace

int main() {
  test_draws();
  test_greedy();
  test_floor();
  test_rows_without_a_distribution();
  return failures();
}
