#pragma once

#include <cstdint>
#include <cstring>

#include "dove/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Vectors of fp32 for the CPU kernels, by the compilers' vector extensions: + - * / and comparisons are the operators.
// Compiled once per ISA, like the kernels. Sums are in fp32; 16-bit floats are widened when they are loaded and rounded
// to nearest even when they are stored.
namespace dove::DOVE_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * 2)));

// Not `Vec{} + value`: that would turn -0 into 0.
inline Vec broadcast(float value) { return value - Vec{}; }

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline Vec select(IntVec mask, Vec yes, Vec no) {
  return bit_cast<Vec>((mask & bit_cast<IntVec>(yes)) | (~mask & bit_cast<IntVec>(no)));
}

// a * b + c, in one rounding where the ISA has it.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The same of one number, in as many roundings.
inline float fma(float a, float b, float c) {
#if defined(__AVX2__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// The smaller and the larger of two; where one is NaN, b.
inline Vec minimum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return select(a < b, a, b);
#endif
}
inline Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}

// e^x to a relative error of 1e-7: 0 below -87.3, where it would be subnormal, infinity above 88.7, NaN for NaN.
inline Vec exp(Vec x) {
  // x = n ln 2 + r with |r| <= ln 2 / 2: n by adding and taking away 1.5 * 2^23, ln 2 in two parts so that n times the
  // first is exact, e^r by its Taylor series to r^7 (the next term is below 6e-9), 2^n by its exponent's bits.
  const Vec shift = broadcast(0x1.8p23f);
  const Vec clamped = minimum(maximum(x, broadcast(-87.3f)), broadcast(88.7f));
  const Vec shifted = fma(clamped, broadcast(1.44269504f), shift);
  const Vec n = shifted - shift;
  const Vec r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), clamped));
  Vec series = broadcast(1.0f / 5040.0f);
  series = fma(series, r, broadcast(1.0f / 720.0f));
  series = fma(series, r, broadcast(1.0f / 120.0f));
  series = fma(series, r, broadcast(1.0f / 24.0f));
  series = fma(series, r, broadcast(1.0f / 6.0f));
  series = fma(series, r, broadcast(0.5f));
  series = fma(series, r, broadcast(1.0f));
  series = fma(series, r, broadcast(1.0f));
  // In two factors, as 2^128 is no fp32 number.
  const IntVec exponent = __builtin_convertvector(n, IntVec);
  const IntVec half = exponent >> 1;
  const Vec power = bit_cast<Vec>((half + 127) << 23);
  const Vec rest = bit_cast<Vec>((exponent - half + 127) << 23);
  Vec result = series * power * rest;
  result = select(x < broadcast(-87.3f), Vec{}, result);
  result = select(x > broadcast(88.7f), broadcast(__builtin_inff()), result);
  return select(x != x, x, result);
}

// e^-x for |x| <= 87, to a relative error of 2e-7; NaN gives any number.
inline Vec exp_of_minus(Vec x) {
  // e^-x = 2^(n + f), n whole, |f| <= 1/2, as in exp, but n's bits are added to the exponent as they are: 2^n is a
  // normal number. 2^f - 1 by a polynomial without constant term fitted to a relative error of 2e-9 of 2^f.
  const Vec shift = broadcast(0x1.8p23f);
  const Vec shifted = fma(x, broadcast(-1.44269502f), shift);
  const Vec n = shifted - shift;
  // log2 e in two parts: the product with the first is exact within the fma.
  const Vec f = fma(x, broadcast(-1.92596303e-8f), fma(x, broadcast(-1.44269502f), -n));
  Vec series = broadcast(0.000153532572f);
  series = fma(series, f, broadcast(0.00133990031f));
  series = fma(series, f, broadcast(0.00961843878f));
  series = fma(series, f, broadcast(0.0555033199f));
  series = fma(series, f, broadcast(0.240226477f));
  series = fma(series, f, broadcast(0.693147182f));
  series = fma(series, f, broadcast(1.0f));
  return bit_cast<Vec>(bit_cast<UintVec>(series) + (bit_cast<UintVec>(shifted) << 23));
}

// x / (1 + e^-x), to a relative error of 3e-7 above -87 and an absolute one of 1e-36 below.
inline Vec silu(Vec x) {
  // Kept where exp_of_minus can follow, which changes nothing above and leaves -87 e^-87 below.
  const Vec above = maximum(broadcast(-87.0f), x);  // NaN stays
  return above / (broadcast(1.0f) + exp_of_minus(minimum(above, broadcast(87.0f))));
}

// The derivative of silu: s (1 + x (1 - s)) with s = 1 / (1 + e^-x), to an absolute error of 3e-7.
inline Vec silu_slope(Vec x) {
  const Vec clamped = minimum(broadcast(87.0f), maximum(broadcast(-87.0f), x));  // NaN stays
  const Vec power = exp_of_minus(clamped);
  const Vec s = broadcast(1.0f) / (broadcast(1.0f) + power);
  // 1 - s = s e^-x, without its cancellation.
  return s * fma(clamped, power * s, broadcast(1.0f));
}

// Widening and rounding of 16-bit floats.

inline Vec widen(HalfBits bits, BFloat16) {
#if defined(__AVX512F__)
  return bit_cast<Vec>((UintVec)_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(bits)) << 16);
