#include "packed_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <vector>

#include "check.h"
#include "panel_gemm.h"
#include "transpose.h"
#include "vector_math.h"

namespace nrt_fast {
namespace {

constexpr int64_t TILE = 64;  // consecutive tokens of a segment, as queries or as keys
constexpr int64_t SCORE_STRIDE = TILE + 16;  // rows of scores apart, so that a column is not all in one cache set
constexpr int64_t CHUNK_ROWS = 16 * TILE;  // query rows in hand while keys go by, where a group is cut
constexpr int64_t MIN_CUT_PAIRS = 1 << 16;  // of a query and a key, below which cutting a group does not pay
constexpr float LOG2_E = 1.44269504f;

int64_t padded_dim(const PackedInput& input) {
  return round_up(input.head_dim, 16);
}

struct Tile {
  int64_t start, size, position;  // first token, number of tokens, position of the first in its sequence
  int64_t first_own;  // tile of its segment
  int64_t group;
};

// Tiles of a group: the prompt's come first.
struct Group {
  int64_t first, end_prompt, end;
  int64_t pairs;  // of a query and a key, about
};

struct Plan {
  std::vector<Tile> tiles;
  std::vector<Group> groups;

  bool sees(int64_t query, int64_t key, int64_t window) const {
    const Tile &q = tiles[query], &k = tiles[key];
    return key <= query && (key >= q.first_own || key < groups[q.group].end_prompt) &&
        (window == 0 || q.position - (k.position + k.size - 1) < window);
  }

  // visit(key) for the tiles that these tiles of one group may see, in order.
  template <typename Visit>
  void for_keys(int64_t first, int64_t end, Visit visit) const {
    const Group& group = groups[tiles[first].group];
    for (int64_t key = group.first; key < std::min(group.end_prompt, end); ++key) {
      visit(key);
    }
    for (int64_t key = std::max(group.end_prompt, tiles[first].first_own); key < end; ++key) {
      visit(key);
    }
  }
};

enum class Part { all, queries, keys };

// Work that nothing else depends on: for one key head, tiles first..end of one group.
struct Item {
  Part part;
  int64_t kv_head, first, end;
  int64_t cost;
};

// Memory of a thread.
struct Scratch {
  float *q, *grad, *total;  // [rows, padded_dim]; total is what becomes the result, or the gradient of q
  float *peak, *sum, *dot;  // [rows]
  float *keys, *values, *grad_keys, *grad_values;  // [TILE, padded_dim]
  float *keys_transposed, *values_transposed;  // [padded_dim, TILE]
  float *weights, *grad_scores;  // [TILE, SCORE_STRIDE]

  static int64_t size(int64_t rows, int64_t padded) {
    return rows * (3 * padded + 3) + 6 * TILE * padded + 2 * TILE * SCORE_STRIDE;
  }

  Scratch(float* memory, int64_t rows, int64_t padded) {
    const auto take = [&](int64_t size) {
      float* part = memory;
      memory += size;
      return part;
    };
    q = take(rows * padded), grad = take(rows * padded), total = take(rows * padded);
    keys = take(TILE * padded), values = take(TILE * padded);
    grad_keys = take(TILE * padded), grad_values = take(TILE * padded);
    keys_transposed = take(TILE * padded), values_transposed = take(TILE * padded);
    weights = take(TILE * SCORE_STRIDE), grad_scores = take(TILE * SCORE_STRIDE);
    peak = take(rows), sum = take(rows), dot = take(rows);
  }
};

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
constexpr int WIDTH = 16;
#include "packed_attention_kernel.h"
}  // namespace avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int WIDTH = 8;
#include "packed_attention_kernel.h"
}  // namespace avx2
#pragma GCC pop_options
#endif
namespace baseline {
constexpr int WIDTH = 4;
#include "packed_attention_kernel.h"
}  // namespace baseline

struct Kernels {
  decltype(&baseline::attend) attend;
  decltype(&baseline::attend_back) attend_back;
};

Kernels kernels_here() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return {avx512::attend, avx512::attend_back};
  }
  if (has_avx2) {
    return {avx2::attend, avx2::attend_back};
  }
#endif
  return {baseline::attend, baseline::attend_back};
}

Plan plan_of(const PackedInput& input) {
  Plan plan;
  for (int64_t segment = 0; segment < input.num_segments; ++segment) {
    const int64_t root = input.roots[segment], length = input.lens[segment], first_own = plan.tiles.size();
    const int64_t prefix = root == segment ? 0 : input.lens[root];
    if (root == segment) {
      plan.groups.push_back({first_own, first_own, first_own, 0});
    }
    Group& group = plan.groups.back();
    for (int64_t begin = 0; begin < length; begin += TILE) {
      const int64_t size = std::min(TILE, length - begin), keys = prefix + begin + (size + 1) / 2;
      plan.tiles.push_back({input.starts[segment] + begin, size, prefix + begin, first_own,
                            static_cast<int64_t>(plan.groups.size()) - 1});
      group.pairs += size * (input.window > 0 ? std::min(keys, input.window) : keys);
    }
    group.end = plan.tiles.size();
    group.end_prompt = root == segment ? group.end : group.end_prompt;
  }
  return plan;
}

