#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

// For the CPU kernels alone: compiled once per ISA, like them.
namespace dove::DOVE_ISA_NAMESPACE {

// Calls body(begin, end) for ranges that cover [0, count) once, on up to `threads` threads with `grain` or more items
// each. body must not throw; where memory for its scratch is out, the process ends.
template <typename Body>
void parallel_ranges(int64_t count, int64_t grain, int threads, const Body& body) {
  const int64_t ranges = std::min<int64_t>(count / std::max<int64_t>(grain, 1), threads);
#ifdef _OPENMP
  if (ranges > 1) {
    const int64_t size = count / ranges, rest = count % ranges;
#pragma omp parallel for num_threads(static_cast<int>(ranges)) schedule(static, 1)
    for (int64_t range = 0; range < ranges; ++range) {
      const int64_t begin = range * size + std::min(range, rest);
      body(begin, begin + size + (range < rest ? 1 : 0));
    }
    return;
  }
#else
  (void)ranges;
#endif
  if (count > 0) body(0, count);
}

// Calls body(next) on up to `threads` threads; next() gives each of 0 .. count - 1 once, to whoever asks first, and
// then -1. For items of unequal size. body must not throw.
template <typename Body>
void parallel_items(int64_t count, int threads, const Body& body) {
  std::atomic<int64_t> taken{0};
  const auto next = [&] {
    const int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
    return item < count ? item : int64_t{-1};
  };
#ifdef _OPENMP
  const int used = static_cast<int>(std::min<int64_t>(count, threads));
  if (used > 1) {
#pragma omp parallel num_threads(used)
    body(next);
    return;
  }
#else
  (void)threads;
#endif
  body(next);
}

}  // namespace dove::DOVE_ISA_NAMESPACE
