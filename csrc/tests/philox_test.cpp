// Tests of the torch-free Philox4x32-10; exits with the number of failures.
#include "../philox.h"

#include <vector>

#include "expect.h"

namespace {

using nrt_fast::PhiloxCounter;
using nrt_fast::PhiloxInput;

// One counter word at a time, as the paper has it: no blocks, no strides, no vectors.
double number(uint64_t key, uint32_t c3, uint32_t c2, uint32_t c1, uint32_t c0) {
  auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
  }
  return static_cast<double>((uint64_t{c0 >> 5} << 26) | (c1 >> 6)) * 0x1p-53;
}

double number_of(const PhiloxInput& input, int64_t index) {
  int64_t offset[3] = {0, 0, 0};
  const PhiloxCounter* const counters[3] = {&input.prompt, &input.trace, &input.position};
  for (int axis = nrt_fast::PHILOX_AXES - 1; axis >= 0; --axis) {
    for (int i = 0; i < 3; ++i) {
      offset[i] += index % input.size[axis] * counters[i]->stride[axis];
    }
    index /= input.size[axis];
  }
  uint32_t word[3];
  for (int i = 0; i < 3; ++i) {
    word[i] = static_cast<uint32_t>(counters[i]->data[offset[i]]);
  }
  return number(input.key, input.step, word[0], word[1], word[2]);
}

// philox4x32-10 in tests/kat_vectors of Random123 1.14; a number is made of the first two words.
void test_known_answers() {
  struct Known {
    int64_t counter[4];
    uint64_t key;
    uint32_t output[2];
  };
  const Known all_known[] = {
      {{0, 0, 0, 0}, 0, {0x6627E8D5, 0xE169C58D}},
      {{0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF}, 0xFFFFFFFFFFFFFFFF, {0x408F276D, 0x41C83B0E}},
      {{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}, 0x299F31D0A4093822, {0xD16CFE09, 0x94FDCCEB}},
  };
  for (const Known& known : all_known) {
    const int64_t* const counter = known.counter;
    const auto step = static_cast<uint32_t>(counter[3]);
    const PhiloxInput input{known.key, step, {1, 1, 1, 1}, {counter, {}}, {counter + 1, {}}, {counter + 2, {}}};
    double uniform = -1.0;
    nrt_fast::philox_uniform(input, 0, 1, &uniform);
    const uint64_t bits = (uint64_t{known.output[0] >> 5} << 26) | (known.output[1] >> 6);
    expect(uniform == static_cast<double>(bits) / 0x1p53, "a known answer");
  }
}

// Every number of a grid, at once and from any number to any other, is that of its own counters.
void test_broadcasting(const int64_t (&size)[4], bool strided) {
  const int64_t total = size[0] * size[1] * size[2] * size[3];
  // Exactly as long as the counters reach, for AddressSanitizer; some are negative or above 32 bits.
  const int64_t step = strided ? 3 : 1;
  const auto make = [](int64_t length, int64_t from) {
    std::vector<int64_t> counter(length);
    for (int64_t i = 0; i < length; ++i) {
      counter[i] = from + i * 0x30000001;
    }
    return counter;
  };
  const std::vector<int64_t> prompt = make((size[0] - 1) * step + 1, -2);
  const std::vector<int64_t> trace = make((size[1] * size[2] - 1) * step + 1, int64_t{1} << 40);
  const std::vector<int64_t> position = make(((size[0] - 1) * size[3] + size[3] - 1) * step + 1, 5);
  const PhiloxInput input{
      0xFEDCBA9876543210,
      0x80000001,
      {size[0], size[1], size[2], size[3]},
      {position.data(), {size[3] * step, 0, 0, step}},
      {trace.data(), {0, size[2] * step, step, 0}},
      {prompt.data(), {step, 0, 0, 0}}};
  for (const int64_t begin : {int64_t{0}, int64_t{1}, total / 3, total - 1}) {
    std::vector<double> uniform(total, -1.0);
    const int64_t end = begin ? total - total / 5 : total;
    nrt_fast::philox_uniform(input, begin, end, uniform.data());
    for (int64_t i = 0; i < total; ++i) {
      expect(uniform[i] == (begin <= i && i < end ? number_of(input, i) : -1.0), "a number of the grid");
    }
  }
}

void test_empty() {
  const PhiloxInput input{1, 2, {3, 0, 1, 4}, {nullptr, {}}, {nullptr, {}}, {nullptr, {}}};
  nrt_fast::philox_uniform(input, 0, 0, nullptr);
}

}  // namespace

int main() {
  test_known_answers();
  for (const bool strided : {false, true}) {
    test_broadcasting({1, 1, 1, 1}, strided);
    test_broadcasting({1, 1, 64, 8}, strided);
    test_broadcasting({2, 3, 4, 5}, strided);
    test_broadcasting({1, 1, 1, 1000}, strided);
    test_broadcasting({3, 1, 257, 1}, strided);
    test_broadcasting({5, 7, 1, 61}, strided);
  }
  test_empty();
  return failures();
}
