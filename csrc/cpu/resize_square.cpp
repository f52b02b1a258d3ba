#include "dove/resize_square.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "dove/resample_taps.h"
#include "simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace dove::DOVE_ISA_NAMESPACE {
namespace {

// Pixels that are summed together: a vector of bytes.
constexpr int kTile = 16;
constexpr int kParts = kTile / kLanes;
constexpr int kChannels = 3;

typedef uint8_t Bytes __attribute__((vector_size(kTile)));

// One sum a pixel.
struct Sums {
  IntVec part[kParts];
};

Bytes load_bytes(const uint8_t* from, int64_t count = kTile) {
  Bytes bytes = {};
  std::memcpy(&bytes, from, count);
  return bytes;
}

// The bytes of one vector, as integers.
inline Sums widen(Bytes bytes) {
  Sums wide;
#if defined(__AVX512F__)
  wide.part[0] = (IntVec)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)bytes);
#elif defined(__AVX2__)
  wide.part[0] = (IntVec)_mm256_cvtepu8_epi32((__m128i)bytes);
  wide.part[1] = (IntVec)_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)bytes, 8));
#elif defined(__SSE2__)
  const __m128i zero = _mm_setzero_si128();
  const __m128i low = _mm_unpacklo_epi8((__m128i)bytes, zero), high = _mm_unpackhi_epi8((__m128i)bytes, zero);
  wide.part[0] = (IntVec)_mm_unpacklo_epi16(low, zero);
  wide.part[1] = (IntVec)_mm_unpackhi_epi16(low, zero);
  wide.part[2] = (IntVec)_mm_unpacklo_epi16(high, zero);
  wide.part[3] = (IntVec)_mm_unpackhi_epi16(high, zero);
#else
  for (int i = 0; i < kTile; ++i) wide.part[i / kLanes][i % kLanes] = bytes[i];
#endif
  return wide;
}

inline void add(Sums& sums, Bytes bytes, int32_t weight) {
  const Sums wide = widen(bytes);
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) sums.part[i] += wide.part[i] * weight;
}

// Half a unit: what rounds to nearest.
inline Sums begin() {
  Sums sums;
  for (IntVec& part : sums.part) part = IntVec{} + (1 << (ResampleTaps::kFractionBits - 1));
  return sums;
}

// The sums as bytes, those out of range as the nearest one.
inline Bytes finish(Sums sums) {
  for (IntVec& part : sums.part) part >>= ResampleTaps::kFractionBits;
#if defined(__AVX512F__)
  const __m512i positive = _mm512_maskz_max_epi32(0xffff, (__m512i)sums.part[0], _mm512_setzero_si512());
  return (Bytes)_mm512_maskz_cvtusepi32_epi8(0xffff, positive);
#elif defined(__AVX2__)
  const __m256i words = _mm256_packs_epi32((__m256i)sums.part[0], (__m256i)sums.part[1]);
  const __m256i ordered = _mm256_permute4x64_epi64(words, _MM_SHUFFLE(3, 1, 2, 0));
  return (Bytes)_mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
#elif defined(__SSE2__)
  return (Bytes)_mm_packus_epi16(_mm_packs_epi32((__m128i)sums.part[0], (__m128i)sums.part[1]),
                                 _mm_packs_epi32((__m128i)sums.part[2], (__m128i)sums.part[3]));
#else
  Bytes bytes;
  for (int i = 0; i < kTile; ++i) {
    bytes[i] = static_cast<uint8_t>(std::clamp<int32_t>(sums.part[i / kLanes][i % kLanes], 0, 255));
  }
  return bytes;
#endif
}

