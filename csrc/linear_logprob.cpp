#include "linear_logprob.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "softmax_tile.h"

namespace nrt_fast {
namespace {

constexpr int64_t kTile = 512;             // words of the vocabulary in a tile, a multiple of kPanel
constexpr int64_t kForwardRows = 2048;     // rows of a chunk: each chunk reads the weight once
constexpr int64_t kLossRows = 512;         // the same for the loss, where they allow it
constexpr int64_t kLogitBytes = 64 << 20;
constexpr int64_t kMaxSplits = 16;         // partial sums of grad_hidden, added in their order

// Calls make_worker() once on each thread, and what it returns with each task, on whichever thread is free.
template <typename MakeWorker>
void for_each_task(const Parallel& parallel, int64_t num_tasks, const MakeWorker& make_worker) {
  std::atomic<int64_t> next{0};
  parallel([&] {
    int64_t task = next++;
    if (task < num_tasks) {
      for (auto work = make_worker(); task < num_tasks; task = next++) {
        work(task);
      }
    }
  });
}

// Some rows and all that is known of them; arrays are padded to whole panels, with tokens of hidden state 0.
template <typename T>
class Chunk {
 public:
  Chunk(const LinearInput<T>& input, PanelProduct<T> product, int64_t max_rows)
      : input_(input), product_(product), depth_(round_up(input.D, kGroup<T>)), tiles_(ceil_div(input.V, kTile)),
        max_width_(round_up(max_rows, kPanel)), panels_(max_width_ * depth_), stats_(tiles_ * 3 * max_width_),
        rows_(kNumArrays * max_width_) {}

  int64_t first = 0, num_rows = 0;

  int64_t width() const { return round_up(num_rows, kPanel); }
  int64_t depth() const { return depth_; }
  int64_t num_tiles() const { return tiles_; }
  int64_t tile_rows(int64_t tile) const { return std::min(kTile, input_.V - tile * kTile); }

  float* inv_temperature() const { return rows_; }
  float* target_logit() const { return rows_ + max_width_; }  // times inv_temperature
  float* peak() const { return rows_ + 2 * max_width_; }
  float* logsum() const { return rows_ + 3 * max_width_; }
  float* entropy() const { return rows_ + 4 * max_width_; }
  float logprob(int64_t row) const { return (target_logit()[row] - peak()[row]) - logsum()[row]; }

  // Computes everything for rows [begin, end). Where logits is not null it keeps them: [tile, panel, kTile, kPanel].
  void compute(int64_t begin, int64_t end, const Parallel& parallel, float* logits);

 private:
  static constexpr int64_t kNumArrays = 5;

  void pack_hidden(int64_t panel);
  void add_tile(int64_t tile, int64_t panel, const T* weight, int64_t ld_weight, float* logits);
  void finish(int64_t panel);
  OnlineSoftmax stats(int64_t tile, int64_t panel) const {
    float* peak = stats_ + (tile * 3 * max_width_ + panel * kPanel);
    return {peak, peak + max_width_, peak + 2 * max_width_};
  }

