#include "node.h"
#include "ops.h"

namespace tiny_llm {
namespace {

class FlashAttention : public Node {
 public:
  FlashAttention(float scale, bool causal) : scale_(scale), causal_(causal) {}
  const char* name() const override { return "flash_attention"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    const auto q = dense_last_axis(inputs[0], queue), k = dense_last_axis(inputs[1], queue),
               v = dense_last_axis(inputs[2], queue);
    allocate_heads_inside(outputs[0]);
    FlashJob job{};
    job.q = q.data<float>(), job.k = k.data<float>(), job.v = v.data<float>();
    job.q_batch = q.strides(0), job.q_head = q.strides(1), job.q_token = q.strides(2);
    job.k_batch = k.strides(0), job.k_head = k.strides(1), job.k_token = k.strides(2);
    job.v_batch = v.strides(0), job.v_head = v.strides(1), job.v_token = v.strides(2);
    job.out = outputs[0].data<float>();
    job.B = q.shape(0), job.H = q.shape(1), job.L = q.shape(2), job.D = q.shape(3);
    job.Hkv = k.shape(1), job.S = k.shape(2);
    job.scale = scale_, job.causal = causal_;
    queue.dispatch([job, &kernels = kernels()] {
      parallel_for(job.B * job.L * job.H, 1,
                   [&](int64_t begin, int64_t end) { kernels.flash_attention(job, begin, end); });
    });
  }

 private:
  float scale_;
  bool causal_;
};

}  // namespace

mx::array flash_attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                          bool causal) {
  for (auto [name, a] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}}) {
    check_dtype(name, *a, mx::float32);
    check_ndim(name, *a, 4);
  }
  const int B = q.shape(0), H = q.shape(1), L = q.shape(2), D = q.shape(3), Hkv = k.shape(1), S = k.shape(2);
  check_shape("k", k, {B, Hkv, S, D}, "[B, Hkv, S, D]");
  check_shape("v", v, {B, Hkv, S, D}, "[B, Hkv, S, D]");
  if (Hkv == 0 || H % Hkv)
    refuse("q has ", H, " heads, expected a multiple of the ", Hkv, " heads of k and v");
  if (S == 0) refuse("k and v must have at least one position");
  if (causal && L > S)
    refuse("q has ", L, " rows, expected at most the ", S, " positions of k for causal attention");
  return mx::array(q.shape(), mx::float32, std::make_shared<FlashAttention>(scale, causal), {q, k, v});
}

}  // namespace tiny_llm
