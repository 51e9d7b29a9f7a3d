#include "paged_attention.h"

#include "ops.h"
#include "scratch.h"

namespace tiny_llm {
namespace {

/// The job that `reading_job` makes, with q [1, H, T, D] and out added.
AttentionJob reading(const mx::array& q, const mx::array& keys, const mx::array& values,
                     const mx::array& tables, const mx::array& row_of_token, const mx::array& positions,
                     mx::array& out, float scale, int64_t window) {
  AttentionJob job = reading_job(keys, values, tables, row_of_token, positions, scale, window);
  job.q = q.data<float>(), job.q_head = q.strides(1), job.q_token = q.strides(2);
  job.out = out.data<float>();
  job.H = q.shape(1);
  return job;
}

class PagedAttention : public Node {
 public:
  PagedAttention(float scale, int64_t window) : scale_(scale), window_(window) {}
  const char* name() const override { return "paged_attention"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    const auto q = dense_last_axis(inputs[0], queue);
    const auto keys = dense(inputs[1], queue), values = dense(inputs[2], queue);
    const auto tables = dense(inputs[3], queue), row_of_token = dense(inputs[4], queue),
               positions = dense(inputs[5], queue);
    allocate_heads_inside(outputs[0]);
    const auto job = reading(q, keys, values, tables, row_of_token, positions, outputs[0], scale_, window_);
    queue.dispatch([job, &kernels = kernels()] { attend_all(job, kernels); });
  }

 private:
  float scale_;
  int64_t window_;
};

class WriteAndAttend : public Node {
 public:
  WriteAndAttend(float scale, int64_t window) : scale_(scale), window_(window) {}
  const char* name() const override { return "write_and_attend"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    const auto q = dense_last_axis(inputs[0], queue), k = dense_last_axis(inputs[1], queue),
               v = dense_last_axis(inputs[2], queue);
    const auto slots = dense(inputs[5], queue), tables = dense(inputs[6], queue);
    const auto row_of_token = dense(inputs[7], queue), positions = dense(inputs[8], queue);
    if (!inputs[3].flags().row_contiguous || !inputs[4].flags().row_contiguous) {
      throw std::runtime_error(
          "write_and_attend: the pools must be row-contiguous, because a copy would lose the writes");
    }
    allocate_heads_inside(outputs[0]);
    outputs[1].copy_shared_buffer(inputs[3]);  // the same memory, never a copy
    outputs[2].copy_shared_buffer(inputs[4]);

    auto job =
        reading(q, outputs[1], outputs[2], tables, row_of_token, positions, outputs[0], scale_, window_);
    job.k = k.data<float>(), job.k_head = k.strides(1), job.k_token = k.strides(2);
    job.v = v.data<float>(), job.v_head = v.strides(1), job.v_token = v.strides(2);
    job.slots = slots.data<int32_t>();
    queue.dispatch([job, &kernels = kernels()] {
      // All writes of the step are done before the first read: a token may attend to other tokens of the step.
      parallel_for(job.T, 32, [&](int64_t begin, int64_t end) { kernels.write_tokens(job, begin, end); });
      attend_all(job, kernels);
    });
  }

