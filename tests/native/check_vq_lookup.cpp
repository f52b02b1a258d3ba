// vq_lookup against every score in double, with planted duplicates and near duplicates of codewords.

#include "check.h"
#include "dove/vq_lookup.h"

namespace {

using check::Array;
using check::Dtype;
using check::Random;

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

Codebook make_codebook(Random& random, int64_t count, int64_t width, double scale) {
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
      // Some units in the last place away.
      const int64_t at = word * width + random.between(0, width - 1);
      book.words.set(at, book.words[at] * (1 + 3e-7));
    }
  }
  return book;
}

// `overflow`: no score of a finite row is a finite fp32 number.
void check_size(Random& random, dove::Isa isa, Dtype dtype, const Size& size, bool overflow = false) {
  const auto [rows, num_words, width, threads] = size;
  const int64_t stride = width + random.between(0, 5);
  check::next_problem("%s, %d rows of %d, %d apart, %d words%s, %d threads", check::name(dtype), int(rows), int(width),
                      int(stride), int(num_words), overflow ? " that overflow" : "", threads);
  const Codebook book = make_codebook(random, num_words, width, overflow ? 1e25 : 1.0);
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

  // (rows, words) in double, and how far off the kernel's may be: see csrc/cpu/vq_lookup.cpp.
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
      errors[row * num_words + word] = 2 * g * (sizes[word] / 2 + std::sqrt(norm * sizes[word]));
    }
  }

  const auto run = [&](dove::Isa which) {
    std::vector<int64_t> codes(rows, check::poison<int64_t>());
    Array quantized(dtype, rows * width), expected(dtype, rows * width);
    int64_t num_undecided = check::poison<int64_t>(), undecided = 0;
    DOVE_CPU_KERNEL(vq_lookup)
    ({x.data(), stride, words.floats(), squares.floats(), codes.data(), quantized.data(), &num_undecided, rows,
      num_words, width, dtype, threads},
     which);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t code = codes[row];
      if (overflow && finite[row]) {
        if (code != dove::kUndecided) check::fail("row %d overflows, but has code %d", int(row), int(code));
        ++undecided;
        continue;
      }
      if (code < 0 || code >= num_words) check::fail("row %d has code %lld", int(row), static_cast<long long>(code));
      for (int64_t c = 0; c < width; ++c) expected.set(row * width + c, words[code * width + c]);
      if (!finite[row]) {
        if (code != 0) check::fail("row %d is not finite, but has code %d", int(row), int(code));
        continue;
      }
      const double* score = &scores[row * num_words];
      const double* error = &errors[row * num_words];
      const int64_t best = std::max_element(score, score + num_words) - score;
      if (score[code] < score[best] - error[best] - error[code]) {
        check::fail("row %d has code %d, not %d", int(row), int(code), int(best));
      }
      if (book.first[code] != code) {
        check::fail("row %d has code %d, not %d, which is the same", int(row), int(code), int(book.first[code]));
      }
    }
    if (num_undecided != undecided) check::fail("%lld rows undecided", static_cast<long long>(num_undecided));
    close("quantized", quantized, expected.values(), 0, width);
    return codes;
  };
  const auto codes = run(isa), others = run(dove::Isa::kBaseline);
  for (int64_t row = 0; row < rows; ++row) {
    if (codes[row] == others[row]) continue;
    // Each is within the bound of the best, so this can be only where two words are that close.
    const int64_t ours = row * num_words + codes[row], theirs = row * num_words + others[row];
    if (std::abs(scores[ours] - scores[theirs]) > 2 * (errors[ours] + errors[theirs])) {
      check::fail("row %d has code %d, the baseline %d", int(row), int(codes[row]), int(others[row]));
    }
  }
}

void check_all(dove::Isa isa) {
  Random random;
  for (const Dtype dtype : check::kDtypes) {
    for (int trial = 0; trial < 150; ++trial) {
      const int64_t rows = random.one_of({random.between(0, 9), random.between(10, 70)});
      check_size(random, isa, dtype, {rows, random.between(1, 90), random.between(1, 70), 1});
    }
    check_size(random, isa, dtype, {5, 30, 40, 2}, true);
    check_size(random, isa, dtype, {50, 30, 9, 2}, true);
    // Rows and codewords divided among threads, in several groups of panels and blocks of codewords.
    check_size(random, isa, dtype, {3, 700, 517, 5});
    check_size(random, isa, dtype, {40, 1001, 33, 7});
    check_size(random, isa, dtype, {301, 300, 601, 3});
  }
}

}  // namespace

int main(int argc, char** argv) { return check::run(argc, argv, check_all); }
