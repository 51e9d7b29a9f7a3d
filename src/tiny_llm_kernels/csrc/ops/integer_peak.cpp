#include <numeric>

#include "../dispatch.h"
#include "../threads.h"
#include "ops.h"

namespace tiny_llm {

int64_t integer_peak(int bits, int64_t rounds) {
  const int64_t items = 8 * num_threads();  // several for each thread: one of them may be descheduled
  std::vector<int32_t> sums(items);
  std::vector<int64_t> products(items);
  parallel_for_each(items, [&](int64_t begin, int64_t end) {
    kernels().integer_peak({bits, rounds / items + 1, sums.data(), products.data()}, begin, end);
  });
  return std::accumulate(products.begin(), products.end(), int64_t{0});
}

}  // namespace tiny_llm
