// Tests of the torch-free core with the portable product, against double precision; exits with the number of failures.
#include "../panel_linear.h"

#include <cmath>
#include <cstring>
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
std::vector<T> randoms(int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(size);
  for (T& value : values) {
    value = rounded<T>(normal(random));
  }
  return values;
}

// Two weights, rows of the first one element further apart than they are long, in memory of exactly their size.
template <typename T>
struct Problem {
  int64_t M, first_N, N, K, depth = round_up(K, kGroup<T>);
  std::vector<T> x, first, second, bias, panels;

  Problem(int64_t M, int64_t first_N, int64_t second_N, int64_t K)
      : M(M), first_N(first_N), N(first_N + second_N), K(K), x(randoms<T>(M * depth, 1)),
        first(randoms<T>(first_N * (K + 1) - 1, 2)), second(randoms<T>(second_N * K, 3)), bias(randoms<T>(N, 4)),
        panels(ceil_div(N, kPanel) * depth * kPanel, T(77)) {
    for (int64_t m = 0; depth != K && m < M; ++m) {
      x[m * depth + K] = T(0);
    }
    const std::vector<WeightRows<T>> weights{{first.data(), K + 1, first_N}, {second.data(), K, second_N}};
    for (int64_t panel = 0; panel < ceil_div(N, kPanel); ++panel) {
      pack_weights(weights, K, panel, panel + 1, panels.data());
    }
  }

  float weight(int64_t n, int64_t k) const {
    return value_of(n < first_N ? first[n * (K + 1) + k] : second[(n - first_N) * K + k]);
  }

  template <typename Result>
  std::vector<Result> run(int64_t first_row, int64_t num_rows) const {
    std::vector<Result> result(num_rows * N);
    const LinearOperands<T> operands{
        x.data() + first_row * depth, depth, num_rows, panels.data(), bias.data(), N, depth};
    const int64_t middle = operands.num_tiles() / 2;
    panel_linear(operands, PanelProduct<T>(portable_product), middle, operands.num_tiles(), result.data());
    panel_linear(operands, PanelProduct<T>(portable_product), 0, middle, result.data());
    return result;
  }
};

template <typename T>
void test_layout(const Problem<T>& problem) {
  bool fits = true;
  for (int64_t n = 0; n < round_up(problem.N, kPanel); ++n) {
    for (int64_t k = 0; k < problem.depth; ++k) {
      const int64_t row = n / kPanel * problem.depth + k / kGroup<T> * kGroup<T>;
      const T packed = problem.panels[row * kPanel + n % kPanel * kGroup<T> + k % kGroup<T>];
      fits = fits && value_of(packed) == (n < problem.N && k < problem.K ? problem.weight(n, k) : 0.0f);
    }
  }
  expect(fits, "every weight has its place, and what is beyond is 0");
}

template <typename T, typename Result>
void test_product(const Problem<T>& problem) {
  const std::vector<Result> ours = problem.template run<Result>(0, problem.M);
  double largest = 0.0, error = 0.0;
  for (int64_t m = 0; m < problem.M; ++m) {
    for (int64_t n = 0; n < problem.N; ++n) {
      double sum = value_of(problem.bias[n]);
      for (int64_t k = 0; k < problem.K; ++k) {
        sum += static_cast<double>(value_of(problem.x[m * problem.depth + k])) * problem.weight(n, k);
      }
      largest = std::max(largest, std::abs(sum));
      error = std::max(error, std::abs(sum - value_of(ours[m * problem.N + n])));
    }
  }
  expect(error <= (sizeof(Result) == 2 ? 4e-3 : 1e-5) * largest, "the product is right");
  for (int64_t row = 0; row < problem.M; row += 1 + row / 3) {
    const std::vector<Result> some = problem.template run<Result>(row, problem.M - row);
    expect(std::memcmp(some.data(), ours.data() + row * problem.N, some.size() * sizeof(Result)) == 0,
           "a row has the same bits, whatever rows are beside it");
  }
}

template <typename T>
void test(int64_t M, int64_t first_N, int64_t second_N, int64_t K) {
  const Problem<T> problem(M, first_N, second_N, K);
  test_layout(problem);
  test_product<T, T>(problem);
  test_product<T, float>(problem);
}

}  // namespace

int main() {
  test<float>(1, 1, 0, 1);
  test<float>(7, 63, 1, 33);
  test<float>(70, 60, 70, 17);
  test<float>(3, 1, 128, 1030);
  test<uint16_t>(1, 1, 0, 1);
  test<uint16_t>(7, 63, 1, 33);
  test<uint16_t>(70, 60, 70, 18);
  test<uint16_t>(3, 1, 128, 2050);
  return failures();
}
