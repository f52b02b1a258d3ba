#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "dove/group_norm_silu.h"
#include "dove/parallel.h"
#include "simd.h"

// With n = (x - mean) rstd, y = weight n + bias and d = grad silu'(y), a channel's bias gets sum d and its weight
// sum d n, and x gets rstd (weight d - A - n B), A and B the means of weight d and weight d n over the group.
//
// Two passes over a unit, an image if channels-last, else one group of one image: the first takes the channels' sums
// slab by slab, the second writes grad_x, from the last slab to the first, as the last ones are still in the cache. For
// the second, d lies in grad_x if that is fp32; 16 bits would round it, and it is computed again. A slab's sums are in
// fp32; slabs are added in their order in fp64, and so are images. What a slab is depends on the shape alone: the
// result is the same for any number of threads, and grad_x in any batch.
//
// The mean comes rounded to fp32. Where it is so far from 0 that n would show that, a pass before these takes the mean
// of x - mean.
namespace dove::DOVE_ISA_NAMESPACE {
namespace {

// A slab is kRows pixels of all channels, or up to kRun pixels of one channel.
constexpr int64_t kRows = 64;
constexpr int64_t kRun = 4096;
// Vectors, or rows of pixels, that are worked on at a time.
constexpr int64_t kTogether = 4;
// A unit whose x and grad are up to this size is one thread's; larger ones are divided among the threads.
constexpr int64_t kUnitBytes = int64_t{1} << 20;
// A thread gets at least so many values: some 20 us.
constexpr int64_t kGrain = int64_t{1} << 14;
// The |mean| rstd up to which the rounding is left in n: it is at most 8 / 2^24 = 5e-7.
constexpr float kNear = 8;

// Whether the first pass leaves d in grad_x; without SiLU it is grad.
template <bool kSilu, typename T>
constexpr bool kKept = kSilu && std::is_same_v<T, float>;

// What is known of a channel of an image.
enum Row : int64_t {
  kShift,   // the mean as it came
  kScale,   // rstd
  kLost,    // what the mean's rounding took off n
  kWeight,  // of the channel, as is the bias
  kBias,
  kMinusA,
  kMinusB,
  kTableRows
};

// kLanes channels, or one of them in all lanes.
struct Channel {
  Vec shift, scale, lost, weight, bias;

  // `read` gives a row of the table.
  template <typename Read>
  explicit Channel(const Read& read)
      : shift(read(kShift)), scale(read(kScale)), lost(read(kLost)), weight(read(kWeight)), bias(read(kBias)) {}

  Vec n(Vec x) const { return fma(x - shift, scale, lost); }

  template <bool kSilu>
  Vec d(Vec grad, Vec n) const {
    return kSilu ? grad * silu_slope(fma(n, weight, bias)) : grad;
  }

  // `grad` is d already where that is kept.
  template <bool kSilu, typename T>
  Vec grad_x(Vec grad, Vec x, Vec minus_a, Vec minus_b) const {
    const Vec normal = n(x);
    return scale * fma(weight, d < kSilu && !kKept < kSilu, T >> (grad, normal), fma(normal, minus_b, minus_a));
  }
};

// The table, and the channels' sums.
class Channels {
 public:
  explicit Channels(const GroupNormSiluBackwardParams& p)
      : width(p.channels / p.groups),
        padded((p.channels + kLanes - 1) / kLanes * kLanes),
        p_(p),
        table_(p.batch * kTableRows * padded),
        sums_(p.batch * 2 * padded) {
    for (int64_t image = 0; image < p.batch; ++image) {
      for (int64_t c = 0; c < p.channels; ++c) {
        row(image, kShift)[c] = p.mean[image * p.groups + c / width];
        row(image, kScale)[c] = p.rstd[image * p.groups + c / width];
        row(image, kWeight)[c] = p.weight[c];
        row(image, kBias)[c] = p.bias[c];
      }
    }
  }

  const int64_t width;   // channels of a group
  const int64_t padded;  // channels, in whole vectors

  float* row(int64_t image, Row row) { return table_.data() + (image * kTableRows + row) * padded; }
  const float* row(int64_t image, Row row) const { return const_cast<Channels*>(this)->row(image, row); }

