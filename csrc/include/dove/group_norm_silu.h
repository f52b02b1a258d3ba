#pragma once

#include <cstdint>

#include "dove/dispatch.h"
#include "dove/dtype.h"

namespace dove {

// Group normalisation, scale and shift by channel, then SiLU if asked.
struct GroupNormSiluParams {
  const void* x;        // in `dtype`, contiguous: (batch, spatial, channels) if channels_last, else with them swapped
  void* out;            // like x; may not overlap it
  const float* weight;  // (channels,)
  const float* bias;    // (channels,)
  float* mean;          // (batch, groups): written
  float* rstd;          // (batch, groups): written, 1 / sqrt(variance + eps)
  int64_t batch;
  int64_t channels;  // a multiple of `groups`
  int64_t spatial;
  int64_t groups;
  double eps;
  bool channels_last;
  bool silu;
  Dtype dtype;
  int num_threads;
};

DOVE_DECLARE_CPU_KERNEL(group_norm_silu, GroupNormSiluParams)

// Its gradients for x, weight and bias, from `grad`, that of the result.
struct GroupNormSiluBackwardParams {
  const void* grad;     // in `dtype`, laid out as x
  const void* x;        // in `dtype`, as above
  void* grad_x;         // like x; may not overlap them: written
  const float* weight;  // (channels,)
  const float* bias;    // (channels,)
  const float* mean;    // (batch, groups), rounded to fp32
  const float* rstd;    // (batch, groups)
  float* grad_weight;   // (channels,): written
  float* grad_bias;     // (channels,): written
  int64_t batch;
  int64_t channels;  // a multiple of `groups`
  int64_t spatial;
  int64_t groups;
  bool channels_last;
  bool silu;
  Dtype dtype;
  int num_threads;
};

DOVE_DECLARE_CPU_KERNEL(group_norm_silu_backward, GroupNormSiluBackwardParams)

}  // namespace dove
