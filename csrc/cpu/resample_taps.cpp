#include "dove/resample_taps.h"

#include <algorithm>
#include <cmath>

namespace dove {
namespace {

constexpr double kSupport = 2.0;

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < kSupport) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

}  // namespace

ResampleTaps resample_taps(int64_t length, int64_t from, int64_t side, int64_t size) {
  const double scale = static_cast<double>(side) / size;
  const double width = std::max(scale, 1.0), support = kSupport * width, inverse = 1.0 / width;
  ResampleTaps taps;
  taps.most = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
  taps.first.resize(size);
  taps.count.resize(size);
  taps.weights.assign(size * taps.most, 0);
  std::vector<double> exact(taps.most);
  for (int64_t x = 0; x < size; ++x) {
    const double center = from + (x + 0.5) * scale;
    const int64_t first = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
    const int64_t count = std::min(static_cast<int64_t>(center + support + 0.5), length) - first;
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      exact[i] = bicubic((i + first - center + 0.5) * inverse);
      sum += exact[i];
    }
    // No pixel of an image is so far outside that its weights are all 0.
    for (int64_t i = 0; i < count; ++i) {
      const double weight = exact[i] / sum;
      const double half = weight < 0 ? -0.5 : 0.5;
      taps.weights[x * taps.most + i] = static_cast<int32_t>(half + weight * (1 << ResampleTaps::kFractionBits));
    }
    taps.first[x] = first;
    taps.count[x] = count;
  }
  return taps;
}

}  // namespace dove
