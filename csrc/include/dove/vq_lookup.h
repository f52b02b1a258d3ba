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
  int64_t* codes;   // (num_rows,): written; kUndecided where scores are out of fp32's range, 0 for a row not finite
  void* quantized;  // (num_rows, width) in `dtype`, contiguous: the codewords, rounded; rows undecided are not set
  int64_t* num_undecided;  // one number: written
  int64_t num_rows;
  int64_t num_words;
  int64_t width;
  Dtype dtype;
  int num_threads;  // CPU only, as is num_undecided
  // CUDA only.
  bool words_rounded;  // codewords have more bits than a 16-bit float
  int64_t num_ranges;  // of codewords, each searched by blocks of its own
  void* scratch;       // vq_lookup_scratch_bytes
};

constexpr int64_t kUndecided = -1;

// CUDA: codewords in a tile, num_ranges being at most the number of tiles, and rows that a block searches.
constexpr int kVqLookupWordsATile = 64;
constexpr int kVqLookupRowsABlock = 128;

// CUDA: what the kernels hand on from one to the next.
inline int64_t vq_lookup_scratch_bytes(int64_t num_rows, int64_t num_ranges) {
  return 4 * (3 * num_ranges * num_rows + num_ranges + 1 + num_rows);
}

DOVE_DECLARE_CPU_KERNEL(vq_lookup, VqLookupParams)

// The same on a CUDA device, for every row; `stream` is a cudaStream_t. Returns once the kernels are launched and
// throws CudaError.
namespace cuda {
void vq_lookup(const VqLookupParams& params, int device, void* stream);
}  // namespace cuda

}  // namespace dove
