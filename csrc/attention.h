// Attention of new tokens over a paged key-value cache, free of torch: raw pointers and sizes, CPU memory.
// Bad input throws std::invalid_argument before anything is read from the cache.
#pragma once

#include <cstdint>
#include <vector>

namespace nrt_fast {

// Keys and values of many sequences in pages. Slot s of a sequence is slot s % page_slots of its page s / page_slots.
struct PagedKeys {
  const void* k;  // [num_pages, num_kv_heads, page_slots, head_dim]
  const void* v;  // likewise
  int64_t num_pages;
  int64_t page_slots;
  const int32_t* table;  // [sequences, num_columns] pages; entries past a sequence's length are not read
  int64_t num_columns;
  const int32_t* lens;  // [sequences]: tokens before this call's
};

// Groups of rows: a row's queries see the prefix of its group, the row's own keys before them, and themselves.
struct AttentionInput {
  const void* q;  // [num_tokens, num_heads, head_dim], row after row
  bool is_bfloat16;  // of q, k, v and the result; else they are float
  PagedKeys prefix;  // one sequence per group
  PagedKeys own;  // one per row; the keys of the row's queries stand behind its length
  const int32_t* cu_q;  // [num_rows + 1] token offsets, from 0
  const int32_t* cu_rows;  // [num_groups + 1] row offsets, from 0
  int64_t num_tokens, num_rows, num_groups;
  int64_t num_heads, num_kv_heads, head_dim;
  int64_t max_q, max_rows;  // at least the queries of any row, the rows of any group; only checked here
  int64_t window;  // positions that a query sees, itself included; 0: all
  float scale;
};

void check_attention(const AttentionInput& input);

// Consecutive tokens of one group, few enough for their state to stay in the first-level cache.
struct TokenTile {
  int64_t group, first, end;
};

std::vector<TokenTile> token_tiles(const AttentionInput& input);

// Writes out [num_tokens, num_heads, head_dim] for work items first..end of the tiles.size() * num_kv_heads there are.
// A token's result does not depend, bit by bit, on what else is in the batch or on how the items are divided.
void attend(
    const AttentionInput& input, const std::vector<TokenTile>& tiles, int64_t first_item, int64_t end_item, void* out);

}  // namespace nrt_fast
