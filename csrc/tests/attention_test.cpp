// Tests of the torch-free core; exits with the number of failures.
#include "../attention.h"

#include <cmath>
#include <limits>
#include <vector>

#include "expect.h"

namespace {

using Ints = std::vector<int32_t>;

constexpr float NOT_WRITTEN = std::numeric_limits<float>::quiet_NaN();
struct Shape {
  int64_t heads, kv_heads, dim, page, window;
};

// Two groups of two rows and one row, on pages of one storage in an order of their own.
struct Batch {
  Shape shape;
  Ints prefix_lens{3, 0}, own_lens{2, 0, 140}, cu_q{0, 2, 3, 8}, cu_rows{0, 2, 3}, prefix_table, own_table;
  std::vector<float> q, k, v;
  int64_t columns, num_pages;

  explicit Batch(Shape shape) : shape(shape), columns(145 / shape.page + 1), num_pages(5 * columns) {
    for (int64_t i = 0; i < 2 * columns; ++i) {
      prefix_table.push_back(num_pages - 1 - i);
    }
    for (int64_t i = 0; i < 3 * columns; ++i) {
      own_table.push_back((i * 2) % (3 * columns + (3 * columns + 1) % 2));
    }
    const int64_t num_slots = num_pages * shape.kv_heads * shape.page * shape.dim;
    q = numbers(8 * shape.heads * shape.dim, 1);
    k = std::vector<float>(num_slots, NOT_WRITTEN);
    v = k;
    for (int64_t group = 0; group < 2; ++group) {
      write(prefix_table.data() + group * columns, prefix_lens[group], group);
    }
    for (int64_t row = 0; row < 3; ++row) {
      write(own_table.data() + row * columns, own_lens[row] + cu_q[row + 1] - cu_q[row], 5 + row);
    }
  }

  static std::vector<float> numbers(int64_t count, int64_t seed) {
    std::vector<float> values(count);
    for (int64_t i = 0; i < count; ++i) {
      values[i] = static_cast<float>(std::sin(1.7 * i + 37.0 * seed));
    }
    return values;
  }

  int64_t place(const int32_t* table, int64_t slot, int64_t kv_head) const {
    return ((table[slot / shape.page] * shape.kv_heads + kv_head) * shape.page + slot % shape.page) * shape.dim;
  }

  void write(const int32_t* table, int64_t length, int64_t seed) {
    const auto values = numbers(2 * length * shape.kv_heads * shape.dim, seed + 2);
    auto value = values.begin();
    for (int64_t slot = 0; slot < length; ++slot) {
      for (int64_t head = 0; head < shape.kv_heads; ++head) {
        for (int64_t e = 0; e < shape.dim; ++e) {
          k[place(table, slot, head) + e] = *value++;
          v[place(table, slot, head) + e] = *value++;
        }
      }
    }
  }

  nrt_fast::AttentionInput input() const {
    const nrt_fast::PagedKeys prefix{
        k.data(), v.data(), num_pages, shape.page, prefix_table.data(), columns, prefix_lens.data()};
    const nrt_fast::PagedKeys own{k.data(), v.data(), num_pages, shape.page, own_table.data(), columns, own_lens.data()};
    return {q.data(), false, prefix, own, cu_q.data(), cu_rows.data(), 8, 3, 2, shape.heads, shape.kv_heads, shape.dim,
            5, 2, shape.window, 0.5f};
  }

  std::vector<float> attend(int64_t items_at_once = 1000) const {
    const nrt_fast::AttentionInput batch = input();
    nrt_fast::check_attention(batch);
    const auto tiles = nrt_fast::token_tiles(batch);
    std::vector<float> out(q.size(), NOT_WRITTEN);
    const int64_t num_items = tiles.size() * shape.kv_heads;
    for (int64_t item = 0; item < num_items; item += items_at_once) {
      nrt_fast::attend(batch, tiles, item, std::min(item + items_at_once, num_items), out.data());
    }
    return out;
  }