  // By channel, sum d and, `padded` behind it, sum d n; both begin as 0.
  double* sums(int64_t image) { return sums_.data() + image * 2 * padded; }

  bool far(int64_t image, int64_t group) const {
    const int64_t c = group * width;
    return std::abs(row(image, kShift)[c]) * row(image, kScale)[c] > kNear;
  }

  // `rest` is the mean of x - mean.
  void set_rest(int64_t image, int64_t group, double rest) {
    const double lost = -rest * row(image, kScale)[group * width];
    std::fill_n(row(image, kLost) + group * width, width, static_cast<float>(lost));
  }

  // To be called when the group's sums are complete.
  void set_means(int64_t image, int64_t group) {
    const double *d = sums(image), *dn = d + padded;
    double a = 0, b = 0;
    for (int64_t c = group * width; c < (group + 1) * width; ++c) {
      a += p_.weight[c] * d[c];
      b += p_.weight[c] * dn[c];
    }
    const double count = static_cast<double>(width * p_.spatial);
    std::fill_n(row(image, kMinusA) + group * width, width, static_cast<float>(-a / count));
    std::fill_n(row(image, kMinusB) + group * width, width, static_cast<float>(-b / count));
  }

  void add_images() const {
    std::vector<double> total(2 * padded);
    for (int64_t image = 0; image < p_.batch; ++image) {
      for (int64_t i = 0; i < 2 * padded; ++i) total[i] += sums_[image * 2 * padded + i];
    }
    for (int64_t c = 0; c < p_.channels; ++c) {
      p_.grad_bias[c] = static_cast<float>(total[c]);
      p_.grad_weight[c] = static_cast<float>(total[padded + c]);
    }
  }

 private:
  const GroupNormSiluBackwardParams& p_;
  std::vector<float> table_;  // (batch, kTableRows, padded)
  std::vector<double> sums_;  // (batch, 2, padded)
};

// Channels-last: a unit is an image, (spatial, channels).
template <typename T>
class Images {
 public:
  Images(const GroupNormSiluBackwardParams& p, Channels& channels)
      : units(p.batch),
        size(p.spatial * p.channels),
        slabs((p.spatial + kRows - 1) / kRows),
        slab_sums(2 * channels.padded),
        p_(p),
        channels_(channels),
        padded_(channels.padded) {}

  const int64_t units, size, slabs;
  const int64_t slab_sums;  // floats that a slab's sums take

  bool far(int64_t unit) const {
    for (int64_t group = 0; group < p_.groups; ++group) {
      if (channels_.far(unit, group)) return true;
    }
    return false;
  }

  // The sums of x - mean.
  void measure(int64_t unit, int64_t slab, float* sums) const {
    const float* shifts = channels_.row(unit, kShift);
    std::fill_n(sums, padded_, 0.0f);
    for_rows(unit, slab, [&](int64_t first, auto rows) {
      constexpr int64_t kCount = rows;
      const T* x = static_cast<const T*>(p_.x) + first;
      for_vectors<T>(p_.channels, [&](int64_t c, auto read, auto) {
        const Vec shift = load(shifts + c);
        Vec sum = load(sums + c);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kCount; ++r) sum += read(x + r * p_.channels + c) - shift;
        store(sums + c, sum);
      });
    });
  }

  // `sums`: those of the unit's slabs.
  void set_rests(int64_t unit, const float* sums) {
    for (int64_t group = 0; group < p_.groups; ++group) {
      double rest = 0;
      for (int64_t slab = 0; slab < slabs; ++slab) {
        const float* of_slab = sums + slab * slab_sums + group * channels_.width;
        for (int64_t c = 0; c < channels_.width; ++c) rest += of_slab[c];
      }
      channels_.set_rest(unit, group, rest / static_cast<double>(channels_.width * p_.spatial));
    }
  }

