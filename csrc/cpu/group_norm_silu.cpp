#include "dove/group_norm_silu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dove/parallel.h"
#include "simd.h"

// Two passes over a unit: an image if channels-last, else one group of one image, which is one contiguous run. The
// first takes the statistics slab by slab, the second normalises the slabs from the last to the first, as the last ones
// are still in the cache. What a slab is depends on the shape alone, and slabs are merged in their order: the result is
// the same for any number of threads and in any batch.
//
// A slab's n values are summed in fp32 as differences d = x - k from a value k near their mean: the mean is
// k + sum d / n, and M2 = sum d^2 - (sum d)^2 / n. The subtraction multiplies the relative error of the sums by
// sum d^2 / M2 = 1 + n (k - mean)^2 / M2, whatever the mean. k is the first of a channel's n <= kRows values, so that
// (k - mean)^2 <= M2, or the mean of kRun of the values, so that (k - mean)^2 <= M2 / kRun: the factor is at most
// 1 + kRows (where k is the one outlier among equal values), and about 2 for noise. Slabs are merged in fp64.
namespace dove::DOVE_ISA_NAMESPACE {
namespace {

// A slab is kRows pixels of all channels, or a run of kRows * kRun values.
constexpr int64_t kRows = 64;
constexpr int64_t kRun = 64;
// Vectors, or rows of pixels, that are worked on at a time.
constexpr int64_t kTogether = 4;
static_assert(kRun % (kTogether * kLanes) == 0 && kRows % kTogether == 0);
// A unit up to this size is one thread's; larger ones are divided among the threads, whose caches together hold more.
constexpr int64_t kUnitBytes = int64_t{1} << 20;
// A thread gets at least so many values: some 20 us.
constexpr int64_t kGrain = int64_t{1} << 15;

// One group in one slab, or in all of them.
struct Moments {
  double count = 0;
  double mean = 0;
  double m2 = 0;  // the sum of (x - mean)^2

  // From the sums of x - shift and (x - shift)^2.
  static Moments of(double count, double shift, double sum, double squares) {
    return {count, shift + sum / count, std::max(squares - sum * sum / count, 0.0)};
  }

  void merge(const Moments& other) {
    const double total = count + other.count, apart = other.mean - mean;
    mean += apart * (other.count / total);
    m2 += other.m2 + apart * apart * (count * other.count / total);
    count = total;
  }
};

// One channel of one image: y = (x - shift) * scale + offset. The shift is the mean in fp32; what that rounds off is in
// the offset.
struct Affine {
  float shift;
  float scale;
  float offset;
};

Affine affine(const GroupNormSiluParams& p, double mean, double rstd, int64_t channel) {
  const double scale = rstd * p.weight[channel];
  const float shift = static_cast<float>(mean);
  return {shift, static_cast<float>(scale), static_cast<float>(p.bias[channel] - (mean - shift) * scale)};
}

template <bool kSilu>
inline Vec normalise(Vec x, Vec shift, Vec scale, Vec offset) {
  const Vec y = fma(x - shift, scale, offset);
  return kSilu ? silu(y) : y;
}

// Channels-last: a unit is an image, (spatial, channels).
template <typename T>
class Images {
 public:
  explicit Images(const GroupNormSiluParams& p)
      : units(p.batch),
        groups(p.groups),
        size(p.spatial * p.channels),
        slabs((p.spatial + kRows - 1) / kRows),
        p_(p),
        padded_((p.channels + kLanes - 1) / kLanes * kLanes),
        affine_(units * 3 * padded_) {}

  const int64_t units, groups, size, slabs;

  // `scratch` has scratch_size() floats.
  void measure(int64_t unit, int64_t slab, Moments* moments, float* scratch) const {
    const T* x = static_cast<const T*>(p_.x) + unit * size + slab * kRows * p_.channels;
    const int64_t rows = std::min(kRows, p_.spatial - slab * kRows);
    // By channel: k, sum d, sum d^2.
    float *shift = scratch, *sum = shift + padded_, *squares = sum + padded_;
    for_vectors<T>(p_.channels, [&](int64_t c, auto read, auto) {
      store(shift + c, read(x + c));
      store(sum + c, Vec{});
      store(squares + c, Vec{});
    });
    int64_t row = 0;
    for (; row + kTogether <= rows; row += kTogether) add<kTogether>(x + row * p_.channels, scratch);
    for (; row < rows; ++row) add<1>(x + row * p_.channels, scratch);

    const int64_t width = p_.channels / groups;
    const double n = static_cast<double>(rows);
    for (int64_t group = 0; group < groups; ++group) {
      // Around the first channel's k: x - k_0 = d + e with e = k - k_0.
      const int64_t first = group * width;
      double all = 0, all_squares = 0;
      for (int64_t c = first; c < first + width; ++c) {
        const double e = static_cast<double>(shift[c]) - shift[first], d = sum[c];
        all += d + n * e;
        all_squares += squares[c] + e * (2 * d + n * e);
      }
      moments[group] = Moments::of(n * width, shift[first], all, all_squares);
    }
  }

