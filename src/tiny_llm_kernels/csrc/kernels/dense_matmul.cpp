// y = x W^T with plain weights in their stored type: float32, float16 or bfloat16.
//
//     W [N, K]  | row n: w_0 w_1 ... w_{K-1} |        y[m, n] = sum over lanes of  acc[lane]
//     x [M, K]  | row m: x_0 x_1 ... x_{K-1} |        acc[lane] = sum of x_k w_k for k = lane, lane + 8, ...
//
// Every output has one accumulator of eight lanes, filled in the order of k and summed by one tree at the end.
// The number of rows and columns that are computed together only decides which loads are shared, so an output
// has the same bits alone and among a thousand rows.
#include "kernels.h"
#include "vec.h"

namespace tiny_llm::TINY_LLM_ISA {

/// ROWS x COLS outputs: for the rows of x from `row` on and the weight rows from `column` on.
template <typename T, int ROWS, int COLS>
static void outputs(const DenseJob& job, int64_t row, int64_t column) {
  const auto* weight = static_cast<const typename T::Storage*>(job.weight) + column * job.K;
  const float* x = job.x.data + row * job.x.stride;
  f32x8 acc[ROWS][COLS] = {};
  const auto add = [&](int64_t k, auto load_x, auto load_w) __attribute__((always_inline)) {
    f32x8 v[ROWS];
    UNROLL
    for (int r = 0; r < ROWS; ++r) v[r] = load_x(x + r * job.x.stride + k);
    UNROLL
    for (int c = 0; c < COLS; ++c) {
      const f32x8 w = load_w(weight + c * job.K + k);
      UNROLL
      for (int r = 0; r < ROWS; ++r) acc[r][c] = fma(v[r], w, acc[r][c]);
    }
  };
  int64_t k = 0;
  KEEP_LOOP
  for (; k + LANES <= job.K; k += LANES) {
    add(k, [](const float* p) { return load(p); }, [](const auto* p) { return T::load8(p); });
  }
  if (const int64_t left = job.K - k) {
    add(
        k, [left](const float* p) { return load_first(p, left); },
        [left](const auto* p) { return load_first_as<T>(p, left); });
  }
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    UNROLL
    for (int c = 0; c < COLS; ++c) job.out[(row + r) * job.N + column + c] = sum(acc[r][c]);
  }
}

/// Up to four weight rows for the rows first .. last-1 of x, three rows at a time, which share loaded weights.
template <typename T, int COLS>
static void column_block(const DenseJob& job, int64_t first, int64_t last, int64_t column) {
  int64_t row = first;
  for (; row + 3 <= last; row += 3) outputs<T, 3, COLS>(job, row, column);
  switch (last - row) {
    case 2: return outputs<T, 2, COLS>(job, row, column);
    case 1: return outputs<T, 1, COLS>(job, row, column);
  }
}

template <typename T>
static void dense_items(const DenseJob& job, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / job.tiles() * DenseJob::ROW_BLOCK, tile = item % job.tiles();
    const int64_t last = first + DenseJob::ROW_BLOCK < job.M ? first + DenseJob::ROW_BLOCK : job.M;
    int64_t column = tile * TILE_OUTPUTS;
    const int64_t stop = column + TILE_OUTPUTS < job.N ? column + TILE_OUTPUTS : job.N;
    for (; column + 4 <= stop; column += 4) column_block<T, 4>(job, first, last, column);
    switch (stop - column) {
      case 3: column_block<T, 3>(job, first, last, column); break;
      case 2: column_block<T, 2>(job, first, last, column); break;
      case 1: column_block<T, 1>(job, first, last, column); break;
    }
  }
}

void dense_matmul(const DenseJob& job, int64_t begin, int64_t end) {
  switch (job.storage) {
    case StorageType::float32: return dense_items<Float32>(job, begin, end);
    case StorageType::float16: return dense_items<Float16>(job, begin, end);
    case StorageType::bfloat16: return dense_items<BFloat16>(job, begin, end);
  }
}

}  // namespace tiny_llm::TINY_LLM_ISA
