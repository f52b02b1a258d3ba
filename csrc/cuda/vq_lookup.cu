#include "dove/vq_lookup.h"

#include <algorithm>
#include <cstdint>

#include "elements.h"
#include "launch.h"
#include "warp.h"

// Three launches, nothing of size (rows, words), nothing read by the host:
//   search   the two best scores x.c - |c|^2 / 2 of each row in one range of codewords, one TF32 product each;
//   finish   merges the ranges; where the second is further behind than rounding can explain, the first is the nearest;
//   rescore  the other rows (of normal data one or two in ten), against all codewords in fp32.
//
// How far a TF32 score can be from the true one: elements are rounded to 11 bits, 2^-11 each, so that a product is off
// by r |x_i c_i|, r = 2^-10 + 2^-22 (16-bit elements are not rounded at all); tensor cores add eight products to a sum
// in fp32, cutting each of the nine instead of rounding, 9/8 C times in all, 2^-23 of the sum of all sizes each time at
// most; |c|^2 / 2 is off by C 2^-24 of itself. With sum |x_i c_i| <= |x| |c| and the longest codeword, a score is
// within
//   E = r |x| |c| + s (|c|^2 / 2 + |x| |c|),  s = (2 C + 2) 2^-23,
// and a row is decided where its two best are more than 2 E apart: then no rounding can have exchanged them. Underflow
// loses the smallest normal number a term, as in dove_fast/ops/vq_lookup/reference.py.
// A rescored score is an fp32 sum of C + 1 terms in one order for every codeword: identical codewords tie, and the
// lowest index is kept. Its bound is the CPU kernel's. Rows that could overflow, or that are so small that underflow is
// more than rounding, are rescored by fp64 distances.
namespace dove::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;

// Search: a warp has kTiles x 16 rows; a block's warps share kWords codewords, kColumns columns at a time.
constexpr int kTiles = 2;
constexpr int kRows = kVqLookupRowsABlock;
constexpr int kWords = kVqLookupWordsATile;
constexpr int kColumns = 64;
// Floats from codeword to codeword in shared memory: lanes that read 16 bytes together meet every bank once.
constexpr int kPitch = kColumns + 16;
static_assert(kRows == kWarps * kTiles * 16);
static_assert(kPitch % 32 == 16 && kWords % 8 == 0 && kColumns % 16 == 0);

// Rescore: rows that a block compares with each codeword at once.
constexpr int kTogether = 8;
constexpr int kRescoreThreads = 256;
constexpr int kPiece = 16;
constexpr unsigned kRescoreBlocks = 1024;

constexpr float kNone = -__builtin_inff();
constexpr float kFar = __builtin_inff();
constexpr int32_t kNoCode = 0x7fffffff;
// Below it no rounding makes a sum overflow; above it, a column, underflow is less than rounding.
constexpr float kLargest = 1e38f;
constexpr float kSmallest = 0x1p-100f;
constexpr float kTiny = 1.17549435e-38f;

// Rounds to TF32, halves away from zero; the bits that mma_tf32 does not read are not cleared.
__device__ inline uint32_t to_tf32(float value) { return __float_as_uint(value) + 0x1000u; }

// The best score, its codeword, and the second best score, of one row.
struct Top {
  float best = kNone;
  float second = kNone;
  int32_t code = 0;

  // Codewords come in the order of their indices.
  __device__ void offer(float score, int32_t index) {
    second = fmaxf(second, fminf(best, score));
    if (score > best) {
      best = score;
      code = index;
    }
  }

  __device__ void merge(float other_best, float other_second, int32_t other_code) {
    second = fmaxf(fminf(best, other_best), fmaxf(second, other_second));
    if (other_best > best || (other_best == best && other_code < code)) {
      best = other_best;
      code = other_code;
    }
  }
};

// What the launches hand on: (ranges, rows) each, then the rows to rescore.
struct Scratch {
  float* best;
  float* second;
  int32_t* code;
  float* longest;  // (ranges,): the largest |c|^2
  int32_t* count;  // one number
  int32_t* list;   // (rows,): a row, or ~row where fp32's range is too small
};

__host__ __device__ inline Scratch scratch_of(const VqLookupParams& p) {
  const int64_t size = p.num_ranges * p.num_rows;
  auto* memory = static_cast<float*>(p.scratch);
  auto* numbers = reinterpret_cast<int32_t*>(memory + 2 * size);
  auto* longest = reinterpret_cast<float*>(numbers + size);
  auto* count = reinterpret_cast<int32_t*>(longest + p.num_ranges);
  return {memory, memory + size, numbers, longest, count, count + 1};
}

