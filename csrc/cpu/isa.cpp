#include "dove/isa.h"

#include <stdexcept>

namespace dove {
namespace {

constexpr Isa kAll[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512};

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    default:
      return "baseline";
  }
}

bool isa_available(Isa isa) {
#ifdef DOVE_X86_ISAS
  // The compiler's own test asks the operating system too (XGETBV), not the processor alone.
  __builtin_cpu_init();
  // F16C came before AVX2 on every processor; GCC before 11 does not know its name.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (isa) {
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    default:
      return true;
  }
#else
  return isa == Isa::kBaseline;
#endif
}

Isa best_isa() {
  static const Isa best = [] {
    Isa found = Isa::kBaseline;
    for (const Isa isa : kAll) {
      if (isa_available(isa)) found = isa;
    }
    return found;
  }();
  return best;
}

Isa isa_by_name(const std::string& name) {
  if (name.empty()) return best_isa();
  for (const Isa isa : kAll) {
    if (name == isa_name(isa) && isa_available(isa)) return isa;
  }
  throw std::invalid_argument("instruction set '" + name + "' is unknown or not available here");
}

}  // namespace dove
