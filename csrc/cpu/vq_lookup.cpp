#include "dove/vq_lookup.h"

#include <algorithm>
#include <vector>

#include "dove/parallel.h"
#include "simd.h"

// No (rows, words) matrix: the scores of a few rows and a few codewords live in registers. A score is summed from
// -|c|^2 / 2 over the columns in their order (or, for a few rows, in one order of the lanes), the same for every
// codeword, so that identical codewords tie; "greater" then keeps the lowest index.
//
// How far a score can be from the true one, with unit roundoff u = 2^-24: a sum of width + 1 terms in any order is off
// by g (|c|^2 / 2 + |x| |c|), g = (width + 1) u / (1 - (width + 1) u), and |c|^2 / 2 itself by its own sum's rounding,
// another g |c|^2 / 2. So the code is the fp64 argmin wherever the runner-up's score is further away than twice
// 2 g (|c|^2 / 2 + |x| |c|), and within that everywhere. Overflow is noticed (kUndecided).
namespace dove::DOVE_ISA_NAMESPACE {
namespace {

// Registers: kWords x 2 sums, 2 vectors of rows and a codeword's element (AVX-512 takes that one from memory).
#if defined(__AVX512F__)
constexpr int kWords = 12;
#else
constexpr int kWords = 6;
#endif

// So few rows leave most of a vector's lanes empty: they are taken one by one, with the columns in the lanes.
constexpr int64_t kFewRows = 2;
// A thread gets at least so many multiply-adds: some 20 us.
constexpr int64_t kGrain = int64_t{1} << 20;

constexpr float kNone = -__builtin_inff();

// The best codeword so far of each row in the lanes.
struct Best {
  Vec score = broadcast(kNone);
  IntVec code = {};

