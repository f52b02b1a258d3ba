#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "dove/dtype.h"
#include "dove/isa.h"
#include "tolerances.h"

// What the native checks share. A check runs one kernel in one ISA on problems of a fixed seed and compares it with a
// loop in double and with the baseline. Buffers are as large as the kernel is told and not a byte more, so that
// AddressSanitizer sees any other access; what is to be written holds NaN or bytes of 0x7f before, and so do the gaps
// between strided rows.
namespace check {

using dove::BFloat16;
using dove::Dtype;
using dove::Float16;
using dove::Isa;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int kSkipped = 77;

template <typename Int>
Int poison() {
  Int value;
  std::memset(&value, 0x7f, sizeof(value));
  return value;
}

// What a failure names, and how many problems there were.
struct Progress {
  char problem[400] = "";
  int64_t count = 0;
};
inline Progress& progress() {
  static Progress now;
  return now;
}

// Says which problem is next, as printf does.
[[gnu::format(printf, 1, 2)]] inline void next_problem(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(progress().problem, sizeof(Progress::problem), format, arguments);
  va_end(arguments);
  ++progress().count;
}

[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "problem %lld (%s): ", static_cast<long long>(progress().count), progress().problem);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::exit(1);
}

class Random {
 public:
  int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(bits_() % (high - low + 1)); }
  bool coin() { return between(0, 1) == 1; }
  double normal() { return normal_(bits_); }

  template <typename T>
  T one_of(std::initializer_list<T> choices) {
    return choices.begin()[between(0, static_cast<int64_t>(choices.size()) - 1)];
  }

 private:
  std::mt19937_64 bits_{1};
  std::normal_distribution<double> normal_;
};

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};

inline const char* name(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? "float32" : dtype == Dtype::kBFloat16 ? "bfloat16" : "float16";
}
inline double tolerance(Dtype dtype) {
  return dtype == Dtype::kFloat32    ? relative::float32
         : dtype == Dtype::kBFloat16 ? relative::bfloat16
                                     : relative::float16;
}

// Between double and an element: rounded to nearest even.

inline double decode(float x) { return x; }
inline double decode(BFloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}
inline double decode(Float16 x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  double size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) size = mantissa == 0 ? kInfinity : kNan;
  return x.bits & 0x8000 ? -size : size;
}

inline void encode(double x, float* to) { *to = static_cast<float>(x); }
// The bits of a 16-bit float with `digits` of mantissa and the exponents from `lowest` to `highest`.
inline uint16_t encode(double x, int digits, int lowest, int highest) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const uint16_t infinity = static_cast<uint16_t>((highest - lowest + 2) << digits);
  if (std::isnan(x)) return 0x7fff;
  if (std::isinf(x)) return sign | infinity;
  const int exponent = x == 0 ? lowest : std::max(std::ilogb(x), lowest);
  // From 2^digits on it carries into the exponent, as it should.
  const auto steps = static_cast<int64_t>(std::nearbyint(std::ldexp(std::abs(x), digits - exponent)));
  const int64_t bits = (static_cast<int64_t>(exponent - lowest) << digits) + steps;
  return sign | static_cast<uint16_t>(std::min<int64_t>(bits, infinity));
}
inline void encode(double x, BFloat16* to) { to->bits = encode(x, 7, -126, 127); }
inline void encode(double x, Float16* to) { to->bits = encode(x, 10, -14, 15); }

// Numbers in a dtype; NaN until they are set.
class Array {
 public:
  Array(Dtype dtype, int64_t count) : dtype_(dtype), size_(count), bytes_(count * (dtype == Dtype::kFloat32 ? 4 : 2)) {
    for (int64_t i = 0; i < count; ++i) set(i, kNan);
  }

  // Normal numbers in rows of `width`, the next row `stride` behind.
  static Array normal(Random& random, Dtype dtype, int64_t rows, int64_t width, int64_t stride, double mean = 0) {
    Array array(dtype, rows == 0 ? 0 : (rows - 1) * stride + width);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < width; ++i) array.set(row * stride + i, mean + random.normal());
    }
    return array;
  }
  static Array normal(Random& random, Dtype dtype, int64_t count, double mean = 0) {
    return normal(random, dtype, 1, count, count, mean);
  }

  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  float* floats() { return static_cast<float*>(data()); }
  const float* floats() const { return static_cast<const float*>(data()); }
  int64_t size() const { return size_; }

  double operator[](int64_t i) const {
    double value = kNan;
    dove::with_element_type(dtype_, [&](auto element) {
      std::memcpy(&element, bytes_.data() + i * sizeof(element), sizeof(element));
      value = decode(element);
    });
    return value;
  }
  void set(int64_t i, double value) {
    dove::with_element_type(dtype_, [&](auto element) {
      encode(value, &element);
      std::memcpy(bytes_.data() + i * sizeof(element), &element, sizeof(element));
    });
  }
  std::vector<double> values() const {
    std::vector<double> all(size_);
    for (int64_t i = 0; i < size_; ++i) all[i] = (*this)[i];
    return all;
  }

 private:
  Dtype dtype_;
  int64_t size_;
  std::vector<uint8_t> bytes_;
};

// ||actual - expected|| <= tolerance ||expected|| for each run of `run` numbers. NaN is expected where nothing writes.
inline void close(const char* what, const Array& actual, const std::vector<double>& expected, double tolerance,
                  int64_t run) {
  if (actual.size() != static_cast<int64_t>(expected.size())) fail("%s has another size", what);
  for (int64_t begin = 0; begin < actual.size(); begin += run) {
    double difference = 0, scale = 0;
    for (int64_t i = begin; i < std::min(begin + run, actual.size()); ++i) {
      const double ours = actual[i], theirs = expected[i];
      if (std::isnan(ours) != std::isnan(theirs)) {
        fail("%s[%lld] is %g, expected %g", what, static_cast<long long>(i), ours, theirs);
      }
      if (std::isnan(ours) || (std::isinf(theirs) && ours == theirs)) continue;
      difference += (ours - theirs) * (ours - theirs);
      scale += theirs * theirs;
    }
    if (!(difference <= tolerance * tolerance * scale)) {
      fail("%s[%lld...] is off by %.2e, allowed are %.0e", what, static_cast<long long>(begin),
           std::sqrt(difference / scale), tolerance);
    }
  }
}

// The whole of a check's main: `body` runs all problems.
inline int run(void (*body)()) {
  body();
  if (progress().count == 0) fail("there was none");
  std::printf("%lld problems agree\n", static_cast<long long>(progress().count));
  return 0;
}

// The same in the ISA that the command line names.
inline int run(int argc, char** argv, void (*body)(Isa)) {
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (argc != 2 || std::strcmp(argv[1], dove::isa_name(isa)) != 0) continue;
    if (!dove::isa_available(isa)) {
      std::printf("%s is not compiled or not on this processor\n", argv[1]);
      return kSkipped;
    }
    body(isa);
    if (progress().count == 0) fail("there was none");
    std::printf("%s: %lld problems agree\n", argv[1], static_cast<long long>(progress().count));
    return 0;
  }
  std::fprintf(stderr, "usage: %s baseline|avx2|avx512\n", argv[0]);
  return 2;
}

}  // namespace check
