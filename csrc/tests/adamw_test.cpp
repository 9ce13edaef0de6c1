// Tests of the torch-free AdamW; exits with the number of failures.
#include "../adamw.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "expect.h"

namespace {

struct State {
  std::vector<float> weight, grad, first, second;
  std::vector<uint16_t> high;
  std::vector<int16_t> low;

  explicit State(int64_t size) : weight(size), grad(size), first(size), second(size), high(size), low(size) {
    for (int64_t i = 0; i < size; ++i) {
      weight[i] = std::sin(float(i)) * std::pow(10.0f, float(i % 7) - 3);
      grad[i] = std::cos(float(i));
      first[i] = 0.1f * std::sin(3 * float(i));
      second[i] = 0.01f * float(i % 5);
      uint32_t bits;
      std::memcpy(&bits, &weight[i], 4);
      high[i] = uint16_t((bits + 0x8000) >> 16);
      low[i] = int16_t(bits - (uint32_t(high[i]) << 16));
    }
  }

  void update(float grad_scale, int64_t num_decayed, bool halves, int64_t begin, int64_t end) {
    const nrt_fast::AdamwTensors tensors{
        halves ? nullptr : weight.data(), high.data(), low.data(), grad.data(), first.data(), second.data()};
    nrt_fast::adamw(tensors, {0.01f, 0.99f, 1e-8f, 0.1f, 0.95f, 0.05f, 1.5f, grad_scale, num_decayed}, begin, end);
  }

  float master(int64_t i) const {
    const uint32_t bits = (uint32_t(high[i]) << 16) + uint32_t(int32_t(low[i]));
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

void test_update() {
  for (const int64_t size : {1, 7, 64, 201}) {
    const State before(size);
    State whole(size), halves(size), pieces(size);
    whole.update(0.5f, size / 2, false, 0, size);
    halves.update(0.5f, size / 2, true, 0, size);
    pieces.update(0.5f, size / 2, false, 0, size / 3);
    pieces.update(0.5f, size / 2, false, size / 3, size);
    for (int64_t i = 0; i < size; ++i) {
      const double grad = 0.5 * before.grad[i];
      const double first = 0.9 * before.first[i] + 0.1 * grad;
      const double second = 0.95 * before.second[i] + 0.05 * grad * grad;
      const double decay = i < size / 2 ? 0.99 : 1.0;
      const double weight = decay * before.weight[i] - 0.01 * first / (std::sqrt(1.5 * second) + 1e-8);
      expect(std::fabs(whole.weight[i] - weight) <= 2e-7 * std::fabs(weight) + 1e-8, "the weight by the formula");
      expect(whole.grad[i] == 0.0f, "the gradient is cleared");
      expect(halves.master(i) == whole.weight[i], "two halves make the same master");
      expect(pieces.weight[i] == whole.weight[i], "pieces make the whole");
    }
  }
}

void test_nan_scale() {
  const State before(50);
  State state(50);
  state.update(std::numeric_limits<float>::quiet_NaN(), 20, false, 0, 50);
  expect(state.weight == before.weight && state.first == before.first && state.second == before.second, "no change");
  expect(state.grad == std::vector<float>(50), "the gradient is cleared without a step");
}

void test_norm() {
  expect(nrt_fast::squared_norm(nullptr, 0) == 0.0, "the norm of nothing");
  for (const int64_t size : {1, 15, 16, 33, 1000}) {
    expect(nrt_fast::squared_norm(std::vector<float>(size, 1e20f).data(), size) >= 0.999e40 * size, "no overflow");
  }
}

}  // namespace

int main() {
  test_update();
  test_nan_scale();
  test_norm();
  return failures();
}
