// The vector type that every kernel is written in.
//
// Eight floats in one value. `+ - * /` are the compiler's own vector extensions, so one source serves
// every processor; the few things that plain C++ cannot say stand at the end, once per instruction set.
// The kernels are compiled several times, each time with another TINY_LLM_ISA (a namespace): see
// CMakeLists.txt. Only names from this namespace may be used in a kernel: a standard-library template
// compiled for AVX2 could be picked by the linker for the portable copy too.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define TINY_LLM_AVX2 1
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

// Before a short loop over values that should stay in registers.
#define UNROLL _Pragma("GCC unroll 16")

// Before a loop that must stay one: unrolled, GCC puts all its sums off to the end and runs out of
// registers.
#define KEEP_LOOP _Pragma("GCC unroll 1")

namespace tiny_llm::TINY_LLM_ISA {

constexpr int LANES = 8;

typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x32 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));

// ---- moving data ---------------------------------------------------------------------------------

template <typename V>
INLINE V load_as(const void* source) {
  V value;
  std::memcpy(&value, source, sizeof(V));
  return value;
}

INLINE f32x8 load(const float* source) { return load_as<f32x8>(source); }
INLINE void store(float* target, f32x8 value) { std::memcpy(target, &value, sizeof(value)); }
INLINE f32x8 splat(float value) { return f32x8{value, value, value, value, value, value, value, value}; }

/// The first `count` floats (count <= 8); the other lanes are zero.
INLINE f32x8 load_first(const float* source, int64_t count) {
  f32x8 value = {};
  std::memcpy(&value, source, count * sizeof(float));
  return value;
}

INLINE void store_first(float* target, f32x8 value, int64_t count) {
  std::memcpy(target, &value, count * sizeof(float));
}

template <typename To, typename From>
INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// ---- arithmetic ----------------------------------------------------------------------------------

/// a * b + c, rounded once where the processor can (the same choice for every call of one build).
INLINE f32x8 fma(f32x8 a, f32x8 b, f32x8 c) {
#if TINY_LLM_AVX2
  return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

INLINE f32x8 max(f32x8 a, f32x8 b) { return a > b ? a : b; }
INLINE f32x8 abs(f32x8 a) { return bits_as<f32x8>(bits_as<u32x8>(a) & 0x7fffffffu); }

/// The nearest whole number, ties to even; |a| must be below 2^22.
INLINE f32x8 round(f32x8 a) {
  const f32x8 magic = splat(0x1.8p23f);
  return (a + magic) - magic;
}

/// Whole numbers, as `round` returns them, as integers.
INLINE i32x8 to_int(f32x8 a) { return __builtin_convertvector(a, i32x8); }
INLINE f32x8 to_float(i32x8 a) { return __builtin_convertvector(a, f32x8); }

// Sums over lanes always use this one tree:  ((0+4)+(2+6)) + ((1+5)+(3+7)).
INLINE f32x4 fold(f32x8 a) {
  return __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
}

INLINE float sum(f32x8 a) {
  f32x4 b = fold(a);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

/// {sum(a), sum(b), sum(c), sum(d)}: four trees at once.
INLINE f32x4 sum4(f32x8 a, f32x8 b, f32x8 c, f32x8 d) {
  f32x4 fa = fold(a), fb = fold(b), fc = fold(c), fd = fold(d);
  f32x4 ab = __builtin_shufflevector(fa, fb, 0, 1, 4, 5) + __builtin_shufflevector(fa, fb, 2, 3, 6, 7);
  f32x4 cd = __builtin_shufflevector(fc, fd, 0, 1, 4, 5) + __builtin_shufflevector(fc, fd, 2, 3, 6, 7);
  return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
}

INLINE float largest(f32x8 a) {
  f32x4 low = __builtin_shufflevector(a, a, 0, 1, 2, 3), high = __builtin_shufflevector(a, a, 4, 5, 6, 7);
  f32x4 b = low > high ? low : high;
  float c = b[0] > b[1] ? b[0] : b[1], d = b[2] > b[3] ? b[2] : b[3];
  return c > d ? c : d;
}

/// e^x to about one unit in the last place; exactly 0 below -87.3 (and so for -inf), finite above 88.
///   x = n ln 2 + r with |r| <= ln 2 / 2;   e^x = 2^n * p(r), p the polynomial below.
INLINE f32x8 exp(f32x8 x) {
  const f32x8 low = splat(-87.3f), high = splat(88.0f);
  f32x8 y = x < low ? low : x;
  y = y > high ? high : y;
  f32x8 n = round(y * splat(1.44269504f));
  f32x8 r = fma(n, splat(-0.693359375f), y);
  r = fma(n, splat(2.12194440e-4f), r);
  f32x8 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.0f));
  f32x8 two_to_n = bits_as<f32x8>((to_int(n) + 127) << 23);
  f32x8 value = p * two_to_n;
  return x < low ? splat(0.0f) : value;
}