// A group in pieces of some query rows, for every key head.
void cut(const PackedInput& input, const Group& group, Part part, int64_t tiles_at_once, std::vector<Item>& items) {
  for (int64_t kv_head = 0; kv_head < input.num_kv_heads; ++kv_head) {
    for (int64_t first = group.first; first < group.end; first += tiles_at_once) {
      const int64_t end = std::min(first + tiles_at_once, group.end);
      items.push_back({part, kv_head, first, end, group.pairs * (end - first) / (group.end - group.first)});
    }
  }
}

int64_t tiles_of_chunk(const PackedInput& input) {
  return std::max<int64_t>(1, CHUNK_ROWS / TILE * input.num_kv_heads / input.num_heads);
}

std::vector<Item> forward_items(const PackedInput& input, const Plan& plan) {
  std::vector<Item> items;
  for (const Group& group : plan.groups) {
    cut(input, group, Part::queries, tiles_of_chunk(input), items);
  }
  return items;
}

// A group goes back whole, so that its scores are computed once and its keys' gradients need no sum over items, unless
// few groups would leave threads idle: then its queries and its keys go back apart. The shapes alone decide: no
// rounding may depend on the number of threads.
std::vector<Item> backward_items(const PackedInput& input, const Plan& plan) {
  std::vector<Item> items;
  int64_t pairs = 0;
  for (const Group& group : plan.groups) {
    pairs += group.pairs;
  }
  for (const Group& group : plan.groups) {
    if (group.pairs > MIN_CUT_PAIRS && 8 * group.pairs > pairs * input.num_kv_heads) {
      cut(input, group, Part::queries, tiles_of_chunk(input), items);
      cut(input, group, Part::keys, 1, items);
    } else {
      cut(input, group, Part::all, group.end - group.first, items);
    }
  }
  return items;
}

template <typename Run>
void run_items(const PackedInput& input, std::vector<Item> items, const OnAllThreads& on_all_threads, const Run& run) {
  const int64_t padded = padded_dim(input), num_items = items.size();
  int64_t rows = 0;
  for (const Item& item : items) {
    rows = std::max(rows, (item.end - item.first) * TILE * (input.num_heads / input.num_kv_heads));
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  std::atomic<int64_t> next{0};
  on_all_threads([&] {
    int64_t item = next++;
    if (item < num_items) {
      const Buffer<float> memory(Scratch::size(rows, padded));
      const Scratch scratch(memory, rows, padded);
      for (; item < num_items; item = next++) {
        run(items[item], scratch);
      }
    }
  });
}

}  // namespace

void check_packed_attention(const PackedInput& input) {
  if (input.num_kv_heads < 1 || input.num_heads % input.num_kv_heads != 0) {
    fail(std::to_string(input.num_heads) + " query heads: expected a multiple of the " +
         std::to_string(input.num_kv_heads) + " key heads");
  }
  if (input.head_dim < 1) {
    fail("heads of width " + std::to_string(input.head_dim) + ": expected at least 1");
  }
  int64_t end = 0, prompt = 0;
  for (int64_t segment = 0; segment < input.num_segments; ++segment) {
    if (input.starts[segment] != end) {
      fail(at("starts_S", segment, input.starts[segment]) + ": expected " + std::to_string(end));
    }
    if (input.lens[segment] < 1 || input.lens[segment] > input.num_tokens - end) {
      fail(at("lens_S", segment, input.lens[segment]) + ": expected 1 to " + std::to_string(input.num_tokens - end));
    }
    prompt = input.roots[segment] == segment ? segment : prompt;
    if (input.roots[segment] != prompt) {
      fail(at("root_S", segment, input.roots[segment]) + ": expected " + std::to_string(prompt) + " or " +
           std::to_string(segment));
    }
    end += input.lens[segment];
  }
  if (end != input.num_tokens) {
    fail("lens_S: a sum of " + std::to_string(end) + ", expected " + std::to_string(input.num_tokens));
  }
}

void packed_attention(const PackedInput& input, Strided out, SoftmaxStats stats, const OnAllThreads& on_all_threads) {
  static const Kernels kernels = kernels_here();
  const Plan plan = plan_of(input);
  run_items(input, forward_items(input, plan), on_all_threads, [&](const Item& item, const Scratch& scratch) {
    kernels.attend(input, plan, item, scratch, out, stats);
  });
}

void packed_attention_backward(
    const PackedInput& input, SoftmaxStats stats, const PackedGradients& gradients,
    const OnAllThreads& on_all_threads) {
  static const Kernels kernels = kernels_here();
  const Plan plan = plan_of(input);
  run_items(input, backward_items(input, plan), on_all_threads, [&](const Item& item, const Scratch& scratch) {
    kernels.attend_back(input, plan, item, scratch, stats, gradients);
  });
}

}  // namespace nrt_fast