  const LinearInput<T>& input_;
  PanelProduct<T> product_;
  int64_t depth_, tiles_, max_width_;
  Buffer<T> panels_;
  Buffer<float> stats_;
  Buffer<float> rows_;
};

template <typename T>
void Chunk<T>::compute(int64_t begin, int64_t end, const Parallel& parallel, float* logits) {
  first = begin;
  num_rows = end - begin;
  const int64_t num_panels = width() / kPanel;
  for_each_task(parallel, num_panels, [&] { return [&](int64_t panel) { pack_hidden(panel); }; });

  // A task is a tile and some panels: enough to bring the tile into the cache for, few enough to share out.
  constexpr int64_t kGroupOfPanels = 8;
  const int64_t num_groups = ceil_div(num_panels, kGroupOfPanels);
  for_each_task(parallel, tiles_ * num_groups, [&] {
    const bool padded = depth_ != input_.D;
    return [&, padded, scratch = Buffer<float>(logits ? 0 : kTile * kPanel),
            copy = Buffer<T>(padded ? kTile * depth_ : 0)](int64_t task) {
      const int64_t tile = task / num_groups, group = task % num_groups;
      const T* weight = input_.weight + tile * kTile * input_.ld_weight;
      for (int64_t v = 0; padded && v < tile_rows(tile); ++v) {
        std::copy_n(weight + v * input_.ld_weight, input_.D, copy + v * depth_);
        std::fill(copy + v * depth_ + input_.D, copy + (v + 1) * depth_, T(0));
      }
      const int64_t end_panel = std::min(num_panels, (group + 1) * kGroupOfPanels);
      for (int64_t panel = group * kGroupOfPanels; panel < end_panel; ++panel) {
        float* kept = logits ? logits + (tile * num_panels + panel) * kTile * kPanel : scratch;
        add_tile(tile, panel, padded ? copy : weight, padded ? depth_ : input_.ld_weight, kept);
      }
    };
  });
  for_each_task(parallel, num_panels, [&] { return [&](int64_t panel) { finish(panel); }; });
}

template <typename T>
void Chunk<T>::pack_hidden(int64_t panel) {
  const int64_t row = panel * kPanel, num = std::min(kPanel, num_rows - row);
  T* packed = panels_ + row * depth_;
  std::fill_n(packed, num < kPanel ? kPanel * depth_ : 0, T(0));
  pack_transposed(input_.hidden + (first + row) * input_.ld_hidden, input_.ld_hidden, input_.D, num, packed);
  std::fill_n(inv_temperature() + row, kPanel, 1.0f);
  if (input_.inv_temperature) {
    std::copy_n(input_.inv_temperature + first + row, num, inv_temperature() + row);
  }
  std::fill_n(target_logit() + row, kPanel, std::numeric_limits<float>::quiet_NaN());
}

template <typename T>
void Chunk<T>::add_tile(int64_t tile, int64_t panel, const T* weight, int64_t ld_weight, float* logits) {
  const int64_t row = panel * kPanel;
  multiply(product_, tile_rows(tile), kPanel, depth_, weight, ld_weight, panels_ + row * depth_, logits, kPanel, false);
  reduce_tile(logits, tile_rows(tile), inv_temperature() + row, stats(tile, panel));
  for (int64_t n = row; n < std::min(row + kPanel, num_rows); ++n) {
    const int64_t v = input_.target[first + n] - tile * kTile;
    if (v >= 0 && v < tile_rows(tile)) {
      target_logit()[n] = logits[v * kPanel + n - row] * inv_temperature()[n];
    }
  }
}

template <typename T>
void Chunk<T>::finish(int64_t panel) {
  const int64_t row = panel * kPanel;
  float total[kPanel], moment[kPanel];
  merge_tiles(stats(0, panel), 3 * max_width_, tiles_, {peak() + row, total, moment});
  for (int64_t n = 0; n < kPanel; ++n) {
    logsum()[row + n] = std::log(total[n]);
    entropy()[row + n] = logsum()[row + n] - moment[n] / total[n];
  }
}

// The gradients of a chunk of rows, given its logits.
template <typename T>
class Gradients {
 public:
  Gradients(const LinearInput<T>& input, PanelProduct<T> product, int64_t max_rows)
      : input_(input), product_(product), max_width_(round_up(max_rows, kPanel)), out_width_(round_up(input.D, kPanel)),
        num_splits_(std::min(kMaxSplits, ceil_div(input.V, kTile))), hidden_(max_width_ * out_width_),
        partial_(num_splits_ * max_width_ * input.D), slopes_(2 * max_width_) {}

  float* by_logprob() const { return slopes_; }
  float* by_entropy() const { return slopes_ + max_width_; }

  void compute(const Chunk<T>& chunk, const float* logits, const Parallel& parallel, const LossOutput<T>& output);

 private:
  struct Scratch {
    explicit Scratch(int64_t width, int64_t out_width)
        : block(kPanel * kPanel), rows(kTile * width), columns(width * kTile), weight(kTile * out_width) {}
    Buffer<float> block;  // of the gradient, fp32
    Buffer<T> rows;       // gradient of a tile, [kTile, width]
    Buffer<T> columns;    // its transpose
    Buffer<T> weight;     // panels of the tile's weight
  };