// ---- int16 products ------------------------------------------------------------------------------
//
// A 32-byte vector of int16 holds 8 outputs x 2 inputs, the inputs of one output side by side:
//
//     lane    0    1  |  2    3  | ...
//          o0k0 o0k1  | o1k0 o1k1 | ...
//
// `add_dot2` multiplies weights (0..255) with activations and adds neighbours and all to 8 sums in int32.
// A group of 32 sums to at most 32 * 255 * 32767 < 2^31: exact.
//
// AVX-512 VNNI goes here: its vpdpwssd does the product and the running sum of 16 outputs in one.

INLINE void add_dot2(i32x8& sums, i16x16 weights, i16x16 activations) {
#if TINY_LLM_AVX2
  sums += (i32x8)_mm256_madd_epi16((__m256i)weights, (__m256i)activations);
  asm("" : "+x"(sums));  // add now: GCC would rather keep many products, in memory, and add them later
#else
  const i32x8 w = bits_as<i32x8>(weights), x = bits_as<i32x8>(activations);
  sums += (w & 0xffff) * (bits_as<i32x8>(bits_as<u32x8>(x) << 16) >> 16) + (w >> 16) * (x >> 16);
#endif
}

/// The same two numbers in all eight places.
INLINE i16x16 splat2(const int16_t* two) {
  const uint32_t v = load_as<uint32_t>(two);
  return bits_as<i16x16>(u32x8{v, v, v, v, v, v, v, v});
}

/// Eight ints of 16 bits, side by side.
INLINE void store_int16(int16_t* target, i32x8 value) {
  typedef int16_t i16x8 __attribute__((vector_size(16)));
  const i16x8 narrow = __builtin_convertvector(value, i16x8);
  std::memcpy(target, &narrow, sizeof(narrow));
}

// ---- storage types: how a number lies in memory --------------------------------------------------

struct Float32 {
  using Storage = float;
  INLINE f32x8 load8(const float* source) { return load(source); }
  INLINE void store8(float* target, f32x8 value) { store(target, value); }
};

struct Float16 {
  using Storage = uint16_t;

  INLINE f32x8 load8(const uint16_t* source) {
#if TINY_LLM_AVX2
    return (f32x8)_mm256_cvtph_ps(load_as<__m128i>(source));
#else
    u32x8 h = __builtin_convertvector(load_as<u16x8>(source), u32x8);
    // The exponent is 112 too small after the shift; the multiplication also mends subnormals.
    f32x8 f = bits_as<f32x8>((h & 0x7fffu) << 13) * splat(0x1p112f);
    u32x8 infinite = bits_as<u32x8>(f >= splat(65536.0f)) & 0x7f800000u;
    return bits_as<f32x8>(bits_as<u32x8>(f) | infinite | ((h & 0x8000u) << 16));
#endif
  }

  INLINE void store8(uint16_t* target, f32x8 value) {
#if TINY_LLM_AVX2
    __m128i halves = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(target, &halves, sizeof(halves));
#else
    u32x8 bits = bits_as<u32x8>(value), magnitude = bits & 0x7fffffffu;
    // Normal: drop 13 bits, ties to even. Subnormal: let a float addition do the rounding.
    u32x8 normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    u32x8 tiny = bits_as<u32x8>(bits_as<f32x8>(magnitude) + splat(0.5f)) - 0x3f000000u;
    u32x8 half = magnitude < 0x38800000u ? tiny : normal;
    u32x8 special = magnitude > 0x7f800000u ? (u32x8{} + 0x7e00u) : (u32x8{} + 0x7c00u);
    half = magnitude >= 0x47800000u ? special : half;
    u16x8 result = __builtin_convertvector(half | ((bits >> 16) & 0x8000u), u16x8);
    std::memcpy(target, &result, sizeof(result));
#endif
  }
};

struct BFloat16 {
  using Storage = uint16_t;

  INLINE f32x8 load8(const uint16_t* source) {
#if TINY_LLM_AVX2
    return bits_as<f32x8>((u32x8)_mm256_cvtepu16_epi32(load_as<__m128i>(source)) << 16);
#else
    return bits_as<f32x8>(__builtin_convertvector(load_as<u16x8>(source), u32x8) << 16);
#endif
  }

  INLINE void store8(uint16_t* target, f32x8 value) {
    u32x8 bits = bits_as<u32x8>(value);
    u32x8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    u32x8 quiet_nan = (bits >> 16) | 0x40u;
    u32x8 kept = (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded;
    u16x8 result = __builtin_convertvector(kept, u16x8);
    std::memcpy(target, &result, sizeof(result));
  }
};

/// The first `count` numbers (count < 8) of a storage type as floats; the other lanes are zero.
template <typename T>
INLINE f32x8 load_first_as(const typename T::Storage* source, int64_t count) {
  typename T::Storage eight[LANES] = {};
  std::memcpy(eight, source, count * sizeof(eight[0]));
  return T::load8(eight);
}

/// Stores the first `count` floats (count < 8) as a storage type.
template <typename T>
INLINE void put_first(typename T::Storage* target, f32x8 value, int64_t count) {
  typename T::Storage eight[LANES];
  T::store8(eight, value);
  std::memcpy(target, eight, count * sizeof(eight[0]));
}

}  // namespace tiny_llm::TINY_LLM_ISA
