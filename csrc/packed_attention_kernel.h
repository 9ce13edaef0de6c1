// The arithmetic of packed_attention.cpp, which includes this once per instruction set, in a namespace that defines
// WIDTH: the floats of a vector register. Rows in scratch memory are fp32, padded_dim floats apart, zero past the head.

#include "vector_lanes.h"

constexpr int ROWS = 6;  // of a block of a product that stays in registers
constexpr int VECTORS = WIDTH == 16 ? 4 : 2;  // registers of a row of it

template <int M, int N>
inline void product_block(
    int64_t K, const float* A, int64_t a_row, int64_t a_step, const float* B, int64_t ldb, float* C, int64_t ldc,
    bool add) {
  Float<WIDTH> sum[M][N];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      sum[m][n] = add ? load<WIDTH>(C + m * ldc + n * WIDTH) : Float<WIDTH>{};
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    Float<WIDTH> b[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      b[n] = load<WIDTH>(B + k * ldb + n * WIDTH);
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const float a = A[m * a_row + k * a_step];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        sum[m][n] += a * b[n];
      }
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      store<WIDTH>(C + m * ldc + n * WIDTH, sum[m][n]);
    }
  }
}

template <int M>
inline void product_rows(
    int64_t N, int64_t K, const float* A, int64_t a_row, int64_t a_step, const float* B, int64_t ldb, float* C,
    int64_t ldc, bool add) {
  int64_t n = 0;
  for (; n + VECTORS * WIDTH <= N; n += VECTORS * WIDTH) {
    product_block<M, VECTORS>(K, A, a_row, a_step, B + n, ldb, C + n, ldc, add);
  }
  const int64_t rest = (N - n) / WIDTH;
  if (rest == 3) {
    product_block<M, VECTORS == 4 ? 3 : 1>(K, A, a_row, a_step, B + n, ldb, C + n, ldc, add);
  } else if (rest == 2) {
    product_block<M, 2>(K, A, a_row, a_step, B + n, ldb, C + n, ldc, add);
  } else if (rest == 1) {
    product_block<M, 1>(K, A, a_row, a_step, B + n, ldb, C + n, ldc, add);
  }
}

// C[m][n] (+)= sum over k of A[m a_row + k a_step] B[k][n] for M <= ROWS rows and N columns, a multiple of WIDTH.
inline void product(
    int64_t M, int64_t N, int64_t K, const float* A, int64_t a_row, int64_t a_step, const float* B, int64_t ldb,
    float* C, int64_t ldc, bool add) {
  switch (M) {
    case 1: return product_rows<1>(N, K, A, a_row, a_step, B, ldb, C, ldc, add);
    case 2: return product_rows<2>(N, K, A, a_row, a_step, B, ldb, C, ldc, add);
    case 3: return product_rows<3>(N, K, A, a_row, a_step, B, ldb, C, ldc, add);
    case 4: return product_rows<4>(N, K, A, a_row, a_step, B, ldb, C, ldc, add);
    case 5: return product_rows<5>(N, K, A, a_row, a_step, B, ldb, C, ldc, add);
    default: return product_rows<ROWS>(N, K, A, a_row, a_step, B, ldb, C, ldc, add);
  }
}

template <int L>
inline float max_of(Float<L> x) {
  if constexpr (L == 16) {
    const Float<8> low = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
    const Float<8> high = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    return max_of<8>(low > high ? low : high);
  } else if constexpr (L == 8) {
    const Float<4> low = __builtin_shufflevector(x, x, 0, 1, 2, 3), high = __builtin_shufflevector(x, x, 4, 5, 6, 7);
    return max_of<4>(low > high ? low : high);
  } else {
    return std::max(std::max(x[0], x[1]), std::max(x[2], x[3]));
  }
}

