// Tests of the torch-free core against double precision; exits with the number of failures.
#include "../layers.h"

#include <algorithm>
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

// Two blocks of rows and a bit; x, its gradient from elsewhere and the norm's are rows of something wider.
template <typename T>
void test_norm_backward(int64_t D) {
  const int64_t num_rows = 2 * kNormBlock + 3, num_blocks = 3, stride = 3 * D + 1;
  const std::vector<T> wide = randoms<T>(num_rows * stride, 6), weight = randoms<T>(D, 7);
  const auto rows = [&](int64_t third) { return RowView<T>{wide.data() + third * D, 1, stride, 0}; };
  const double eps = 1e-5;
  for (const bool has_more : {false, true}) {
    std::vector<T> grad_x(num_rows * D), grad_weight(D);
    std::vector<float> partials(num_blocks * D, std::numeric_limits<float>::quiet_NaN());
    const NormBackward<T> arguments{
        rows(0), weight.data(), rows(1), has_more ? rows(2) : RowView<T>{}, num_rows, D, 1e-5f, grad_x.data(),
        partials.data()};
    rms_norm_backward(arguments, 1, num_blocks);
    rms_norm_backward(arguments, 0, 1);
    sum_norm_blocks(partials.data(), num_blocks, D, grad_weight.data());
    std::vector<double> exact_weight(D);
    bool good = true;
    for (int64_t i = 0; i < num_rows; ++i) {
      const T *x = rows(0).row(i), *grad = rows(1).row(i), *more = rows(2).row(i);
      double squares = 0.0, dot = 0.0;
      for (int64_t d = 0; d < D; ++d) {
        squares += static_cast<double>(value_of(x[d])) * value_of(x[d]);
      }
      const double rstd = 1.0 / std::sqrt(squares / static_cast<double>(D) + eps);
      for (int64_t d = 0; d < D; ++d) {
        dot += static_cast<double>(value_of(grad[d])) * value_of(weight[d]) * value_of(x[d]) * rstd;
        exact_weight[d] += value_of(grad[d]) * value_of(x[d]) * rstd;
      }
      for (int64_t d = 0; d < D; ++d) {
        const double scaled = static_cast<double>(value_of(grad[d])) * value_of(weight[d]);
        const double exact = rstd * (scaled - value_of(x[d]) * rstd * dot / static_cast<double>(D));
        const double scale = std::max(1.0, rstd * std::abs(scaled));  // of what cancels
        const double whole = exact + (has_more ? value_of(more[d]) : 0.0f);
        const double error = std::abs(value_of(grad_x[i * D + d]) - whole);
        good = good && error <= 2 * kError<T> * std::max(scale, std::abs(whole));
      }
    }
    expect(good, "the gradient of what was normed");
    good = true;
    for (int64_t d = 0; d < D; ++d) {
      good = good && std::abs(value_of(grad_weight[d]) - exact_weight[d]) <= 20 * kError<T>;
    }
    expect(good, "the gradient of the weight");
  }
  std::vector<T> none(D, T(7));
  sum_norm_blocks(nullptr, 0, D, none.data());
  expect(std::all_of(none.begin(), none.end(), [](T x) { return x == T(0); }), "no rows, no gradient");
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
  const std::vector<T> grad = randoms<T>(F, 8);
  std::vector<T> grads(num_rows * 2 * F);
  swiglu_backward(
      RowView<T>{gate_up.data(), 2, 2 * F, F}, RowView<T>{grad.data(), 1, 0, 0}, F, 0, num_rows, grads.data());
  good = true;
  for (int64_t i = 0; i < num_rows * F; ++i) {
    const int64_t place = i / F * 2 * F + i % F;
    const double gate = value_of(gate_up[place]), up = value_of(gate_up[place + F]), dy = value_of(grad[i % F]);
    const double sigmoid = 1.0 / (1.0 + std::exp(-gate));
    good = good && close(value_of(grads[place]), dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), 4 * kError<T>) &&
        close(value_of(grads[place + F]), dy * gate * sigmoid, kError<T>);
  }
  expect(good, "both gradients of swiglu, for one row of upstream gradients");
}

// Inside one projection [3 + 2 heads] a token: turned, then back.
template <typename T>
void test_rotate(int64_t F) {
  constexpr int64_t kTokens = 3, kHeads = 3, kKeyHeads = 2;
  const int64_t E = 2 * F, stride = (kHeads + kKeyHeads) * E;
  const std::vector<T> qk = randoms<T>(kTokens * stride, 9);
  std::vector<T> cos = randoms<T>(kTokens * F, 10), sin(kTokens * F);
  for (int64_t i = 0; i < kTokens * F; ++i) {
    const float angle = 3.0f * value_of(cos[i]);
    cos[i] = rounded<T>(std::cos(angle));
    sin[i] = rounded<T>(std::sin(angle));
  }
  const HeadView<const T> q{qk.data(), kHeads, stride, E}, k{qk.data() + kHeads * E, kKeyHeads, stride, E};
  std::vector<T> turned(kTokens * stride), back(kTokens * stride);
  const auto heads = [&](std::vector<T>& values, int64_t first, int64_t num_heads) {
    return HeadView<T>{values.data() + first * E, num_heads, stride, E};
  };
  const auto const_heads = [](const HeadView<T>& x) {
    return HeadView<const T>{x.data, x.num_heads, x.token_stride, x.head_stride};
  };
  const HeadView<T> turned_q = heads(turned, 0, kHeads), turned_k = heads(turned, kHeads, kKeyHeads);
  rotate(Rotate<T>{q, k, cos.data(), sin.data(), F, turned_q, turned_k}, 0, kTokens);
  const Rotate<T> backward{
      const_heads(turned_q), const_heads(turned_k), cos.data(), sin.data(), F, heads(back, 0, kHeads),
      heads(back, kHeads, kKeyHeads)};
  rotate_backward(backward, 1, kTokens);
  rotate_backward(backward, 0, 1);
  bool good = true;
  for (int64_t i = 0; i < kTokens * stride; ++i) {
    const int64_t t = i / stride, e = i % E, f = e % F, first = i - e + f;
    const double a = value_of(qk[first]), b = value_of(qk[first + F]);
    const double c = value_of(cos[t * F + f]), s = value_of(sin[t * F + f]);
    good = good && close(value_of(turned[i]), e < F ? a * c - b * s : b * c + a * s, 2 * kError<T>) &&
        close(value_of(back[i]), value_of(qk[i]), 4 * kError<T>);
  }
  expect(good, "rotated, and back");
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
  test_norm_backward<T>(size);
  test_swiglu<T>(size);
  test_rotate<T>(size);
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
