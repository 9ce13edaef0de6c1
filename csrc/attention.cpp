#include "attention.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>

#include "check.h"
#include "vector_math.h"

namespace nrt_fast {
namespace {

constexpr int64_t TILE_ROWS = 32;  // query rows of a work item
constexpr int64_t KEY_BLOCK = 128;  // keys between two looks at the peak; blocks are aligned to slot 0
constexpr int64_t SCORE_STRIDE = KEY_BLOCK + 16;  // room for what a vector writes past the end

struct HeadShape {
  int64_t kv_heads, kv_head, dim;
};

// What is known of each query row so far: softmax(scores) v = total / sum, both in units of 2^(scale peak).
struct RowState {
  float scale;  // of the scores, times log2(e)
  float* q;  // [rows, dim]
  float* total;  // [rows, dim]
  float* scores;  // [rows, SCORE_STRIDE] of one block
  float* peak;  // [rows]
  float* sum;  // [rows]
  int64_t* first;  // [rows] first slot that the row sees of the sequence at hand
  int64_t* end;  // [rows] one past its last
};

// VECTOR_CLONES would not do: it copies a function whose vectors GCC has already cut down to what every CPU has, and the
// tiles here are made of whole registers.
#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
constexpr int WIDTH = 16;
#include "attention_kernel.h"
}  // namespace avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int WIDTH = 8;
#include "attention_kernel.h"
}  // namespace avx2
#pragma GCC pop_options
#endif
namespace baseline {
constexpr int WIDTH = 4;
#include "attention_kernel.h"
}  // namespace baseline

using AttendTile = void (*)(const AttentionInput&, const TokenTile&, int64_t, const RowState&, void*);

AttendTile attend_tile_here() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512::attend_tile;
  }
  if (has_avx2) {
    return avx2::attend_tile;
  }
#endif
  return baseline::attend_tile;
}

void check_lengths(const char* name, const int32_t* offsets, int64_t count, const char* limit_name, int64_t limit) {
  for (int64_t i = 1; i <= count; ++i) {
    if (offsets[i] - offsets[i - 1] > limit) {
      fail(at(name, i, offsets[i]) + " - " + std::to_string(offsets[i - 1]) + ": expected at most " + limit_name + " = " +
           std::to_string(limit));
    }
  }
}

void check_pages(const std::string& name, const PagedKeys& keys, int64_t sequence, int64_t num_new) {
  const int64_t length = keys.lens[sequence] + num_new, room = keys.num_columns * keys.page_slots;
  if (keys.lens[sequence] < 0 || length > room) {
    fail(at(name + "_lens", sequence, keys.lens[sequence]) + " and " + std::to_string(num_new) +
         " new: expected 0 to " + std::to_string(room) + " slots");
  }
  for (int64_t column = 0; column * keys.page_slots < length; ++column) {
    const int64_t index = sequence * keys.num_columns + column;
    if (keys.table[index] < 0 || keys.table[index] >= keys.num_pages) {
      fail(at(name + "_pages", index, keys.table[index]) + ": expected 0 <= page < " + std::to_string(keys.num_pages));
    }
  }
}

}  // namespace

void check_attention(const AttentionInput& input) {
  if (input.num_kv_heads < 1 || input.num_heads % input.num_kv_heads != 0) {
    fail(std::to_string(input.num_heads) + " query heads: expected a multiple of the " +
         std::to_string(input.num_kv_heads) + " key heads");
  }
  check_offsets("cu_q", input.cu_q, input.num_rows, input.num_tokens);
  check_lengths("cu_q", input.cu_q, input.num_rows, "max_q", input.max_q);
  check_offsets("cu_rows", input.cu_rows, input.num_groups, input.num_rows);
  check_lengths("cu_rows", input.cu_rows, input.num_groups, "max_rows", input.max_rows);
  for (int64_t group = 0; group < input.num_groups; ++group) {
    check_pages("prefix", input.prefix, group, 0);
  }
  for (int64_t row = 0; row < input.num_rows; ++row) {
    check_pages("own", input.own, row, input.cu_q[row + 1] - input.cu_q[row]);
  }
}

std::vector<TokenTile> token_tiles(const AttentionInput& input) {
  const int64_t size = std::max<int64_t>(1, TILE_ROWS * input.num_kv_heads / input.num_heads);
  std::vector<TokenTile> tiles;
  for (int64_t group = 0; group < input.num_groups; ++group) {
    const int64_t end = input.cu_q[input.cu_rows[group + 1]];
    for (int64_t token = input.cu_q[input.cu_rows[group]]; token < end; token += size) {
      tiles.push_back({group, token, std::min(token + size, end)});
    }
  }
  return tiles;
}

void attend(
    const AttentionInput& input, const std::vector<TokenTile>& tiles, int64_t first_item, int64_t end_item, void* out) {
  static const AttendTile attend_tile = attend_tile_here();
  const int64_t num_rows = std::max(TILE_ROWS, input.num_heads / input.num_kv_heads), dim = input.head_dim;
  std::vector<float> floats(num_rows * (2 * dim + SCORE_STRIDE + 2));
  std::vector<int64_t> slots(2 * num_rows);
  float* q = floats.data();
  float* total = q + num_rows * dim;
  float* scores = total + num_rows * dim;
  float* peak = scores + num_rows * SCORE_STRIDE;
  const RowState state{input.scale * 1.44269504f, q, total, scores, peak, peak + num_rows, slots.data(), slots.data() + num_rows};
  const int64_t num_tiles = tiles.size();
  for (int64_t item = first_item; item < end_item; ++item) {
    attend_tile(input, tiles[item % num_tiles], item / num_tiles, state, out);
  }
}

}  // namespace nrt_fast
