#pragma once

#include <string>

namespace dove {

// The instruction sets that the CPU kernels are compiled for, from lower to higher. Where DOVE_X86_ISAS is not defined
// there is the baseline alone.
enum class Isa { kBaseline, kAvx2, kAvx512 };

const char* isa_name(Isa isa);

// Whether this processor and its operating system run the ISA and it was compiled.
bool isa_available(Isa isa);

// The highest available ISA, found once.
Isa best_isa();

// The ISA of that name, "" for the best one. Throws std::invalid_argument for one that is unknown or not available.
Isa isa_by_name(const std::string& name);

}  // namespace dove