  void set_affine(int64_t unit, int64_t group, double mean, double rstd) {
    float* to = affine_.data() + unit * 3 * padded_;
    const int64_t width = p_.channels / groups;
    for (int64_t c = group * width; c < (group + 1) * width; ++c) {
      const Affine a = affine(p_, mean, rstd, c);
      to[c] = a.shift;
      to[padded_ + c] = a.scale;
      to[2 * padded_ + c] = a.offset;
    }
  }

  template <bool kSilu>
  void apply(int64_t unit, int64_t slab) const {
    const int64_t begin = slab * kRows, end = std::min(begin + kRows, p_.spatial);
    int64_t row = begin;
    for (; row + kTogether <= end; row += kTogether) apply_rows<kSilu, kTogether>(unit, row);
    for (; row < end; ++row) apply_rows<kSilu, 1>(unit, row);
  }

  int64_t scratch_size() const { return 3 * padded_; }

 private:
  template <int64_t kCount>
  void add(const T* x, float* scratch) const {
    for_vectors<T>(p_.channels, [&](int64_t c, auto read, auto) {
      const Vec shift = load(scratch + c);
      Vec sum = load(scratch + padded_ + c), squares = load(scratch + 2 * padded_ + c);
#pragma GCC unroll 4
      for (int64_t row = 0; row < kCount; ++row) {
        const Vec d = read(x + row * p_.channels + c) - shift;
        sum += d;
        squares = fma(d, d, squares);
      }
      store(scratch + padded_ + c, sum);
      store(scratch + 2 * padded_ + c, squares);
    });
  }

  template <bool kSilu, int64_t kCount>
  void apply_rows(int64_t unit, int64_t row) const {
    const int64_t offset = unit * size + row * p_.channels;
    const T* x = static_cast<const T*>(p_.x) + offset;
    T* out = static_cast<T*>(p_.out) + offset;
    const float* affine = affine_.data() + unit * 3 * padded_;
    for_vectors<T>(p_.channels, [&](int64_t c, auto read, auto write) {
      const Vec shift = load(affine + c), scale = load(affine + padded_ + c), add = load(affine + 2 * padded_ + c);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kCount; ++r) {
        write(out + r * p_.channels + c, normalise<kSilu>(read(x + r * p_.channels + c), shift, scale, add));
      }
    });
  }

  const GroupNormSiluParams& p_;
  const int64_t padded_;       // channels, in whole vectors
  std::vector<float> affine_;  // (units, 3, padded)
};

// Contiguous: a unit is a group of an image, (channels of a group, spatial).
template <typename T>
class Runs {
 public:
  explicit Runs(const GroupNormSiluParams& p)
      : units(p.batch * p.groups),
        groups(1),
        size(p.channels / p.groups * p.spatial),
        slabs((size + kSlab - 1) / kSlab),
        p_(p),
        affine_(p.batch * p.channels) {}

  const int64_t units, groups, size, slabs;

