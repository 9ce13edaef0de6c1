// The arithmetic of attention.cpp, which includes this once per instruction set, in a namespace that defines WIDTH:
// the floats of a vector register. GCC's vector extension: +, *, <, ?: and shuffles, no intrinsics.
// Every sum is taken in an order that depends on the slot and the head width alone. Loops over registers are unrolled
// by pragma: GCC would keep the arrays in memory.

#include "vector_lanes.h"

// scores[m][n] = q[m] . k[n] for ROWS rows of q and keys first..end; key n of k and of the scores is at n - first.
// Up to three scores past the end are scratch.
template <int L, int ROWS, typename T>
inline void score_keys(const float* q, int64_t dim, const T* k, int64_t num_keys, float* scores) {
  for (int64_t n = 0; n < num_keys; n += 4) {
    const T* keys[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      keys[j] = k + std::min(n + j, num_keys - 1) * dim;
    }
    Float<L> total[ROWS][4] = {};
    for (int64_t e = 0; e < dim; e += L) {
      const Float<L> key[4] = {load<L>(keys[0] + e), load<L>(keys[1] + e), load<L>(keys[2] + e), load<L>(keys[3] + e)};
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; ++m) {
        const Float<L> query = load<L>(q + m * dim + e);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          total[m][j] += query * key[j];
        }
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
      store<4>(scores + m * SCORE_STRIDE + n, sums<L>(total[m][0], total[m][1], total[m][2], total[m][3]));
    }
  }
}

// total[m] += sum over n of weights[m][n] v[n], for ROWS rows and CHUNKS * L columns of v, which has dim of them.
template <int L, int ROWS, int CHUNKS, typename T>
inline void add_values(const float* weights, const T* v, int64_t dim, int64_t num_keys, float* total) {
  Float<L> sum[ROWS][CHUNKS];
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
    for (int c = 0; c < CHUNKS; ++c) {
      sum[m][c] = load<L>(total + m * dim + c * L);
    }
  }
  for (int64_t n = 0; n < num_keys; ++n) {
    Float<L> value[CHUNKS];
#pragma GCC unroll 4
    for (int c = 0; c < CHUNKS; ++c) {
      value[c] = load<L>(v + n * dim + c * L);
    }
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
      const float weight = weights[m * SCORE_STRIDE + n];
#pragma GCC unroll 4
      for (int c = 0; c < CHUNKS; ++c) {
        sum[m][c] += weight * value[c];
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
    for (int c = 0; c < CHUNKS; ++c) {
      store<L>(total + m * dim + c * L, sum[m][c]);
    }
  }
}

template <int L, int ROWS, typename T>
inline void add_values(const float* weights, const T* v, int64_t dim, int64_t num_keys, float* total) {
  int64_t e = 0;
  for (; e + 4 * L <= dim; e += 4 * L) {
    add_values<L, ROWS, 4>(weights, v + e, dim, num_keys, total + e);
  }
  for (; e + 2 * L <= dim; e += 2 * L) {
    add_values<L, ROWS, 2>(weights, v + e, dim, num_keys, total + e);
  }
  for (; e < dim; e += L) {
    add_values<L, ROWS, 1>(weights, v + e, dim, num_keys, total + e);
  }
}

// Turns a row's scores of slots lo..hi of a block into weights, and rescales its state to the new peak.
// The scale comes after the difference to the peak, where it rounds least.
inline void weigh(const RowState& state, int64_t row, int64_t lo, int64_t hi, int64_t dim) {
  float* scores = state.scores + row * SCORE_STRIDE;
  const int64_t lo_vector = lo / WIDTH * WIDTH, hi_vector = (hi + WIDTH - 1) / WIDTH * WIDTH;
  std::fill(scores + lo_vector, scores + lo, -INFINITY);
  std::fill(scores + hi, scores + hi_vector, -INFINITY);
  Float<WIDTH> peaks = load<WIDTH>(scores + lo_vector);
  for (int64_t n = lo_vector + WIDTH; n < hi_vector; n += WIDTH) {
    const Float<WIDTH> x = load<WIDTH>(scores + n);
    peaks = x > peaks ? x : peaks;
  }
  float peak = state.peak[row];
  for (int lane = 0; lane < WIDTH; ++lane) {
    peak = peaks[lane] > peak ? peaks[lane] : peak;
  }
  Float<WIDTH> total{};
  for (int64_t n = lo_vector; n < hi_vector; n += WIDTH) {
    const Float<WIDTH> weight = exp2_of<WIDTH>((load<WIDTH>(scores + n) - peak) * state.scale);
    store<WIDTH>(scores + n, weight);
    total += weight;
  }
  const Float<4> lanes = fold<WIDTH>(total);
  const float sum = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  if (peak != state.peak[row]) {
    const float rescale = exp2_of((state.peak[row] - peak) * state.scale);
    state.sum[row] *= rescale;
    for (int64_t e = 0; e < dim; ++e) {
      state.total[row * dim + e] *= rescale;
    }
    state.peak[row] = peak;
  }
  state.sum[row] += sum;
}

