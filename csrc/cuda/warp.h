#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// What a warp does as a whole: matrix products on the tensor cores and copies in the background. Where nvcc does not
// compile, they are declared here and defined by the tests, which run the kernels on the CPU
// (tests/native/cuda_on_host).
namespace dove::cuda {

#ifdef __CUDACC__

// c (16 x 8) += a (16 x 8) b (8 x 8) in TF32; the lower 13 bits of an element are not read. With g = lane / 4 and
// t = lane % 4 a lane holds a: rows g, g + 8 of column t, then of column t + 4; b: rows t, t + 4 of column g; c:
// columns 2 t, 2 t + 1 of row g, then of row g + 8.
__device__ inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Starts a copy of 16 bytes to shared memory, all aligned to 16; only the first `bytes` are read, the rest is zero.
__device__ inline void copy_async(float* target, const float* source, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
}

// The same for 4 bytes, aligned to 4.
__device__ inline void copy_async_one(float* target, const float* source, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
}

// Closes a group of copies; waits until all groups but the last `kPending` of this thread are there.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Launches `kernel` without dynamic shared memory.
template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream, Arguments... arguments) {
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
}

#else

void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void copy_async(float* target, const float* source, int bytes);
void copy_async_one(float* target, const float* source, int bytes);
void commit_copies();
template <int kPending>
void wait_for_copies();
template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream, Arguments... arguments);

#endif

}  // namespace dove::cuda
