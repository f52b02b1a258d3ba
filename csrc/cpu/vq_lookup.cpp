#include "dove/vq_lookup.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "dove/parallel.h"
#include "simd.h"

// No (rows, words) matrix: the scores of a few rows and a few codewords live in registers. A score is summed from
// -|c|^2 / 2 over the columns in their order (or, for a few rows, in one order of the lanes), the same for every
// codeword, so that identical codewords tie; "greater" then keeps the lowest index.
//
// How far a score can be from the true one, with unit roundoff u = 2^-24: a sum of width + 1 terms in any order is off
// by g (|c|^2 / 2 + |x| |c|), g = (width + 1) u / (1 - (width + 1) u), and |c|^2 / 2 itself by its own sum's rounding,
// another g |c|^2 / 2; underflow loses the smallest normal number, 2^-126, a term of each. So a score is within
// 2 g (|c|^2 / 2 + |x| |c|) + 2 width 2^-126, the code is the fp64 argmin wherever the runner-up's score is further
// away than both their bounds, and within that everywhere. Rows that could overflow, or that are so small that
// underflow is more than rounding, are kUndecided.
namespace dove::DOVE_ISA_NAMESPACE {
namespace {

// Registers: kWords x 2 sums, 2 vectors of rows and a codeword's element (AVX-512 takes that one from memory).
#if defined(__AVX512F__)
constexpr int kWords = 12;
#else
constexpr int kWords = 6;
#endif

// So few rows leave many of a vector's lanes empty: the columns take the lanes.
constexpr int64_t kFewRows = 8;
constexpr int kRowsTogether = 4;
// A thread gets at least so many multiply-adds: some 20 us.
constexpr int64_t kGrain = int64_t{1} << 20;

// A panel: kPanelRows rows, column by column, padded with zeros; of one with kLanes rows or fewer the first vector of
// every column is used.
constexpr int kVectors = 2;
constexpr int kPanelRows = kVectors * kLanes;
// A quarter of a 1 MB cache for a block of codewords, and as much for the panels that are searched with it.
constexpr int64_t kBlockFloats = int64_t{1} << 16;

constexpr float kNone = -__builtin_inff();
// Below it no rounding makes a sum overflow; above it, a column, underflow is less than rounding.
constexpr float kLargest = 1e38f;
constexpr float kSmallest = 0x1p-100f;

// The best score so far of each row in the lanes, and the first of the codewords that it was found among: which of them
// is found out at the end, from the same sums.
struct Best {
  Vec score = broadcast(kNone);
  IntVec first = {};