// Slots lo..hi of a sequence, page by page: visit(first key, its slot, number of keys).
template <typename T, typename Visit>
inline void for_pages(
    const void* base, const PagedKeys& keys, int64_t sequence, const HeadShape& shape, int64_t lo, int64_t hi,
    Visit visit) {
  while (lo < hi) {
    const int64_t page = keys.table[sequence * keys.num_columns + lo / keys.page_slots];
    const int64_t slot = lo % keys.page_slots;
    const int64_t count = std::min(hi - lo, keys.page_slots - slot);
    visit(static_cast<const T*>(base) + ((page * shape.kv_heads + shape.kv_head) * keys.page_slots + slot) * shape.dim,
          lo, count);
    lo += count;
  }
}

template <int L, int ROWS, typename T>
inline void score_tile(
    const RowState& state, const PagedKeys& keys, int64_t sequence, const HeadShape& shape, int64_t row, int64_t block) {
  int64_t lo = INT64_MAX, hi = 0;
  for (int m = 0; m < ROWS; ++m) {
    lo = std::min(lo, state.first[row + m]);
    hi = std::max(hi, state.end[row + m]);
  }
  lo = std::max(lo, block), hi = std::min(hi, block + KEY_BLOCK);
  for_pages<T>(keys.k, keys, sequence, shape, lo, hi, [&](const T* k, int64_t slot, int64_t count) {
    score_keys<L, ROWS>(
        state.q + row * shape.dim, shape.dim, k, count, state.scores + row * SCORE_STRIDE + slot - block);
  });
}

template <int L, int ROWS, typename T>
inline void value_range(
    const RowState& state, const PagedKeys& keys, int64_t sequence, const HeadShape& shape, int64_t row, int64_t block,
    int64_t lo, int64_t hi) {
  for_pages<T>(keys.v, keys, sequence, shape, lo, hi, [&](const T* v, int64_t slot, int64_t count) {
    add_values<L, ROWS>(
        state.scores + row * SCORE_STRIDE + slot - block, v, shape.dim, count, state.total + row * shape.dim);
  });
}

// What all rows of the tile see goes through registers once; before and after it come the keys that only some see,
// row by row: a value that a row does not see is not read for it, so a NaN there is nobody's.
template <int L, int ROWS, typename T>
inline void value_tile(
    const RowState& state, const PagedKeys& keys, int64_t sequence, const HeadShape& shape, int64_t row, int64_t block) {
  int64_t lo[ROWS], hi[ROWS], common_lo = 0, common_hi = INT64_MAX;
  for (int m = 0; m < ROWS; ++m) {
    lo[m] = std::max(state.first[row + m], block);
    hi[m] = std::max(lo[m], std::min(state.end[row + m], block + KEY_BLOCK));
    common_lo = std::max(common_lo, lo[m]);
    common_hi = std::min(common_hi, hi[m]);
  }
  if (common_hi <= common_lo) {
    for (int m = 0; m < ROWS; ++m) {
      value_range<L, 1, T>(state, keys, sequence, shape, row + m, block, lo[m], hi[m]);
    }
    return;
  }
  for (int m = 0; m < ROWS; ++m) {
    value_range<L, 1, T>(state, keys, sequence, shape, row + m, block, lo[m], common_lo);
  }
  value_range<L, ROWS, T>(state, keys, sequence, shape, row, block, common_lo, common_hi);
  for (int m = 0; m < ROWS; ++m) {
    value_range<L, 1, T>(state, keys, sequence, shape, row + m, block, common_hi, hi[m]);
  }
}

// visit(row, tile) for rows in tiles of 4, 2 and 1.
template <typename Visit>
inline void for_tiles(int64_t first, int64_t end, Visit visit) {
  int64_t row = first;
  for (; row + 4 <= end; row += 4) {
    visit(row, std::integral_constant<int, 4>());
  }
  for (; row + 2 <= end; row += 2) {
    visit(row, std::integral_constant<int, 2>());
  }
  for (; row < end; ++row) {
    visit(row, std::integral_constant<int, 1>());
  }
}

