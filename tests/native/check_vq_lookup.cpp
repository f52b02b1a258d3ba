// vq_lookup against every score in double, and against the baseline.

#include "vq_lookup_problem.h"

namespace {

using check::Dtype;
using check::vq_lookup::Size;

void check_size(check::Random& random, dove::Isa isa, Dtype dtype, const Size& size, bool overflow = false) {
  const auto problem = check::vq_lookup::make_problem(random, dtype, size, overflow);
  const auto run = [&](dove::Isa which) {
    return check::vq_lookup::solve(problem, false,
                                   [&](const dove::VqLookupParams& p) { DOVE_CPU_KERNEL(vq_lookup)(p, which); });
  };
  const auto codes = run(isa), others = run(dove::Isa::kBaseline);
  for (int64_t row = 0; row < size.rows; ++row) {
    if (codes[row] == others[row]) continue;
    // Each is within the bound of the best, so this can be only where two words are that close.
    const int64_t ours = row * size.words + codes[row], theirs = row * size.words + others[row];
    if (std::abs(problem.scores[ours] - problem.scores[theirs]) > 2 * (problem.errors[ours] + problem.errors[theirs])) {
      check::fail("row %d has code %d, the baseline %d", int(row), int(codes[row]), int(others[row]));
    }
  }
}

void check_all(dove::Isa isa) {
  check::Random random;
  for (const Dtype dtype : check::kDtypes) {
    for (int trial = 0; trial < 150; ++trial) {
      const int64_t rows = random.one_of({random.between(0, 9), random.between(10, 70)});
      check_size(random, isa, dtype, {rows, random.between(1, 90), random.between(1, 70), 1});
    }
    check_size(random, isa, dtype, {5, 30, 40, 2}, true);
    check_size(random, isa, dtype, {50, 30, 9, 2}, true);
    // Rows and codewords divided among threads, in several groups of panels and blocks of codewords.
    check_size(random, isa, dtype, {3, 700, 517, 5});
    check_size(random, isa, dtype, {40, 1001, 33, 7});
    check_size(random, isa, dtype, {301, 300, 601, 3});
  }
}

}  // namespace

int main(int argc, char** argv) { return check::run(argc, argv, check_all); }
