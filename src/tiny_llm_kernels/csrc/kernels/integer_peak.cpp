// How fast the processor multiplies integers: the limit of quantized_matmul. Nothing is loaded, unpacked or scaled.
#include "kernels.h"
#include "vec.h"

namespace tiny_llm::TINY_LLM_ISA {

constexpr int CHAINS = WIDE == 16 ? 12 : 8;  // independent sums, to hide the latency of a product

/// Makes the compiler believe that the numbers change, so that it leaves out no product.
INLINE void change(u32w& numbers) {
#if TINY_LLM_AVX512
  asm volatile("" : "+v"(numbers));
#elif TINY_LLM_AVX2
  asm volatile("" : "+x"(numbers));
#else
  asm volatile("" : "+m"(numbers));
#endif
}

/// The product instructions of a Dot (vec.h): WIDE * 4 products of 8 bits, or WIDE * 2 of 16 bits.
template <int BITS>
INLINE void multiply_add(i32w& sums, u32w a, u32w b) {
#if TINY_LLM_AVX512
  sums = BITS == 8 ? (i32w)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b)
                   : (i32w)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif TINY_LLM_AVX2
  sums = BITS == 8 ? (i32w)_mm256_add_epi16((__m256i)sums, _mm256_maddubs_epi16((__m256i)a, (__m256i)b))
                   : sums + (i32w)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  for (int i = 0; i < 32 / BITS; ++i) sums += bits_as<i32w>(a >> (8 * i) & 0xffu) * bits_as<i32w>(b);
#endif
}

template <int BITS>
static int32_t multiply(int64_t rounds) {
  i32w sums[CHAINS] = {};
  u32w a = {}, b = {};
  change(b);
  for (int64_t round = 0; round < rounds; ++round) {
    UNROLL
    for (int i = 0; i < CHAINS; ++i) {
      change(a);
      multiply_add<BITS>(sums[i], a, b);
    }
  }
  i32w total = {};
  UNROLL
  for (int i = 0; i < CHAINS; ++i) total += sums[i];
  return total[0];
}

/// Items: independent repetitions of `rounds` rounds. A round is CHAINS instructions.
void integer_peak(const PeakJob& job, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    job.sums[item] = job.bits == 8 ? multiply<8>(job.rounds) : multiply<16>(job.rounds);
    job.products[item] = job.rounds * CHAINS * WIDE * 32 / job.bits;
  }
}

}  // namespace tiny_llm::TINY_LLM_ISA