  template <bool kSilu>
  void sum(int64_t unit, int64_t slab, float* sums) const {
    std::fill_n(sums, slab_sums, 0.0f);
    for_rows(unit, slab, [&](int64_t first, auto rows) {
      constexpr int64_t kCount = rows;
      const T *grad = static_cast<const T*>(p_.grad) + first, *x = static_cast<const T*>(p_.x) + first;
      T* kept = static_cast<T*>(p_.grad_x) + first;
      for_vectors<T>(p_.channels, [&](int64_t c, auto read, auto write) {
        const Channel channel = channel_at(unit, c);
        Vec sum_d = load(sums + c), sum_dn = load(sums + padded_ + c);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kCount; ++r) {
          const int64_t at = r * p_.channels + c;
          const Vec n = channel.n(read(x + at)), d = channel.d<kSilu>(read(grad + at), n);
          if (kKept<kSilu, T>) write(kept + at, d);
          sum_d += d;
          sum_dn = fma(d, n, sum_dn);
        }
        store(sums + c, sum_d);
        store(sums + padded_ + c, sum_dn);
      });
    });
  }

  void set_means(int64_t unit, const float* sums) {
    double* total = channels_.sums(unit);
    for (int64_t slab = 0; slab < slabs; ++slab) {
      for (int64_t i = 0; i < slab_sums; ++i) total[i] += sums[slab * slab_sums + i];
    }
    for (int64_t group = 0; group < p_.groups; ++group) channels_.set_means(unit, group);
  }

  template <bool kSilu>
  void apply(int64_t unit, int64_t slab) const {
    for_rows(unit, slab, [&](int64_t first, auto rows) {
      constexpr int64_t kCount = rows;
      const T* x = static_cast<const T*>(p_.x) + first;
      T* grad_x = static_cast<T*>(p_.grad_x) + first;
      const T* grad = kKept<kSilu, T> ? grad_x : static_cast<const T*>(p_.grad) + first;
      for_vectors<T>(p_.channels, [&](int64_t c, auto read, auto write) {
        const Channel channel = channel_at(unit, c);
        const Vec minus_a = load(channels_.row(unit, kMinusA) + c), minus_b = load(channels_.row(unit, kMinusB) + c);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kCount; ++r) {
          const int64_t at = r * p_.channels + c;
          write(grad_x + at, channel.grad_x<kSilu, T>(read(grad + at), read(x + at), minus_a, minus_b));
        }
      });
    });
  }

 private:
  // Calls body(offset, rows) for the rows of a slab, kTogether or one at a time; `rows` is known when it is compiled.
  template <typename Body>
  void for_rows(int64_t unit, int64_t slab, const Body& body) const {
    const int64_t begin = slab * kRows, end = std::min(begin + kRows, p_.spatial);
    int64_t row = begin;
    for (; row + kTogether <= end; row += kTogether) {
      body(unit * size + row * p_.channels, std::integral_constant<int64_t, kTogether>());
    }
    for (; row < end; ++row) body(unit * size + row * p_.channels, std::integral_constant<int64_t, 1>());
  }

  Channel channel_at(int64_t unit, int64_t c) const {
    return Channel([&](Row row) { return load(channels_.row(unit, row) + c); });
  }

  const GroupNormSiluBackwardParams& p_;
  Channels& channels_;
  const int64_t padded_;
};

// Contiguous: a unit is a group of an image, (channels of a group, spatial).
template <typename T>
class Runs {
 public:
  Runs(const GroupNormSiluBackwardParams& p, Channels& channels)
      : units(p.batch * p.groups),
        size(channels.width * p.spatial),
        slabs(channels.width * ((p.spatial + kRun - 1) / kRun)),
        slab_sums(2),
        p_(p),
        channels_(channels),
        parts_((p.spatial + kRun - 1) / kRun) {}

  const int64_t units, size, slabs;
  const int64_t slab_sums;

  bool far(int64_t unit) const { return channels_.far(unit / p_.groups, unit % p_.groups); }

  void measure(int64_t unit, int64_t slab, float* sums) const {
    const Run run = run_of(unit, slab);
    const T* x = static_cast<const T*>(p_.x) + run.begin;
    const float shift = channels_.row(run.image, kShift)[run.channel];
    Vec lanes[kTogether] = {};
    const int64_t whole = for_whole_vectors(run.count, [&](int64_t v, int64_t i) { lanes[v] += load(x + i) - shift; });
    double sum = add_lanes(lanes);
    for (int64_t i = whole; i < run.count; ++i) sum += static_cast<double>(load_one(x + i)) - shift;
    *sums = static_cast<float>(sum);
  }