  void offer(Vec candidate, int32_t index) {
    const IntVec better = candidate > score;
    score = select(better, candidate, score);
    code = (better & index) | (~better & code);
  }
};

// Offers `count` codewords from `first` on to kVectors x kLanes rows, which lie in `panel` column by column.
template <int kVectors, int kCount>
void score_words(const VqLookupParams& p, const float* panel, int64_t first, Best* best) {
  Vec sums[kCount][kVectors];
  const float* words = p.words + first * p.width;
  for (int word = 0; word < kCount; ++word) {
    for (int v = 0; v < kVectors; ++v) sums[word][v] = broadcast(p.squares[first + word] * -0.5f);
  }
  for (int64_t column = 0; column < p.width; ++column) {
    Vec rows[kVectors];
    for (int v = 0; v < kVectors; ++v) rows[v] = load(panel + (column * kVectors + v) * kLanes);
#pragma GCC unroll 12
    for (int word = 0; word < kCount; ++word) {
      const Vec element = broadcast(words[word * p.width + column]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[word][v] = fma(rows[v], element, sums[word][v]);
    }
  }
  for (int word = 0; word < kCount; ++word) {
    for (int v = 0; v < kVectors; ++v) best[v].offer(sums[word][v], static_cast<int32_t>(first + word));
  }
}

// A half-open range of codewords.
struct Words {
  int64_t begin;
  int64_t end;
};

// Writes the best score and code among `words` of rows [row, row + count), count <= kVectors * kLanes.
template <int kVectors, typename T>
void search_panel(const VqLookupParams& p, int64_t row, int64_t count, Words words, float* panel, float* scores,
                  int32_t* codes) {
  const T* source = static_cast<const T*>(p.rows) + row * p.row_stride;
  constexpr int kRows = kVectors * kLanes;
  for (int64_t column = 0; column < p.width; column += kLanes) {
    const int64_t columns = std::min<int64_t>(kLanes, p.width - column);
    for (int64_t r = 0; r < kRows; ++r) {
      const T* at = source + r * p.row_stride + column;
      const Vec elements = r >= count ? Vec{} : columns == kLanes ? load(at) : load_part(at, columns);
      for (int64_t c = 0; c < columns; ++c) panel[(column + c) * kRows + r] = elements[c];
    }
  }
  Best best[kVectors];
  int64_t word = words.begin;
  for (; word + kWords <= words.end; word += kWords) score_words<kVectors, kWords>(p, panel, word, best);
  for (; word < words.end; ++word) score_words<kVectors, 1>(p, panel, word, best);
  for (int64_t r = 0; r < count; ++r) {
    scores[r] = best[r / kLanes].score[r % kLanes];
    codes[r] = best[r / kLanes].code[r % kLanes];
  }
}

// The same for one row, with its columns in the lanes.
template <typename T>
void search_row(const VqLookupParams& p, int64_t row, Words words, float* panel, float* score, int32_t* code) {
  const T* source = static_cast<const T*>(p.rows) + row * p.row_stride;
  const int64_t whole = p.width / kLanes * kLanes, rest = p.width - whole;
  for (int64_t column = 0; column < whole; column += kLanes) store(panel + column, load(source + column));
  if (rest > 0) store(panel + whole, load_part(source + whole, rest));
  *score = kNone;
  *code = 0;
  constexpr int kTogether = 8;
  for (int64_t first = words.begin; first < words.end; first += kTogether) {
    Vec sums[kTogether] = {};
    const float* word[kTogether];
    for (int w = 0; w < kTogether; ++w) word[w] = p.words + std::min(first + w, words.end - 1) * p.width;
    for (int64_t column = 0; column < whole; column += kLanes) {
      const Vec elements = load(panel + column);
      for (int w = 0; w < kTogether; ++w) sums[w] = fma(elements, load(word[w] + column), sums[w]);
    }
    if (rest > 0) {
      const Vec elements = load(panel + whole);
      for (int w = 0; w < kTogether; ++w) sums[w] = fma(elements, load_part(word[w] + whole, rest), sums[w]);
    }
    for (int64_t w = 0; w < kTogether && first + w < words.end; ++w) {
      const float candidate = sum(sums[w]) + p.squares[first + w] * -0.5f;
      if (candidate > *score) {
        *score = candidate;
        *code = static_cast<int32_t>(first + w);
      }
    }
  }
}

template <typename T>
bool all_finite(const T* row, int64_t width) {
  // x - x is 0 for a finite x, NaN for any other.
  Vec differences = {};
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) {
    const Vec x = load(row + column);
    differences += x - x;
  }
  if (column < width) {
    const Vec x = load_part(row + column, width - column);
    differences += x - x;
  }
  return sum(differences) == 0.0f;
}

template <typename T>
void finish_row(const VqLookupParams& p, int64_t row, float score, int32_t code) {
  int64_t chosen = code;
  if (!all_finite(static_cast<const T*>(p.rows) + row * p.row_stride, p.width)) {
    chosen = 0;
  } else if (!(score - score == 0.0f)) {
    p.codes[row] = kUndecided;
    return;
  }
  p.codes[row] = chosen;
  const float* word = p.words + chosen * p.width;
  T* target = static_cast<T*>(p.quantized) + row * p.width;
  int64_t column = 0;
  for (; column + kLanes <= p.width; column += kLanes) store(target + column, load(word + column));
  if (column < p.width) store_part(target + column, load_part(word + column, p.width - column), p.width - column);
}

template <typename T>
void search(const VqLookupParams& p) {
  const bool few = p.num_rows <= kFewRows && p.width >= 2 * kLanes;
  const int64_t rows_together = few ? 1 : p.num_rows <= kLanes ? kLanes : 2 * kLanes;
  const int64_t groups = (p.num_rows + rows_together - 1) / rows_together;
  // Fewer groups than threads: the codewords are divided too.
  const int64_t wanted = std::clamp<int64_t>(p.num_threads / groups, 1, 64);
  const int64_t splits = std::clamp<int64_t>(p.num_words / (4 * kWords), 1, wanted);
  std::vector<float> scores(p.num_rows * splits);
  std::vector<int32_t> codes(p.num_rows * splits);
  const int64_t work = rows_together * p.width * (p.num_words / splits + 1);

  parallel_ranges(groups * splits, kGrain / work + 1, p.num_threads, [&](int64_t begin, int64_t end) {
    std::vector<float> panel((p.width + kLanes) * rows_together);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t split = item / groups, row = item % groups * rows_together;
      const int64_t count = std::min(rows_together, p.num_rows - row);
      const Words words{p.num_words * split / splits, p.num_words * (split + 1) / splits};
      float* score = scores.data() + split * p.num_rows + row;
      int32_t* code = codes.data() + split * p.num_rows + row;
      if (few) {
        search_row<T>(p, row, words, panel.data(), score, code);
      } else if (count <= kLanes) {
        search_panel<1, T>(p, row, count, words, panel.data(), score, code);
      } else {
        search_panel<2, T>(p, row, count, words, panel.data(), score, code);
      }
    }
  });

  parallel_ranges(p.num_rows, kGrain / (4 * p.width) + 1, p.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t best = row;
      for (int64_t at = row + p.num_rows; at < p.num_rows * splits; at += p.num_rows) {
        if (scores[at] > scores[best]) best = at;
      }
      finish_row<T>(p, row, scores[best], codes[best]);
    }
  });
}

}  // namespace

void vq_lookup(const VqLookupParams& params) {
  if (params.num_rows == 0) return;
  with_element_type(params.dtype, [&](auto element) { search<decltype(element)>(params); });
}

}  // namespace dove::DOVE_ISA_NAMESPACE
