#include "node.h"
#include "ops.h"

namespace tiny_llm {
namespace {

class Rope : public Node {
 public:
  const char* name() const override { return "rope"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    const auto x = dense_last_axis(inputs[0], queue), positions = dense(inputs[1], queue),
               inv_freq = dense(inputs[2], queue);
    allocate_heads_inside(outputs[0]);
    RopeJob job{x.data<float>(),
                x.strides(0),
                x.strides(1),
                x.strides(2),
                positions.data<int32_t>(),
                inv_freq.data<float>(),
                outputs[0].data<float>(),
                x.shape(0),
                x.shape(1),
                x.shape(2),
                x.shape(3)};
    queue.dispatch([job, &kernels = kernels()] {
      parallel_for(job.B * job.L, 8, [&](int64_t begin, int64_t end) { kernels.rope(job, begin, end); });
    });
  }
};

}  // namespace

mx::array rope(const mx::array& x, const mx::array& positions, const mx::array& inv_freq) {
  check_dtype("x", x, mx::float32);
  check_dtype("positions", positions, mx::int32);
  check_dtype("inv_freq", inv_freq, mx::float32);
  check_ndim("x", x, 4);
  if (x.shape(3) % 2 || x.shape(3) == 0) refuse("x must have an even last axis D, got shape ", shape_text(x));
  check_shape("positions", positions, {x.shape(2)}, "[L]");
  check_shape("inv_freq", inv_freq, {x.shape(3) / 2}, "[D/2]");
  return mx::array(x.shape(), mx::float32, std::make_shared<Rope>(), {x, positions, inv_freq});
}

}  // namespace tiny_llm
