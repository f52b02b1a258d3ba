#pragma once

#include <cstdint>

#include "dove/dispatch.h"
#include "dove/dtype.h"

namespace dove {

// total = (terms[1] + terms[2]) + terms[0], in fp32 and rounded once, and one or two LayerNorms of its rows.
struct LayerNormPairParams {
  const void* terms[3];    // (rows, width) in `dtype`: x and up to two addends, null where there is none
  int64_t row_strides[3];  // elements from row to row; the elements of one row are adjacent
  void* total;             // (rows, width) in `dtype`, contiguous: written; null without addends, when it is x
  void* y1;                // the norms, as `total`: written; y2 is null for a single one
  void* y2;
  float* mean;  // (rows,) each: written
  float* rstd;
  const float* weight1;  // (width,) each; those of a second norm are null without y2
  const float* bias1;
  const float* weight2;
  const float* bias2;
  int64_t rows;
  int64_t width;  // at least 1
  float eps;
  Dtype dtype;
  int num_threads;
};

DOVE_DECLARE_CPU_KERNEL(layer_norm_pair, LayerNormPairParams)

}  // namespace dove
