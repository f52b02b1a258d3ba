#include "dove/pack.h"

#include <algorithm>
#include <cstring>

#include "dove/parallel.h"

namespace dove::DOVE_ISA_NAMESPACE {
namespace {

// A thread gets at least so many bytes to write: about 25 us of copying, several times what it costs to wake it.
constexpr int64_t kGrainBytes = int64_t{1} << 18;

int64_t grain_entries(const PackParams& p) { return kGrainBytes / p.entry_bytes + 1; }

// The row that holds the entry at `position` of values: the last one that starts at or before it, past empty rows.
int64_t find_row(const PackParams& p, int64_t position) {
  return std::upper_bound(p.cu_seqlens, p.cu_seqlens + p.batch + 1, position) - p.cu_seqlens - 1;
}

}  // namespace

void pack(const PackParams& p) {
  if (p.entry_bytes == 0) return;
  const auto* padded = static_cast<const char*>(p.source);
  auto* values = static_cast<char*>(p.target);
  parallel_ranges(p.total, grain_entries(p), p.num_threads, [&](int64_t begin, int64_t end) {
    int64_t row = find_row(p, begin);
    for (int64_t position = begin; position < end; ++row) {
      const int64_t first = p.cu_seqlens[row];
      const int64_t stop = std::min<int64_t>(end, p.cu_seqlens[row + 1]);
      const int64_t copied = std::max(position, std::min(stop, first + p.length));
      // Where nothing is left of the row there may be no such address, or no memory at all.
      if (copied > position) {
        const char* source = padded + row * p.row_stride + (position - first) * p.entry_stride;
        if (p.entry_stride == p.entry_bytes) {
          std::memcpy(values + position * p.entry_bytes, source, (copied - position) * p.entry_bytes);
        } else {
          for (int64_t entry = position; entry < copied; ++entry, source += p.entry_stride) {
            std::memcpy(values + entry * p.entry_bytes, source, p.entry_bytes);
          }
        }
      }
      if (copied < stop) std::memset(values + copied * p.entry_bytes, 0, (stop - copied) * p.entry_bytes);
      position = std::max(position, stop);
    }
  });
}

void unpack(const PackParams& p) {
  if (p.entry_bytes == 0 || p.length == 0) return;
  const auto* values = static_cast<const char*>(p.source);
  auto* padded = static_cast<char*>(p.target);
  // The ranges are of padded entries, zeros included, so that the threads write alike much however the rows' lengths
  // are spread.
  parallel_ranges(p.batch * p.length, grain_entries(p), p.num_threads, [&](int64_t begin, int64_t end) {
    int64_t row = begin / p.length;
    for (int64_t entry = begin; entry < end; ++row) {
      const int64_t step = entry - row * p.length;
      const int64_t stop = std::min(end, (row + 1) * p.length);
      const int64_t present = p.cu_seqlens[row + 1] - p.cu_seqlens[row] - step;
      const int64_t copied = std::clamp<int64_t>(present, 0, stop - entry);
      char* target = padded + entry * p.entry_bytes;
      if (copied > 0) {
        std::memcpy(target, values + (p.cu_seqlens[row] + step) * p.entry_bytes, copied * p.entry_bytes);
      }
      std::memset(target + copied * p.entry_bytes, 0, (stop - entry - copied) * p.entry_bytes);
      entry = stop;
    }
  });
}

}  // namespace dove::DOVE_ISA_NAMESPACE
