#include "dove/pack.h"

#include <algorithm>
#include <cstdint>

#include "launch.h"
#include "warp.h"

namespace dove::cuda {
namespace {

constexpr int kThreads = 256;
// Enough blocks to fill any GPU many times over; the kernels stride over what is left.
constexpr int64_t kMaxBlocks = 1 << 16;

// Threads: x along an entry's vectors, y along the entries of the target. A target entry is written once, by one row of
// threads, from its source or with zeros. cu_seqlens comes unchecked: every source index is tested before it is used.

template <typename Vector>
__global__ void __launch_bounds__(kThreads) pack_kernel(const PackParams p, int64_t vectors) {
  const auto* padded = static_cast<const char*>(p.source);
  auto* values = static_cast<Vector*>(p.target);
  for (int64_t position = blockIdx.x * int64_t{blockDim.y} + threadIdx.y; position < p.total;
       position += gridDim.x * int64_t{blockDim.y}) {
    // The last row that starts at or before the position: cu_seqlens[low] <= position < cu_seqlens[high].
    int64_t low = -1, high = p.batch + 1;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (p.cu_seqlens[middle] <= position ? low : high) = middle;
    }
    const int64_t step = low < 0 ? 0 : position - p.cu_seqlens[low];
    const bool found = low >= 0 && low < p.batch && step < p.length;
    const auto* source =
        reinterpret_cast<const Vector*>(padded + (found ? low * p.row_stride + step * p.entry_stride : 0));
    for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
      values[position * vectors + v] = found ? source[v] : Vector{};
    }
  }
}

template <typename Vector>
__global__ void __launch_bounds__(kThreads) unpack_kernel(const PackParams p, int64_t vectors) {
  const auto* values = static_cast<const Vector*>(p.source);
  auto* padded = static_cast<Vector*>(p.target);
  const int64_t entries = p.batch * p.length;
  for (int64_t entry = blockIdx.x * int64_t{blockDim.y} + threadIdx.y; entry < entries;
       entry += gridDim.x * int64_t{blockDim.y}) {
    const int64_t row = entry / p.length;
    const int64_t position = p.cu_seqlens[row] + (entry - row * p.length);
    const bool found = position >= 0 && position < p.cu_seqlens[row + 1] && position < p.total;
    for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
      padded[entry * vectors + v] = found ? values[position * vectors + v] : Vector{};
    }
  }
}

template <typename Vector>
void launch(void (*kernel)(PackParams, int64_t), const PackParams& p, int64_t entries, cudaStream_t stream) {
  const int64_t vectors = p.entry_bytes / int64_t{sizeof(Vector)};
  unsigned along = 1;
  while (along < vectors && along < kThreads) along *= 2;
  const dim3 threads(along, kThreads / along);
  const int64_t blocks = std::min((entries + threads.y - 1) / threads.y, kMaxBlocks);
  launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)), threads, stream, p, vectors);
}

// The widest access, up to 16 bytes, that divides every address the kernels form.
int access_bytes(const PackParams& p) {
  const auto all = reinterpret_cast<uintptr_t>(p.source) | reinterpret_cast<uintptr_t>(p.target) |
                   static_cast<uintptr_t>(p.entry_bytes) | static_cast<uintptr_t>(p.row_stride) |
                   static_cast<uintptr_t>(p.entry_stride) | 16;
  return static_cast<int>(all & -all);
}

}  // namespace

void pack(const PackParams& params, int device, void* stream) {
  if (params.total == 0 || params.entry_bytes == 0) return;
  const DeviceGuard guard(device, "pack");
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (access_bytes(params)) {
    case 16:
      launch<uint4>(pack_kernel<uint4>, params, params.total, queue);
      break;
    case 8:
      launch<uint2>(pack_kernel<uint2>, params, params.total, queue);
      break;
    case 4:
      launch<uint32_t>(pack_kernel<uint32_t>, params, params.total, queue);
      break;
    case 2:
      launch<uint16_t>(pack_kernel<uint16_t>, params, params.total, queue);
      break;
    default:
      launch<uint8_t>(pack_kernel<uint8_t>, params, params.total, queue);
  }
  check(cudaGetLastError(), "pack");
}

void unpack(const PackParams& params, int device, void* stream) {
  const int64_t entries = params.batch * params.length;
  if (entries == 0 || params.entry_bytes == 0) return;
  const DeviceGuard guard(device, "unpack");
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (access_bytes(params)) {
    case 16:
      launch<uint4>(unpack_kernel<uint4>, params, entries, queue);
      break;
    case 8:
      launch<uint2>(unpack_kernel<uint2>, params, entries, queue);
      break;
    case 4:
      launch<uint32_t>(unpack_kernel<uint32_t>, params, entries, queue);
      break;
    case 2:
      launch<uint16_t>(unpack_kernel<uint16_t>, params, entries, queue);
      break;
    default:
      launch<uint8_t>(unpack_kernel<uint8_t>, params, entries, queue);
  }
  check(cudaGetLastError(), "unpack");
}

}  // namespace dove::cuda
