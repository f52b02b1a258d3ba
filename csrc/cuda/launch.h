#pragma once

#include <cuda_runtime.h>

#include <string>

#include "dove/cuda_error.h"

namespace dove::cuda {

// Throws CudaError with one sentence if `status` is an error; `op` is the op's public name.
inline void check(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  std::string reason;
  switch (status) {
    case cudaErrorInsufficientDriver:
      reason = "the NVIDIA driver is missing or too old for CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
               std::to_string(CUDART_VERSION % 1000 / 10);
      break;
    case cudaErrorNoDevice:
      reason = "no CUDA device was found";
      break;
    case cudaErrorNoKernelImageForDevice:
      reason = "this build has no code for this GPU (build_info()['cuda_archs'] lists what it has)";
      break;
    default:
      reason = cudaGetErrorString(status);
  }
  throw CudaError(std::string(op) + " cannot run on the GPU: " + reason + " (CUDA error " +
                  std::to_string(static_cast<int>(status)) + ")");
}

// Makes `device` current while it lives: a kernel is launched on its stream's own device.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check(cudaGetDevice(&previous_), op);
    if (previous_ != device) {
      check(cudaSetDevice(device), op);
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace dove::cuda
