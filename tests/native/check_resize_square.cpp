// resize_square against loops over the same taps, pixel by pixel; that the taps are Pillow's is for tests/data to see.

#include "check.h"
#include "dove/resample_taps.h"
#include "dove/resize_square.h"

namespace {

using check::Random;
using dove::ResampleTaps;

uint8_t weighed(const ResampleTaps& taps, int64_t at, const uint8_t* pixels, int64_t stride) {
  int64_t sum = int64_t{1} << (ResampleTaps::kFractionBits - 1);
  for (int64_t tap = 0; tap < taps.count[at]; ++tap) {
    sum += int64_t{pixels[(taps.first[at] + tap) * stride]} * taps.weights[at * taps.most + tap];
  }
  return static_cast<uint8_t>(std::clamp<int64_t>(sum >> ResampleTaps::kFractionBits, 0, 255));
}

void check_taps(const ResampleTaps& taps, int64_t length, int64_t size) {
  for (int64_t x = 0; x < size; ++x) {
    if (taps.first[x] < 0 || taps.count[x] < 1 || taps.first[x] + taps.count[x] > length || taps.count[x] > taps.most) {
      check::fail("pixel %d has %d taps from %d on", int(x), int(taps.count[x]), int(taps.first[x]));
    }
    int64_t sum = 0;
    for (int64_t tap = 0; tap < taps.count[x]; ++tap) sum += taps.weights[x * taps.most + tap];
    // Each is rounded by half a unit at most.
    if (std::abs(sum - (int64_t{1} << ResampleTaps::kFractionBits)) > taps.count[x]) {
      check::fail("the weights of pixel %d come to %lld", int(x), static_cast<long long>(sum));
    }
  }
}

void check_image(Random& random, dove::Isa isa, int64_t width, int64_t height, int64_t size) {
  const int64_t side = random.between(1, std::min(width, height));
  const int64_t left = random.between(0, width - side), top = random.between(0, height - side);
  check::next_problem("%d x %d pixels, %d from (%d, %d) to %d", int(width), int(height), int(side), int(left), int(top),
                      int(size));
  // Noise, or black and white alone, which leaves the range between.
  const bool extreme = random.coin();
  std::vector<uint8_t> source(width * height * 3);
  for (uint8_t& pixel : source) pixel = static_cast<uint8_t>(extreme ? 255 * random.coin() : random.between(0, 255));
  std::vector<uint8_t> target(3 * size * size, check::poison<uint8_t>());
  DOVE_CPU_KERNEL(resize_square)({source.data(), target.data(), width, height, left, top, side, size}, isa);

  const ResampleTaps across = dove::resample_taps(width, left, side, size);
  const ResampleTaps down = dove::resample_taps(height, top, side, size);
  check_taps(across, width, size);
  check_taps(down, height, size);
  std::vector<uint8_t> middle(height * size);
  for (int64_t c = 0; c < 3; ++c) {
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t x = 0; x < size; ++x) middle[y * size + x] = weighed(across, x, &source[y * width * 3 + c], 3);
    }
    for (int64_t y = 0; y < size; ++y) {
      for (int64_t x = 0; x < size; ++x) {
        const int expected = weighed(down, y, &middle[x], size), found = target[(c * size + y) * size + x];
        if (found != expected) {
          check::fail("channel %d at (%d, %d) is %d, not %d", int(c), int(x), int(y), found, expected);
        }
      }
    }
  }
}

void check_all(dove::Isa isa) {
  Random random;
  for (int trial = 0; trial < 300; ++trial) {
    check_image(random, isa, random.between(1, 70), random.between(1, 70), random.between(1, 40));
  }
  check_image(random, isa, 1, 1, 64);
  check_image(random, isa, 1000, 3, 64);
  check_image(random, isa, 3, 1000, 64);
  check_image(random, isa, 300, 257, 64);
}

}  // namespace

int main(int argc, char** argv) { return check::run(argc, argv, check_all); }
