#pragma once

#include <cstdint>

#include "dove/dispatch.h"
#include "dove/dtype.h"

namespace dove {

// The nearest of `num_words` codewords for each of `num_rows` rows: the largest x.c - |c|^2 / 2, the lowest index among
// equals.
struct VqLookupParams {
  const void* rows;      // (num_rows, width) in `dtype`
  int64_t row_stride;    // elements from row to row; the elements of one row are adjacent
  const float* words;    // (num_words, width), contiguous
  const float* squares;  // (num_words,): |c|^2; the same for identical codewords
  int64_t* codes;        // (num_rows,): written; kUndecided where fp32 scores overflow, 0 for a row that is not finite
  void* quantized;       // (num_rows, width) in `dtype`, contiguous: the codewords, rounded; rows undecided are not set
  int64_t* num_undecided;  // one number: written
  int64_t num_rows;
  int64_t num_words;
  int64_t width;
  Dtype dtype;
  int num_threads;
};

constexpr int64_t kUndecided = -1;

DOVE_DECLARE_CPU_KERNEL(vq_lookup, VqLookupParams)

}  // namespace dove
