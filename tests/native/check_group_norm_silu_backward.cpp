// group_norm_silu_backward against the formula in double, in both layouts, and with one thread.

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
  Array grad_x, grad_weight, grad_bias;
};

void check_size(Random& random, dove::Isa isa, Dtype dtype, const Size& size, bool channels_last) {
  const auto [batch, groups, width, spatial, threads] = size;
  const int64_t channels = groups * width, image = channels * spatial;
  const bool silu = random.coin();
  // A group of few values has next to no gradient where eps is small: what would be compared is rounding.
  const double eps = random.one_of({0.1, 1.0});
  check::next_problem("%s, %s, %d images of %d pixels, %d groups of %d channels, silu %d, %d threads",
                      check::name(dtype), channels_last ? "channels-last" : "contiguous", int(batch), int(spatial),
                      int(groups), int(width), silu, threads);
  // The second is far from 0, and so is the rounding of its mean.
  const Array x = Array::normal(random, dtype, batch * image, random.one_of({3.0, 300.0}));
  const Array grad = Array::normal(random, dtype, batch * image, 0.5);
  const Array weight = Array::normal(random, Dtype::kFloat32, channels);
  const Array bias = Array::normal(random, Dtype::kFloat32, channels);
  Array means(Dtype::kFloat32, batch * groups), rstds(Dtype::kFloat32, batch * groups);

  const auto make = [&] {
    return Result{Array(dtype, x.size()), Array(Dtype::kFloat32, channels), Array(Dtype::kFloat32, channels)};
  };
  Result truth = make();
  std::vector<double> of_weight(channels), of_bias(channels), normal(x.size()), delta(x.size());
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
    double mean = 0, variance = 0, a = 0, b = 0;
    for_values([&](int64_t, int64_t at) { mean += x[at] / count; });
    for_values([&](int64_t, int64_t at) { variance += (x[at] - mean) * (x[at] - mean) / count; });
    const double rstd = 1 / std::sqrt(variance + eps);
    means.set(unit, mean);
    rstds.set(unit, rstd);
    for_values([&](int64_t c, int64_t at) {
      normal[at] = (x[at] - mean) * rstd;
      const double y = normal[at] * weight[c] + bias[c], s = 1 / (1 + std::exp(-y));
      delta[at] = grad[at] * (silu ? s * (1 + y * (1 - s)) : 1);
      of_bias[c] += delta[at];
      of_weight[c] += delta[at] * normal[at];
      a += weight[c] * delta[at] / count;
      b += weight[c] * delta[at] * normal[at] / count;
    });
    for_values(
        [&](int64_t c, int64_t at) { truth.grad_x.set(at, rstd * (weight[c] * delta[at] - a - normal[at] * b)); });
  }
  for (int64_t c = 0; c < channels; ++c) {
    truth.grad_weight.set(c, of_weight[c]);
    truth.grad_bias.set(c, of_bias[c]);
  }

  const auto run = [&](dove::Isa which, int num_threads) {
    Result result = make();
    DOVE_CPU_KERNEL(group_norm_silu_backward)
    ({grad.data(), x.data(), result.grad_x.data(), weight.floats(), bias.floats(), means.floats(), rstds.floats(),
      result.grad_weight.floats(), result.grad_bias.floats(), batch, channels, spatial, groups, channels_last, silu,
      dtype, num_threads},
     which);
    return result;
  };
  const auto compare = [&](const Result& ours, const Result& theirs, double of_x, double of_channels) {
    close("grad_x", ours.grad_x, theirs.grad_x.values(), of_x, image);
    close("grad_weight", ours.grad_weight, theirs.grad_weight.values(), of_channels, channels);
    close("grad_bias", ours.grad_bias, theirs.grad_bias.values(), of_channels, channels);
  };
  const double of_x = check::tolerance(dtype), of_channels = check::tolerance(Dtype::kFloat32);
  const Result ours = run(isa, threads);
  compare(ours, truth, of_x, of_channels);
  compare(ours, run(dove::Isa::kBaseline, threads), of_x, of_channels);
  compare(ours, run(isa, 1), 0, 0);
}

void check_all(dove::Isa isa) {
  Random random;
  for (const Dtype dtype : check::kDtypes) {
    for (const bool channels_last : {false, true}) {
      for (int trial = 0; trial < 100; ++trial) {
        const Size size{random.between(0, 3), random.between(1, 5), random.between(2, 20), random.between(0, 90), 3};
        check_size(random, isa, dtype, size, channels_last);
      }
      // Groups of one channel.
      check_size(random, isa, dtype, {2, 37, 1, 9, 3}, channels_last);
      // Several slabs and threads: images divided among the threads, and images and groups that are one thread's.
      check_size(random, isa, dtype, {2, 3, 7, 5003, 4}, channels_last);
      check_size(random, isa, dtype, {5, 2, 9, 1301, 2}, channels_last);
    }
  }
  // Units above 1 MB, in more than one wave.
  check_size(random, isa, Dtype::kFloat32, {2, 1, 67, 4099, 2}, false);
  check_size(random, isa, Dtype::kFloat32, {3, 1, 67, 4099, 2}, true);
}

}  // namespace

int main(int argc, char** argv) { return check::run(argc, argv, check_all); }