  void offer(Vec candidate, int32_t index) {
    const IntVec better = candidate > score;
    score = maximum(candidate, score);
    first = (better & index) | (~better & first);
  }
};

// Offers kCount codewords from `first` on to the first kUsed vectors of rows of a panel.
template <int kUsed, int kCount>
void score_words(const VqLookupParams& p, const float* panel, int64_t first, Best* best) {
  Vec sums[kCount][kUsed];
  const float* words = p.words + first * p.width;
  for (int word = 0; word < kCount; ++word) {
    for (int v = 0; v < kUsed; ++v) sums[word][v] = broadcast(p.squares[first + word] * -0.5f);
  }
  for (int64_t column = 0; column < p.width; ++column) {
    Vec rows[kUsed];
    for (int v = 0; v < kUsed; ++v) rows[v] = load(panel + column * kPanelRows + v * kLanes);
#pragma GCC unroll 12
    for (int word = 0; word < kCount; ++word) {
      const Vec element = broadcast(words[word * p.width + column]);
#pragma GCC unroll 2
      for (int v = 0; v < kUsed; ++v) sums[word][v] = fma(rows[v], element, sums[word][v]);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kUsed; ++v) {
    // A NaN does not stay: the second of the two does.
    Vec largest = broadcast(kNone);
#pragma GCC unroll 12
    for (int word = 0; word < kCount; ++word) largest = maximum(sums[word][v], largest);
    best[v].offer(largest, static_cast<int32_t>(first));
  }
}

// The codeword with the largest score among those from `first` on that were offered together, the lowest index among
// equals, for the row in lane `lane` of a panel. Sums are taken as in score_words.
int32_t best_of(const VqLookupParams& p, const float* panel, int64_t lane, int64_t first) {
  const int count = static_cast<int>(std::min<int64_t>(kWords, p.num_words - first));
  const float* words[kWords];
  float sums[kWords];
  for (int word = 0; word < kWords; ++word) {
    // Where there are fewer, the last one again.
    const int64_t index = first + std::min(word, count - 1);
    words[word] = p.words + index * p.width;
    sums[word] = p.squares[index] * -0.5f;
  }
  for (int64_t column = 0; column < p.width; ++column) {
    const float element = panel[column * kPanelRows + lane];
#pragma GCC unroll 12
    for (int word = 0; word < kWords; ++word) sums[word] = fma(element, words[word][column], sums[word]);
  }
  int best = 0;
  for (int word = 1; word < count; ++word) {
    // A number is larger than NaN.
    if (sums[word] > sums[best] || (sums[best] != sums[best] && sums[word] == sums[word])) best = word;
  }
  return static_cast<int32_t>(first + best);
}

// A half-open range of codewords.
struct Words {
  int64_t begin;
  int64_t end;
};

template <typename T>
void fill_panel(const VqLookupParams& p, int64_t row, int64_t count, float* panel) {
  const T* source = static_cast<const T*>(p.rows) + row * p.row_stride;
  for (int64_t column = 0; column < p.width; column += kLanes) {
    const int64_t columns = std::min<int64_t>(kLanes, p.width - column);
    for (int64_t r = 0; r < kPanelRows; ++r) {
      Vec elements = {};
      if (r < count) {
        const T* at = source + r * p.row_stride + column;
        elements = columns == kLanes ? load(at) : load_part(at, columns);
      }
      for (int64_t c = 0; c < columns; ++c) panel[(column + c) * kPanelRows + r] = elements[c];
    }
  }
}

template <int kUsed>
void search_panel(const VqLookupParams& p, const float* panel, Words words, Best* best) {
  int64_t word = words.begin;
  for (; word + kWords <= words.end; word += kWords) score_words<kUsed, kWords>(p, panel, word, best);
  for (; word < words.end; ++word) score_words<kUsed, 1>(p, panel, word, best);
}

// Writes the best score and code among `words` of rows [row, row + count). The rows' panels and a block of codewords
// stay in the L2 cache together: the codebook is read once for all of them.
template <typename T>
void search_panels(const VqLookupParams& p, int64_t row, int64_t count, Words words, float* panels, float* scores,
                   int32_t* codes) {
  const int64_t num_panels = (count + kPanelRows - 1) / kPanelRows;
  const int64_t panel_size = p.width * kPanelRows;
  std::vector<Best> best(num_panels * kVectors);
  const auto rows_in = [&](int64_t panel) { return std::min<int64_t>(kPanelRows, count - panel * kPanelRows); };
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    fill_panel<T>(p, row + panel * kPanelRows, rows_in(panel), panels + panel * panel_size);
  }
  const int64_t block = std::max<int64_t>(kBlockFloats / p.width / kWords, 1) * kWords;
  for (int64_t begin = words.begin; begin < words.end; begin += block) {
    const Words part{begin, std::min(begin + block, words.end)};
    for (int64_t panel = 0; panel < num_panels; ++panel) {
      const auto search = rows_in(panel) <= kLanes ? &search_panel<1> : &search_panel<kVectors>;
      search(p, panels + panel * panel_size, part, &best[panel * kVectors]);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const Best& found = best[r / kLanes];
    scores[r] = found.score[r % kLanes];
    const float* panel = panels + r / kPanelRows * panel_size;
    codes[r] = best_of(p, panel, r % kPanelRows, found.first[r % kLanes]);
  }
}

// Offers kCount codewords from `first` on to kRows rows, with their columns in the lanes; a row of `panel` is
// `padded` long.
template <int kRows, int kCount>
void score_columns(const VqLookupParams& p, const float* panel, int64_t padded, int64_t first, float* scores,
                   int32_t* codes) {
  Vec sums[kCount][kRows];
#pragma GCC unroll 12
  for (int word = 0; word < kCount; ++word) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[word][r] = Vec{};
  }
  const float* words = p.words + first * p.width;
  const auto add = [&](int64_t column, auto load_elements) {
    Vec rows[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) rows[r] = load(panel + r * padded + column);
#pragma GCC unroll 12
    for (int word = 0; word < kCount; ++word) {
      __builtin_prefetch(words + (kCount + word) * p.width + column);
      const Vec elements = load_elements(words + word * p.width + column);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[word][r] = fma(rows[r], elements, sums[word][r]);
    }
  };
  int64_t column = 0;
  for (; column + kLanes <= p.width; column += kLanes) {
    add(column, [](const float* at) { return load(at); });
  }
  if (const int64_t rest = p.width - column; rest > 0) {
    add(column, [rest](const float* at) { return load_part(at, rest); });
  }
#pragma GCC unroll 12
  for (int word = 0; word < kCount; ++word) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const float candidate = sum(sums[word][r]) + p.squares[first + word] * -0.5f;
      if (candidate > scores[r]) {
        scores[r] = candidate;
        codes[r] = static_cast<int32_t>(first + word);
      }
    }
  }
}

