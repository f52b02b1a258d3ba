// group_norm_silu against the formula in double, in both layouts.

#include "check.h"
#include "dove/group_norm_silu.h"

namespace {

using check::Array;
using check::Dtype;
using check::Random;

struct Size {
  int64_t batch;
  int64_t groups;
  int64_t width;  // channels of a group
  int64_t spatial;
  int threads;
};

struct Result {
  Array out, mean, rstd;
};

void check_size(Random& random, dove::Isa isa, Dtype dtype, const Size& size, bool channels_last) {
  const auto [batch, groups, width, spatial, threads] = size;
  const int64_t channels = groups * width, image = channels * spatial;
  const bool silu = random.coin();
  const double eps = random.one_of({1e-6, 1e-3});
  check::next_problem("%s, %s, %d images of %d pixels, %d groups of %d channels, silu %d, %d threads",
                      check::name(dtype), channels_last ? "channels-last" : "contiguous", int(batch), int(spatial),
                      int(groups), int(width), silu, threads);
  const Array x = Array::normal(random, dtype, batch * image, random.one_of({3.0, 30.0}));
  const Array weight = Array::normal(random, Dtype::kFloat32, channels);
  const Array bias = Array::normal(random, Dtype::kFloat32, channels);

  // Without pixels there are no statistics, and nothing is written.
  const auto make = [&] {
    return Result{Array(dtype, x.size()), Array(Dtype::kFloat32, batch * groups),
                  Array(Dtype::kFloat32, batch * groups)};
  };
  Result truth = make();
  for (int64_t unit = 0; unit < (spatial == 0 ? 0 : batch * groups); ++unit) {
    const int64_t first = unit % groups * width;
    // Calls body(channel, index into x).
    const auto for_values = [&](const auto& body) {
      for (int64_t c = first; c < first + width; ++c) {
        for (int64_t s = 0; s < spatial; ++s) {
          body(c, unit / groups * image + (channels_last ? s * channels + c : c * spatial + s));
        }
      }
    };
    const double count = static_cast<double>(width * spatial);
    double mean = 0, variance = 0;
    for_values([&](int64_t, int64_t at) { mean += x[at] / count; });
    for_values([&](int64_t, int64_t at) { variance += (x[at] - mean) * (x[at] - mean) / count; });
    const double rstd = 1 / std::sqrt(variance + eps);
    truth.mean.set(unit, mean);
    truth.rstd.set(unit, rstd);
    for_values([&](int64_t c, int64_t at) {
      const double y = (x[at] - mean) * rstd * weight[c] + bias[c];
      truth.out.set(at, silu ? y / (1 + std::exp(-y)) : y);
    });
  }

  const auto run = [&](dove::Isa which) {
    Result result = make();
    DOVE_CPU_KERNEL(group_norm_silu)
    ({x.data(), result.out.data(), weight.floats(), bias.floats(), result.mean.floats(), result.rstd.floats(), batch,
      channels, spatial, groups, eps, channels_last, silu, dtype, threads},
     which);
    return result;
  };
  const auto compare = [&](const Result& ours, const Result& theirs) {
    close("out", ours.out, theirs.out.values(), check::tolerance(dtype), image);
    close("mean", ours.mean, theirs.mean.values(), check::tolerance(Dtype::kFloat32), batch * groups);
    close("rstd", ours.rstd, theirs.rstd.values(), check::tolerance(Dtype::kFloat32), batch * groups);
  };
  const Result ours = run(isa);
  compare(ours, truth);
  compare(ours, run(dove::Isa::kBaseline));
}

void check_all(dove::Isa isa) {
  Random random;
  for (const Dtype dtype : check::kDtypes) {
    for (const bool channels_last : {false, true}) {
      for (int trial = 0; trial < 100; ++trial) {
        const Size size{random.between(0, 3), random.between(1, 5), random.between(1, 20), random.between(0, 90), 3};
        check_size(random, isa, dtype, size, channels_last);
      }
      // Several slabs and threads: images divided among the threads, and images and groups that are one thread's.
      check_size(random, isa, dtype, {2, 3, 7, 5003, 4}, channels_last);
      check_size(random, isa, dtype, {5, 2, 9, 1301, 2}, channels_last);
    }
  }
  // Units above 1 MB, in more than one wave.
  check_size(random, isa, Dtype::kFloat32, {2, 1, 67, 4099, 1}, false);
  check_size(random, isa, Dtype::kFloat32, {2, 1, 67, 4099, 1}, true);
}

}  // namespace

int main(int argc, char** argv) { return check::run(argc, argv, check_all); }
