#pragma once

#include "check.h"
#include "dove/pack.h"

// Random rows for pack and unpack, and what loops make of them, byte by byte.
namespace check::pack {

struct Size {
  int64_t batch;
  int64_t length;
  int64_t entry_bytes;
  int threads;
};

// Bytes that are not poison.
inline std::vector<uint8_t> random_bytes(Random& random, int64_t count) {
  std::vector<uint8_t> bytes(count);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.between(0x80, 0xff));
  return bytes;
}

inline void compare(const char* what, const std::vector<uint8_t>& actual, const std::vector<uint8_t>& expected) {
  for (size_t at = 0; at < expected.size(); ++at) {
    if (actual[at] != expected[at]) check::fail("%s: byte %zu is %d, not %d", what, at, actual[at], expected[at]);
  }
}

// `pack` and `unpack` take the parameters.
template <typename Pack, typename Unpack>
void check_size(Random& random, const Size& size, const Pack& pack, const Unpack& unpack) {
  const auto [batch, length, entry_bytes, threads] = size;
  const int64_t entry_stride = entry_bytes + random.one_of({0, 0, 1, 13});
  // 0: one row that is repeated.
  const int64_t row_stride = random.coin() ? length * entry_stride + random.between(0, 9) : 0;
  std::vector<int32_t> cu_seqlens{0};
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t count = random.one_of({int64_t{0}, length, random.between(0, length + 2)});
    cu_seqlens.push_back(cu_seqlens.back() + static_cast<int32_t>(count));
  }
  const int64_t total = cu_seqlens.back();
  check::next_problem("batch %d, length %d, %d bytes an entry, strides %d and %d, total %d, %d threads", int(batch),
                      int(length), int(entry_bytes), int(row_stride), int(entry_stride), int(total), threads);

  const bool empty = batch == 0 || length == 0 || entry_bytes == 0;
  const auto source =
      random_bytes(random, empty ? 0 : (batch - 1) * row_stride + (length - 1) * entry_stride + entry_bytes);
  const auto values = random_bytes(random, total * entry_bytes);
  std::vector<uint8_t> packed(values.size()), unpacked(batch * length * entry_bytes);
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t first = cu_seqlens[row], count = cu_seqlens[row + 1] - first;
    for (int64_t entry = 0; entry < std::max(count, length); ++entry) {
      for (int64_t byte = 0; byte < entry_bytes; ++byte) {
        const int64_t in_values = (first + entry) * entry_bytes + byte;
        if (entry < count && entry < length) {
          packed[in_values] = source[row * row_stride + entry * entry_stride + byte];
          unpacked[(row * length + entry) * entry_bytes + byte] = values[in_values];
        }
      }
    }
  }

  std::vector<uint8_t> to_values(packed.size(), 0x7f), to_padded(unpacked.size(), 0x7f);
  dove::PackParams params{source.data(), to_values.data(), cu_seqlens.data(), batch,        length,
                          total,         entry_bytes,      row_stride,        entry_stride, threads};
  pack(params);
  compare("pack", to_values, packed);

  params.source = values.data();
  params.target = to_padded.data();
  params.row_stride = length * entry_bytes;
  params.entry_stride = entry_bytes;
  unpack(params);
  compare("unpack", to_padded, unpacked);
}

}  // namespace check::pack
