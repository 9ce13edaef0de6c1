// Tests of the torch-free core against double precision; exits with the number of failures.
#include "../layers.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "../vector_math.h"
#include "expect.h"

namespace {

using namespace nrt_fast;

float value_of(float x) { return x; }
float value_of(uint16_t x) { return from_bf16(x); }

template <typename T>
T rounded(float x);
template <>
float rounded<float>(float x) { return x; }
template <>
uint16_t rounded<uint16_t>(float x) { return to_bf16(x); }

template <typename T>
constexpr double kError = sizeof(T) == 2 ? 1.6e-2 : 2e-6;  // of bf16: two or three roundings of 2^-9

template <typename T>
std::vector<T> randoms(int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(size);
  for (T& value : values) {
    value = rounded<T>(normal(random));
  }
  return values;
}

bool close(float ours, double exact, double error) {
  return std::abs(ours - exact) <= error * std::max(1.0, std::abs(exact));
}

template <typename T>
bool is_norm(const T* ours, const T* x, const T* weight, int64_t D) {
  double squares = 0.0;
  for (int64_t d = 0; d < D; ++d) {
    squares += static_cast<double>(value_of(x[d])) * value_of(x[d]);
  }
  bool good = true;
  for (int64_t d = 0; d < D; ++d) {
    const double normed = value_of(x[d]) / std::sqrt(squares / static_cast<double>(D) + 1e-5);
    good = good && close(value_of(ours[d]), normed * value_of(weight[d]), kError<T>);
  }
  return good;
}

// Heads inside a fused projection: two axes of rows, neither dense.
template <typename T>
void test_norms(int64_t D) {
  const int64_t num_tokens = 3, num_heads = 2, stride = 5 * D + 1;
  const std::vector<T> x = randoms<T>(num_tokens * stride, 1), weight = randoms<T>(D, 2);
  std::vector<T> result(num_tokens * num_heads * D), sum(num_tokens * D), normed_sum(num_tokens * D);
  const RowView<T> view{x.data() + D, num_heads, stride, D};
  rms_norm(view, weight.data(), D, 1e-5f, 0, 4, result.data());
  rms_norm(view, weight.data(), D, 1e-5f, 4, num_tokens * num_heads, result.data());
  for (int64_t i = 0; i < num_tokens * num_heads; ++i) {
    const T* row = x.data() + D + i / num_heads * stride + i % num_heads * D;
    expect(is_norm(result.data() + i * D, row, weight.data(), D), "rms_norm of rows of a wider tensor");
  }
  add_rms_norm(
      RowView<T>{x.data(), 1, stride, 0}, RowView<T>{x.data() + D, 1, stride, 0}, weight.data(), D, 1e-5f, 0,
      num_tokens, normed_sum.data(), sum.data());
  for (int64_t i = 0; i < num_tokens; ++i) {
    const T* row = x.data() + i * stride;
    bool added = true;
    for (int64_t d = 0; d < D; ++d) {
      added = added && sum[i * D + d] == rounded<T>(value_of(row[d]) + value_of(row[D + d]));
    }
    expect(added, "the sum is rounded once");
    expect(is_norm(normed_sum.data() + i * D, sum.data() + i * D, weight.data(), D), "and its norm is that of it");
  }
}

template <typename T>
void test_swiglu(int64_t F) {
  const int64_t num_rows = 3;
  std::vector<T> gate_up = randoms<T>(num_rows * 2 * F, 3), result(num_rows * F);
  gate_up[0] = rounded<T>(-200.0f);
  gate_up[F - 1] = rounded<T>(200.0f);
  swiglu(RowView<T>{gate_up.data(), 2, 2 * F, F}, F, 0, num_rows, result.data());
  bool good = true;
  for (int64_t i = 0; i < num_rows * F; ++i) {
    const T* pair = gate_up.data() + i / F * 2 * F + i % F;
    const double gate = value_of(pair[0]);
    good = good && close(value_of(result[i]), gate / (1.0 + std::exp(-gate)) * value_of(pair[F]), kError<T>);
  }
  expect(good, "swiglu, far from 0 too");
}

// One projection [H + 2 K heads] a token; the cache is one layer of two.
template <typename T>
void test_rotate_write(int64_t F) {
  constexpr int64_t kTokens = 3, kHeads = 3, kKeyHeads = 2, kPages = 2, kSlots = 4;
  const int64_t E = 2 * F, stride = (kHeads + 2 * kKeyHeads) * E, page_size = kKeyHeads * kSlots * E;
  const std::vector<T> qkv = randoms<T>(kTokens * stride, 4), angles = randoms<T>(2 * kTokens * F, 5);
  std::vector<T> k_cache(2 * kPages * page_size, T(7)), v_cache = k_cache, result(kTokens * kHeads * E);
  const int64_t page[kTokens] = {1, 0, 1}, slot[kTokens] = {3, 0, 0};
  const auto pages = [&](std::vector<T>& cache) {
    return PageView<T>{cache.data() + page_size, 2 * page_size, kSlots * E, E};
  };
  const T *k = qkv.data() + kHeads * E, *v = k + kKeyHeads * E, *cos = angles.data(), *sin = cos + kTokens * F;
  const RotateWrite<T> arguments{
      {qkv.data(), kHeads, stride, E}, {k, kKeyHeads, stride, E}, {v, kKeyHeads, stride, E}, cos, sin, F,
      pages(k_cache), pages(v_cache), page, slot, {result.data(), kHeads, kHeads * E, E}};
  rotate_write(arguments, 1, kTokens);
  rotate_write(arguments, 0, 1);
  const auto is_rotated = [&](const T* ours, const T* x, int64_t token) {
    bool good = true;
    for (int64_t f = 0; f < F; ++f) {
      const double a = value_of(x[f]), b = value_of(x[F + f]);
      const double c = value_of(cos[token * F + f]), s = value_of(sin[token * F + f]);
      good = good && close(value_of(ours[f]), a * c - b * s, 4 * kError<T>) &&
          close(value_of(ours[F + f]), b * c + a * s, 4 * kError<T>);
    }
    return good;
  };
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t h = 0; h < kHeads; ++h) {
      expect(is_rotated(result.data() + (t * kHeads + h) * E, qkv.data() + t * stride + h * E, t), "queries");
    }
    for (int64_t h = 0; h < kKeyHeads; ++h) {
      const int64_t place = (2 * page[t] + 1) * page_size + (h * kSlots + slot[t]) * E;
      expect(is_rotated(k_cache.data() + place, k + t * stride + h * E, t), "keys in their slot");
      expect(std::equal(v + t * stride + h * E, v + t * stride + (h + 1) * E, v_cache.data() + place), "values");
    }
  }
  int64_t untouched = 0;
  for (const T x : v_cache) {
    untouched += x == T(7);
  }
  expect(untouched == static_cast<int64_t>(v_cache.size()) - kTokens * kKeyHeads * E, "nothing else is written");
}

template <typename T>
void test(int64_t size) {
  test_norms<T>(size);
  test_swiglu<T>(size);
  test_rotate_write<T>(size);
}

void test_missing_numbers_stay_missing() {
  const float nan = std::numeric_limits<float>::quiet_NaN(), x[2] = {nan, 1.0f}, weight[2] = {1.0f, 1.0f};
  float result[2];
  rms_norm(RowView<float>{x, 1, 2, 0}, weight, 2, 1e-5f, 0, 1, result);
  expect(std::isnan(result[0]) && std::isnan(result[1]), "a row with NaN has no norm");
  swiglu(RowView<float>{x, 2, 2, 1}, 1, 0, 1, result);
  expect(std::isnan(result[0]), "NaN stays NaN");
}

}  // namespace

int main() {
  for (const int64_t size : {1, 3, 40, 64, 130}) {
    test<float>(size);
    test<uint16_t>(size);
  }
  test_missing_numbers_stay_missing();
  return failures();
}
