// Vector types and their operations, in which all kernels are written.
//
// A vector has eight floats, or for matrix products as many as a processor register. `+ - * /` are the
// compiler's vector extensions, so one source works for every processor. The few operations that plain C++ cannot
// express have one version per instruction set, selected with `#if` (NEON would be added next to AVX2, and in
// CMakeLists.txt and dispatch.cpp; until then ARM processors on Linux use the portable version). The kernels are
// compiled several times, each time with another TINY_LLM_ISA (a namespace): see CMakeLists.txt. A kernel may use
// only names from this namespace: the linker could merge a standard-library template that was compiled for AVX2
// into the portable kernels.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define TINY_LLM_AVX2 1
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define TINY_LLM_AVX512 1
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

// For short loops over values that should stay in registers.
#define UNROLL _Pragma("GCC unroll 16")

// For loops that must not be unrolled: GCC would move all sums to the end and run out of registers.
#define KEEP_LOOP _Pragma("GCC unroll 1")

namespace tiny_llm::TINY_LLM_ISA {

constexpr int LANES = 8;
constexpr float INF = __builtin_inff();

typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef int64_t i64x4 __attribute__((vector_size(32)));
typedef int64_t i64x8 __attribute__((vector_size(64)));

// WIDE numbers fill the processor's widest register: for matrix products, whose tiles have 16 outputs.
#if TINY_LLM_AVX512
constexpr int WIDE = 16;
typedef float f32w __attribute__((vector_size(64)));
typedef int32_t i32w __attribute__((vector_size(64)));
typedef uint32_t u32w __attribute__((vector_size(64)));
#else
constexpr int WIDE = 8;
typedef f32x8 f32w;
typedef i32x8 i32w;
typedef u32x8 u32w;
#endif

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

#if TINY_LLM_AVX512
INLINE f32w splat_wide(float value) { return (f32w)_mm512_set1_ps(value); }
#else
INLINE f32w splat_wide(float value) { return splat(value); }
#endif

INLINE f32w load_wide(const float* source) { return load_as<f32w>(source); }

/// Loads into a register now. For a value that several operations use, GCC would load it again for each of them. With 32
/// registers, one is left for it.
INLINE f32w in_register(f32w value) {
#if TINY_LLM_AVX512
  asm("" : "+v"(value));
#endif
  return value;
}
INLINE void store_wide(float* target, f32w value) { std::memcpy(target, &value, sizeof(value)); }

/// Stores the first `count` floats of a wide vector, or all of them if count > WIDE.
INLINE void store_wide(float* target, f32w value, int64_t count) {
  if (count >= WIDE) return store_wide(target, value);
  std::memcpy(target, &value, count * sizeof(float));
}

/// Loads the first `count` floats (count <= 8); the other lanes are zero.
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

/// a * b + c, rounded once if the processor supports it (always the same within one instruction set).
INLINE f32x8 fma(f32x8 a, f32x8 b, f32x8 c) {
#if TINY_LLM_AVX2
  return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

#if TINY_LLM_AVX512
INLINE f32w fma(f32w a, f32w b, f32w c) { return (f32w)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#endif

INLINE f32x8 max(f32x8 a, f32x8 b) { return a > b ? a : b; }
INLINE f32x8 abs(f32x8 a) { return bits_as<f32x8>(bits_as<u32x8>(a) & 0x7fffffffu); }

/// Rounds to the nearest integer, ties to even; |a| must be below 2^22.
template <typename V>
INLINE V round(V a) {
  const V magic = V{} + 0x1.8p23f;
  return (a + magic) - magic;
}

/// Converts floats that `round` returned.
INLINE i32x8 to_int(f32x8 a) { return __builtin_convertvector(a, i32x8); }
#if TINY_LLM_AVX512
INLINE i32w to_int(f32w a) { return __builtin_convertvector(a, i32w); }
#endif
INLINE f32x8 to_float(i32x8 a) { return __builtin_convertvector(a, f32x8); }
INLINE f32w to_float_wide(i32w a) { return __builtin_convertvector(a, f32w); }

/// Whether a comparison is true in at least one lane.
INLINE bool any(i32x8 mask) {
  const auto words = bits_as<i64x4>(mask);
  return ((words[0] | words[1]) | (words[2] | words[3])) != 0;
}

// Sums over lanes always use this tree:  ((0+2)+(1+3)) + ((4+6)+(5+7)).
INLINE float sum(f32x8 a) {
  const f32x4 low = __builtin_shufflevector(a, a, 0, 1, 2, 3),
              high = __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return ((low[0] + low[2]) + (low[1] + low[3])) + ((high[0] + high[2]) + (high[1] + high[3]));
}

/// {sum(a), sum(b), sum(c), sum(d)}, computed together.
INLINE f32x4 sum4(f32x8 a, f32x8 b, f32x8 c, f32x8 d) {
  const f32x8 ab = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
                   __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  const f32x8 cd = __builtin_shufflevector(c, d, 0, 1, 8, 9, 4, 5, 12, 13) +
                   __builtin_shufflevector(c, d, 2, 3, 10, 11, 6, 7, 14, 15);
  const f32x8 all = __builtin_shufflevector(ab, cd, 0, 2, 8, 10, 4, 6, 12, 14) +
                    __builtin_shufflevector(ab, cd, 1, 3, 9, 11, 5, 7, 13, 15);
  return __builtin_shufflevector(all, all, 0, 1, 2, 3) + __builtin_shufflevector(all, all, 4, 5, 6, 7);
}

/// Exchanges rows and columns of 8 x 8 numbers.
INLINE void transpose(f32x8 (&rows)[LANES]) {
  f32x8 pairs[LANES], fours[LANES];
  UNROLL
  for (int i = 0; i < LANES; i += 2) {
    pairs[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    pairs[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  UNROLL
  for (int i = 0; i < LANES; i += 4) {
    UNROLL
    for (int j = i; j < i + 2; ++j) {
      fours[j] = __builtin_shufflevector(pairs[j], pairs[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      fours[j + 2] = __builtin_shufflevector(pairs[j], pairs[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  UNROLL
  for (int i = 0; i < 4; ++i) {
    rows[i] = __builtin_shufflevector(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    rows[i + 4] = __builtin_shufflevector(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

/// The sum of a wide vector's halves: eight sums.
INLINE f32x8 narrow(f32w a) {
#if TINY_LLM_AVX512
  return __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7) +
         __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  return a;
#endif
}

INLINE float largest(f32x8 a) {
  f32x4 low = __builtin_shufflevector(a, a, 0, 1, 2, 3), high = __builtin_shufflevector(a, a, 4, 5, 6, 7);
  f32x4 b = low > high ? low : high;
  float c = b[0] > b[1] ? b[0] : b[1], d = b[2] > b[3] ? b[2] : b[3];
  return c > d ? c : d;
}

/// e^x to about one unit in the last place; exactly 0 below -87.3 (and so for -inf), finite above 88.
///   x = n ln 2 + r with |r| <= ln 2 / 2;   e^x = 2^n * p(r), p the polynomial below.
template <typename V>
INLINE V exp(V x) {
  const V zero = {}, low = zero - 87.3f, high = zero + 88.0f;
  V y = x < low ? low : x;
  y = y > high ? high : y;
  const V n = round(y * 1.44269504f);
  V r = fma(n, zero - 0.693359375f, y);
  r = fma(n, zero + 2.12194440e-4f, r);
  V p = zero + 1.9875691500e-4f;
  p = fma(p, r, zero + 1.3981999507e-3f);
  p = fma(p, r, zero + 8.3334519073e-3f);
  p = fma(p, r, zero + 4.1665795894e-2f);
  p = fma(p, r, zero + 1.6666665459e-1f);
  p = fma(p, r, zero + 5.0000001201e-1f);
  p = fma(p, r * r, r + 1.0f);
  const V two_to_n = bits_as<V>((to_int(n) + 127) << 23);
  return x < low ? zero : p * two_to_n;
}

// ---- integer dot products ------------------------------------------------------------------------
//
// For WIDE outputs at once; each has the weights of four inputs as adjacent bytes in a lane of 32 bits:
//
//     lane 0: o0 k0 k1 k2 k3 | lane 1: o1 k0 k1 k2 k3 | ...
//
// A Dot multiplies them by the four activations of one row, the same for every output, and adds the products to
// WIDE sums. For one group of 32 inputs and weights of BITS bits, every sum is exact on every processor.

/// The low or the high half of every byte.
INLINE u32w low_halves(u32w bytes) { return bytes & 0x0f0f0f0fu; }
INLINE u32w high_halves(u32w bytes) { return bytes >> 4 & 0x0f0f0f0fu; }

template <int BITS, typename Activation>
struct Dot;

#if TINY_LLM_AVX2

/// Unsigned bytes times signed bytes.
template <int BITS>
struct Dot<BITS, int8_t> {
  typedef u32w Four;
  INLINE Four everywhere(const int8_t* four) { return u32w{} + load_as<uint32_t>(four); }
#if TINY_LLM_AVX512
  static constexpr int REGISTERS = 1;
  i32w sums = {};
  INLINE_MEMBER void add(u32w weights, Four four) {
    sums = (i32w)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)four);
  }
  INLINE_MEMBER i32w total() const { return sums; }
#else
  // A 16-bit sum adds up 16 products in pairs. It cannot overflow if each product is at most 15 * 127. So an 8-bit
  // weight is split into its low half and 16 times its high half, which have separate sums.
  static constexpr int REGISTERS = BITS == 8 ? 2 : 1;
  __m256i low = _mm256_setzero_si256(), high = low;
  INLINE_MEMBER void add(u32w weights, Four four) {
    if constexpr (BITS == 8) add_to(high, high_halves(weights), four);
    add_to(low, BITS == 8 ? low_halves(weights) : weights, four);
  }
  INLINE_MEMBER i32w total() const {
    const i32w sums = (i32w)_mm256_madd_epi16(low, _mm256_set1_epi16(1));
    return BITS == 8 ? sums + (i32w)_mm256_madd_epi16(high, _mm256_set1_epi16(16)) : sums;
  }

 private:
  INLINE void add_to(__m256i& sums, u32w weights, Four four) {
    sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16((__m256i)weights, (__m256i)four));
    asm("" : "+x"(sums));  // forces the addition now; GCC would keep many products in memory and add later
  }
#endif
};

/// 16-bit numbers: the even bytes of the weights, and the odd ones. 32 * 255 * 32767 < 2^31.
template <int BITS>
struct Dot<BITS, int16_t> {
  static constexpr int REGISTERS = 1;
  struct Four {
    u32w even, odd;
  };
  INLINE Four everywhere(const int16_t* four) {
    return {u32w{} + load_as<uint32_t>(four), u32w{} + load_as<uint32_t>(four + 2)};
  }
  i32w sums = {};
  INLINE_MEMBER void add(u32w weights, Four four) {
    add_pairs(weights & 0x00ff00ffu, four.even);
    add_pairs(weights >> 8 & 0x00ff00ffu, four.odd);
  }
  INLINE_MEMBER i32w total() const { return sums; }

 private:
  INLINE_MEMBER void add_pairs(u32w weights, u32w two) {
#if TINY_LLM_AVX512
    sums = (i32w)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)weights, (__m512i)two);
#else
    sums += (i32w)_mm256_madd_epi16((__m256i)weights, (__m256i)two);
    asm("" : "+x"(sums));
#endif
  }
};

#else

template <int BITS, typename Activation>
struct Dot {
  static constexpr int REGISTERS = 1;
  typedef const Activation* Four;
  INLINE Four everywhere(const Activation* four) { return four; }
  i32w sums = {};
  INLINE_MEMBER void add(u32w weights, Four four) {
    const int first = sizeof(Activation) == 1 ? 1 : 2;  // the index of input 1: see kernels.h
    sums += bits_as<i32w>(weights & 0xffu) * int32_t{four[0]} +
            bits_as<i32w>(weights >> 8 & 0xffu) * int32_t{four[first]};
    sums += bits_as<i32w>(weights >> 16 & 0xffu) * int32_t{four[3 - first]} +
            bits_as<i32w>(weights >> 24) * int32_t{four[3]};
  }
  INLINE_MEMBER i32w total() const { return sums; }
};

#endif

/// Stores eight integers as 8 or 16 bits each.
INLINE void store_narrow(int8_t* target, i32x8 value) {
  typedef int8_t i8x8 __attribute__((vector_size(8)));
  const i8x8 narrow = __builtin_convertvector(value, i8x8);
  std::memcpy(target, &narrow, sizeof(narrow));
}

INLINE void store_narrow(int16_t* target, i32x8 value) {
  typedef int16_t i16x8 __attribute__((vector_size(16)));
  // The middle two of each four are exchanged: see kernels.h.
  const i16x8 narrow =
      __builtin_convertvector(__builtin_shufflevector(value, value, 0, 2, 1, 3, 4, 6, 5, 7), i16x8);
  std::memcpy(target, &narrow, sizeof(narrow));
}

// ---- storage types: how numbers are stored in memory ---------------------------------------------

struct Float32 {
  using Storage = float;
  INLINE f32x8 load8(const float* source) { return load(source); }
  INLINE f32w load_wide(const float* source) { return load_as<f32w>(source); }
  INLINE void store8(float* target, f32x8 value) { store(target, value); }
};

struct Float16 {
  using Storage = uint16_t;

  INLINE f32x8 load8(const uint16_t* source) {
#if TINY_LLM_AVX2
    return (f32x8)_mm256_cvtph_ps(load_as<__m128i>(source));
#else
    u32x8 h = __builtin_convertvector(load_as<u16x8>(source), u32x8);
    // The exponent is 112 too small after the shift; the multiplication also fixes subnormals.
    f32x8 f = bits_as<f32x8>((h & 0x7fffu) << 13) * splat(0x1p112f);
    u32x8 infinite = bits_as<u32x8>(f >= splat(65536.0f)) & 0x7f800000u;
    return bits_as<f32x8>(bits_as<u32x8>(f) | infinite | ((h & 0x8000u) << 16));
#endif
  }

  INLINE f32w load_wide(const uint16_t* source) {
#if TINY_LLM_AVX512
    return (f32w)_mm512_maskz_cvtph_ps(0xffff, load_as<__m256i>(source));
#else
    return load8(source);
#endif
  }

  INLINE void store8(uint16_t* target, f32x8 value) {
#if TINY_LLM_AVX2
    __m128i halves = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(target, &halves, sizeof(halves));
#else
    u32x8 bits = bits_as<u32x8>(value), magnitude = bits & 0x7fffffffu;
    // Normal: drop 13 bits, ties to even. Subnormal: a float addition does the rounding.
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

  INLINE f32w load_wide(const uint16_t* source) {
#if TINY_LLM_AVX512
    return bits_as<f32w>((u32w)_mm512_maskz_cvtepu16_epi32(0xffff, load_as<__m256i>(source)) << 16);
#else
    return load8(source);
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

/// Loads the first `count` numbers (count < 8) of a storage type as floats; the other lanes are zero.
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