  void pack_hidden(const Chunk<T>& chunk, const Parallel& parallel);
  void differentiate(const Chunk<T>& chunk, int64_t tile, const float* logits, Scratch& scratch) const;
  void add_tile(
      const Chunk<T>& chunk, int64_t tile, bool add, Scratch& scratch, float* grad_hidden, float* grad_weight);
  void reduce(const Chunk<T>& chunk, const Parallel& parallel, T* grad_hidden) const;
  bool active(int64_t row) const { return by_logprob()[row] != 0.0f || by_entropy()[row] != 0.0f; }

  const LinearInput<T>& input_;
  PanelProduct<T> product_;
  int64_t max_width_, out_width_, num_splits_;
  Buffer<T> hidden_;       // panels of the chunk's hidden states
  Buffer<float> partial_;  // [split, row, D]
  Buffer<float> slopes_;
};

template <typename T>
void Gradients<T>::compute(
    const Chunk<T>& chunk, const float* logits, const Parallel& parallel, const LossOutput<T>& output) {
  pack_hidden(chunk, parallel);
  const int64_t num_tiles = chunk.num_tiles();
  for_each_task(parallel, num_splits_, [&] {
    return [&, scratch = Scratch(chunk.width(), out_width_)](int64_t split) mutable {
      const int64_t first = split * num_tiles / num_splits_, last = (split + 1) * num_tiles / num_splits_;
      for (int64_t tile = first; tile < last; ++tile) {
        differentiate(chunk, tile, logits + tile * kTile * chunk.width(), scratch);
        add_tile(chunk, tile, tile > first, scratch, partial_ + split * max_width_ * input_.D, output.grad_weight);
      }
    };
  });
  reduce(chunk, parallel, output.grad_hidden);
}

// Rows without a gradient count as 0 here, for 0 times what they may hold could be NaN.
template <typename T>
void Gradients<T>::pack_hidden(const Chunk<T>& chunk, const Parallel& parallel) {
  const T* source = input_.hidden + chunk.first * input_.ld_hidden;
  for_each_task(parallel, out_width_ / kPanel, [&] {
    return [&, copy = Buffer<T>(chunk.width() * kPanel)](int64_t panel) {
      const int64_t column = panel * kPanel, num_columns = std::min(kPanel, input_.D - column);
      for (int64_t n = 0; n < chunk.num_rows; ++n) {
        if (active(n)) {
          std::copy_n(source + n * input_.ld_hidden + column, num_columns, copy + n * kPanel);
        } else {
          std::fill_n(copy + n * kPanel, num_columns, T(0));
        }
      }
      pack(copy, kPanel, chunk.num_rows, num_columns, chunk.width(), hidden_ + column * chunk.width());
    };
  });
}

// The tile's gradient, rounded, in both orders; 0 beyond its last row.
template <typename T>
void Gradients<T>::differentiate(const Chunk<T>& chunk, int64_t tile, const float* logits, Scratch& scratch) const {
  const int64_t width = chunk.width(), num_rows = chunk.tile_rows(tile);
  for (int64_t n = 0; n < width; n += kPanel) {
    const LossSlope slope{
        chunk.inv_temperature() + n, chunk.peak() + n, chunk.logsum() + n, chunk.entropy() + n,
        by_logprob() + n, by_entropy() + n};
    for (int64_t v = 0; v < num_rows; v += kPanel) {
      const int64_t block_rows = std::min(kPanel, num_rows - v);
      gradient_tile(logits + n * kTile + v * kPanel, block_rows, slope, scratch.block);
      std::fill(scratch.block + block_rows * kPanel, scratch.block + kPanel * kPanel, 0.0f);
      for (int64_t lane = 0; lane < std::min(kPanel, chunk.num_rows - n); ++lane) {
        const int64_t target = input_.target[chunk.first + n + lane] - tile * kTile - v;
        if (target >= 0 && target < block_rows && active(n + lane)) {
          scratch.block[target * kPanel + lane] += by_logprob()[n + lane] * chunk.inv_temperature()[n + lane];
        }
      }
      round_block(scratch.block, scratch.rows + v * width + n, width, scratch.columns + n * kTile + v, kTile);
    }
  }
}

template <typename T>
void Gradients<T>::add_tile(
    const Chunk<T>& chunk, int64_t tile, bool add, Scratch& scratch, float* grad_hidden, float* grad_weight) {
  const int64_t D = input_.D, width = chunk.width(), num_rows = chunk.tile_rows(tile);
  const int64_t padded_rows = round_up(num_rows, kGroup<T>);
  if (grad_weight != nullptr) {
    multiply<T>(product_, num_rows, D, width, scratch.rows, width, hidden_, grad_weight + tile * kTile * D, D, true);
  }
  pack(input_.weight + tile * kTile * input_.ld_weight, input_.ld_weight, num_rows, D, padded_rows, scratch.weight);
  multiply<T>(product_, width, D, padded_rows, scratch.columns, kTile, scratch.weight, grad_hidden, D, add);
}

template <typename T>
void Gradients<T>::reduce(const Chunk<T>& chunk, const Parallel& parallel, T* grad_hidden) const {
  const int64_t D = input_.D;
  for_each_task(parallel, chunk.num_rows, [&] {
    return [&, sum = std::vector<float>(D)](int64_t row) mutable {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t split = 0; active(row) && split < num_splits_; ++split) {
        const float* part = partial_ + (split * max_width_ + row) * D;
        for (int64_t d = 0; d < D; ++d) {
          sum[d] += part[d];
        }
      }
      round_to(sum.data(), D, grad_hidden + (chunk.first + row) * D);
    };
  });
}

}  // namespace

