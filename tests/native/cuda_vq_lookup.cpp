// The CUDA kernels of vq_lookup on the CPU, against every score in double.

#include "csrc/cuda/vq_lookup.cu"
#include "cuda_on_host/warp_on_host.h"
#include "vq_lookup_problem.h"

namespace {

using check::Dtype;
using check::vq_lookup::Size;

// A row whose best score is far ahead needs no second search: with it, what goes wrong in the first would not show.
void check_rescored(const check::vq_lookup::Problem& problem, int64_t row) {
  const auto [rows, num_words, width, threads] = problem.size;
  std::vector<double> scores(&problem.scores[row * num_words], &problem.scores[row * num_words] + num_words);
  std::sort(scores.rbegin(), scores.rend());
  double norm = 0, longest = 0;
  for (int64_t c = 0; c < width; ++c) norm += std::pow(problem.x[row * problem.stride + c], 2);
  for (int64_t word = 0; word < num_words; ++word) longest = std::max(longest, double(problem.squares[word]));
  const double product = std::sqrt(norm * longest);
  const double error = 0x1p-10 * product + (2 * width + 3) * 0x1p-23 * (longest / 2 + product);
  if (scores.size() < 2 || scores[0] - scores[1] > 4.1 * error) check::fail("row %d was searched again", int(row));
}

void check_size(check::Random& random, Dtype dtype, const Size& size, int64_t ranges, bool overflow = false) {
  const auto problem = check::vq_lookup::make_problem(random, dtype, size, overflow);
  std::vector<uint8_t> scratch(dove::vq_lookup_scratch_bytes(size.rows, ranges), 0x7f);
  check::vq_lookup::solve(problem, true, [&](dove::VqLookupParams p) {
    p.words_rounded = true;
    p.num_ranges = ranges;
    p.scratch = scratch.data();
    dove::cuda::vq_lookup(p, 0, nullptr);
    if (overflow || p.num_rows == 0) return;
    const dove::cuda::Scratch found = dove::cuda::scratch_of(p);
    for (int32_t at = 0; at < *found.count; ++at) check_rescored(problem, found.list[at]);
  });
}

void check_all() {
  check::Random random;
  for (const Dtype dtype : check::kDtypes) {
    for (int trial = 0; trial < 8; ++trial) {
      check_size(random, dtype, {random.between(0, 40), random.between(1, 90), random.between(1, 70), 0}, 1);
    }
    check_size(random, dtype, {20, 30, 24, 0}, 1, true);
    // Few channels: the bound of an fp32 score is far below that of a TF32 one.
    for (int trial = 0; trial < 4; ++trial) check_size(random, dtype, {128, 60, random.between(1, 6), 0}, 1);
    // Several blocks of rows, ranges of codewords, chunks of columns and groups of rows to rescore.
    check_size(random, dtype, {140, 200, 64, 0}, 3);
    check_size(random, dtype, {9, 300, 130, 0}, 2);
  }
}

}  // namespace

int main() { return check::run(check_all); }