#elif defined(__AVX2__)
  return bit_cast<Vec>((UintVec)_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)) << 16);
#else
  return bit_cast<Vec>(__builtin_convertvector(bits, UintVec) << 16);
#endif
}

inline Vec widen(HalfBits bits, Float16) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps(bit_cast<__m128i>(bits));
#else
  // Exponent and mantissa moved into place and scaled by 2^112, which makes subnormals normal; infinity and NaN get
  // the exponent back that the scaling took from them.
  const UintVec wide = __builtin_convertvector(bits, UintVec);
  const UintVec magnitude = (wide & 0x7fffu) << 13;
  const Vec scaled = bit_cast<Vec>(magnitude) * 0x1p112f;
  const UintVec special = (UintVec)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return bit_cast<Vec>(bit_cast<UintVec>(scaled) | special | (wide & 0x8000u) << 16);
#endif
}

inline HalfBits round_to(Vec value, BFloat16) {
  const UintVec bits = bit_cast<UintVec>(value);
#if defined(__AVX512F__)
  const UintVec even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32((__m512i)even, nan, _mm512_set1_epi32(0x7fc0));
  return bit_cast<HalfBits>(_mm512_maskz_cvtepi32_epi16(0xffff, result));
#else
  const UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UintVec quiet = (bits >> 16) | 0x40u;
  const UintVec is_nan = (UintVec)(value != value);
  return __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), HalfBits);
#endif
}

inline HalfBits round_to(Vec value, Float16) {
#if defined(__AVX512F__)
  return bit_cast<HalfBits>(
      _mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  return bit_cast<HalfBits>(_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const UintVec bits = bit_cast<UintVec>(value);
  const UintVec sign = (bits >> 16) & 0x8000u;
  const UintVec magnitude = bits & 0x7fffffffu;
  // Normal results: the exponent's bias changed from 127 to 15, the mantissa rounded to nearest even at bit 13.
  const UintVec normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 2^-1 leaves the rounded multiple of 2^-24 in the low bits.
  const UintVec small = bit_cast<UintVec>(bit_cast<Vec>(magnitude) + 0.5f) - 0x3f000000u;
  const UintVec is_small = (UintVec)(magnitude < (113u << 23));
  const UintVec is_large = (UintVec)(magnitude >= 0x477ff000u);  // 65520 and more round to infinity
  const UintVec is_nan = (UintVec)(magnitude > 0x7f800000u);
  UintVec result = (is_small & small) | (~is_small & normal);
  result = (is_large & 0x7c00u) | (~is_large & result);
  result = (is_nan & 0x7e00u) | (~is_nan & result);
  return __builtin_convertvector(result | sign, HalfBits);
#endif
}

// kLanes elements at `p`, of any alignment.

inline Vec load(const float* p) {
  Vec value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

template <typename T>
inline Vec load(const T* p) {
  HalfBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return widen(bits, T{});
}

inline void store(float* p, Vec value) { std::memcpy(p, &value, sizeof(value)); }

template <typename T>
inline void store(T* p, Vec value) {
  const HalfBits bits = round_to(value, T{});
  std::memcpy(p, &bits, sizeof(bits));
}

// The first `count` < kLanes elements; the other lanes are zero, and nothing behind them is touched.

template <typename T>
inline Vec load_part(const T* p, int64_t count) {
  T elements[kLanes] = {};
  std::memcpy(elements, p, count * sizeof(T));
  return load(elements);
}

#if defined(__AVX512F__)
inline Vec load_part(const float* p, int64_t count) {
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
#endif

template <typename T>
inline void store_part(T* p, Vec value, int64_t count) {
  T elements[kLanes];
  store(elements, value);
  std::memcpy(p, elements, count * sizeof(T));
}

// Calls body(i, read, write) for every vector of `count` elements, i its first; read(p) and write(p, value) take the
// last one's part.
template <typename T, typename Body>
inline void for_vectors(int64_t count, const Body& body) {
  const int64_t rest = count % kLanes;
  for (int64_t i = 0; i < count - rest; i += kLanes) {
    body(i, [](const T* at) { return load(at); }, [](T* at, Vec value) { store(at, value); });
  }
  if (rest > 0) {
    body(
        count - rest, [=](const T* at) { return load_part(at, rest); },
        [=](T* at, Vec value) { store_part(at, value, rest); });
  }
}

// One element, and reductions over the lanes in a fixed order: halves are added.

inline float load_one(const float* p) { return *p; }

template <typename T>
inline float load_one(const T* p) {
  return load_part(p, 1)[0];
}

inline float sum(Vec value) {
#if defined(__AVX512F__)
  const __m512 all = (__m512)value;
  const __m256 eight =
      _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, all, 1), _mm512_maskz_extractf32x8_ps(0xff, all, 0));
#elif defined(__AVX2__)
  const __m256 eight = (__m256)value;
#endif
#if defined(__AVX2__)
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
  return (value[0] + value[2]) + (value[1] + value[3]);
#endif
}

inline float largest(Vec value) {
  float result = value[0];
  for (int lane = 1; lane < kLanes; ++lane) result = value[lane] > result ? value[lane] : result;
  return result;
}

}  // namespace dove::DOVE_ISA_NAMESPACE
