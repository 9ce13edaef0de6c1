// Tests of the torch-free core; exits with the number of failures.
#include "../packed_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "expect.h"

namespace {

using Floats = std::vector<float>;
using Ints = std::vector<int64_t>;

constexpr float NOT_WRITTEN = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  Ints lens, roots;
  int64_t heads, kv_heads, dim, window;
};

// q, k and v are slices of one tensor, as a fused projection leaves them.
struct Batch {
  Shape shape;
  Ints starts;
  int64_t tokens = 0;
  Floats qkv, grad;

  explicit Batch(const Shape& shape) : shape(shape) {
    for (const int64_t length : shape.lens) {
      starts.push_back(tokens);
      tokens += length;
    }
    qkv.resize(tokens * (shape.heads + 2 * shape.kv_heads) * shape.dim);
    grad.resize(tokens * shape.heads * shape.dim);
    for (size_t i = 0; i < qkv.size(); ++i) {
      qkv[i] = static_cast<float>(std::sin(1.7 * i * i + 3.0));
    }
    for (size_t i = 0; i < grad.size(); ++i) {
      grad[i] = static_cast<float>(std::cos(2.3 * i * i));
    }
  }

  nrt_fast::Strided slice(int64_t first_head) {
    return {qkv.data() + first_head * shape.dim, (shape.heads + 2 * shape.kv_heads) * shape.dim, shape.dim, 1};
  }

  nrt_fast::Strided dense(Floats& x, int64_t heads) const { return {x.data(), heads * shape.dim, shape.dim, 1}; }

  nrt_fast::PackedInput input() {
    return {slice(0), slice(shape.heads), slice(shape.heads + shape.kv_heads), false, starts.data(), shape.lens.data(),
            shape.roots.data(), static_cast<int64_t>(shape.lens.size()), tokens, shape.heads, shape.kv_heads, shape.dim,
            shape.window, 0.5f};
  }

  float at(int64_t token, int64_t head, int64_t e) const {
    return qkv[(token * (shape.heads + 2 * shape.kv_heads) + head) * shape.dim + e];
  }
};

