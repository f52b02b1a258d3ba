#pragma once

// CUDA kernels on the CPU, so that their arithmetic and their barriers are tested where there is no GPU: this header
// stands in for the real one. A block's threads are coroutines that give way at barriers and warp operations, in an
// order drawn anew each round; blocks run one behind the other. A block whose threads wait for one another forever, at
// different barriers, ends the program. Shared memory that a block has not written holds numbers that show. Speed,
// caches and memory order are not imitated.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(threads)
#define CUDART_VERSION 13000

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209
};
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

namespace cuda_on_host {

struct Barrier {
  int expected = 0;
  int arrived = 0;
  unsigned opened = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t values[32];
  uint32_t a[32][4];
  uint32_t b[32][2];
};

// A copy in the background that has not arrived.
struct Copy {
  float* target;
  std::vector<float> values;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  bool done = false;
  std::vector<std::vector<Copy>> copies = {{}};  // groups, the last one open
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  ucontext_t scheduler;
  size_t running = 0;
  bool moved = false;  // a barrier opened or a thread ended
  int poison = 0;
  std::vector<void*> poisoned;  // its variables in shared memory
  std::function<void()> body;
};

inline Block* block = nullptr;
inline dim3 block_index, block_size, grid_size;

inline Thread& current() { return block->threads[block->running]; }
inline Warp& warp() { return block->warps[block->running / 32]; }
inline int lane() { return static_cast<int>(block->running % 32); }

// Behind the declaration of a variable in shared memory: the block's first thread there fills it, and no thread can
// have written it before. The bytes are, from block to block, those of large numbers, of NaN and -1, and of negative
// ones, so that neither a minimum nor a maximum nor a product with zero passes over them.
template <typename Variable>
void poison_once(Variable& variable) {
  constexpr unsigned char kBytes[] = {0x7f, 0xff, 0xfe};
  std::vector<void*>& done = block->poisoned;
  if (std::find(done.begin(), done.end(), &variable) != done.end()) return;
  done.push_back(&variable);
  std::memset(&variable, kBytes[block->poison % 3], sizeof(variable));
}

inline void open_if_full(Barrier& barrier) {
  if (barrier.arrived < barrier.expected || barrier.expected == 0) return;
  barrier.arrived = 0;
  ++barrier.opened;
  block->moved = true;
}

inline void wait(Barrier& barrier) {
  const unsigned before = barrier.opened;
  ++barrier.arrived;
  open_if_full(barrier);
  while (barrier.opened == before) swapcontext(&current().context, &block->scheduler);
}

inline void run_thread() {
  block->body();
  current().done = block->moved = true;
  // The others do not wait for a thread that has ended.
  for (Barrier* barrier : {&block->barrier, &warp().barrier}) {
    --barrier->expected;
    open_if_full(*barrier);
  }
  swapcontext(&current().context, &block->scheduler);
}

inline void run_block(std::mt19937& random) {
  constexpr size_t kStack = size_t{1} << 16;
  for (Thread& thread : block->threads) {
    getcontext(&thread.context);
    thread.stack.reset(new char[kStack]);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, run_thread, 0);
  }
  std::vector<size_t> order(block->threads.size());
  std::iota(order.begin(), order.end(), size_t{0});
  // Every second warp, drawn anew each round, stands still, so that warps drift apart; a round without a move is
  // followed by one of them all.
  bool all = false;
  do {
    all = !block->moved && !all;
    block->moved = false;
    std::shuffle(order.begin(), order.end(), random);
    const auto still = static_cast<uint32_t>(random());
    for (const size_t index : order) {
      if (block->threads[index].done || (!all && still >> (index / 32) & 1)) continue;
      block->running = index;
      swapcontext(&block->scheduler, &block->threads[index].context);
    }
  } while (block->moved || !all);
  for (const Thread& thread : block->threads) {
    if (!thread.done) {
      std::fprintf(stderr, "the threads of a block wait at different barriers\n");
      std::abort();
    }
  }
}

template <typename Value>
Value exchange(Value value, int source) {
  Warp& mine = warp();
  std::memcpy(&mine.values[lane()], &value, sizeof(value));
  wait(mine.barrier);
  std::memcpy(&value, &mine.values[source], sizeof(value));
  wait(mine.barrier);
  return value;
}

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::current().index)
#define blockIdx cuda_on_host::block_index
#define blockDim cuda_on_host::block_size
#define gridDim cuda_on_host::grid_size

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::block->barrier); }
template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int distance) {
  return cuda_on_host::exchange(value, cuda_on_host::lane() ^ distance);
}
inline int32_t atomicAdd(int32_t* target, int32_t value) { return std::exchange(*target, *target + value); }

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline uint32_t __float_as_uint(float value) { return bits_as<uint32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return bits_as<float>(bits); }
