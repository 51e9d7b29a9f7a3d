#include "node.h"
#include "ops.h"

namespace tiny_llm {
namespace {

class Swiglu : public Node {
 public:
  explicit Swiglu(bool gelu) : gelu_(gelu) {}
  const char* name() const override { return gelu_ ? "geglu" : "swiglu"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    mx::array gate = inputs[0], up = inputs[1];
    const Rows gate_rows = rows_of(gate, queue), up_rows = rows_of(up, queue);
    allocate(outputs[0]);
    SwigluJob job{gate_rows, up_rows, outputs[0].data<float>(), gate.shape(-1), gelu_};
    queue.dispatch([job, &kernels = kernels()] {
      parallel_for(job.gate.count, 8, [&](int64_t begin, int64_t end) { kernels.swiglu(job, begin, end); });
    });
  }

 private:
  bool gelu_;
};

mx::array gated(const mx::array& gate, const mx::array& up, bool gelu) {
  check_dtype("gate", gate, mx::float32);
  check_dtype("up", up, mx::float32);
  if (gate.ndim() == 0) refuse("gate must have a last axis, got a scalar");
  check_same_shape("up", up, gate.shape(), "gate");
  return mx::array(gate.shape(), mx::float32, std::make_shared<Swiglu>(gelu), {gate, up});
}

}  // namespace

mx::array swiglu(const mx::array& gate, const mx::array& up) { return gated(gate, up, false); }
mx::array geglu(const mx::array& gate, const mx::array& up) { return gated(gate, up, true); }

}  // namespace tiny_llm
