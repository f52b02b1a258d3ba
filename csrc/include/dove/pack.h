#pragma once

#include <cstdint>

#include "dove/dispatch.h"

namespace dove {

// One copy between a padded batch (batch, length, entry) and its ragged rows (total, entry). An entry is moved as
// bytes: every dtype is the same to the kernels.
struct PackParams {
  const void* source;         // pack: padded; unpack: values
  void* target;               // pack: values; unpack: padded; every byte of it is written
  const int32_t* cu_seqlens;  // (batch + 1,); on the CPU: from 0 to total, non-decreasing; CUDA kernels bear anything
  int64_t batch;
  int64_t length;
  int64_t total;
  int64_t entry_bytes;
  int64_t row_stride;    // bytes from row to row of the padded side
  int64_t entry_stride;  // bytes from entry to entry of the padded side
  int num_threads;       // CPU only
};

// padded -> values. Where a row of cu_seqlens is longer than `length`, the entries without a source are zero.
DOVE_DECLARE_CPU_KERNEL(pack, PackParams)

// values -> padded. Entries behind a row are zero; a row longer than `length` is cut. The padded side is contiguous.
DOVE_DECLARE_CPU_KERNEL(unpack, PackParams)

// The same on a CUDA device; `stream` is a cudaStream_t. They return once the kernel is launched and throw CudaError.
namespace cuda {
void pack(const PackParams& params, int device, void* stream);
void unpack(const PackParams& params, int device, void* stream);
}  // namespace cuda

}  // namespace dove
