// pack and unpack against loops: the ISAs agree if each agrees with them.

#include "pack_problem.h"

namespace {

void check_all(dove::Isa isa) {
  check::Random random;
  const auto check_size = [&](const check::pack::Size& size) {
    check::pack::check_size(
        random, size, [&](const dove::PackParams& p) { DOVE_CPU_KERNEL(pack)(p, isa); },
        [&](const dove::PackParams& p) { DOVE_CPU_KERNEL(unpack)(p, isa); });
  };
  for (int trial = 0; trial < 1000; ++trial) {
    for (const int64_t entry_bytes : {0, 1, 2, 6, 64}) {
      check_size({random.between(0, 5), random.between(0, 9), entry_bytes, 3});
    }
  }
  // Enough bytes for several threads.
  check_size({3, 1001, 700, 4});
  check_size({900, 33, 52, 3});
  check_size({1, 70000, 33, 5});
}

}  // namespace

int main(int argc, char** argv) { return check::run(argc, argv, check_all); }
