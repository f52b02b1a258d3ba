// eos_scan against dot products in double; a row's length is held to the logits that were written.

#include "check.h"
#include "dove/eos_scan.h"

namespace {

using check::Array;
using check::Dtype;
using check::Random;

void check_rows(Random& random, dove::Isa isa, Dtype dtype, int64_t rows, int64_t longest, int64_t width, int threads) {
  std::vector<int32_t> cu_seqlens{0}, steps;
  for (int64_t row = 0; row < rows; ++row) {
    cu_seqlens.push_back(cu_seqlens.back() + static_cast<int32_t>(random.between(0, longest)));
    steps.push_back(static_cast<int32_t>(random.between(0, 9)));
  }
  const int64_t total = cu_seqlens.back(), stride = width + random.between(0, 5);
  const auto max_length = static_cast<int32_t>(random.between(1, longest + 9));
  check::next_problem("%s, %d rows, %d states, %d of %d wide, at most %d, %d threads", check::name(dtype), int(rows),
                      int(total), int(width), int(stride), max_length, threads);
  const Array states = Array::normal(random, dtype, total, width, stride);
  const Array weight = Array::normal(random, Dtype::kFloat32, width);
  const float bias = -0.5f;
  // Some states in a hundred are EOS.
  const float limit = static_cast<float>(2 * std::sqrt(static_cast<double>(width)));

  std::vector<double> expected(total, bias);
  for (int64_t state = 0; state < total; ++state) {
    for (int64_t c = 0; c < width; ++c) expected[state] += states[state * stride + c] * weight[c];
  }

  const auto run = [&](dove::Isa which) {
    Array logits(Dtype::kFloat32, total);
    std::vector<int32_t> lengths(rows, check::poison<int32_t>());
    DOVE_CPU_KERNEL(eos_scan)
    ({states.data(), stride, cu_seqlens.data(), weight.floats(), bias, limit, steps.data(), max_length, logits.floats(),
      lengths.data(), rows, width, dtype, threads},
     which);
    for (int64_t row = 0; row < rows; ++row) {
      const int32_t count = cu_seqlens[row + 1] - cu_seqlens[row];
      int32_t length = steps[row] + count >= max_length ? max_length : 0;
      for (int32_t state = 0; state < count; ++state) {
        if (logits[cu_seqlens[row] + state] > limit) {
          length = std::min(steps[row] + state + 1, max_length);
          break;
        }
      }
      if (lengths[row] != length) check::fail("row %d has length %d, not %d", int(row), lengths[row], length);
    }
    return logits;
  };
  // The logits are fp32 whatever the states are.
  const double tolerance = check::tolerance(Dtype::kFloat32);
  const Array logits = run(isa);
  close("logits", logits, expected, tolerance, total);
  close("logits beside the baseline's", logits, run(dove::Isa::kBaseline).values(), tolerance, total);
}

void check_all(dove::Isa isa) {
  Random random;
  for (const Dtype dtype : check::kDtypes) {
    for (int trial = 0; trial < 200; ++trial) {
      check_rows(random, isa, dtype, random.between(0, 6), random.between(0, 40), random.between(1, 150), 3);
    }
    // Enough multiply-adds for several threads.
    check_rows(random, isa, dtype, 37, 100, 803, 4);
  }
}

}  // namespace

int main(int argc, char** argv) { return check::run(argc, argv, check_all); }
