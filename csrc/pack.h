// Packing of prompt groups into micro-batches, free of torch: raw pointers and sizes, CPU memory.
// Bad input throws std::invalid_argument before anything is written.
#pragma once

#include <cstdint>
#include <vector>

namespace nrt_fast {

// Best-fit-decreasing bin packing. Costs are taken from the largest to the smallest (in order among equals), each into
// the open bin with the least room that suffices, the lowest-numbered one among equals. Bins count from 0 in order of
// opening. O(M log M).
//   cost  [num_costs], each in 1..budget
//   bin   [num_costs], written
void pack_bins(const int64_t* cost, int64_t num_costs, int64_t budget, int64_t* bin);

// The prompts, the loss tokens of all traces, and which of them make up this batch.
struct PackInput {
  const int64_t* entries;  // [num_entries, 3]: prompt, first trace, end trace
  int64_t num_entries;
  const int64_t* cu_prompts;  // [num_prompts + 1] token offsets, from 0
  int64_t num_prompts;
  const int64_t* cu_traces;  // [num_traces + 1] offsets of loss tokens, from 0
  int64_t num_traces;
};

struct PackSize {
  int64_t num_tokens;       // T
  int64_t num_segments;     // S
  int64_t num_loss_tokens;  // A
};

// Where pack_index writes; the lengths are those of PackSize.
struct PackOutput {
  int64_t* source;      // [T] into cat(prompt tokens, loss tokens)
  int64_t* positions;   // [T]
  int32_t* cu_seqlens;  // [S + 1]
  int64_t* hidden;      // [A] into T: the token whose hidden state predicts a loss token
  int64_t* rows;        // [A] into the loss tokens
};

// Checks the input and counts what pack_index will write before each entry and, last, in all: [num_entries + 1].
std::vector<PackSize> pack_sizes(const PackInput& input);

// Lays out, entry after entry, the prompt and then the inputs of its traces: their loss tokens without the last one.
// Writes the part of the entries from begin to end, apart from that of all others; cu_seqlens[S] comes with the last.
//   sizes  the input's pack_sizes
void pack_index(
    const PackInput& input, const std::vector<PackSize>& sizes, int64_t begin, int64_t end, const PackOutput& output);

}  // namespace nrt_fast
