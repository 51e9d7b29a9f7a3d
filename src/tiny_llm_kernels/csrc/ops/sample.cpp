#include "node.h"
#include "ops.h"

namespace tiny_llm {
namespace {

class Sample : public Node {
 public:
  explicit Sample(const SampleJob& how) : how_(how) {}
  const char* name() const override { return "sample"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    const auto logits = dense(inputs[0], queue);
    allocate(outputs[0]);
    SampleJob job = how_;
    job.logits = logits.data<float>(), job.V = logits.size(), job.token = outputs[0].data<uint32_t>();
    if (job.temperature > 0) job.scratch = temporary<float>(2 * rounded_up(job.V, 8), queue);
    queue.dispatch([job, &kernels = kernels()] { kernels.sample(job, 0, 1); });
  }

 private:
  SampleJob how_;  // without logits and token
};

}  // namespace

mx::array sample(const mx::array& logits, float temperature, float min_p, int64_t top_k, float top_p,
                 double uniform) {
  check_dtype("logits", logits, mx::float32);
  check_ndim("logits", logits, 1);
  if (logits.size() == 0) refuse("logits must not be empty");
  if (!(temperature >= 0)) refuse("temperature must be 0 or above, got ", temperature);
  if (!(uniform >= 0 && uniform < 1)) refuse("uniform must be at least 0 and below 1, got ", uniform);
  SampleJob how{};
  how.temperature = temperature, how.min_p = min_p, how.top_k = top_k, how.top_p = top_p,
  how.share = 1 - uniform;
  return mx::array(mx::Shape{}, mx::uint32, std::make_shared<Sample>(how), {logits});
}

}  // namespace tiny_llm