// As search_panels, for kRows rows with their columns in the lanes.
template <int kRows, typename T>
void search_rows(const VqLookupParams& p, int64_t row, Words words, float* panel, float* scores, int32_t* codes) {
  const int64_t padded = p.width + kLanes;
  float score[kRows];
  int32_t code[kRows] = {};
  for (int r = 0; r < kRows; ++r) {
    const T* source = static_cast<const T*>(p.rows) + (row + r) * p.row_stride;
    int64_t column = 0;
    for (; column + kLanes <= p.width; column += kLanes) store(panel + r * padded + column, load(source + column));
    if (column < p.width) store(panel + r * padded + column, load_part(source + column, p.width - column));
    score[r] = kNone;
  }
  constexpr int kCount = kRows == 1 ? 8 : kWords / kRows;
  int64_t word = words.begin;
  for (; word + kCount <= words.end; word += kCount) {
    score_columns<kRows, kCount>(p, panel, padded, word, score, code);
  }
  for (; word < words.end; ++word) score_columns<kRows, 1>(p, panel, padded, word, score, code);
  std::copy_n(score, kRows, scores);
  std::copy_n(code, kRows, codes);
}

template <typename T>
void search_few(const VqLookupParams& p, int64_t row, int64_t count, Words words, float* panel, float* scores,
                int32_t* codes) {
  const auto search = count == 1   ? &search_rows<1, T>
                      : count == 2 ? &search_rows<2, T>
                      : count == 3 ? &search_rows<3, T>
                                   : &search_rows<kRowsTogether, T>;
  search(p, row, words, panel, scores, codes);
}

// |x|^2 of a row, NaN or infinity where an element is not finite.
template <typename T>
float sum_of_squares(const T* row, int64_t width) {
  Vec squares = {};
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) {
    const Vec x = load(row + column);
    squares = fma(x, x, squares);
  }
  if (column < width) {
    const Vec x = load_part(row + column, width - column);
    squares = fma(x, x, squares);
  }
  return sum(squares);
}

template <typename T>
bool all_finite(const T* row, int64_t width) {
  for (int64_t column = 0; column < width; ++column) {
    const float x = load_one(row + column);
    if (!(x - x == 0.0f)) return false;
  }
  return true;
}

