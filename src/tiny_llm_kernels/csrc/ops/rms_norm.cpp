#include "node.h"
#include "ops.h"

namespace tiny_llm {
namespace {

class RmsNorm : public Node {
 public:
  explicit RmsNorm(float eps) : eps_(eps) {}
  const char* name() const override { return "rms_norm"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    mx::array x = inputs[0];
    const Rows rows = rows_of(x, queue);
    const mx::array weight = dense(inputs[1], queue);
    allocate(outputs[0]);
    RmsNormJob job{rows, weight.data<float>(), outputs[0].data<float>(), x.shape(-1), eps_};
    queue.dispatch([job, &kernels = kernels()] {
      parallel_for(job.x.count, 32, [&](int64_t begin, int64_t end) { kernels.rms_norm(job, begin, end); });
    });
  }

 private:
  float eps_;
};

}  // namespace

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps) {
  check_dtype("x", x, mx::float32);
  check_dtype("weight", weight, mx::float32);
  if (x.ndim() == 0 || x.shape(-1) == 0) refuse("x must have a last axis, got shape ", shape_text(x));
  check_shape("weight", weight, {x.shape(-1)}, "[K]");
  return mx::array(x.shape(), mx::float32, std::make_shared<RmsNorm>(eps), {x, weight});
}

}  // namespace tiny_llm