template <typename T>
void linear_logprob(
    const LinearInput<T>& input, PanelProduct<T> product, const Parallel& parallel, const LogprobOutput& output) {
  Chunk<T> chunk(input, product, std::min(input.N, kForwardRows));
  for (int64_t first = 0; first < input.N; first += kForwardRows) {
    chunk.compute(first, std::min(input.N, first + kForwardRows), parallel, nullptr);
    for (int64_t n = 0; n < chunk.num_rows; ++n) {
      output.logprob[first + n] = chunk.logprob(n);
      if (output.logsumexp) {
        output.logsumexp[first + n] = chunk.peak()[n] + chunk.logsum()[n];
      }
      if (output.entropy) {
        output.entropy[first + n] = chunk.entropy()[n];
      }
    }
  }
}

template <typename T>
void linear_logprob_loss(
    const LinearInput<T>& input, const LossInput& loss, PanelProduct<T> product, const Parallel& parallel,
    const LossOutput<T>& output) {
  const int64_t column_bytes = sizeof(float) * round_up(input.V, kTile);
  const int64_t rows_that_fit = std::max(kPanel, kLogitBytes / column_bytes / kPanel * kPanel);
  const int64_t max_rows = std::min({input.N, kLossRows, rows_that_fit});
  Chunk<T> chunk(input, product, max_rows);
  Gradients<T> gradients(input, product, max_rows);
  const Buffer<float> logits(round_up(input.V, kTile) * round_up(max_rows, kPanel));
  double sum = 0.0;
  for (int64_t first = 0; first < input.N; first += max_rows) {
    chunk.compute(first, std::min(input.N, first + max_rows), parallel, logits);
    for (int64_t n = 0; n < chunk.width(); ++n) {
      TokenLoss token;
      if (n < chunk.num_rows) {
        const int64_t row = first + n;
        output.logprob[row] = chunk.logprob(n);
        output.entropy[row] = chunk.entropy()[n];
        token = token_loss(
            loss.terms,
            {loss.token_weight[row], loss.policy[row], loss.old_logprob ? loss.old_logprob + row : nullptr,
             loss.reference_logprob ? loss.reference_logprob + row : nullptr},
            output.logprob[row], output.entropy[row]);
      }
      sum += token.loss;
      gradients.by_logprob()[n] = token.by_logprob;
      gradients.by_entropy()[n] = token.by_entropy;
    }
    gradients.compute(chunk, logits, parallel, output);
  }
  *output.loss = static_cast<float>(sum);
}

template void linear_logprob(
    const LinearInput<float>&, PanelProduct<float>, const Parallel&, const LogprobOutput&);
template void linear_logprob(
    const LinearInput<uint16_t>&, PanelProduct<uint16_t>, const Parallel&, const LogprobOutput&);
template void linear_logprob_loss(
    const LinearInput<float>&, const LossInput&, PanelProduct<float>, const Parallel&, const LossOutput<float>&);
template void linear_logprob_loss(
    const LinearInput<uint16_t>&, const LossInput&, PanelProduct<uint16_t>, const Parallel&,
    const LossOutput<uint16_t>&);

}  // namespace nrt_fast