// Rows first_row..end_row see slots first[row]..end[row] of one sequence.
template <int L, typename T>
inline void see(
    const RowState& state, const PagedKeys& keys, int64_t sequence, const HeadShape& shape, int64_t first_row,
    int64_t end_row) {
  const int64_t lo = *std::min_element(state.first + first_row, state.first + end_row);
  const int64_t hi = *std::max_element(state.end + first_row, state.end + end_row);
  for (int64_t block = lo / KEY_BLOCK * KEY_BLOCK; block < hi; block += KEY_BLOCK) {
    for_tiles(first_row, end_row, [&](int64_t row, auto rows) {
      score_tile<L, rows, T>(state, keys, sequence, shape, row, block);
    });
    for (int64_t row = first_row; row < end_row; ++row) {
      const int64_t row_lo = std::max(state.first[row], block), row_hi = std::min(state.end[row], block + KEY_BLOCK);
      if (row_lo < row_hi) {
        weigh(state, row, row_lo - block, row_hi - block, shape.dim);
      }
    }
    for_tiles(first_row, end_row, [&](int64_t row, auto rows) {
      value_tile<L, rows, T>(state, keys, sequence, shape, row, block);
    });
  }
}

inline void put(float* to, float value) {
  *to = value;
}

inline void put(uint16_t* to, float value) {
  *to = to_bf16(value);
}

template <int L, typename T>
void attend_tile(const AttentionInput& input, const TokenTile& tile, int64_t kv_head, const RowState& state, T* out) {
  const int64_t dim = input.head_dim, ratio = input.num_heads / input.num_kv_heads;
  const int64_t num_rows = (tile.end - tile.first) * ratio;
  const HeadShape shape{input.num_kv_heads, kv_head, dim};
  const auto row_of = [&](int64_t token) { return (token * input.num_kv_heads + kv_head) * ratio * dim; };
  for (int64_t token = tile.first; token < tile.end; ++token) {
    const T* q = static_cast<const T*>(input.q) + row_of(token);
    float* to = state.q + (token - tile.first) * ratio * dim;
    for (int64_t e = 0; e < ratio * dim; ++e) {
      to[e] = load<1>(q + e)[0];
    }
  }
  std::fill(state.total, state.total + num_rows * dim, 0.0f);
  std::fill(state.peak, state.peak + num_rows, -INFINITY);
  std::fill(state.sum, state.sum + num_rows, 0.0f);

  const auto sees = [&](int64_t token, int64_t newest, int64_t end) {  // slots within the window, before the end
    const int64_t first = input.window > 0 ? std::max<int64_t>(0, newest + 1 - input.window) : 0;
    std::fill_n(state.first + (token - tile.first) * ratio, ratio, std::min(first, end));
    std::fill_n(state.end + (token - tile.first) * ratio, ratio, end);
  };
  const int64_t prefix_len = input.prefix.lens[tile.group];
  const int64_t first_row_of_tile =
      std::upper_bound(input.cu_q, input.cu_q + input.num_rows + 1, tile.first) - input.cu_q - 1;
  if (prefix_len > 0) {
    for (int64_t token = tile.first, row = first_row_of_tile; token < tile.end; ++token) {
      while (token >= input.cu_q[row + 1]) {
        ++row;
      }
      sees(token, prefix_len + input.own.lens[row] + token - input.cu_q[row], prefix_len);
    }
    see<L, T>(state, input.prefix, tile.group, shape, 0, num_rows);
  }
  for (int64_t token = tile.first, row = first_row_of_tile; token < tile.end; ++row) {
    const int64_t first = token, end = std::min<int64_t>(tile.end, input.cu_q[row + 1]);
    for (; token < end; ++token) {
      const int64_t slot = input.own.lens[row] + token - input.cu_q[row];
      sees(token, slot, slot + 1);
    }
    if (first < end) {
      see<L, T>(state, input.own, row, shape, (first - tile.first) * ratio, (end - tile.first) * ratio);
    }
  }
  for (int64_t token = tile.first; token < tile.end; ++token) {
    for (int64_t r = 0; r < ratio; ++r) {
      const int64_t row = (token - tile.first) * ratio + r;
      const float inverse = 1.0f / state.sum[row];
      for (int64_t e = 0; e < dim; ++e) {
        put(out + row_of(token) + r * dim + e, state.total[row * dim + e] * inverse);
      }
    }
  }
}

template <typename T>
void attend_tile(const AttentionInput& input, const TokenTile& tile, int64_t kv_head, const RowState& state, void* out) {
  T* typed = static_cast<T*>(out);
  if (input.head_dim % WIDTH == 0) {
    attend_tile<WIDTH, T>(input, tile, kv_head, state, typed);
  } else if (input.head_dim % 4 == 0) {
    attend_tile<4, T>(input, tile, kv_head, state, typed);
  } else {
    attend_tile<1, T>(input, tile, kv_head, state, typed);
  }
}

void attend_tile(const AttentionInput& input, const TokenTile& tile, int64_t kv_head, const RowState& state, void* out) {
  if (input.is_bfloat16) {
    attend_tile<uint16_t>(input, tile, kv_head, state, out);
  } else {
    attend_tile<float>(input, tile, kv_head, state, out);
  }
}
