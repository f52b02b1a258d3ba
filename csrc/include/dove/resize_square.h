#pragma once

#include <cstdint>

#include "dove/dispatch.h"

namespace dove {

// A square of an image of 8-bit RGB to a square of another size, as Pillow resizes with antialiased bicubic weights:
// the same bits, where Pillow resizes lines before columns. It always did until version 13; since then it does where
// height - size <= max(0, 2 * (width - size)).
struct ResizeSquareParams {
  const uint8_t* source;  // (height, width, 3), contiguous
  uint8_t* target;        // (3, size, size), contiguous: every byte of it is written
  int64_t width;
  int64_t height;
  int64_t left;  // of the square, which lies within the image
  int64_t top;
  int64_t side;  // at least 1, and so is size
  int64_t size;
};

DOVE_DECLARE_CPU_KERNEL(resize_square, ResizeSquareParams)

}  // namespace dove