  void set_rests(int64_t unit, const float* sums) {
    double rest = 0;
    for (int64_t slab = 0; slab < slabs; ++slab) rest += sums[slab * slab_sums];
    channels_.set_rest(unit / p_.groups, unit % p_.groups, rest / static_cast<double>(size));
  }

  template <bool kSilu>
  void sum(int64_t unit, int64_t slab, float* sums) const {
    const Run run = run_of(unit, slab);
    const T *grad = static_cast<const T*>(p_.grad) + run.begin, *x = static_cast<const T*>(p_.x) + run.begin;
    T* kept = static_cast<T*>(p_.grad_x) + run.begin;
    const Channel channel = channel_of(run);
    Vec sum_d[kTogether] = {}, sum_dn[kTogether] = {};
    const auto add = [&](int64_t v, Vec grad, Vec x) {
      const Vec n = channel.n(x), d = channel.d<kSilu>(grad, n);
      sum_d[v] += d;
      sum_dn[v] = fma(d, n, sum_dn[v]);
      return d;
    };
    const int64_t whole = for_whole_vectors(run.count, [&](int64_t v, int64_t i) {
      const Vec d = add(v, load(grad + i), load(x + i));
      if (kKept<kSilu, T>) store(kept + i, d);
    });
    const int64_t rest = run.count - whole;
    if (rest > 0) {
      // Behind the end grad is 0, and so is d.
      const Vec d = add(0, load_part(grad + whole, rest), load_part(x + whole, rest));
      if (kKept<kSilu, T>) store_part(kept + whole, d, rest);
    }
    sums[0] = static_cast<float>(add_lanes(sum_d));
    sums[1] = static_cast<float>(add_lanes(sum_dn));
  }

  void set_means(int64_t unit, const float* sums) {
    const int64_t image = unit / p_.groups, group = unit % p_.groups;
    double* total = channels_.sums(image);
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const int64_t c = group * channels_.width + slab / parts_;
      total[c] += sums[slab * slab_sums];
      total[channels_.padded + c] += sums[slab * slab_sums + 1];
    }
    channels_.set_means(image, group);
  }

  template <bool kSilu>
  void apply(int64_t unit, int64_t slab) const {
    const Run run = run_of(unit, slab);
    const T* x = static_cast<const T*>(p_.x) + run.begin;
    T* grad_x = static_cast<T*>(p_.grad_x) + run.begin;
    const T* grad = kKept<kSilu, T> ? grad_x : static_cast<const T*>(p_.grad) + run.begin;
    const Channel channel = channel_of(run);
    const Vec minus_a = broadcast(channels_.row(run.image, kMinusA)[run.channel]);
    const Vec minus_b = broadcast(channels_.row(run.image, kMinusB)[run.channel]);
    const int64_t whole = for_whole_vectors(run.count, [&](int64_t, int64_t i) {
      store(grad_x + i, channel.grad_x<kSilu, T>(load(grad + i), load(x + i), minus_a, minus_b));
    });
    const int64_t rest = run.count - whole;
    if (rest > 0) {
      const Vec value =
          channel.grad_x<kSilu, T>(load_part(grad + whole, rest), load_part(x + whole, rest), minus_a, minus_b);
      store_part(grad_x + whole, value, rest);
    }
  }

 private:
  // A slab: `count` pixels of a channel from the element `begin` on.
  struct Run {
    int64_t image, channel, begin, count;
  };

  Run run_of(int64_t unit, int64_t slab) const {
    const int64_t in_group = slab / parts_, pixel = slab % parts_ * kRun;
    return {unit / p_.groups, unit % p_.groups * channels_.width + in_group,
            unit * size + in_group * p_.spatial + pixel, std::min(kRun, p_.spatial - pixel)};
  }

  Channel channel_of(const Run& run) const {
    return Channel([&](Row row) { return broadcast(channels_.row(run.image, row)[run.channel]); });
  }

  // Calls body(v, i), v < kTogether, for every vector from i on that is whole; returns where the rest begins.
  template <typename Body>
  static int64_t for_whole_vectors(int64_t count, const Body& body) {
    int64_t i = 0;
    for (; i + kTogether * kLanes <= count; i += kTogether * kLanes) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < kTogether; ++v) body(v, i + v * kLanes);
    }
    for (; i + kLanes <= count; i += kLanes) body(0, i);
    return i;
  }

  static double add_lanes(const Vec (&lanes)[kTogether]) {
    double total = 0;
    for (const Vec& lane : lanes) total += dove::DOVE_ISA_NAMESPACE::sum(lane);
    return total;
  }

  const GroupNormSiluBackwardParams& p_;
  Channels& channels_;
  const int64_t parts_;  // slabs of a channel
};

