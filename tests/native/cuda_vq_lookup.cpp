// The CUDA kernels of vq_lookup on the CPU, against every score in double.

#include "../../csrc/cuda/vq_lookup.cu"
#include "cuda_on_host/warp_on_host.h"
#include "vq_lookup_problem.h"

namespace {

using check::Dtype;
using check::vq_lookup::Size;

void check_size(check::Random& random, Dtype dtype, const Size& size, int64_t ranges, bool overflow = false) {
  const auto problem = check::vq_lookup::make_problem(random, dtype, size, overflow);
  check::vq_lookup::solve(problem, true, [&](dove::VqLookupParams p) {
    std::vector<uint8_t> scratch(dove::vq_lookup_scratch_bytes(p.num_rows, ranges), 0x7f);
    p.words_rounded = true;
    p.num_ranges = ranges;
    p.scratch = scratch.data();
    dove::cuda::vq_lookup(p, 0, nullptr);
  });
}

void check_all() {
  check::Random random;
  for (const Dtype dtype : check::kDtypes) {
    for (int trial = 0; trial < 8; ++trial) {
      check_size(random, dtype, {random.between(0, 40), random.between(1, 90), random.between(1, 70), 0}, 1);
    }
    check_size(random, dtype, {20, 30, 24, 0}, 1, true);
    // Several blocks of rows, ranges of codewords, chunks of columns and groups of rows to rescore.
    check_size(random, dtype, {140, 200, 64, 0}, 3);
    check_size(random, dtype, {9, 300, 130, 0}, 5);
  }
}

}  // namespace

int main() { return check::run(check_all); }
