#pragma once

#include <cstdint>

#include "dove/dispatch.h"
#include "dove/dtype.h"

namespace dove {

// EOS logits of ragged rows of states, and where each row ends.
struct EosScanParams {
  const void* states;         // (total, width) in `dtype`; the elements of a state are adjacent
  int64_t state_stride;       // elements from state to state
  const int32_t* cu_seqlens;  // (rows + 1,): from 0 to total, non-decreasing
  const float* weight;        // (width,)
  float bias;
  float limit;           // a logit above it is EOS
  const int32_t* steps;  // (rows,): the step of each row's first state
  int32_t max_length;
  float* logits;     // (total,): written
  int32_t* lengths;  // (rows,): written: tokens of a row that ends here, else 0
  int64_t rows;
  int64_t width;
  Dtype dtype;
  int num_threads;
};

DOVE_DECLARE_CPU_KERNEL(eos_scan, EosScanParams)

}  // namespace dove
