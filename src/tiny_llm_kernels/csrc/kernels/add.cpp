// x = x + y, row by row; y is a residual or a bias.
#include "kernels.h"
#include "vec.h"

namespace tiny_llm::TINY_LLM_ISA {

void add(const AddJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float* x = job.x + row * job.x_stride;
    const float* y = job.y + row * job.y_stride;
    int64_t k = 0;
    for (; k + LANES <= job.K; k += LANES) store(x + k, load(x + k) + load(y + k));
    if (const int64_t left = job.K - k)
      store_first(x + k, load_first(x + k, left) + load_first(y + k, left), left);
  }
}

}  // namespace tiny_llm::TINY_LLM_ISA
