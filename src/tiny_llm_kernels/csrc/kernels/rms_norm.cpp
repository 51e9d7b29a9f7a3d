// y = x / sqrt(mean(x^2) + eps) * weight, row by row.
#include "kernels.h"
#include "vec.h"

namespace tiny_llm::TINY_LLM_ISA {

/// The squares are added to four accumulators in rotation: the order of additions depends only on K.
static float sum_of_squares(const float* x, int64_t K) {
  f32x8 acc[4] = {};
  int64_t k = 0, next = 0;
  for (; k + LANES <= K; k += LANES, next = (next + 1) % 4) {
    f32x8 v = load(x + k);
    acc[next] = fma(v, v, acc[next]);
  }
  if (k < K) {
    f32x8 v = load_first(x + k, K - k);
    acc[next] = fma(v, v, acc[next]);
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

void rms_norm(const RmsNormJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = job.x.data + row * job.x.stride;
    float* out = job.out + row * job.K;
    const float mean = sum_of_squares(x, job.K) / static_cast<float>(job.K);
    const f32x8 factor = splat(1.0f / __builtin_sqrtf(mean + job.eps));
    int64_t k = 0;
    for (; k + LANES <= job.K; k += LANES) store(out + k, load(x + k) * factor * load(job.weight + k));
    if (const int64_t left = job.K - k) {
      store_first(out + k, load_first(x + k, left) * factor * load_first(job.weight + k, left), left);
    }
  }
}

}  // namespace tiny_llm::TINY_LLM_ISA
