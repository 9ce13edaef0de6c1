#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vector_math.h"

namespace nrt_fast {
namespace {

constexpr int64_t BLOCK = 512;  // logits of a record: 2 KiB, read twice from the first-level cache
constexpr int64_t LANES = 64;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

struct Record {
  float peak;
  float total;
  float drawn;
  double scale;  // of the sums in the row, once its peak is known
};

ALWAYS_INLINE float peak_of(const float* x, int64_t size) {
  float peaks[LANES];
  std::fill(peaks, peaks + LANES, -INFINITE);
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    for (int64_t lane = 0; lane < LANES; ++lane) {
      peaks[lane] = x[i + lane] > peaks[lane] ? x[i + lane] : peaks[lane];
    }
  }
  float peak = *std::max_element(peaks, peaks + LANES);
  for (; i < size; ++i) {
    peak = x[i] > peak ? x[i] : peak;
  }
  return peak;
}

// The sum of `size` masses that zeros fill up to a multiple of LANES.
ALWAYS_INLINE float sum_of(const float* mass, int64_t size) {
  float sums[LANES] = {};
  for (int64_t i = 0; i < size; i += LANES) {
    for (int64_t lane = 0; lane < LANES; ++lane) {
      sums[lane] += mass[i + lane];
    }
  }
  float sum = 0.0f;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    sum += sums[lane];
  }
  return sum;
}

VECTOR_CLONES void write_masses(const float* x, int64_t size, float shift, float inv_temperature, float* mass) {
  for (int64_t i = 0; i < size; ++i) {
    mass[i] = exp_of((x[i] - shift) * inv_temperature);
  }
}

// Ids with a logit under the floor have no mass.
VECTOR_CLONES void cut_masses(const float* x, int64_t size, float floor, float* mass) {
  for (int64_t i = 0; i < size; ++i) {
    mass[i] = x[i] >= floor ? mass[i] : 0.0f;
  }
}

VECTOR_CLONES Record record_of(const float* x, int64_t size, float inv_temperature, const float* floor) {
  float mass[BLOCK];
  const float peak = peak_of(x, size);
  write_masses(x, size, finite_peak(peak), inv_temperature, mass);
  std::fill(mass + size, mass + (size + LANES - 1) / LANES * LANES, 0.0f);
  const float total = sum_of(mass, size);
  if (floor) {
    cut_masses(x, size, *floor, mass);
  }
  return {peak, total, floor ? sum_of(mass, size) : total, 0.0};
}

struct Found {
  int64_t index;  // -1: there is no mass
  double before;  // the sum of what lies in front of it
};

// The first index at which the prefix sum passes the threshold; the last one with mass if rounding lets none pass.
template <typename Mass>
Found find(Mass mass, int64_t size, double threshold) {
  Found found{-1, 0.0};
  double through = 0.0;
  for (int64_t i = 0; i < size; ++i) {
    const double here = mass(i);
    if (here > 0.0) {
      found = {i, through};
      through += here;
      if (through > threshold) {
        break;
      }
    }
  }
  return found;
}

}  // namespace

void sample_logprob(const SampleInput& input, int64_t begin, int64_t end, int64_t* ids, float* logprob) {
  const int64_t num_ids = input.num_ids;
  const float inv_temperature = static_cast<float>(input.temperature == 0.0 ? 1.0 : 1.0 / input.temperature);
  std::vector<Record> records((num_ids + BLOCK - 1) / BLOCK);
  const int64_t num_records = static_cast<int64_t>(records.size());
  for (int64_t row = begin; row < end; ++row) {
    const float* logits = input.logits + row * num_ids;
    const float* floor = input.floor ? input.floor + row : nullptr;
    float peak = -INFINITE;
    for (int64_t i = 0; i < num_records; ++i) {
      records[i] = record_of(logits + i * BLOCK, std::min(BLOCK, num_ids - i * BLOCK), inv_temperature, floor);
      peak = std::max(peak, records[i].peak);
    }
    double total = 0.0;
    double drawn = 0.0;
    for (Record& record : records) {
      record.scale = std::exp((double(record.peak) - peak) * inv_temperature);
      total += record.total * record.scale;
      drawn += record.drawn * record.scale;
    }
    ids[row] = 0;
    if (!(total > 0.0 && std::isfinite(total))) {
      logprob[row] = std::numeric_limits<float>::quiet_NaN();
      continue;
    }
    if (input.temperature == 0.0) {
      const auto block =
          std::find_if(records.begin(), records.end(), [peak](const Record& record) { return record.peak == peak; });
      ids[row] = std::find(logits + (block - records.begin()) * BLOCK, logits + num_ids, peak) - logits;
    } else {
      const double threshold = input.uniform[row] * drawn;
      const auto [block, before] =
          find([&](int64_t i) { return records[i].drawn * records[i].scale; }, num_records, threshold);
      if (block >= 0) {
        float mass[BLOCK];
        const int64_t start = block * BLOCK;
        const int64_t size = std::min(BLOCK, num_ids - start);
        write_masses(logits + start, size, records[block].peak, inv_temperature, mass);
        if (floor) {
          cut_masses(logits + start, size, *floor, mass);
        }
        const double rest = (threshold - before) / records[block].scale;
        ids[row] = start + find([&](int64_t i) { return double(mass[i]); }, size, rest).index;
      }
    }
    logprob[row] = static_cast<float>((double(logits[ids[row]]) - peak) * inv_temperature - std::log(total));
  }
}

}  // namespace nrt_fast