// Rows become columns: byte j of row i goes to byte i of line j.
inline void transpose(const Bytes (&rows)[kTile], uint8_t* target, int64_t stride) {
#if defined(__SSE2__)
  __m128i now[kTile], next[kTile];
  std::memcpy(now, rows, sizeof(now));
  // Each step interleaves the first half with the second one; four of them reverse the order of the indices' bits
  // between byte and row.
  for (int step = 0; step < 4; ++step) {
#pragma GCC unroll 8
    for (int i = 0; i < kTile / 2; ++i) {
      next[2 * i] = _mm_unpacklo_epi8(now[i], now[i + kTile / 2]);
      next[2 * i + 1] = _mm_unpackhi_epi8(now[i], now[i + kTile / 2]);
    }
    std::memcpy(now, next, sizeof(now));
  }
  for (int j = 0; j < kTile; ++j) std::memcpy(target + j * stride, &now[j], kTile);
#else
  for (int j = 0; j < kTile; ++j) {
    for (int i = 0; i < kTile; ++i) target[j * stride + i] = rows[i][j];
  }
#endif
}

int64_t tiles(int64_t count) { return (count + kTile - 1) / kTile; }

}  // namespace

void resize_square(const ResizeSquareParams& p) {
  const ResampleTaps across = resample_taps(p.width, p.left, p.side, p.size);
  const ResampleTaps down = resample_taps(p.height, p.top, p.side, p.size);
  const int64_t first_row = down.first[0], rows = down.first[p.size - 1] + down.count[p.size - 1] - first_row;
  const int64_t first = across.first[0], pixels = across.first[p.size - 1] + across.count[p.size - 1] - first;
  const int64_t line_bytes = kChannels * pixels;
  // What resizing the lines leaves: (channel, row, x), rounded up to whole tiles.
  const int64_t line = tiles(p.size) * kTile, plane = tiles(rows) * kTile * line;
  std::vector<uint8_t> middle(kChannels * plane);
  // Of some rows together, the other way round, (byte of the line, row): then a weight meets as many rows at once.
  std::vector<uint8_t> columns(tiles(line_bytes) * kTile * kTile);

  for (int64_t row = 0; row < rows; row += kTile) {
    for (int64_t byte = 0; byte < line_bytes; byte += kTile) {
      Bytes block[kTile];
      for (int i = 0; i < kTile; ++i) {
        // The last rows may be fewer: some come several times, and what they give is not read.
        const int64_t y = first_row + std::min(row + i, rows - 1);
        const uint8_t* from = p.source + (y * p.width + first) * kChannels + byte;
        block[i] = line_bytes - byte >= kTile ? load_bytes(from) : load_bytes(from, line_bytes - byte);
      }
      transpose(block, &columns[byte * kTile], kTile);
    }
    for (int64_t tile = 0; tile < p.size; tile += kTile) {
      Bytes made[kChannels][kTile] = {};
      for (int64_t x = tile; x < std::min(tile + kTile, p.size); ++x) {
        const int32_t* weight = &across.weights[x * across.most];
        const uint8_t* column = &columns[(across.first[x] - first) * kChannels * kTile];
        Sums sums[kChannels] = {begin(), begin(), begin()};
        for (int64_t tap = 0; tap < across.count[x]; ++tap, column += kChannels * kTile) {
#pragma GCC unroll 3
          for (int c = 0; c < kChannels; ++c) add(sums[c], load_bytes(column + c * kTile), weight[tap]);
        }
        for (int c = 0; c < kChannels; ++c) made[c][x - tile] = finish(sums[c]);
      }
      for (int c = 0; c < kChannels; ++c) transpose(made[c], &middle[c * plane + row * line + tile], line);
    }
  }

  for (int64_t y = 0; y < p.size; ++y) {
    const int32_t* weight = &down.weights[y * down.most];
    for (int64_t tile = 0; tile < p.size; tile += kTile) {
      const uint8_t* row = &middle[(down.first[y] - first_row) * line + tile];
      Sums sums[kChannels] = {begin(), begin(), begin()};
      for (int64_t tap = 0; tap < down.count[y]; ++tap, row += line) {
#pragma GCC unroll 3
        for (int c = 0; c < kChannels; ++c) add(sums[c], load_bytes(row + c * plane), weight[tap]);
      }
      for (int c = 0; c < kChannels; ++c) {
        const Bytes bytes = finish(sums[c]);
        std::memcpy(p.target + (c * p.size + y) * p.size + tile, &bytes, std::min<int64_t>(kTile, p.size - tile));
      }
    }
  }
}

}  // namespace dove::DOVE_ISA_NAMESPACE
