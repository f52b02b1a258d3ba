#pragma once

#include "check.h"
#include "dove/vq_lookup.h"

// Random rows and codewords with planted duplicates and near duplicates, every score in double, and what a kernel's
// codes must be.
namespace check::vq_lookup {

struct Size {
  int64_t rows;
  int64_t words;
  int64_t width;
  int threads;
};

// Codewords; `first` of each is the lowest index of those like it.
struct Codebook {
  Array words;
  std::vector<int64_t> first;
};

inline Codebook make_codebook(Random& random, int64_t count, int64_t width, double scale) {
  Codebook book{Array(Dtype::kFloat32, count * width), std::vector<int64_t>(count)};
  for (int64_t word = 0; word < count; ++word) {
    book.first[word] = word;
    const int64_t like = word == 0 ? 0 : random.between(0, word - 1), kind = word == 0 ? 9 : random.between(0, 9);
    for (int64_t c = 0; c < width; ++c) {
      book.words.set(word * width + c, kind < 4 ? book.words[like * width + c] : scale * random.normal());
    }
    if (kind < 2) {
      book.first[word] = book.first[like];
    } else if (kind < 4) {
      // From some units in the last place away to what 11 bits tell apart.
      const int64_t at = word * width + random.between(0, width - 1);
      book.words.set(at, book.words[at] * (1 + std::pow(10.0, random.between(-7, -2))));
    }
  }
  return book;
}

struct Problem {
  Size size;
  Dtype dtype;
  bool overflow;  // no score of a finite row is a finite fp32 number
  int64_t stride;
  Codebook book;
  Array x;
  Array squares;
  std::vector<bool> finite;    // (rows,)
  std::vector<double> scores;  // (rows, words)
  std::vector<double> errors;  // how far off the kernel's may be: see csrc/cpu/vq_lookup.cpp
};

inline Problem make_problem(Random& random, Dtype dtype, const Size& size, bool overflow = false) {
  const auto [rows, num_words, width, threads] = size;
  const int64_t stride = width + random.between(0, 5);
  check::next_problem("%s, %d rows of %d, %d apart, %d words%s, %d threads", check::name(dtype), int(rows), int(width),
                      int(stride), int(num_words), overflow ? " that overflow" : "", threads);
  Codebook book = make_codebook(random, num_words, width, overflow ? 1e25 : 1.0);
  const Array& words = book.words;
  Array x = Array::normal(random, dtype, rows, width, stride);
  std::vector<bool> finite(rows, true);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t kind = random.between(0, 19), word = random.between(0, num_words - 1);
    if (kind == 0) {
      finite[row] = false;
      x.set(row * stride + random.between(0, width - 1), random.one_of({check::kNan, -check::kInfinity}));
    } else if (kind < 10 && !overflow) {
      for (int64_t c = 0; c < width; ++c) x.set(row * stride + c, words[word * width + c] + 1e-3 * random.normal());
    }
  }
  Array squares(Dtype::kFloat32, num_words);
  std::vector<double> sizes(num_words);
  for (int64_t word = 0; word < num_words; ++word) {
    float square = 0;
    for (int64_t c = 0; c < width; ++c) {
      const auto element = static_cast<float>(words[word * width + c]);
      square += element * element;
      sizes[word] += static_cast<double>(element) * element;
    }
    squares.set(word, square);
  }

  const double terms = static_cast<double>(width + 1) * 0x1p-24, g = terms / (1 - terms);
  const std::vector<double> all_x = x.values(), all_words = words.values();
  std::vector<double> scores(rows * num_words), errors(rows * num_words);
  for (int64_t row = 0; row < rows; ++row) {
    const double* in_row = all_x.data() + row * stride;
    double norm = 0;
    for (int64_t c = 0; c < width; ++c) norm += in_row[c] * in_row[c];
    for (int64_t word = 0; word < num_words; ++word) {
      const double* in_word = all_words.data() + word * width;
      double score = -sizes[word] / 2;
      for (int64_t c = 0; c < width; ++c) score += in_row[c] * in_word[c];
      scores[row * num_words + word] = score;
      errors[row * num_words + word] =
          2 * g * (sizes[word] / 2 + std::sqrt(norm * sizes[word])) + 2 * static_cast<double>(width) * 0x1p-126;
    }
  }
  return {size, dtype, overflow, stride, std::move(book), std::move(x), std::move(squares), finite, scores, errors};
}

// Runs `kernel(params)` and returns the codes, which are right. `decides`: also those of rows that overflow.
template <typename Kernel>
std::vector<int64_t> solve(const Problem& problem, bool decides, const Kernel& kernel) {
  const auto [rows, num_words, width, threads] = problem.size;
  std::vector<int64_t> codes(rows, poison<int64_t>());
  Array quantized(problem.dtype, rows * width), expected(problem.dtype, rows * width);
  int64_t num_undecided = poison<int64_t>(), undecided = 0;
  dove::VqLookupParams params{};
  params.rows = problem.x.data();
  params.row_stride = problem.stride;
  params.words = problem.book.words.floats();
  params.squares = problem.squares.floats();
  params.codes = codes.data();
  params.quantized = quantized.data();
  params.num_undecided = &num_undecided;
  params.num_rows = rows;
  params.num_words = num_words;
  params.width = width;
  params.dtype = problem.dtype;
  params.num_threads = threads;
  kernel(params);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t code = codes[row];
    if (!decides && problem.overflow && problem.finite[row]) {
      if (code != dove::kUndecided) fail("row %d overflows, but has code %d", int(row), int(code));
      ++undecided;
      continue;
    }
    if (code < 0 || code >= num_words) fail("row %d has code %lld", int(row), static_cast<long long>(code));
    for (int64_t c = 0; c < width; ++c) expected.set(row * width + c, problem.book.words[code * width + c]);
    if (!problem.finite[row]) {
      if (code != 0) fail("row %d is not finite, but has code %d", int(row), int(code));
      continue;
    }
    const double* score = &problem.scores[row * num_words];
    const double* error = &problem.errors[row * num_words];
    const int64_t best = std::max_element(score, score + num_words) - score;
    if (score[code] < score[best] - error[best] - error[code]) {
      fail("row %d has code %d, not %d", int(row), int(code), int(best));
    }
    const int64_t first = problem.book.first[code];
    if (first != code) fail("row %d has code %d, not %d, which is the same", int(row), int(code), int(first));
  }
  if (!decides && num_undecided != undecided) fail("%lld rows undecided", static_cast<long long>(num_undecided));
  close("quantized", quantized, expected.values(), 0, width);
  return codes;
}

}  // namespace check::vq_lookup
