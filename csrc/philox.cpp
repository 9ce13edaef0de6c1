#include "philox.h"

#include <algorithm>

#include "vector_clones.h"

namespace nrt_fast {
namespace {

constexpr int64_t BLOCK = 256;  // numbers whose counters are gathered, then encrypted side by side

struct Words {
  uint32_t position[BLOCK], trace[BLOCK], prompt[BLOCK];
};

// Low 32 bits of the counters of `size` numbers from `begin` on, in rows of the last axis.
void gather(
    const PhiloxCounter& counter, const int64_t* sizes, int64_t begin, int64_t size, uint32_t* __restrict words) {
  int64_t index[PHILOX_AXES], offset = 0;
  for (int axis = PHILOX_AXES - 1; axis >= 0; --axis) {
    index[axis] = begin % sizes[axis];
    begin /= sizes[axis];
    offset += index[axis] * counter.stride[axis];
  }
  constexpr int LAST = PHILOX_AXES - 1;
  const int64_t stride = counter.stride[LAST];
  for (int64_t done = 0; done < size;) {
    const int64_t row = std::min(sizes[LAST] - index[LAST], size - done);
    for (int64_t i = 0; i < row; ++i) {
      words[done + i] = static_cast<uint32_t>(counter.data[offset + i * stride]);
    }
    done += row;
    offset += row * stride;
    index[LAST] += row;
    for (int axis = LAST; axis > 0 && index[axis] == sizes[axis]; --axis) {
      offset += counter.stride[axis - 1] - sizes[axis] * counter.stride[axis];
      index[axis] = 0;
      ++index[axis - 1];
    }
  }
}

// Words in 64 bits, of which the low halves count: so the products are those of vector units.
ALWAYS_INLINE double number(uint64_t c0, uint64_t c1, uint64_t c2, uint64_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = 0xD2511F53 * (c0 & 0xFFFFFFFF), product1 = 0xCD9E8D57 * (c2 & 0xFFFFFFFF);
    c0 = (product1 >> 32) ^ c1 ^ k0;
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ k1;
    c3 = product0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  // 27 and 26 bits: each fits the signed numbers that every vector unit converts, and the sum is exact.
  const auto high = static_cast<int32_t>(static_cast<uint32_t>(c0) >> 5);
  const auto low = static_cast<int32_t>(static_cast<uint32_t>(c1) >> 6);
  return high * 0x1p-27 + low * 0x1p-53;
}

VECTOR_CLONES
void encrypt(const Words& words, uint64_t key, uint32_t step, int64_t size, double* __restrict uniform) {
  const auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int64_t i = 0; i < size; ++i) {
    uniform[i] = number(words.position[i], words.trace[i], words.prompt[i], step, k0, k1);
  }
}

}  // namespace

void philox_uniform(const PhiloxInput& input, int64_t begin, int64_t end, double* uniform) {
  Words words;
  for (; begin < end; begin += BLOCK) {
    const int64_t size = std::min(BLOCK, end - begin);
    gather(input.position, input.size, begin, size, words.position);
    gather(input.trace, input.size, begin, size, words.trace);
    gather(input.prompt, input.size, begin, size, words.prompt);
    encrypt(words, input.key, input.step, size, uniform + begin);
  }
}

}  // namespace nrt_fast
