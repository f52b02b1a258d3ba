#include "dove/layer_norm_pair.h"

#include <cmath>

#include "dove/parallel.h"
#include "simd.h"

// A row's terms are read once from memory: its total is stored and read again from the cache, three times in all, for
// the mean, the variance and the norms.
namespace dove::DOVE_ISA_NAMESPACE {
namespace {

// A thread gets at least so many elements: some 20 us.
constexpr int64_t kGrain = int64_t{1} << 15;
// Independent sums, so that an addition need not wait for the one before it.
constexpr int kSums = 4;

// Which elements of a vector there are: all, or the first `count` of the row's last.
struct Whole {};
struct Part {
  int64_t count;
};

template <typename T>
Vec get(const T* p, Whole) {
  return load(p);
}
template <typename T>
Vec get(const T* p, Part part) {
  return load_part(p, part.count);
}
template <typename T>
void put(T* p, Vec value, Whole) {
  store(p, value);
}
template <typename T>
void put(T* p, Vec value, Part part) {
  store_part(p, value, part.count);
}
Vec zero_rest(Vec value, Whole) { return value; }
Vec zero_rest(Vec value, Part part) {
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = lane < part.count ? value[lane] : 0.0f;
  return value;
}

// Calls step(at, Whole or Part, which of kSums) for a row's vectors.
template <typename Step>
void for_vectors(int64_t width, const Step& step) {
  int64_t at = 0;
  for (; at + kSums * kLanes <= width; at += kSums * kLanes) {
    step(at, Whole{}, 0);
    step(at + kLanes, Whole{}, 1);
    step(at + 2 * kLanes, Whole{}, 2);
    step(at + 3 * kLanes, Whole{}, 3);
  }
  for (; at + kLanes <= width; at += kLanes) step(at, Whole{}, 0);
  if (at < width) step(at, Part{width - at}, 0);
}

float sum_all(const Vec (&sums)[kSums]) { return sum((sums[0] + sums[1]) + (sums[2] + sums[3])); }

template <typename T, int kAddends, bool kPair>
void one_row(const LayerNormPairParams& p, int64_t row) {
  const T* term[3];
  for (int i = 0; i <= kAddends; ++i) term[i] = static_cast<const T*>(p.terms[i]) + row * p.row_strides[i];
  const int64_t width = p.width;
  const float count = static_cast<float>(width);

  Vec sums[kSums] = {};
  T* total = kAddends ? static_cast<T*>(p.total) + row * width : nullptr;
  for_vectors(width, [&](int64_t at, auto which, int index) {
    Vec value = get(term[0] + at, which);
    if constexpr (kAddends > 0) {
      Vec added = get(term[1] + at, which);
      if constexpr (kAddends > 1) added = added + get(term[2] + at, which);
      put(total + at, added + value, which);
      // As it was rounded.
      value = get(total + at, which);
    }
    sums[index] = sums[index] + value;
  });
  const T* values = kAddends ? total : term[0];
  const float mean = sum_all(sums) / count;

  Vec squares[kSums] = {};
  for (Vec& each : sums) each = Vec{};
  const Vec means = broadcast(mean);
  for_vectors(width, [&](int64_t at, auto which, int index) {
    const Vec difference = zero_rest(get(values + at, which) - means, which);
    sums[index] = sums[index] + difference;
    squares[index] = fma(difference, difference, squares[index]);
  });
  // What the mean lost by its own rounding, which counts where it is far from 0.
  const float rest = sum_all(sums) / count;
  const float variance = sum_all(squares) / count - rest * rest;
  const float rstd = 1.0f / std::sqrt((variance < 0.0f ? 0.0f : variance) + p.eps);
  p.mean[row] = mean + rest;
  p.rstd[row] = rstd;

  const Vec rests = broadcast(rest), scale = broadcast(rstd);
  T* y1 = static_cast<T*>(p.y1) + row * width;
  T* y2 = kPair ? static_cast<T*>(p.y2) + row * width : nullptr;
  for_vectors(width, [&](int64_t at, auto which, int) {
    const Vec normal = (get(values + at, which) - means - rests) * scale;
    put(y1 + at, fma(normal, get(p.weight1 + at, which), get(p.bias1 + at, which)), which);
    if constexpr (kPair) put(y2 + at, fma(normal, get(p.weight2 + at, which), get(p.bias2 + at, which)), which);
  });
}

template <typename T, int kAddends>
void all_rows(const LayerNormPairParams& p) {
  parallel_ranges(p.rows, kGrain / p.width + 1, p.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (p.y2 != nullptr) {
        one_row<T, kAddends, true>(p, row);
      } else {
        one_row<T, kAddends, false>(p, row);
      }
    }
  });
}

}  // namespace

void layer_norm_pair(const LayerNormPairParams& p) {
  with_element_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.terms[1] == nullptr) {
      all_rows<T, 0>(p);
    } else if (p.terms[2] == nullptr) {
      all_rows<T, 1>(p);
    } else {
      all_rows<T, 2>(p);
    }
  });
}

}  // namespace dove::DOVE_ISA_NAMESPACE