  void measure(int64_t unit, int64_t slab, Moments* moments, float*) const {
    const T* x = static_cast<const T*>(p_.x) + unit * size + slab * kSlab;
    const int64_t count = std::min(kSlab, size - slab * kSlab);
    Vec sums[kTogether] = {}, squares[kTogether] = {};
    const auto add = [&](int64_t v, Vec d) {
      sums[v] += d;
      squares[v] = fma(d, d, squares[v]);
    };
    // A short run's k is its first value: it has at most kRun.
    float shift = load_one(x);
    int64_t i = 0;
    if (count >= kRun) {
      Vec total = {};
      for (; i < kRun; i += kLanes) total += load(x + i) - shift;
      shift += dove::DOVE_ISA_NAMESPACE::sum(total) / kRun;
    }
    for (i = 0; i + kTogether * kLanes <= count; i += kTogether * kLanes) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < kTogether; ++v) add(v, load(x + i + v * kLanes) - shift);
    }
    for (; i + kLanes <= count; i += kLanes) add(0, load(x + i) - shift);
    double sum = 0, sum_squares = 0;
    for (; i < count; ++i) {
      const double d = static_cast<double>(load_one(x + i)) - shift;
      sum += d;
      sum_squares += d * d;
    }
    for (int64_t v = 0; v < kTogether; ++v) {
      sum += dove::DOVE_ISA_NAMESPACE::sum(sums[v]);
      sum_squares += dove::DOVE_ISA_NAMESPACE::sum(squares[v]);
    }
    *moments = Moments::of(static_cast<double>(count), shift, sum, sum_squares);
  }

  void set_affine(int64_t unit, int64_t, double mean, double rstd) {
    const int64_t width = p_.channels / p_.groups;
    for (int64_t c = 0; c < width; ++c) {
      affine_[unit * width + c] = affine(p_, mean, rstd, unit % p_.groups * width + c);
    }
  }

  template <bool kSilu>
  void apply(int64_t unit, int64_t slab) const {
    const int64_t end = std::min((slab + 1) * kSlab, size);
    for (int64_t begin = slab * kSlab; begin < end;) {
      const int64_t channel = begin / p_.spatial, stop = std::min(end, (channel + 1) * p_.spatial);
      const Affine& a = affine_[unit * (p_.channels / p_.groups) + channel];
      apply_run<kSilu>(a, static_cast<const T*>(p_.x) + unit * size + begin,
                       static_cast<T*>(p_.out) + unit * size + begin, stop - begin);
      begin = stop;
    }
  }

  int64_t scratch_size() const { return 0; }

 private:
  static constexpr int64_t kSlab = kRows * kRun;

  template <bool kSilu>
  static void apply_run(const Affine& a, const T* x, T* out, int64_t count) {
    const Vec shift = broadcast(a.shift), scale = broadcast(a.scale), offset = broadcast(a.offset);
    int64_t i = 0;
    for (; i + kTogether * kLanes <= count; i += kTogether * kLanes) {
#pragma GCC unroll 4
      for (int64_t at = i; at < i + kTogether * kLanes; at += kLanes) {
        store(out + at, normalise<kSilu>(load(x + at), shift, scale, offset));
      }
    }
    for (; i + kLanes <= count; i += kLanes) {
      store(out + i, normalise<kSilu>(load(x + i), shift, scale, offset));
    }
    if (i < count) store_part(out + i, normalise<kSilu>(load_part(x + i, count - i), shift, scale, offset), count - i);
  }

  const GroupNormSiluParams& p_;
  std::vector<Affine> affine_;  // (batch, channels)
};

template <bool kSilu, typename Layout>
void normalise_all(const GroupNormSiluParams& p, Layout& layout, int64_t element_size) {
  const int64_t slabs = layout.slabs, groups = layout.groups;
  std::vector<Moments> moments(layout.units * slabs * groups);  // (units, slabs, groups)

  const auto measure = [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(layout.scratch_size());
    for (int64_t slab = begin; slab < end; ++slab) {
      layout.measure(slab / slabs, slab % slabs, &moments[slab * groups], scratch.data());
    }
  };
  const auto merge = [&](int64_t unit) {
    for (int64_t group = 0; group < groups; ++group) {
      Moments all;
      for (int64_t slab = unit * slabs; slab < (unit + 1) * slabs; ++slab) all.merge(moments[slab * groups + group]);
      const double rstd = 1 / std::sqrt(all.m2 / all.count + p.eps);
      p.mean[unit * groups + group] = static_cast<float>(all.mean);
      p.rstd[unit * groups + group] = static_cast<float>(rstd);
      layout.set_affine(unit, group, all.mean, rstd);
    }
  };
  const auto apply = [&](int64_t begin, int64_t end) {
    for (int64_t slab = end; slab-- > begin;) layout.template apply<kSilu>(slab / slabs, slab % slabs);
  };

  const int64_t bytes = layout.size * element_size;
  if (layout.units >= p.num_threads && bytes <= kUnitBytes) {
    parallel_ranges(layout.units, kGrain / layout.size + 1, p.num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        measure(unit * slabs, (unit + 1) * slabs);
        merge(unit);
        apply(unit * slabs, (unit + 1) * slabs);
      }
    });
    return;
  }
  const int64_t wave = std::max<int64_t>(p.num_threads * kUnitBytes / bytes, 1),
                grain = kGrain * slabs / layout.size + 1;
  for (int64_t first = 0; first < layout.units; first += wave) {
    const int64_t last = std::min(first + wave, layout.units);
    const auto in_wave = [&](const auto& body) {
      parallel_ranges((last - first) * slabs, grain, p.num_threads,
                      [&](int64_t begin, int64_t end) { body(first * slabs + begin, first * slabs + end); });
    };
    in_wave(measure);
    for (int64_t unit = first; unit < last; ++unit) merge(unit);
    in_wave(apply);
  }
}

template <typename Layout>
void normalise_units(const GroupNormSiluParams& p, Layout layout, int64_t element_size) {
  if (p.silu) {
    normalise_all<true>(p, layout, element_size);
  } else {
    normalise_all<false>(p, layout, element_size);
  }
}

}  // namespace

void group_norm_silu(const GroupNormSiluParams& p) {
  if (p.batch == 0 || p.spatial == 0) return;
  with_element_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.channels_last) {
      normalise_units(p, Images<T>(p), sizeof(T));
    } else {
      normalise_units(p, Runs<T>(p), sizeof(T));
    }
  });
}

}  // namespace dove::DOVE_ISA_NAMESPACE
