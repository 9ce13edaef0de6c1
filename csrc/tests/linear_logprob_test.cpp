// Tests of the torch-free core with the portable product, against double precision; exits with the number of failures.
#include "../linear_logprob.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "expect.h"

namespace {

using namespace nrt_fast;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The error of every element against the largest one.
void expect_close(const Floats& ours, const Doubles& exact, double tolerance, const char* what) {
  double largest = 1.0, error = ours.size() == exact.size() ? 0.0 : 1.0;
  for (size_t i = 0; i < ours.size(); ++i) {
    largest = std::max(largest, std::abs(exact[i]));
    error = std::max(error, std::abs(ours[i] - exact[i]));
  }
  expect(error <= tolerance * largest, what);
}

Parallel on_threads(int num_threads) {
  return [num_threads](const std::function<void()>& work) {
    std::vector<std::thread> threads;
    for (int i = 0; i < num_threads; ++i) {
      threads.emplace_back(work);
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
  };
}

float value_of(float x) { return x; }

float value_of(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void assign(float& x, float value) { x = value; }

void assign(uint16_t& x, float value) {  // towards zero: any value will do
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  x = static_cast<uint16_t>(bits >> 16);
}

// Random arguments; rows of hidden and weight lie one element further apart than they are long.
template <typename T>
struct Problem {
  int64_t N, V, D;
  std::vector<T> hidden, weight;
  std::vector<int64_t> target;
  Floats inv_temperature, token_weight, old_logprob, reference_logprob;
  std::unique_ptr<bool[]> policy;
  LossTerms terms{TraceLoss::cispo, 0.8f, 1.28f, 0.1f, 0.05f, 0.5f};

  Problem(int64_t N, int64_t V, int64_t D)
      : N(N), V(V), D(D), hidden(N * (D + 1)), weight(V * (D + 1)), target(N), inv_temperature(N), token_weight(N),
        old_logprob(N), reference_logprob(N), policy(new bool[N]) {
    std::mt19937 random(static_cast<unsigned>(N * V + D));
    std::normal_distribution<float> normal;
    for (T& x : hidden) {
      assign(x, normal(random));
    }
    for (T& x : weight) {
      assign(x, 2.0f * normal(random) / std::sqrt(static_cast<float>(D)));
    }
    for (int64_t n = 0; n < N; ++n) {
      target[n] = static_cast<int64_t>(random() % V);
      inv_temperature[n] = 0.5f + static_cast<float>(n % 3);
      token_weight[n] = n % 4 ? normal(random) : 0.0f;
      double total = 0.0;
      for (int64_t v = 0; v < V; ++v) {
        total += std::exp(logit(n, v));
      }
      const double logprob = logit(n, target[n]) - std::log(total);
      old_logprob[n] = static_cast<float>(logprob) + 0.3f * normal(random);
      reference_logprob[n] = static_cast<float>(logprob) + 0.3f * normal(random);
      policy[n] = n % 3 != 0;
    }
  }

  LinearInput<T> input() const {
    return {hidden.data(), D + 1, weight.data(), D + 1, target.data(), inv_temperature.data(), N, V, D};
  }

  double logit(int64_t n, int64_t v) const {
    double sum = 0.0;
    for (int64_t d = 0; d < D; ++d) {
      sum += static_cast<double>(value_of(hidden[n * (D + 1) + d])) * value_of(weight[v * (D + 1) + d]);
    }
    return sum * inv_temperature[n];
  }
};

struct Result {
  Floats loss, logprob, entropy, grad_hidden, grad_weight, logsumexp;
};

template <typename T>
Result run(const Problem<T>& problem, int num_threads) {
  const auto [N, V, D] = std::tuple(problem.N, problem.V, problem.D);
  Result result{Floats(1), Floats(N), Floats(N), Floats(N * D), Floats(V * D, 1.0f), Floats(N)};
  std::vector<T> grad_hidden(N * D);
  const LossInput loss{
      problem.token_weight.data(), problem.policy.get(), problem.old_logprob.data(), problem.reference_logprob.data(),
      problem.terms};
  linear_logprob_loss<T>(
      problem.input(), loss, portable_product, on_threads(num_threads),
      {result.loss.data(), result.logprob.data(), result.entropy.data(), grad_hidden.data(),
       result.grad_weight.data()});
  for (int64_t i = 0; i < N * D; ++i) {
    result.grad_hidden[i] = value_of(grad_hidden[i]);
  }
  Floats logprob(N), entropy(N);
  linear_logprob<T>(
      problem.input(), portable_product, on_threads(num_threads),
      {logprob.data(), result.logsumexp.data(), entropy.data()});
  expect(logprob == result.logprob && entropy == result.entropy, "the loss reports what linear_logprob computes");
  return result;
}

struct Exact {
  Doubles loss, logprob, entropy, grad_hidden, grad_weight, logsumexp;
};

template <typename T>
Exact exact(const Problem<T>& problem) {
  const auto [N, V, D] = std::tuple(problem.N, problem.V, problem.D);
  Exact result{Doubles(1), Doubles(N), Doubles(N), Doubles(N * D), Doubles(V * D, 1.0), Doubles(N)};
  for (int64_t n = 0; n < N; ++n) {
    Doubles x(V);
    double total = 0.0, entropy = 0.0;
    for (int64_t v = 0; v < V; ++v) {
      x[v] = problem.logit(n, v);
      total += std::exp(x[v]);
    }
    for (int64_t v = 0; v < V; ++v) {
      entropy -= std::exp(x[v]) / total * (x[v] - std::log(total));
    }
    const double logprob = x[problem.target[n]] - std::log(total);
    const TokenLoss token = token_loss(
        problem.terms,
        {problem.token_weight[n], problem.policy[n], &problem.old_logprob[n], &problem.reference_logprob[n]},
        static_cast<float>(logprob), static_cast<float>(entropy));
    result.loss[0] += token.loss;
    result.logprob[n] = logprob;
    result.logsumexp[n] = std::log(total);
    result.entropy[n] = entropy;
    for (int64_t v = 0; v < V; ++v) {
      const double p = std::exp(x[v]) / total;
      const double by_x = token.by_logprob * ((v == problem.target[n]) - p) -
          token.by_entropy * p * (std::log(p) + entropy);
      const double by_logit = by_x * problem.inv_temperature[n];
      for (int64_t d = 0; d < D; ++d) {
        result.grad_hidden[n * D + d] += by_logit * value_of(problem.weight[v * (D + 1) + d]);
        result.grad_weight[v * D + d] += by_logit * value_of(problem.hidden[n * (D + 1) + d]);
      }
    }
  }
  return result;
}

template <typename T>
void test_against_double(int64_t N, int64_t V, int64_t D) {
  const Problem<T> problem(N, V, D);
  const Result ours = run(problem, 1), shared = run(problem, 3);
  const Exact truth = exact(problem);
  const double rounding = sizeof(T) == 2 ? 8e-3 : 1e-5;
  expect_close(ours.loss, truth.loss, 1e-5, "loss");
  expect_close(ours.logprob, truth.logprob, 2e-5, "log-probability");
  expect_close(ours.logsumexp, truth.logsumexp, 2e-5, "log-sum-exp");
  expect_close(ours.entropy, truth.entropy, 2e-5, "entropy");
  expect_close(ours.grad_hidden, truth.grad_hidden, rounding, "gradient of the hidden states");
  expect_close(ours.grad_weight, truth.grad_weight, rounding, "gradient of the weight");
  expect(ours.loss == shared.loss && ours.logprob == shared.logprob && ours.grad_hidden == shared.grad_hidden &&
             ours.grad_weight == shared.grad_weight,
         "the same bits on three threads");
}

template <typename T>
void test_a_constant_weight_gets_no_gradient(int64_t N, int64_t V, int64_t D) {
  const Problem<T> problem(N, V, D);
  const Result expected = run(problem, 1);
  Floats loss(1), logprob(N), entropy(N);
  std::vector<T> grad_hidden(N * D);
  linear_logprob_loss<T>(
      problem.input(),
      {problem.token_weight.data(), problem.policy.get(), problem.old_logprob.data(),
       problem.reference_logprob.data(), problem.terms},
      portable_product, on_threads(2), {loss.data(), logprob.data(), entropy.data(), grad_hidden.data(), nullptr});
  expect(loss == expected.loss && logprob == expected.logprob && entropy == expected.entropy, "the same results");
  bool same = true;
  for (int64_t i = 0; i < N * D; ++i) {
    same = same && value_of(grad_hidden[i]) == expected.grad_hidden[i];
  }
  expect(same, "the same gradient of the hidden states");
}

void test_rows_do_not_depend_on_their_neighbours() {
  Problem<float> problem(70, 300, 17);
  const Result whole = run(problem, 1);
  LinearInput<float> row = problem.input();
  row.hidden += 69 * row.ld_hidden;
  row.target += 69;
  row.inv_temperature += 69;
  row.N = 1;
  float logprob;
  linear_logprob<float>(row, portable_product, on_threads(1), {&logprob, nullptr, nullptr});
  expect(logprob == whole.logprob[69], "the last row by itself has the same bits");
}

void test_hostile_values() {
  Problem<float> problem(5, 300, 16);
  for (int64_t n = 0; n < 5; ++n) {
    problem.target[n] = n;
    for (int64_t d = 0; d < 16; ++d) {
      float& h = problem.hidden[n * 17 + d];
      h = std::abs(h);
    }
  }
  for (int64_t d = 0; d < 16; ++d) {
    problem.weight[d] = -std::numeric_limits<float>::infinity();  // logit 0 of every row
  }
  problem.hidden[4 * 17] = kNaN;
  problem.target[3] = 300;
  Floats logprob(5), entropy(5);
  linear_logprob<float>(
      problem.input(), portable_product, on_threads(1), {logprob.data(), nullptr, entropy.data()});
  expect(std::isinf(logprob[0]) && logprob[0] < 0, "a logit of -inf has log-probability -inf");
  expect(std::isfinite(entropy[0]) && std::isfinite(logprob[1]), "and leaves everything else finite");
  expect(std::isnan(logprob[3]), "a target outside of the vocabulary gives NaN");
  expect(std::isnan(logprob[4]) && std::isnan(entropy[4]), "NaN stays NaN");
}

void test_a_token_without_gradient_leaves_no_trace() {
  Problem<float> problem(3, 300, 16);
  problem.token_weight[0] = 0.0f;
  problem.policy[0] = false;
  problem.hidden[0] = problem.old_logprob[0] = problem.reference_logprob[0] = problem.inv_temperature[0] = kNaN;
  const LossInput loss{
      problem.token_weight.data(), problem.policy.get(), problem.old_logprob.data(), problem.reference_logprob.data(),
      problem.terms};
  Floats sum(1), logprob(3), entropy(3), grad_hidden(3 * 16, kNaN), grad_weight(300 * 16);
  linear_logprob_loss<float>(
      problem.input(), loss, portable_product, on_threads(1),
      {sum.data(), logprob.data(), entropy.data(), grad_hidden.data(), grad_weight.data()});
  bool finite = std::isfinite(sum[0]);
  for (const float gradient : grad_weight) {
    finite = finite && std::isfinite(gradient);
  }
  expect(finite, "NaN of a token that does not count reaches neither the loss nor the weight");
  expect(grad_hidden[0] == 0.0f && grad_hidden[15] == 0.0f, "its own gradient is 0");
}

void test_token_loss() {
  const float far = -std::numeric_limits<float>::infinity();
  LossTerms terms{TraceLoss::ppo, 0.8f, 1.28f, 0.0f, 0.0f, 1.0f};
  const auto slope = [&](float weight, float old_logprob) {
    return token_loss(terms, {weight, true, &old_logprob, nullptr}, -1.0f, 1.0f).by_logprob;
  };
  expect(slope(1.0f, -2.0f) == 0.0f, "PPO: a ratio above the range is not pushed further");
  expect(std::abs(slope(-1.0f, -2.0f) - std::exp(1.0f)) < 1e-6f, "PPO: it is pushed back");
  expect(slope(0.0f, far) == 0.0f, "an advantage of 0 meets an infinite ratio");
  terms.trace_loss = TraceLoss::cispo;
  expect(slope(1.0f, -2.0f) == 0.0f && slope(-1.0f, -2.0f) == 1.28f, "CISPO: the clipped ratio is a factor");
  terms.trace_loss = TraceLoss::reinforce;
  expect(slope(1.0f, -2.0f) == -1.0f, "REINFORCE knows no ratio");
}

}  // namespace

int main() {
  test_against_double<float>(1, 2, 1);
  test_against_double<float>(67, 515, 33);
  test_against_double<float>(600, 300, 8);
  test_against_double<uint16_t>(1, 2, 1);
  test_against_double<uint16_t>(67, 513, 33);
  test_against_double<uint16_t>(3, 300, 130);
  test_a_constant_weight_gets_no_gradient<float>(67, 515, 33);
  test_a_constant_weight_gets_no_gradient<uint16_t>(67, 513, 33);
  test_rows_do_not_depend_on_their_neighbours();
  test_hostile_values();
  test_a_token_without_gradient_leaves_no_trace();
  test_token_loss();
  return failures();
}