  // The largest difference to sums in double, query by query.
  double error(const std::vector<float>& out) const {
    double worst = 0;
    for (int64_t row = 0; row < 3; ++row) {
      const int64_t group = row == 2;
      for (int64_t token = cu_q[row]; token < cu_q[row + 1]; ++token) {
        for (int64_t head = 0; head < shape.heads; ++head) {
          worst = std::max(worst, error(out, row, group, token, head));
        }
      }
    }
    return worst;
  }

  double error(const std::vector<float>& out, int64_t row, int64_t group, int64_t token, int64_t head) const {
    const int64_t kv_head = head / (shape.heads / shape.kv_heads), own_end = own_lens[row] + token - cu_q[row] + 1;
    const int64_t end = prefix_lens[group] + own_end;
    std::vector<double> total(shape.dim);
    double sum = 0;
    for (int64_t s = shape.window > 0 ? std::max<int64_t>(0, end - shape.window) : 0; s < end; ++s) {
      const bool in_prefix = s < prefix_lens[group];
      const int32_t* table = in_prefix ? prefix_table.data() + group * columns : own_table.data() + row * columns;
      const int64_t at = place(table, in_prefix ? s : s - prefix_lens[group], kv_head);
      double score = 0;
      for (int64_t e = 0; e < shape.dim; ++e) {
        score += 0.5 * q[(token * shape.heads + head) * shape.dim + e] * k[at + e];
      }
      sum += std::exp(score);
      for (int64_t e = 0; e < shape.dim; ++e) {
        total[e] += std::exp(score) * v[at + e];
      }
    }
    double worst = 0;
    for (int64_t e = 0; e < shape.dim; ++e) {
      const double difference = std::fabs(out[(token * shape.heads + head) * shape.dim + e] - total[e] / sum);
      worst = difference <= worst ? worst : difference;  // NaN counts
    }
    return worst;
  }
};

void test_attention() {
  const Shape shapes[] = {{4, 2, 16, 8, 0}, {4, 2, 80, 64, 0}, {3, 1, 12, 3, 0}, {2, 2, 7, 1, 0}, {4, 1, 32, 16, 9},
                          {40, 1, 16, 16, 0}};
  for (const Shape& shape : shapes) {
    const Batch batch(shape);
    const auto out = batch.attend();
    expect(batch.error(out) < 2e-6, "attention is that of one query at a time");
    expect(out == batch.attend(1), "the division into work items changes no bit");
  }
}

void expect_invalid(void (*change)(Batch&, nrt_fast::AttentionInput&), const char* what) {
  Batch batch({4, 2, 16, 8, 0});
  nrt_fast::AttentionInput input = batch.input();
  change(batch, input);
  ::expect_invalid([&] { nrt_fast::check_attention(input); }, what);
}

void test_bad_input() {
  using Input = nrt_fast::AttentionInput;
  expect_invalid([](Batch&, Input& input) { input.num_heads = 5; }, "5 heads over 2 key heads");
  expect_invalid([](Batch&, Input& input) { input.max_q = 4; }, "more queries than max_q");
  expect_invalid([](Batch&, Input& input) { input.max_rows = 1; }, "more rows than max_rows");
  expect_invalid([](Batch&, Input& input) { input.num_tokens = 9; }, "cu_q that ends early");
  expect_invalid([](Batch& batch, Input&) { batch.cu_q[0] = 1; }, "cu_q that starts late");
  expect_invalid([](Batch& batch, Input&) { batch.cu_q[1] = 4; }, "decreasing cu_q");
  expect_invalid([](Batch& batch, Input&) { batch.cu_rows[1] = 4; }, "rows that do not exist");
  expect_invalid([](Batch& batch, Input&) { batch.own_table[0] = 1000; }, "a page past the storage");
  expect_invalid([](Batch& batch, Input&) { batch.prefix_table[0] = -1; }, "a negative page");
  expect_invalid([](Batch& batch, Input&) { batch.own_lens[0] = 1000; }, "a row longer than its pages");
  expect_invalid([](Batch& batch, Input&) { batch.prefix_lens[0] = -1; }, "a negative length");
}

}  // namespace

int main() {
  test_attention();
  test_bad_input();
  return failures();
}