// The result and the gradients of q, k and v.
std::vector<Floats> run(Batch& batch, int num_threads) {
  const nrt_fast::OnAllThreads on_all_threads = [&](const std::function<void()>& work) {
    std::vector<std::thread> threads;
    for (int i = 0; i < num_threads; ++i) {
      threads.emplace_back(work);
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
  };
  const Shape& shape = batch.shape;
  const int64_t wide = batch.tokens * shape.heads * shape.dim, narrow = batch.tokens * shape.kv_heads * shape.dim;
  std::vector<Floats> results{Floats(wide, NOT_WRITTEN), Floats(wide, NOT_WRITTEN), Floats(narrow, NOT_WRITTEN),
                              Floats(narrow, NOT_WRITTEN)};
  Floats stats(2 * batch.tokens * shape.heads, NOT_WRITTEN);
  const nrt_fast::SoftmaxStats split{stats.data(), stats.data() + batch.tokens * shape.heads};
  const nrt_fast::PackedInput input = batch.input();
  nrt_fast::check_packed_attention(input);
  const nrt_fast::Strided out = batch.dense(results[0], shape.heads);
  nrt_fast::packed_attention(input, out, split, on_all_threads);
  nrt_fast::packed_attention_backward(
      input, split,
      {out, batch.dense(batch.grad, shape.heads), batch.dense(results[1], shape.heads),
       batch.dense(results[2], shape.kv_heads), batch.dense(results[3], shape.kv_heads)},
      on_all_threads);
  return results;
}

// The same in double, query by query.
std::vector<std::vector<double>> exact(const Batch& batch) {
  const Shape& shape = batch.shape;
  const int64_t E = shape.dim, H = shape.heads, K = shape.kv_heads, ratio = H / K;
  std::vector<std::vector<double>> results{
      std::vector<double>(batch.tokens * H * E), std::vector<double>(batch.tokens * H * E),
      std::vector<double>(batch.tokens * K * E), std::vector<double>(batch.tokens * K * E)};
  for (size_t segment = 0; segment < shape.lens.size(); ++segment) {
    const int64_t root = shape.roots[segment];
    for (int64_t i = 0; i < shape.lens[segment]; ++i) {
      Ints seen;  // tokens
      for (int64_t j = 0; root != static_cast<int64_t>(segment) && j < shape.lens[root]; ++j) {
        seen.push_back(batch.starts[root] + j);
      }
      for (int64_t j = 0; j <= i; ++j) {
        seen.push_back(batch.starts[segment] + j);
      }
      if (shape.window > 0 && static_cast<int64_t>(seen.size()) > shape.window) {
        seen.erase(seen.begin(), seen.end() - shape.window);
      }
      const int64_t t = batch.starts[segment] + i;
      for (int64_t head = 0; head < H; ++head) {
        const int64_t key_head = head / ratio;
        std::vector<double> weights(seen.size()), grads(seen.size());
        double sum = 0, dot = 0;
        for (size_t n = 0; n < seen.size(); ++n) {
          for (int64_t e = 0; e < E; ++e) {
            weights[n] += 0.5 * batch.at(t, head, e) * batch.at(seen[n], H + key_head, e);
            const double grad = batch.grad[(t * H + head) * E + e];
            grads[n] += grad * batch.at(seen[n], H + K + key_head, e);
          }
          weights[n] = std::exp(weights[n]);
          sum += weights[n];
        }
        for (size_t n = 0; n < seen.size(); ++n) {
          weights[n] /= sum;
          dot += weights[n] * grads[n];
        }
        for (size_t n = 0; n < seen.size(); ++n) {
          const double grad_score = 0.5 * weights[n] * (grads[n] - dot);
          for (int64_t e = 0; e < E; ++e) {
            const int64_t query = (t * H + head) * E + e, key = (seen[n] * K + key_head) * E + e;
            results[0][query] += weights[n] * batch.at(seen[n], H + K + key_head, e);
            results[1][query] += grad_score * batch.at(seen[n], H + key_head, e);
            results[2][key] += grad_score * batch.at(t, head, e);
            results[3][key] += weights[n] * batch.grad[query];
          }
        }
      }
    }
  }
  return results;
}

void test_packed_attention() {
  const Shape shapes[] = {
      {{5, 3, 1, 1, 4}, {0, 0, 0, 3, 3}, 4, 2, 16, 0}, {{70, 65, 1, 130, 3}, {0, 0, 0, 0, 4}, 2, 1, 24, 0},
      {{70, 65, 1, 130, 3}, {0, 0, 0, 0, 4}, 2, 2, 7, 66}, {{30, 500}, {0, 0}, 3, 1, 8, 0},
      {{300, 40}, {0, 1}, 1, 1, 80, 9}, {{1}, {0}, 2, 2, 1, 1}};
  for (const Shape& shape : shapes) {
    Batch batch(shape);
    const auto ours = run(batch, 1);
    const auto truth = exact(batch);
    double worst = 0;
    for (size_t i = 0; i < truth.size(); ++i) {
      for (size_t n = 0; n < truth[i].size(); ++n) {
        const double difference = std::fabs(ours[i][n] - truth[i][n]);
        worst = difference <= worst ? worst : difference;  // NaN counts
      }
    }
    expect(worst < 2e-4, "packed attention and its gradients are those of one query at a time");
    expect(ours == run(batch, 3), "the threads change no bit");
  }
}

void expect_invalid(void (*change)(nrt_fast::PackedInput&, Shape&), const char* what) {
  Batch batch({{5, 3, 1, 1, 4}, {0, 0, 0, 3, 3}, 4, 2, 8, 0});
  nrt_fast::PackedInput input = batch.input();
  change(input, batch.shape);
  ::expect_invalid([&] { nrt_fast::check_packed_attention(input); }, what);
}

void test_bad_input() {
  using Input = nrt_fast::PackedInput;
  expect_invalid([](Input& input, Shape&) { input.num_heads = 3; }, "3 heads over 2 key heads");
  expect_invalid([](Input& input, Shape&) { input.num_kv_heads = 0; }, "no key heads");
  expect_invalid([](Input& input, Shape&) { input.head_dim = 0; }, "heads of no width");
  expect_invalid([](Input& input, Shape&) { input.num_tokens = 15; }, "tokens of no segment");
  expect_invalid([](Input&, Shape& shape) { shape.lens[4] = 5; }, "a segment past the end");
  expect_invalid([](Input&, Shape& shape) { shape.lens[1] = 0; }, "an empty segment");
  expect_invalid([](Input&, Shape& shape) { shape.lens[1] = INT64_MAX; }, "a length that overflows");
  expect_invalid([](Input&, Shape& shape) { shape.roots[0] = 1; }, "a trace before its prompt");
  expect_invalid([](Input&, Shape& shape) { shape.roots[4] = 0; }, "a trace of an earlier group");
}

}  // namespace

int main() {
  test_packed_attention();
  test_bad_input();
  return failures();
}