template <bool kSilu, typename Layout>
void all_units(const GroupNormSiluBackwardParams& p, Layout layout, int64_t element_size) {
  const int64_t slabs = layout.slabs;
  // divide(body) calls body(begin, end) for ranges of the slabs of the units from `first` to `last`; `sums` has room
  // for the sums of all of them.
  const auto work = [&](int64_t first, int64_t last, float* sums, const auto& divide) {
    const auto sums_of = [&](int64_t slab) { return sums + (slab - first * slabs) * layout.slab_sums; };
    bool far = false;
    for (int64_t unit = first; unit < last; ++unit) far = far || layout.far(unit);
    if (far) {
      divide([&](int64_t begin, int64_t end) {
        for (int64_t slab = begin; slab < end; ++slab) layout.measure(slab / slabs, slab % slabs, sums_of(slab));
      });
      // Of those alone that need it, so that an image does not depend on its company.
      for (int64_t unit = first; unit < last; ++unit) {
        if (layout.far(unit)) layout.set_rests(unit, sums_of(unit * slabs));
      }
    }
    divide([&](int64_t begin, int64_t end) {
      for (int64_t slab = begin; slab < end; ++slab) {
        layout.template sum<kSilu>(slab / slabs, slab % slabs, sums_of(slab));
      }
    });
    for (int64_t unit = first; unit < last; ++unit) layout.set_means(unit, sums_of(unit * slabs));
    divide([&](int64_t begin, int64_t end) {
      for (int64_t slab = end; slab-- > begin;) layout.template apply<kSilu>(slab / slabs, slab % slabs);
    });
  };

  const int64_t bytes = 2 * layout.size * element_size;
  if (layout.units >= p.num_threads && bytes <= kUnitBytes) {
    parallel_ranges(layout.units, kGrain / layout.size + 1, p.num_threads, [&](int64_t begin, int64_t end) {
      std::vector<float> sums(slabs * layout.slab_sums);
      for (int64_t unit = begin; unit < end; ++unit) {
        work(unit, unit + 1, sums.data(), [&](const auto& body) { body(unit * slabs, (unit + 1) * slabs); });
      }
    });
    return;
  }
  const int64_t wave = std::min(std::max<int64_t>(p.num_threads * kUnitBytes / bytes, 1), layout.units);
  const int64_t grain = kGrain * slabs / layout.size + 1;
  std::vector<float> sums(wave * slabs * layout.slab_sums);
  for (int64_t first = 0; first < layout.units; first += wave) {
    const int64_t last = std::min(first + wave, layout.units);
    work(first, last, sums.data(), [&](const auto& body) {
      parallel_ranges((last - first) * slabs, grain, p.num_threads,
                      [&](int64_t begin, int64_t end) { body(first * slabs + begin, first * slabs + end); });
    });
  }
}

}  // namespace

void group_norm_silu_backward(const GroupNormSiluBackwardParams& p) {
  Channels channels(p);
  const auto run = [&](auto layout, int64_t element_size) {
    if (p.silu) {
      all_units<true>(p, layout, element_size);
    } else {
      all_units<false>(p, layout, element_size);
    }
  };
  if (p.batch > 0 && p.spatial > 0) {
    with_element_type(p.dtype, [&](auto element) {
      using T = decltype(element);
      if (p.channels_last) {
        run(Images<T>(p, channels), sizeof(T));
      } else {
        run(Runs<T>(p, channels), sizeof(T));
      }
    });
  }
  channels.add_images();
}

}  // namespace dove::DOVE_ISA_NAMESPACE
