#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "dove/dtype.h"

// Elements of the floating dtypes as fp32: widened when they are loaded, rounded to nearest even when they are stored.
namespace dove::cuda {

__device__ inline float load_element(const float* p) { return *p; }
__device__ inline float load_element(const BFloat16* p) {
  return __uint_as_float(static_cast<uint32_t>(p->bits) << 16);
}
__device__ inline float load_element(const Float16* p) { return __half2float(__ushort_as_half(p->bits)); }

__device__ inline void store_element(float* p, float value) { *p = value; }
__device__ inline void store_element(BFloat16* p, float value) {
  p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
__device__ inline void store_element(Float16* p, float value) { p->bits = __half_as_ushort(__float2half_rn(value)); }

}  // namespace dove::cuda
