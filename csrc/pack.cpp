#include "pack.h"


#include <algorithm>
#include <limits>
#include <numeric>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "pack_gather.h"
#include "vector_clones.h"

namespace nrt_fast {
namespace {

struct Entry {
  int64_t prompt, first, end;
};

Entry entry_at(const PackInput& input, int64_t index) {
  const int64_t* entry = input.entries + 3 * index;
  return {entry[0], entry[1], entry[2]};
}

void check_entry(const PackInput& input, int64_t index) {
  const auto [prompt, first, end] = entry_at(input, index);
  const std::string where = "entries_M3[" + std::to_string(index) + "]: ";
  if (prompt < 0 || prompt >= input.num_prompts) {
    fail(where + "prompt " + std::to_string(prompt) + ", expected 0 <= prompt < " + std::to_string(input.num_prompts));
  }
  if (first < 0 || first >= end || end > input.num_traces) {
    fail(where + "traces " + std::to_string(first) + " to " + std::to_string(end) +
         ", expected 0 <= first < end <= " + std::to_string(input.num_traces));
  }
  if (input.cu_prompts[prompt] == input.cu_prompts[prompt + 1]) {
    fail(where + "prompt " + std::to_string(prompt) + " is empty, expected at least one token");
  }
  for (int64_t trace = first; trace < end; ++trace) {
    if (input.cu_traces[trace] == input.cu_traces[trace + 1]) {
      fail(where + "trace " + std::to_string(trace) + " is empty, expected at least one loss token");
    }
  }
}

// first, first + 1, ...
VECTOR_CLONES void count_up(int64_t* out, int64_t length, int64_t first) {
  for (int64_t i = 0; i < length; ++i) {
    out[i] = first + i;
  }
}

}  // namespace

void pack_bins(const int64_t* cost, int64_t num_costs, int64_t budget, int64_t* bin) {
  for (int64_t i = 0; i < num_costs; ++i) {
    if (cost[i] < 1 || cost[i] > budget) {
      fail(at("cost_M", i, cost[i]) + ": expected 1 <= cost <= budget = " + std::to_string(budget));
    }
  }
  std::vector<int64_t> order(num_costs);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [cost](int64_t a, int64_t b) { return cost[a] > cost[b]; });

  std::set<std::pair<int64_t, int64_t>> open_bins;  // (room, bin)
  int64_t num_bins = 0;
  for (const int64_t i : order) {
    const auto best = open_bins.lower_bound({cost[i], 0});
    int64_t room = budget;
    if (best == open_bins.end()) {
      bin[i] = num_bins++;
    } else {
      std::tie(room, bin[i]) = *best;
      open_bins.erase(best);
    }
    open_bins.emplace(room - cost[i], bin[i]);
  }
}

std::vector<PackSize> pack_sizes(const PackInput& input) {
  check_offsets("cu_prompts", input.cu_prompts, input.num_prompts);
  check_offsets("cu_traces", input.cu_traces, input.num_traces);
  std::vector<PackSize> sizes;
  sizes.reserve(input.num_entries + 1);
  PackSize size{0, 0, 0};
  for (int64_t i = 0; i < input.num_entries; ++i) {
    check_entry(input, i);
    sizes.push_back(size);
    const auto [prompt, first, end] = entry_at(input, i);
    const int64_t num_traces = end - first;
    const int64_t num_loss_tokens = input.cu_traces[end] - input.cu_traces[first];
    size.num_tokens += input.cu_prompts[prompt + 1] - input.cu_prompts[prompt] + num_loss_tokens - num_traces;
    size.num_segments += 1 + num_traces;
    size.num_loss_tokens += num_loss_tokens;
    if (size.num_tokens > std::numeric_limits<int32_t>::max()) {
      fail("entries_M3[" + std::to_string(i) + "]: more than 2^31 - 1 packed tokens");
    }
  }
  sizes.push_back(size);
  return sizes;
}

void pack_index(
    const PackInput& input, const std::vector<PackSize>& sizes, int64_t begin, int64_t end, const PackOutput& output) {
  const int64_t num_prompt_tokens = input.cu_prompts[input.num_prompts];
  auto [token, segment, loss_token] = sizes[begin];

  const auto append_segment = [&](int64_t source, int64_t position, int64_t length) {
    output.cu_seqlens[segment++] = static_cast<int32_t>(token);
    count_up(output.source + token, length, source);
    count_up(output.positions + token, length, position);
    token += length;
  };

  for (int64_t i = begin; i < end; ++i) {
    const auto [prompt, first, last] = entry_at(input, i);
    const int64_t prompt_length = input.cu_prompts[prompt + 1] - input.cu_prompts[prompt];
    append_segment(input.cu_prompts[prompt], 0, prompt_length);
    const int64_t prompt_end = token - 1;
    for (int64_t trace = first; trace < last; ++trace) {
      const int64_t row = input.cu_traces[trace];
      const int64_t num_targets = input.cu_traces[trace + 1] - row;
      output.hidden[loss_token] = prompt_end;
      count_up(output.hidden + loss_token + 1, num_targets - 1, token);
      count_up(output.rows + loss_token, num_targets, row);
      loss_token += num_targets;
      append_segment(num_prompt_tokens + row, prompt_length, num_targets - 1);
    }
  }
  if (end == input.num_entries) {
    output.cu_seqlens[segment] = static_cast<int32_t>(token);
  }
}

void pack_gather(const GatherInput& input, const GatherOutput& output) {
  for (int64_t element = 0; element < gather_size(input); ++element) {
    if (!gather_element(input, output, element)) {
      const bool token = element < input.num_tokens;
      const int64_t index = token ? element : element - input.num_tokens;
      const int64_t end = (token ? input.num_prompt_tokens : 0) + input.num_loss_tokens;
      fail(at(token ? "source_T" : "rows_B", index, token ? input.source[index] : input.rows[index]) +
           ": expected 0 <= index < " + std::to_string(end));
    }
  }
}

}  // namespace nrt_fast