// Starts the copy of kColumns columns of kWords codewords from `first` on; zeros where there are none.
__device__ inline void copy_words(const VqLookupParams& p, bool wide, int64_t first, int64_t column, float* target) {
  const int step = wide ? 4 : 1;
  for (int item = threadIdx.x * step; item < kWords * kColumns; item += kThreads * step) {
    const int word = item / kColumns, c = item % kColumns;
    const bool there = first + word < p.num_words && column + c < p.width;
    const float* source = there ? p.words + (first + word) * p.width + column + c : p.words;
    float* place = target + word * kPitch + c;
    if (wide) {
      copy_async(place, source, there ? 16 : 0);
    } else {
      copy_async_one(place, source, there ? 4 : 0);
    }
  }
}

// A lane's share of kTiles x 16 rows and kColumns columns. The columns of a product may come in any order that rows and
// codewords have in common: here a lane's elements are four adjacent ones of 16.
template <typename T>
__device__ inline void load_rows(const VqLookupParams& p, int64_t row, int64_t column, int lane,
                                 uint32_t (&rows)[kTiles][kColumns / 8][4]) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t index = row + tile * 16 + half * 8 + g;
      const T* source = static_cast<const T*>(p.rows) + (index < p.num_rows ? index : 0) * p.row_stride;
#pragma unroll
      for (int step = 0; step < kColumns / 16; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t c = column + step * 16 + t * 4 + i;
          const bool there = index < p.num_rows && c < p.width;
          rows[tile][step * 2 + i / 2][half + 2 * (i % 2)] = to_tf32(there ? load_element(source + c) : 0.0f);
        }
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) search_kernel(const VqLookupParams p, int64_t words_a_range, bool wide) {
  __shared__ __align__(16) float buffers[2][kWords * kPitch];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t row = blockIdx.x * int64_t{kRows} + warp * kTiles * 16;
  const int64_t begin = blockIdx.y * words_a_range;
  const int64_t end = begin + words_a_range < p.num_words ? begin + words_a_range : p.num_words;
  const int64_t chunks = (p.width + kColumns - 1) / kColumns;
  const int64_t steps = (end - begin + kWords - 1) / kWords * chunks;
  const Scratch scratch = scratch_of(p);

  uint32_t rows[kTiles][kColumns / 8][4];
  float sums[kTiles][kWords / 8][4];
  Top tops[kTiles][2];
  float longest = 0.0f;
  copy_words(p, wide, begin, 0, buffers[0]);
  commit_copies();
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t chunk = step % chunks, first = begin + step / chunks * kWords;
    if (step + 1 < steps) {
      const int64_t next = step + 1;
      copy_words(p, wide, begin + next / chunks * kWords, next % chunks * kColumns, buffers[next % 2]);
    }
    commit_copies();
    if (step == 0 || chunks > 1) load_rows<T>(p, row, chunk * kColumns, lane, rows);
    wait_for_copies<1>();
    __syncthreads();
    const float* words = buffers[step % 2];
    if (chunk == 0) {
#pragma unroll
      for (int n = 0; n < kWords / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t word = first + n * 8 + 2 * t + i % 2;
          const float square = word < end ? p.squares[word] : __builtin_inff();
          // Four lanes see them all. NaN is no size.
          if (word < end && square > longest) longest = square;
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) sums[tile][n][i] = -0.5f * square;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kWords / 8; ++n) {
#pragma unroll
      for (int pair = 0; pair < kColumns / 16; ++pair) {
        const float4 b = *reinterpret_cast<const float4*>(words + (n * 8 + g) * kPitch + pair * 16 + t * 4);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          mma_tf32(sums[tile][n], rows[tile][pair * 2], to_tf32(b.x), to_tf32(b.y));
          mma_tf32(sums[tile][n], rows[tile][pair * 2 + 1], to_tf32(b.z), to_tf32(b.w));
        }
      }
    }
    if (chunk + 1 == chunks) {
#pragma unroll
      for (int n = 0; n < kWords / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto word = static_cast<int32_t>(first + n * 8 + 2 * t + i % 2);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) tops[tile][i / 2].offer(sums[tile][n][i], word);
        }
      }
    }
    // The buffer is filled again by the next step's copies.
    __syncthreads();
  }