// Writes the row's code and codeword; returns whether it is decided. `longest` is the largest |c|^2.
template <typename T>
bool finish_row(const VqLookupParams& p, int64_t row, float longest, int32_t code) {
  const T* x = static_cast<const T*>(p.rows) + row * p.row_stride;
  int64_t chosen = code;
  const float squares = sum_of_squares(x, p.width);
  // Every partial sum of a score is at most |x| |c| + |c|^2 / 2 <= |x|^2 + |c|^2.
  const float size = std::sqrt(squares) * std::sqrt(longest) + 0.5f * longest;
  if (!(squares + longest < kLargest && size > kSmallest * p.width)) {
    if (all_finite(x, p.width)) {
      p.codes[row] = kUndecided;
      return false;
    }
    chosen = 0;
  }
  p.codes[row] = chosen;
  const float* word = p.words + chosen * p.width;
  T* target = static_cast<T*>(p.quantized) + row * p.width;
  int64_t column = 0;
  for (; column + kLanes <= p.width; column += kLanes) store(target + column, load(word + column));
  if (column < p.width) store_part(target + column, load_part(word + column, p.width - column), p.width - column);
  return true;
}

template <typename T>
void search(const VqLookupParams& p) {
  const bool few = p.num_rows <= kFewRows && p.width >= 2 * kLanes;
  // As many panels as fit into their share of the cache, but work for every thread.
  const int64_t panels = std::max<int64_t>(kBlockFloats / (p.width * kPanelRows), 1);
  const int64_t share = (p.num_rows + p.num_threads * kPanelRows - 1) / (p.num_threads * kPanelRows);
  const int64_t rows_together = few ? kRowsTogether : std::min(panels, share) * kPanelRows;
  const int64_t groups = (p.num_rows + rows_together - 1) / rows_together;
  // Fewer groups than threads: the codewords are divided too.
  const int64_t wanted = std::clamp<int64_t>(p.num_threads / groups, 1, 64);
  const int64_t splits = std::clamp<int64_t>(p.num_words / (4 * kWords), 1, wanted);
  std::vector<float> scores(p.num_rows * splits);
  std::vector<int32_t> codes(p.num_rows * splits);
  const int64_t work = std::min(rows_together, p.num_rows) * p.width * (p.num_words / splits + 1);

  parallel_ranges(groups * splits, kGrain / work + 1, p.num_threads, [&](int64_t begin, int64_t end) {
    std::vector<float> rows(few ? (p.width + kLanes) * rows_together : p.width * rows_together);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t split = item / groups, row = item % groups * rows_together;
      const int64_t count = std::min(rows_together, p.num_rows - row);
      const Words words{p.num_words * split / splits, p.num_words * (split + 1) / splits};
      float* score = scores.data() + split * p.num_rows + row;
      int32_t* code = codes.data() + split * p.num_rows + row;
      if (few) {
        search_few<T>(p, row, count, words, rows.data(), score, code);
      } else {
        search_panels<T>(p, row, count, words, rows.data(), score, code);
      }
    }
  });

  float longest = 0.0f;
  // NaN is no size.
  for (int64_t word = 0; word < p.num_words; ++word) longest = p.squares[word] > longest ? p.squares[word] : longest;
  std::atomic<int64_t> total_undecided = 0;
  parallel_ranges(p.num_rows, kGrain / (4 * p.width) + 1, p.num_threads, [&](int64_t begin, int64_t end) {
    int64_t undecided = 0;
    for (int64_t row = begin; row < end; ++row) {
      int64_t best = row;
      for (int64_t at = row + p.num_rows; at < p.num_rows * splits; at += p.num_rows) {
        if (scores[at] > scores[best]) best = at;
      }
      undecided += !finish_row<T>(p, row, longest, codes[best]);
    }
    total_undecided += undecided;
  });
  *p.num_undecided = total_undecided;
}

}  // namespace

void vq_lookup(const VqLookupParams& params) {
  *params.num_undecided = 0;
  if (params.num_rows == 0) return;
  with_element_type(params.dtype, [&](auto element) { search<decltype(element)>(params); });
}

}  // namespace dove::DOVE_ISA_NAMESPACE
