#pragma once

#include <cstdint>
#include <vector>

namespace dove {

// Which pixels of a line make each pixel of a shorter or longer one, and their weights in fixed point.
struct ResampleTaps {
  // Of the weights: 8 bits are the pixel's, 2 for sums beyond 1 and below 0.
  static constexpr int kFractionBits = 32 - 8 - 2;

  int64_t most;                  // weights that each pixel has room for
  std::vector<int64_t> first;    // (size,): the first pixel that counts
  std::vector<int64_t> count;    // (size,): how many do
  std::vector<int32_t> weights;  // (size, most)
};

// The taps of Pillow's antialiased bicubic filter, which has a = -0.5 and is as wide as a pixel that is made: from
// `length` pixels, of which `side` from `from` on are resized to `size`; neighbours beyond them take part. Pillow's
// arithmetic, operation for operation.
ResampleTaps resample_taps(int64_t length, int64_t from, int64_t side, int64_t size);

}  // namespace dove