#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Top& top = tops[tile][half];
      for (int distance = 1; distance < 4; distance *= 2) {
        const float best = __shfl_xor_sync(kAll, top.best, distance);
        const float second = __shfl_xor_sync(kAll, top.second, distance);
        top.merge(best, second, __shfl_xor_sync(kAll, top.code, distance));
      }
      const int64_t index = row + tile * 16 + half * 8 + g;
      if (t == 0 && index < p.num_rows) {
        const int64_t at = blockIdx.y * p.num_rows + index;
        scratch.best[at] = top.best;
        scratch.second[at] = top.second;
        scratch.code[at] = top.code;
      }
    }
  }
  for (int distance = 1; distance < 4; distance *= 2) {
    longest = fmaxf(longest, __shfl_xor_sync(kAll, longest, distance));
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    scratch.longest[blockIdx.y] = longest;
    if (blockIdx.y == 0) *scratch.count = 0;
  }
}

template <typename T>
__device__ inline void write_codeword(const VqLookupParams& p, int64_t row, int64_t code, int thread, int threads) {
  for (int64_t column = thread; column < p.width; column += threads) {
    store_element(static_cast<T*>(p.quantized) + row * p.width + column, p.words[code * p.width + column]);
  }
  if (thread == 0) p.codes[row] = code;
}

// A warp a row.
template <typename T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const VqLookupParams p, float rounding, float adding) {
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (row >= p.num_rows) return;
  const Scratch scratch = scratch_of(p);
  Top top;
  float longest = 0.0f;
  for (int64_t range = 0; range < p.num_ranges; ++range) {
    const int64_t at = range * p.num_rows + row;
    top.merge(scratch.best[at], scratch.second[at], scratch.code[at]);
    longest = fmaxf(longest, scratch.longest[range]);
  }
  const T* x = static_cast<const T*>(p.rows) + row * p.row_stride;
  float squares = 0.0f;
  int finite = 1;
  for (int64_t column = lane; column < p.width; column += 32) {
    const float element = load_element(x + column);
    squares += element * element;
    finite &= element - element == 0.0f;
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    squares += __shfl_xor_sync(kAll, squares, distance);
    finite &= __shfl_xor_sync(kAll, finite, distance);
  }
  if (!finite) {
    write_codeword<T>(p, row, 0, lane, 32);
    return;
  }
  const float lost = 2.0f * p.width * kTiny;
  const float product = sqrtf(squares + lost) * sqrtf(longest + lost);
  const float size = sqrtf(squares) * sqrtf(longest) + 0.5f * longest;
  const bool in_range = squares + longest < kLargest && size > kSmallest * p.width;
  const float error = rounding * product + adding * ((longest + lost) * 0.5f + product) + lost;
  // A hundredth more, for the roundings of the bound itself.
  if (in_range && top.best - top.second > 2.02f * error) {
    write_codeword<T>(p, row, top.code, lane, 32);
  } else if (lane == 0) {
    const auto index = static_cast<int32_t>(row);
    scratch.list[atomicAdd(scratch.count, 1)] = in_range ? index : ~index;
  }
}

// The lowest code of the smallest key of all threads, in every thread.
template <typename Key>
__device__ inline int32_t lowest(Key key, int32_t code, Key* keys, int32_t* codes) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const Key other = __shfl_xor_sync(kAll, key, distance);
    const int32_t other_code = __shfl_xor_sync(kAll, code, distance);
    if (other < key || (other == key && other_code < code)) {
      key = other;
      code = other_code;
    }
  }
  if (threadIdx.x % 32 == 0) {
    keys[threadIdx.x / 32] = key;
    codes[threadIdx.x / 32] = code;
  }
  __syncthreads();
  for (int warp = 0; warp < kRescoreThreads / 32; ++warp) {
    if (keys[warp] < key || (keys[warp] == key && codes[warp] < code)) {
      key = keys[warp];
      code = codes[warp];
    }
  }
  __syncthreads();
  return code;
}

// The code of the codeword at the smallest fp64 distance from x, in every thread.
template <typename T>
__device__ inline int32_t nearest(const VqLookupParams& p, const T* x, double* keys, int32_t* codes) {
  double best = kFar;
  int32_t code = kNoCode;
  for (int64_t word = threadIdx.x; word < p.num_words; word += kRescoreThreads) {
    double distance = 0.0;
    for (int64_t column = 0; column < p.width; ++column) {
      const double apart = double{load_element(x + column)} - double{p.words[word * p.width + column]};
      distance += apart * apart;
    }
    if (distance < best) {
      best = distance;
      code = static_cast<int32_t>(word);
    }
  }
  return lowest(best, code, keys, codes);
}