 private:
  float scale_;
  int64_t window_;
};

}  // namespace

AttentionJob reading_job(const mx::array& keys, const mx::array& values, const mx::array& tables,
                         const mx::array& row_of_token, const mx::array& positions, float scale,
                         int64_t window) {
  provide_scratch();
  AttentionJob job{};
  job.keys = const_cast<char*>(keys.data<char>()), job.values = const_cast<char*>(values.data<char>());
  job.storage = storage_of(keys.dtype());
  job.tables = tables.data<int32_t>();
  job.row_of_token = row_of_token.data<int32_t>(), job.positions = positions.data<int32_t>();
  job.T = positions.shape(0), job.Hkv = keys.shape(1), job.D = keys.shape(3);
  job.S = tables.shape(0), job.M = tables.shape(1);
  job.num_blocks = keys.shape(0), job.block_size = keys.shape(2);
  job.scale = scale, job.window = window;
  return job;
}

int64_t checked_window(std::optional<int64_t> window) {
  constexpr int64_t EVERY_POSITION = int64_t{1} << 31;  // more than an int32 position can be
  if (window && *window < 1) refuse("window must be at least 1, got ", *window);
  return std::min(window.value_or(EVERY_POSITION), EVERY_POSITION);
}

void check_reading(int H, int Hkv, int T, int D, const mx::array& key_pool, const mx::array& value_pool,
                   const mx::array& tables, const mx::array& row_of_token, const mx::array& positions) {
  if (D % 2 || D < 2 || D > MAX_HEAD_SIZE)
    refuse("head size D must be even, from 2 to ", MAX_HEAD_SIZE, ", got ", D);
  if (Hkv == 0 || H % Hkv) refuse("H must be a multiple of Hkv, got H = ", H, " and Hkv = ", Hkv);
  check_storage("key_pool", key_pool);
  check_dtype("value_pool", value_pool, key_pool.dtype());
  check_ndim("key_pool", key_pool, 4);
  if (key_pool.size() == 0) refuse("key_pool must not be empty, got shape ", shape_text(key_pool));
  check_shape("key_pool", key_pool, {key_pool.shape(0), Hkv, key_pool.shape(2), D},
              "[num_blocks, Hkv, block_size, D]");
  check_same_shape("value_pool", value_pool, key_pool.shape(), "key_pool");
  check_dtype("tables", tables, mx::int32);
  check_ndim("tables", tables, 2);
  check_dtype("row_of_token", row_of_token, mx::int32);
  check_dtype("positions", positions, mx::int32);
  check_shape("row_of_token", row_of_token, {T}, "[T]");
  check_shape("positions", positions, {T}, "[T]");
}

mx::array paged_attention(const mx::array& q, const mx::array& key_pool, const mx::array& value_pool,
                          const mx::array& tables, const mx::array& row_of_token, const mx::array& positions,
                          float scale, std::optional<int64_t> window) {
  check_dtype("q", q, mx::float32);
  check_ndim("q", q, 4);
  check_ndim("key_pool", key_pool, 4);
  check_shape("q", q, {1, q.shape(1), q.shape(2), q.shape(3)}, "[1, H, T, D]");
  check_reading(q.shape(1), key_pool.shape(1), q.shape(2), q.shape(3), key_pool, value_pool, tables,
                row_of_token, positions);
  return mx::array(q.shape(), mx::float32, std::make_shared<PagedAttention>(scale, checked_window(window)),
                   {q, key_pool, value_pool, tables, row_of_token, positions});
}

std::tuple<mx::array, mx::array, mx::array> write_and_attend(
    const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& key_pool,
    const mx::array& value_pool, const mx::array& slots, const mx::array& tables,
    const mx::array& row_of_token, const mx::array& positions, float scale, std::optional<int64_t> window) {
  check_dtype("q", q, mx::float32);
  check_dtype("k", k, mx::float32);
  check_dtype("v", v, mx::float32);
  check_ndim("q", q, 4);
  check_ndim("k", k, 4);
  const int T = q.shape(2), D = q.shape(3), Hkv = k.shape(1);
  check_shape("q", q, {1, q.shape(1), T, D}, "[1, H, T, D]");
  check_reading(q.shape(1), Hkv, T, D, key_pool, value_pool, tables, row_of_token, positions);
  check_shape("k", k, {1, Hkv, T, D}, "[1, Hkv, T, D]");
  check_shape("v", v, {1, Hkv, T, D}, "[1, Hkv, T, D]");
  check_dtype("slots", slots, mx::int32);
  check_shape("slots", slots, {T}, "[T]");

  auto out = mx::array::make_arrays({q.shape(), key_pool.shape(), value_pool.shape()},
                                    {mx::float32, key_pool.dtype(), value_pool.dtype()},
                                    std::make_shared<WriteAndAttend>(scale, checked_window(window)),
                                    {q, k, v, key_pool, value_pool, slots, tables, row_of_token, positions});
  return {out[0], out[1], out[2]};
}

}  // namespace tiny_llm
