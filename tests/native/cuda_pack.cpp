// The CUDA kernels of pack and unpack on the CPU, against loops.

#include "csrc/cuda/pack.cu"
#include "cuda_on_host/warp_on_host.h"
#include "pack_problem.h"

namespace {

void check_all() {
  check::Random random;
  for (int trial = 0; trial < 20; ++trial) {
    for (const int64_t entry_bytes : {0, 1, 2, 6, 12, 64, 5000}) {
      check::pack::check_size(
          random, {random.between(0, 5), random.between(0, 9), entry_bytes, 0},
          [](const dove::PackParams& p) { dove::cuda::pack(p, 0, nullptr); },
          [](const dove::PackParams& p) { dove::cuda::unpack(p, 0, nullptr); });
    }
  }
}

}  // namespace

int main() { return check::run(check_all); }
