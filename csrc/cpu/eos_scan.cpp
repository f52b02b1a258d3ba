#include "dove/eos_scan.h"

#include <algorithm>

#include "dove/parallel.h"
#include "simd.h"

namespace dove::DOVE_ISA_NAMESPACE {
namespace {

// A thread gets at least so many multiply-adds: some 20 us.
constexpr int64_t kGrain = int64_t{1} << 18;
// Sums at a time: enough for the latency of an fma.
constexpr int kTogether = 4;

template <typename T>
float dot(const T* state, const float* weight, int64_t width) {
  Vec sums[kTogether] = {};
  int64_t c = 0;
  for (; c + kTogether * kLanes <= width; c += kTogether * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) {
      sums[i] = fma(load(state + c + i * kLanes), load(weight + c + i * kLanes), sums[i]);
    }
  }
  for (; c + kLanes <= width; c += kLanes) sums[0] = fma(load(state + c), load(weight + c), sums[0]);
  if (c < width) sums[1] = fma(load_part(state + c, width - c), load_part(weight + c, width - c), sums[1]);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
void scan(const EosScanParams& p) {
  const int64_t total = p.cu_seqlens[p.rows];
  const int64_t grain = kGrain * p.rows / std::max<int64_t>(total * p.width, 1) + 1;
  parallel_ranges(p.rows, grain, p.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t first = p.cu_seqlens[row], count = p.cu_seqlens[row + 1] - first, step = p.steps[row];
      int32_t length = step + count >= p.max_length ? p.max_length : 0;
      for (int32_t state = count; state-- > 0;) {
        const int64_t at = first + state;
        const float logit = dot(static_cast<const T*>(p.states) + at * p.state_stride, p.weight, p.width) + p.bias;
        p.logits[at] = logit;
        if (logit > p.limit) length = std::min(step + state + 1, p.max_length);
      }
      p.lengths[row] = length;
    }
  });
}

}  // namespace

void eos_scan(const EosScanParams& params) {
  with_element_type(params.dtype, [&](auto element) { scan<decltype(element)>(params); });
}

}  // namespace dove::DOVE_ISA_NAMESPACE
