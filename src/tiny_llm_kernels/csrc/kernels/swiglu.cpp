// y = silu(gate) * up,   silu(g) = g / (1 + e^-g).
#include "kernels.h"
#include "vec.h"

namespace tiny_llm::TINY_LLM_ISA {

INLINE f32x8 gated(f32x8 gate, f32x8 up) { return gate / (splat(1.0f) + exp(-gate)) * up; }

void swiglu(const SwigluJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* gate = job.gate.data + row * job.gate.stride;
    const float* up = job.up.data + row * job.up.stride;
    float* out = job.out + row * job.K;
    int64_t k = 0;
    for (; k + LANES <= job.K; k += LANES) store(out + k, gated(load(gate + k), load(up + k)));
    if (const int64_t left = job.K - k) {
      store_first(out + k, gated(load_first(gate + k, left), load_first(up + k, left)), left);
    }
  }
}

}  // namespace tiny_llm::TINY_LLM_ISA
