// Tests of the torch-free core; exits with the number of failures.
#include "../pack.h"
#include "../pack_gather.h"

#include <algorithm>
#include <vector>

#include "expect.h"

namespace {

using Ints = std::vector<int64_t>;

Ints bins(const Ints& costs, int64_t budget) {
  Ints result(costs.size());
  nrt_fast::pack_bins(costs.data(), costs.size(), budget, result.data());
  return result;
}

struct Index {
  Ints source, positions;
  std::vector<int32_t> cu_seqlens;
  Ints hidden, rows;
};

Index index(const Ints& entries, const Ints& cu_prompts, const Ints& cu_traces) {
  const int64_t num_entries = entries.size() / 3;
  const int64_t num_prompts = cu_prompts.size() - 1;
  const int64_t num_traces = cu_traces.size() - 1;
  const nrt_fast::PackInput input{
      entries.data(), num_entries, cu_prompts.data(), num_prompts, cu_traces.data(), num_traces};
  const std::vector<nrt_fast::PackSize> sizes = nrt_fast::pack_sizes(input);
  const nrt_fast::PackSize& size = sizes.back();
  Index result{
      Ints(size.num_tokens), Ints(size.num_tokens), std::vector<int32_t>(size.num_segments + 1),
      Ints(size.num_loss_tokens), Ints(size.num_loss_tokens)};
  const nrt_fast::PackOutput output{
      result.source.data(), result.positions.data(), result.cu_seqlens.data(), result.hidden.data(),
      result.rows.data()};
  for (int64_t end = num_entries; end >= 0; end -= 2) {  // in parts, the last one first, as threads may
    nrt_fast::pack_index(input, sizes, std::max<int64_t>(end - 2, 0), end, output);
  }
  return result;
}

void test_bins() {
  expect(bins({}, 10).empty(), "no cost, no bin");
  expect(bins({4, 7, 3, 6}, 10) == Ints({1, 0, 0, 1}), "the fullest bin that still has room");
  expect(bins({6, 6, 4, 4}, 10) == Ints({0, 1, 0, 1}), "the lowest bin among equals");
  expect(bins({5, 5, 5}, 10) == Ints({0, 0, 1}), "equal costs keep their order");
  expect_invalid([] { bins({11}, 10); }, "a cost above the budget is refused");
  expect_invalid([] { bins({0}, 10); }, "a cost of nothing is refused");
}

void test_index() {
  // Prompts of 2 and 3 tokens; traces of 3, 1 and 2 loss tokens, the first two of prompt 0.
  const Index packed = index({1, 2, 3, 0, 0, 2}, {0, 2, 5}, {0, 3, 4, 6});
  expect(packed.source == Ints({2, 3, 4, 9, 0, 1, 5, 6}), "source");
  expect(packed.positions == Ints({0, 1, 2, 3, 0, 1, 2, 3}), "positions");
  expect(packed.cu_seqlens == std::vector<int32_t>({0, 3, 4, 6, 8, 8}), "cu_seqlens");
  expect(packed.hidden == Ints({2, 3, 5, 6, 7, 5}), "hidden");
  expect(packed.rows == Ints({4, 5, 0, 1, 2, 3}), "rows");
  expect(index({}, {0}, {0}).cu_seqlens == std::vector<int32_t>({0}), "nothing to pack");
}

void test_bad_index() {
  const Ints prompts{0, 2};
  const Ints traces{0, 3};
  expect_invalid([&] { index({1, 0, 1}, prompts, traces); }, "prompt out of range");
  expect_invalid([&] { index({-1, 0, 1}, prompts, traces); }, "negative prompt");
  expect_invalid([&] { index({0, 0, 2}, prompts, traces); }, "trace out of range");
  expect_invalid([&] { index({0, 1, 1}, prompts, traces); }, "entry without traces");
  expect_invalid([&] { index({0, 0, 1}, {0, 0}, traces); }, "empty prompt");
  expect_invalid([&] { index({0, 0, 1}, prompts, {0, 0}); }, "empty trace");
  expect_invalid([&] { index({0, 0, 1}, {0, 2, 1}, traces); }, "decreasing cu_prompts");
  expect_invalid([&] { index({0, 0, 1}, prompts, {1, 3}); }, "cu_traces that starts late");
  expect_invalid([&] { index({0, 0, 1}, prompts, {}); }, "cu_traces without an offset");
}

void test_gather() {
  const Ints prompt_ids{10, 11};
  const Ints targets{20, 21, 22};
  const std::vector<float> values{0.5F, 1.5F, 2.5F};
  const std::vector<int8_t> kinds{0, 1, 2};
  Ints tokens(3), picked(2);
  std::vector<float> a(2), b(2), c(2);
  std::vector<int8_t> kind(2);
  const auto gather = [&](const Ints& source, const Ints& rows) {
    nrt_fast::pack_gather(
        {prompt_ids.data(), 2, targets.data(), values.data(), values.data(), values.data(), kinds.data(), 3,
         source.data(), static_cast<int64_t>(source.size()), rows.data(), static_cast<int64_t>(rows.size())},
        {tokens.data(), picked.data(), a.data(), b.data(), c.data(), kind.data()});
  };
  gather({1, 2, 4}, {2, 1});
  expect(tokens == Ints({11, 20, 22}), "tokens come from the prompts and then the targets");
  expect(picked == Ints({22, 21}) && a == std::vector<float>({2.5F, 1.5F}) && b == a && c == a, "rows of every array");
  expect(kind == std::vector<int8_t>({2, 1}), "rows of the small type");
  gather({}, {});
  expect_invalid([&] { gather({5}, {}); }, "source past the end");
  expect_invalid([&] { gather({-1}, {}); }, "negative source");
  expect_invalid([&] { gather({}, {3}); }, "row past the end");
  expect_invalid([&] { gather({}, {-1}); }, "negative row");
}

}  // namespace

int main() {
  test_bins();
  test_index();
  test_bad_index();
  test_gather();
  return failures();
}