// A block takes kTogether rows of the list at a time and kRescoreThreads codewords, one a thread, kPiece columns of
// both in shared memory.
template <typename T>
__global__ void __launch_bounds__(kRescoreThreads) rescore_kernel(const VqLookupParams p) {
  __shared__ __align__(16) float rows[kPiece][kTogether];
  __shared__ float words[kRescoreThreads][kPiece + 1];
  __shared__ float keys[kRescoreThreads / 32];
  __shared__ double wide_keys[kRescoreThreads / 32];
  __shared__ int32_t codes[kRescoreThreads / 32];
  const Scratch scratch = scratch_of(p);
  const int32_t count = *scratch.count;
  const int thread = threadIdx.x;
  for (int32_t first = blockIdx.x * kTogether; first < count; first += gridDim.x * kTogether) {
    const int used = count - first < kTogether ? count - first : kTogether;
    const auto entry_of = [&](int r) { return scratch.list[first + (r < used ? r : 0)]; };
    const auto row_of = [&](int r) {
      const int32_t entry = entry_of(r);
      return static_cast<const T*>(p.rows) + (entry < 0 ? ~entry : entry) * p.row_stride;
    };
    float best[kTogether];
    int32_t code[kTogether];
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      best[r] = kFar;
      code[r] = kNoCode;
    }
    for (int64_t start = 0; start < p.num_words; start += kRescoreThreads) {
      const int64_t word = start + thread;
      float sums[kTogether];
#pragma unroll
      for (int r = 0; r < kTogether; ++r) sums[r] = word < p.num_words ? 0.5f * p.squares[word] : kFar;
      for (int64_t column = 0; column < p.width; column += kPiece) {
        __syncthreads();
        for (int item = thread; item < kRescoreThreads * kPiece; item += kRescoreThreads) {
          const int64_t w = start + item / kPiece, c = column + item % kPiece;
          const bool there = w < p.num_words && c < p.width;
          words[item / kPiece][item % kPiece] = there ? p.words[w * p.width + c] : 0.0f;
        }
        if (thread < kTogether * kPiece) {
          const int64_t c = column + thread % kPiece;
          const float element = c < p.width ? load_element(row_of(thread / kPiece) + c) : 0.0f;
          rows[thread % kPiece][thread / kPiece] = -element;
        }
        __syncthreads();
#pragma unroll
        for (int c = 0; c < kPiece; ++c) {
          const float element = words[thread][c];
#pragma unroll
          for (int r = 0; r < kTogether; ++r) sums[r] = fmaf(rows[c][r], element, sums[r]);
        }
      }
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        if (sums[r] < best[r]) {
          best[r] = sums[r];
          code[r] = static_cast<int32_t>(word);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      int32_t chosen = lowest(best[r], code[r], keys, codes);
      if (r >= used) continue;
      const int32_t entry = entry_of(r);
      if (entry < 0) chosen = nearest<T>(p, row_of(r), wide_keys, codes);
      // Where no codeword is at a finite distance: the first.
      write_codeword<T>(p, entry < 0 ? ~entry : entry, chosen == kNoCode ? 0 : chosen, thread, kRescoreThreads);
    }
  }
}

template <typename T>
void search(const VqLookupParams& p, void* stream) {
  const auto ceil = [](int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); };
  const int64_t words_a_range = ceil(p.num_words, p.num_ranges * kWords) * int64_t{kWords};
  const bool wide = p.width % 4 == 0 && reinterpret_cast<uintptr_t>(p.words) % 16 == 0;
  const float rounded = (p.dtype == Dtype::kFloat32 ? 0x1p-11f : 0.0f) + (p.words_rounded ? 0x1p-11f : 0.0f);
  const float rounding = rounded * (1.0f + 0x1p-12f), adding = (2.0f * p.width + 2.0f) * 0x1p-23f;
  launch_kernel(search_kernel<T>, dim3(ceil(p.num_rows, kRows), static_cast<unsigned>(p.num_ranges)), dim3(kThreads),
                stream, p, words_a_range, wide);
  check(cudaGetLastError(), "vq_lookup");
  launch_kernel(finish_kernel<T>, dim3(ceil(p.num_rows, kWarps)), dim3(kThreads), stream, p, rounding, adding);
  check(cudaGetLastError(), "vq_lookup");
  const unsigned groups = std::min(ceil(p.num_rows, kTogether), kRescoreBlocks);
  launch_kernel(rescore_kernel<T>, dim3(groups), dim3(kRescoreThreads), stream, p);
  check(cudaGetLastError(), "vq_lookup");
}

}  // namespace

void vq_lookup(const VqLookupParams& params, int device, void* stream) {
  if (params.num_rows == 0) return;
  const DeviceGuard guard(device, "vq_lookup");
  with_element_type(params.dtype, [&](auto element) { search<decltype(element)>(params, stream); });
}

}  // namespace dove::cuda
