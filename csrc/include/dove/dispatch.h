#pragma once

#include "dove/isa.h"

// A CPU kernel `void name(const Params&)` is written once, in namespace dove::DOVE_ISA_NAMESPACE, and compiled once per
// ISA. Its header declares it with DOVE_DECLARE_CPU_KERNEL(name, Params), in namespace dove; a caller takes all its
// versions with DOVE_CPU_KERNEL(name) and runs one with `kernel(params, isa)`.
#ifdef DOVE_X86_ISAS
#define DOVE_DECLARE_CPU_KERNEL(name, Params) \
  namespace baseline {                        \
  void name(const Params&);                   \
  }                                           \
  namespace avx2 {                            \
  void name(const Params&);                   \
  }                                           \
  namespace avx512 {                          \
  void name(const Params&);                   \
  }
#define DOVE_CPU_KERNEL(name) \
  ::dove::CpuKernel { &::dove::baseline::name, &::dove::avx2::name, &::dove::avx512::name }
#else
#define DOVE_DECLARE_CPU_KERNEL(name, Params) \
  namespace baseline {                        \
  void name(const Params&);                   \
  }
#define DOVE_CPU_KERNEL(name) \
  ::dove::CpuKernel { &::dove::baseline::name, &::dove::baseline::name, &::dove::baseline::name }
#endif

namespace dove {

// One kernel in all its compiled versions. `isa` must be available (isa_by_name and best_isa see to it).
template <typename Params>
class CpuKernel {
 public:
  using Function = void (*)(const Params&);

  constexpr CpuKernel(Function baseline, Function avx2, Function avx512) : versions_{baseline, avx2, avx512} {}

  void operator()(const Params& params, Isa isa) const { versions_[static_cast<int>(isa)](params); }

 private:
  Function versions_[3];
};

}  // namespace dove
