// What a packed batch takes from the step's arrays, free of torch; the same code on the host and, by nvcc, on a GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NRT_FAST_HOST_DEVICE __host__ __device__
#else
#define NRT_FAST_HOST_DEVICE
#endif

namespace nrt_fast {

// The step's prompts and loss tokens, and the batch's indices into them.
struct GatherInput {
  const int64_t* prompt_ids;  // [num_prompt_tokens]
  int64_t num_prompt_tokens;
  const int64_t* targets;  // this and the next four: [num_loss_tokens]
  const float* inv_temperature;
  const float* weight;
  const float* old_logprobs;
  const int8_t* kind;
  int64_t num_loss_tokens;
  const int64_t* source;  // [num_tokens] into cat(prompt_ids, targets)
  int64_t num_tokens;
  const int64_t* rows;  // [num_rows] into the loss tokens
  int64_t num_rows;
};

struct GatherOutput {
  int64_t* tokens;   // [num_tokens]
  int64_t* targets;  // this and the next four: [num_rows]
  float* inv_temperature;
  float* weight;
  float* old_logprobs;
  int8_t* kind;
};

// Elements to write: the tokens first, then the rows.
inline NRT_FAST_HOST_DEVICE int64_t gather_size(const GatherInput& input) {
  return input.num_tokens + input.num_rows;
}

// Writes one of them; false, and nothing written, if its index is out of range.
inline NRT_FAST_HOST_DEVICE bool gather_element(const GatherInput& input, const GatherOutput& output, int64_t element) {
  if (element < input.num_tokens) {
    const int64_t source = input.source[element];
    const int64_t target = source - input.num_prompt_tokens;
    if (source < 0 || target >= input.num_loss_tokens) {
      return false;
    }
    output.tokens[element] = target < 0 ? input.prompt_ids[source] : input.targets[target];
    return true;
  }
  element -= input.num_tokens;
  const int64_t row = input.rows[element];
  if (row < 0 || row >= input.num_loss_tokens) {
    return false;
  }
  output.targets[element] = input.targets[row];
  output.inv_temperature[element] = input.inv_temperature[row];
  output.weight[element] = input.weight[row];
  output.old_logprobs[element] = input.old_logprobs[row];
  output.kind[element] = input.kind[row];
  return true;
}

// All of them on the host; throws std::invalid_argument at an index out of range.
void pack_gather(const GatherInput& input, const GatherOutput& output);

}  // namespace nrt_fast
