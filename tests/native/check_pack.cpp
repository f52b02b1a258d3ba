// The plain C++ path without Python: pack and unpack of random rows against loops. Exit 0: all agree.
//
//   c++ -std=c++17 -DDOVE_ISA_NAMESPACE=baseline -Icsrc/include csrc/cpu/isa.cpp csrc/cpu/pack.cpp
//       tests/native/check_pack.cpp

#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "dove/isa.h"
#include "dove/pack.h"

namespace {

// One random batch; returns whether both directions agree with the loops, row by row and byte by byte.
bool check(std::mt19937& random, int64_t entry_bytes) {
  const auto draw = [&](int64_t limit) { return static_cast<int64_t>(random() % (limit + 1)); };
  const int64_t batch = draw(5), length = draw(9);
  std::vector<int32_t> cu_seqlens{0};
  for (int64_t row = 0; row < batch; ++row) {
    cu_seqlens.push_back(cu_seqlens.back() + static_cast<int32_t>(draw(length + 2)));
  }
  const int64_t total = cu_seqlens.back();
  std::vector<uint8_t> padded(batch * length * entry_bytes), values(total * entry_bytes, 0xEE);
  for (auto& byte : padded) byte = static_cast<uint8_t>(random());

  dove::PackParams params{padded.data(),        values.data(), cu_seqlens.data(), batch, length, total, entry_bytes,
                          length * entry_bytes, entry_bytes,   3};
  dove::baseline::pack(params);
  std::vector<uint8_t> back(padded.size(), 0xEE);
  params.source = values.data();
  params.target = back.data();
  dove::baseline::unpack(params);

  for (int64_t row = 0; row < batch; ++row) {
    const int64_t size = cu_seqlens[row + 1] - cu_seqlens[row];
    for (int64_t entry = 0; entry < size || entry < length; ++entry) {
      for (int64_t byte = 0; byte < entry_bytes; ++byte) {
        const int64_t at = (row * length + entry) * entry_bytes + byte;
        const uint8_t source = entry < length ? padded[at] : 0;
        if (entry < size && values[(cu_seqlens[row] + entry) * entry_bytes + byte] != source) return false;
        if (entry < length && back[at] != (entry < size ? source : 0)) return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (int trial = 0; trial < 2000; ++trial) {
    for (const int64_t entry_bytes : {1, 2, 6, 64}) {
      if (!check(random, entry_bytes)) {
        std::printf("trial %d with %d bytes an entry disagrees\n", trial, static_cast<int>(entry_bytes));
        return 1;
      }
    }
  }
  std::printf("%s agrees\n", dove::isa_name(dove::best_isa()));
  return 0;
}
