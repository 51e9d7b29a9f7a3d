// y = silu(gate) * up,   silu(g) = g / (1 + e^-g);   or y = gelu(gate) * up,
// gelu(g) = g / (1 + e^-2z),   z = sqrt(2 / pi) (g + 0.044715 g^3), the tanh approximation.
#include "kernels.h"
#include "vec.h"

namespace tiny_llm::TINY_LLM_ISA {

template <bool GELU>
INLINE f32x8 gated(f32x8 gate, f32x8 up) {
  const float linear = 1.5957691216f, cubic = 0.0713548162726f;  // sqrt(8 / pi), and 0.044715 of it
  const f32x8 x = GELU ? gate * fma(splat(cubic), gate * gate, splat(linear)) : gate;
  return gate / (splat(1.0f) + exp(-x)) * up;
}

template <bool GELU>
static void gate_rows(const SwigluJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* gate = job.gate.data + row * job.gate.stride;
    const float* up = job.up.data + row * job.up.stride;
    float* out = job.out + row * job.K;
    int64_t k = 0;
    for (; k + LANES <= job.K; k += LANES) store(out + k, gated<GELU>(load(gate + k), load(up + k)));
    if (const int64_t left = job.K - k) {
      store_first(out + k, gated<GELU>(load_first(gate + k, left), load_first(up + k, left)), left);
    }
  }
}

void swiglu(const SwigluJob& job, int64_t begin, int64_t end) {
  job.gelu ? gate_rows<true>(job, begin, end) : gate_rows<false>(job, begin, end);
}

}  // namespace tiny_llm::TINY_LLM_ISA