template <int L>
inline float sum_of(Float<L> x) {
  const Float<4> lanes = fold<L>(x);
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

template <typename T>
inline void load_rows(
    const Strided& from, int64_t token, int64_t head, int64_t count, int64_t dim, int64_t padded, float* to) {
  constexpr int64_t AHEAD = 4;  // rows that lie too far apart for the CPU to guess the next one
  const T* x = static_cast<const T*>(from.data) + token * from.token + head * from.head;
  for (int64_t row = 0; row < count; ++row, x += from.token, to += padded) {
    int64_t e = 0;
    if (from.element == 1) {
      const char* later = reinterpret_cast<const char*>(row + AHEAD < count ? x + AHEAD * from.token : x);
      for (int64_t byte = 0; byte < dim * int64_t{sizeof(T)}; byte += 64) {
        __builtin_prefetch(later + byte);
      }
      for (; e + WIDTH <= dim; e += WIDTH) {
        store<WIDTH>(to + e, load<WIDTH>(x + e));
      }
    }
    for (; e < dim; ++e) {
      to[e] = load<1>(x + e * from.element)[0];
    }
    for (; e < padded; ++e) {
      to[e] = 0;
    }
  }
}

// Rows of one head into scratch memory.
inline void load_rows(
    const PackedInput& input, const Strided& from, int64_t token, int64_t head, int64_t count, float* to) {
  if (input.is_bfloat16) {
    load_rows<uint16_t>(from, token, head, count, input.head_dim, padded_dim(input), to);
  } else {
    load_rows<float>(from, token, head, count, input.head_dim, padded_dim(input), to);
  }
}

// The reverse, times a factor for each row.
template <typename Factor>
inline void store_rows(
    const PackedInput& input, const float* from, const Strided& to, int64_t token, int64_t head, int64_t count,
    Factor factor) {
  const int64_t dim = input.head_dim;
  for (int64_t row = 0; row < count; ++row, from += padded_dim(input)) {
    const int64_t at = (token + row) * to.token + head * to.head;
    const float times = factor(row);
    if (input.is_bfloat16) {
      uint16_t* x = static_cast<uint16_t*>(to.data) + at;
      for (int64_t e = 0; e < dim; ++e) {
        x[e] = to_bf16(from[e] * times);
      }
    } else {
      float* x = static_cast<float*>(to.data) + at;
      for (int64_t e = 0; e < dim; ++e) {
        x[e] = from[e] * times;
      }
    }
  }
}

// The transpose [padded_dim, TILE] of a tile's rows; rows up to the next whole register are zero.
inline void load_transposed(
    const PackedInput& input, const Strided& from, const Tile& tile, int64_t head, float* rows, float* transposed) {
  const int64_t padded = padded_dim(input), end = (tile.size + WIDTH - 1) / WIDTH * WIDTH;
  load_rows(input, from, tile.start, head, tile.size, rows);
  std::fill(rows + tile.size * padded, rows + end * padded, 0.0f);
  for (int64_t n = 0; n < end; n += kTransposed) {
    for (int64_t e = 0; e < padded; e += kTransposed) {
      transpose_block(
          reinterpret_cast<const char*>(rows + n * padded + e), padded * sizeof(float),
          reinterpret_cast<char*>(transposed + e * TILE + n), TILE * sizeof(float));
    }
  }
}

// Keys of a tile that rows first..end of a tile of queries see, as columns; lo rounded down and hi up to registers.
struct Columns {
  int64_t lo, hi;

  Columns(const PackedInput& input, const Tile& queries, const Tile& keys, int64_t first, int64_t end) {
    const int64_t position = queries.position - keys.position;
    lo = input.window > 0 ? std::max<int64_t>(0, position + first + 1 - input.window) : 0;
    hi = std::min(keys.size, position + end);
  }

  bool empty() const { return lo >= hi; }
  int64_t lo_vector() const { return lo / WIDTH * WIDTH; }
  int64_t hi_vector() const { return (hi + WIDTH - 1) / WIDTH * WIDTH; }
};

// What a row does not see of the columns that its block computes becomes -inf.
inline void hide(const Columns& seen, int64_t lo, int64_t hi, float* scores) {
  std::fill(scores + lo, scores + std::min(std::max(seen.lo, lo), hi), -INFINITY);
  std::fill(scores + std::max(lo, seen.hi), scores + hi, -INFINITY);
}

// Turns a row's scores into weights and rescales its state to the new peak.
inline void weigh(
    float scale, int64_t lo, int64_t hi, int64_t padded, float* scores, float* peak, float* sum, float* total) {
  Float<WIDTH> peaks = load<WIDTH>(scores + lo);
  for (int64_t n = lo + WIDTH; n < hi; n += WIDTH) {
    const Float<WIDTH> x = load<WIDTH>(scores + n);
    peaks = x > peaks ? x : peaks;
  }
  const float highest = max_of<WIDTH>(peaks);
  if (highest > *peak) {
    const float rescale = exp2_of((*peak - highest) * scale);
    *sum *= rescale;
    for (int64_t e = 0; e < padded; e += WIDTH) {
      store<WIDTH>(total + e, load<WIDTH>(total + e) * rescale);
    }
    *peak = highest;
  }
  Float<WIDTH> weights{};
  for (int64_t n = lo; n < hi; n += WIDTH) {
    const Float<WIDTH> weight = exp2_of<WIDTH>((load<WIDTH>(scores + n) - *peak) * scale);
    store<WIDTH>(scores + n, weight);
    weights += weight;
  }
  *sum += sum_of<WIDTH>(weights);
}

// Lets the rows of a head in a tile of queries see a tile of keys.
inline void see(const PackedInput& input, const Tile& queries, const Tile& keys, const Scratch& scratch, int64_t row) {
  const int64_t padded = padded_dim(input);
  const float scale = input.scale * LOG2_E;
  for (int64_t first = 0; first < queries.size; first += ROWS) {
    const int64_t end = std::min(first + ROWS, queries.size), count = end - first;
    const Columns seen(input, queries, keys, first, end);
    if (seen.empty()) {
      continue;
    }
    const int64_t lo = seen.lo_vector(), hi = seen.hi_vector();
    float* total = scratch.total + (row + first) * padded;
    product(count, hi - lo, input.head_dim, scratch.q + (row + first) * padded, padded, 1,
            scratch.keys_transposed + lo, TILE, scratch.weights + lo, SCORE_STRIDE, false);
    for (int64_t m = 0; m < count; ++m) {
      float* scores = scratch.weights + m * SCORE_STRIDE;
      const Columns mine(input, queries, keys, first + m, first + m + 1);
      if (mine.empty()) {
        std::fill(scores + lo, scores + hi, 0.0f);
        continue;
      }
      hide(mine, lo, hi, scores);
      weigh(scale, lo, hi, padded, scores, scratch.peak + row + first + m, scratch.sum + row + first + m,
            total + m * padded);
    }
    product(count, padded, seen.hi - seen.lo, scratch.weights + seen.lo, SCORE_STRIDE, 1,
            scratch.values + seen.lo * padded, padded, total, padded, true);
  }
}

// The result of an item's queries, and what is kept of their softmax.
void attend(
    const PackedInput& input, const Plan& plan, const Item& item, const Scratch& scratch, Strided out,
    SoftmaxStats stats) {
  const int64_t ratio = input.num_heads / input.num_kv_heads, padded = padded_dim(input);
  const auto for_heads = [&](auto visit) {  // (tile, head, first row in scratch memory)
    for (int64_t t = item.first; t < item.end; ++t) {
      for (int64_t r = 0; r < ratio; ++r) {
        visit(plan.tiles[t], item.kv_head * ratio + r, ((t - item.first) * ratio + r) * TILE);
      }
    }
  };
  for_heads([&](const Tile& tile, int64_t head, int64_t row) {
    load_rows(input, input.q, tile.start, head, tile.size, scratch.q + row * padded);
    std::fill_n(scratch.total + row * padded, tile.size * padded, 0.0f);
    std::fill_n(scratch.peak + row, tile.size, -INFINITY);
    std::fill_n(scratch.sum + row, tile.size, 0.0f);
  });
  plan.for_keys(item.first, item.end, [&](int64_t k) {
    const Tile& keys = plan.tiles[k];
    load_transposed(input, input.k, keys, item.kv_head, scratch.keys, scratch.keys_transposed);
    load_rows(input, input.v, keys.start, item.kv_head, keys.size, scratch.values);
    for (int64_t t = std::max(item.first, k); t < item.end; ++t) {
      for (int64_t r = 0; plan.sees(t, k, input.window) && r < ratio; ++r) {
        see(input, plan.tiles[t], keys, scratch, ((t - item.first) * ratio + r) * TILE);
      }
    }
  });
  for_heads([&](const Tile& tile, int64_t head, int64_t row) {
    store_rows(input, scratch.total + row * padded, out, tile.start, head, tile.size,
               [&](int64_t m) { return 1.0f / scratch.sum[row + m]; });
    std::copy_n(scratch.peak + row, tile.size, stats.peak + head * input.num_tokens + tile.start);
    std::copy_n(scratch.sum + row, tile.size, stats.sum + head * input.num_tokens + tile.start);
  });
}

// The rows of a head in a tile of queries on their way back: q, its gradient, grad, and of each row the inverse of its
// sum and the dot product of grad and out.
inline void load_queries(
    const PackedInput& input, const SoftmaxStats& stats, const PackedGradients& gradients, const Tile& tile,
    int64_t head, const Scratch& scratch, int64_t row) {
  const int64_t padded = padded_dim(input), at = head * input.num_tokens + tile.start;
  float *grad = scratch.grad + row * padded, *out = scratch.total + row * padded;
  load_rows(input, input.q, tile.start, head, tile.size, scratch.q + row * padded);
  load_rows(input, gradients.grad, tile.start, head, tile.size, grad);
  load_rows(input, gradients.out, tile.start, head, tile.size, out);
  for (int64_t m = 0; m < tile.size; ++m) {
    Float<WIDTH> dot{};
    for (int64_t e = 0; e < padded; e += WIDTH) {
      dot += load<WIDTH>(grad + m * padded + e) * load<WIDTH>(out + m * padded + e);
    }
    scratch.dot[row + m] = sum_of<WIDTH>(dot);
    scratch.peak[row + m] = stats.peak[at + m];
    scratch.sum[row + m] = 1.0f / stats.sum[at + m];
  }
  std::fill_n(out, tile.size * padded, 0.0f);  // becomes the gradient of q
}

// Weights, and gradients of scores, of some rows: both [rows, SCORE_STRIDE], 0 where a row does not see.
inline void weigh_back(
    const PackedInput& input, const Tile& queries, const Tile& keys, const Scratch& scratch, int64_t row, int64_t first,
    int64_t end, const Columns& seen) {
  const int64_t padded = padded_dim(input), lo = seen.lo_vector(), hi = seen.hi_vector();
  const int64_t whole = (keys.size + WIDTH - 1) / WIDTH * WIDTH;
  float *weights = scratch.weights + first * SCORE_STRIDE, *grads = scratch.grad_scores + first * SCORE_STRIDE;
  product(end - first, hi - lo, input.head_dim, scratch.q + (row + first) * padded, padded, 1,
          scratch.keys_transposed + lo, TILE, weights + lo, SCORE_STRIDE, false);
  product(end - first, hi - lo, input.head_dim, scratch.grad + (row + first) * padded, padded, 1,
          scratch.values_transposed + lo, TILE, grads + lo, SCORE_STRIDE, false);
  for (int64_t m = first; m < end; ++m, weights += SCORE_STRIDE, grads += SCORE_STRIDE) {
    const float peak = scratch.peak[row + m], inverse = scratch.sum[row + m], dot = scratch.dot[row + m];
    hide(Columns(input, queries, keys, m, m + 1), lo, hi, weights);
    for (int64_t n = lo; n < hi; n += WIDTH) {
      const Float<WIDTH> power = exp2_of<WIDTH>((load<WIDTH>(weights + n) - peak) * (input.scale * LOG2_E));
      const Float<WIDTH> weight = power * inverse;
      store<WIDTH>(weights + n, weight);
      store<WIDTH>(grads + n, weight * (load<WIDTH>(grads + n) - dot));
    }
    std::fill(weights, weights + lo, 0.0f);
    std::fill(weights + hi, weights + whole, 0.0f);
    std::fill(grads, grads + lo, 0.0f);
    std::fill(grads + hi, grads + whole, 0.0f);
  }
}

// What a head's rows in a tile of queries and a tile of keys give to each other's gradients.
template <bool OF_QUERIES, bool OF_KEYS>
inline void see_back(
    const PackedInput& input, const Tile& queries, const Tile& keys, const Scratch& scratch, int64_t row) {
  const int64_t padded = padded_dim(input), position = keys.position - queries.position;
  for (int64_t first = 0; first < queries.size; first += ROWS) {
    const int64_t end = std::min(first + ROWS, queries.size);
    const Columns seen(input, queries, keys, first, end);
    if (seen.empty()) {
      continue;
    }
    weigh_back(input, queries, keys, scratch, row, first, end, seen);
    if (OF_QUERIES) {
      product(end - first, padded, seen.hi - seen.lo, scratch.grad_scores + first * SCORE_STRIDE + seen.lo,
              SCORE_STRIDE, 1, scratch.keys + seen.lo * padded, padded,
              scratch.total + (row + first) * padded, padded, true);
    }
  }
  for (int64_t first = 0; OF_KEYS && first < keys.size; first += ROWS) {
    const int64_t end = std::min(first + ROWS, keys.size);
    const int64_t lo = std::max<int64_t>(0, position + first);  // the rows that see some of these keys
    const int64_t hi = input.window > 0 ? std::min(queries.size, position + end - 1 + input.window) : queries.size;
    if (lo < hi) {
      product(end - first, padded, hi - lo, scratch.weights + lo * SCORE_STRIDE + first, 1, SCORE_STRIDE,
              scratch.grad + (row + lo) * padded, padded, scratch.grad_values + first * padded, padded, true);
      product(end - first, padded, hi - lo, scratch.grad_scores + lo * SCORE_STRIDE + first, 1, SCORE_STRIDE,
              scratch.q + (row + lo) * padded, padded, scratch.grad_keys + first * padded, padded, true);
    }
  }
}

inline void load_keys(const PackedInput& input, const Tile& keys, int64_t kv_head, const Scratch& scratch) {
  const int64_t size = keys.size * padded_dim(input);
  load_transposed(input, input.v, keys, kv_head, scratch.keys, scratch.values_transposed);
  load_transposed(input, input.k, keys, kv_head, scratch.keys, scratch.keys_transposed);
  std::fill_n(scratch.grad_keys, size, 0.0f);
  std::fill_n(scratch.grad_values, size, 0.0f);
}

inline void store_keys(
    const PackedInput& input, const PackedGradients& gradients, const Tile& keys, int64_t kv_head,
    const Scratch& scratch) {
  store_rows(input, scratch.grad_keys, gradients.k, keys.start, kv_head, keys.size,
             [&](int64_t) { return input.scale; });
  store_rows(input, scratch.grad_values, gradients.v, keys.start, kv_head, keys.size, [](int64_t) { return 1.0f; });
}

// The gradients of an item's queries and, where it is a whole group, of its keys.
template <bool OF_KEYS>
void go_back(
    const PackedInput& input, const Plan& plan, const Item& item, const Scratch& scratch, const SoftmaxStats& stats,
    const PackedGradients& gradients) {
  const int64_t ratio = input.num_heads / input.num_kv_heads, padded = padded_dim(input);
  const auto for_heads = [&](auto visit) {
    for (int64_t t = item.first; t < item.end; ++t) {
      for (int64_t r = 0; r < ratio; ++r) {
        visit(plan.tiles[t], item.kv_head * ratio + r, ((t - item.first) * ratio + r) * TILE);
      }
    }
  };
  for_heads([&](const Tile& tile, int64_t head, int64_t row) {
    load_queries(input, stats, gradients, tile, head, scratch, row);
  });
  plan.for_keys(item.first, item.end, [&](int64_t k) {
    load_keys(input, plan.tiles[k], item.kv_head, scratch);
    for (int64_t t = std::max(item.first, k); t < item.end; ++t) {
      for (int64_t r = 0; plan.sees(t, k, input.window) && r < ratio; ++r) {
        see_back<true, OF_KEYS>(input, plan.tiles[t], plan.tiles[k], scratch, ((t - item.first) * ratio + r) * TILE);
      }
    }
    if (OF_KEYS) {
      store_keys(input, gradients, plan.tiles[k], item.kv_head, scratch);
    }
  });
  for_heads([&](const Tile& tile, int64_t head, int64_t row) {
    store_rows(input, scratch.total + row * padded, gradients.q, tile.start, head, tile.size,
               [&](int64_t) { return input.scale; });
  });
}

// The gradients of the keys in one tile, from all queries that see them.
void go_back_to_keys(
    const PackedInput& input, const Plan& plan, const Item& item, const Scratch& scratch, const SoftmaxStats& stats,
    const PackedGradients& gradients) {
  const int64_t ratio = input.num_heads / input.num_kv_heads, k = item.first;
  load_keys(input, plan.tiles[k], item.kv_head, scratch);
  for (int64_t t = k; t < plan.groups[plan.tiles[k].group].end; ++t) {
    for (int64_t r = 0; plan.sees(t, k, input.window) && r < ratio; ++r) {
      load_queries(input, stats, gradients, plan.tiles[t], item.kv_head * ratio + r, scratch, 0);
      see_back<false, true>(input, plan.tiles[t], plan.tiles[k], scratch, 0);
    }
  }
  store_keys(input, gradients, plan.tiles[k], item.kv_head, scratch);
}

void attend_back(
    const PackedInput& input, const Plan& plan, const Item& item, const Scratch& scratch, const SoftmaxStats& stats,
    const PackedGradients& gradients) {
  switch (item.part) {
    case Part::all: return go_back<true>(input, plan, item, scratch, stats, gradients);
    case Part::queries: return go_back<false>(input, plan, item, scratch, stats, gradients);
    case Part::keys: return go_back_to_keys(input, plan, item, scratch, stats, gradients);
  }
}
