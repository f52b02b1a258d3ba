#pragma once

// What csrc/cuda/warp.h declares, on the CPU. Included behind the kernels.

#include "cuda_runtime.h"

namespace dove::cuda {

// The products are exact; their sum with c is cut to fp32, as tensor cores do.
void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  cuda_on_host::Warp& warp = cuda_on_host::warp();
  const int lane = cuda_on_host::lane();
  std::copy_n(a, 4, warp.a[lane]);
  warp.b[lane][0] = b0;
  warp.b[lane][1] = b1;
  cuda_on_host::wait(warp.barrier);
  const auto element = [](uint32_t bits) { return static_cast<double>(bits_as<float>(bits & 0xffffe000u)); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 8; ++k) {
      const double left = element(warp.a[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]);
      sum += left * element(warp.b[column * 4 + k % 4][k / 4]);
    }
    const auto nearest = static_cast<float>(sum);
    c[i] = std::fabs(nearest) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
  }
  cuda_on_host::wait(warp.barrier);
}

// Until the copy has been waited for there is NaN.
void copy_floats(float* target, const float* source, int bytes, int count) {
  std::vector<float> values(count, 0.0f);
  std::memcpy(values.data(), source, bytes);
  std::fill_n(target, count, NAN);
  cuda_on_host::current().copies.back().push_back({target, std::move(values)});
}
void copy_async(float* target, const float* source, int bytes) {
  if (reinterpret_cast<uintptr_t>(target) % 16 || (bytes && reinterpret_cast<uintptr_t>(source) % 16)) std::abort();
  copy_floats(target, source, bytes, 4);
}
void copy_async_one(float* target, const float* source, int bytes) { copy_floats(target, source, bytes, 1); }
void commit_copies() { cuda_on_host::current().copies.emplace_back(); }
template <int kPending>
void wait_for_copies() {
  auto& groups = cuda_on_host::current().copies;
  while (groups.size() > kPending + 1) {
    for (const cuda_on_host::Copy& copy : groups.front()) {
      std::copy(copy.values.begin(), copy.values.end(), copy.target);
    }
    groups.erase(groups.begin());
  }
}

template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 size, void*, Arguments... arguments) {
  static std::mt19937 random(1);
  static int blocks = 0;
  const unsigned threads = size.x * size.y * size.z;
  const auto fits = [](unsigned count, unsigned most) { return count >= 1 && count <= most; };
  if (!fits(grid.x, 0x7fffffff) || !fits(grid.y, 65535) || !fits(grid.z, 65535) || !fits(threads, 1024)) std::abort();
  cuda_on_host::grid_size = grid;
  cuda_on_host::block_size = size;
  for (unsigned index = 0; index < grid.x * grid.y * grid.z; ++index) {
    cuda_on_host::Block block;
    cuda_on_host::block = &block;
    block.poison = blocks++;
    cuda_on_host::block_index = dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
    block.threads = std::vector<cuda_on_host::Thread>(threads);
    block.warps = std::vector<cuda_on_host::Warp>((threads + 31) / 32);
    block.barrier.expected = static_cast<int>(threads);
    block.body = [&] { kernel(arguments...); };
    for (unsigned thread = 0; thread < threads; ++thread) {
      block.threads[thread].index = dim3(thread % size.x, thread / size.x % size.y, thread / size.x / size.y);
      ++block.warps[thread / 32].barrier.expected;
    }
    cuda_on_host::run_block(random);
  }
  cuda_on_host::block = nullptr;
}

}  // namespace dove::cuda
