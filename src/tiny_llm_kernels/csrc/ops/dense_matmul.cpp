#include "node.h"
#include "ops.h"

namespace tiny_llm {
namespace {

class DenseMatmul : public Node {
 public:
  const char* name() const override { return "dense_matmul"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    mx::array x = inputs[0];
    const Rows rows = rows_of(x, queue);
    const mx::array weight = dense(inputs[1], queue);
    allocate(outputs[0]);
    DenseJob job{rows,
                 weight.data<char>(),
                 storage_of(weight.dtype()),
                 outputs[0].data<float>(),
                 rows.count,
                 weight.shape(0),
                 weight.shape(1)};
    queue.dispatch([job, &kernels = kernels()] {
      parallel_for(job.items(), 1,
                   [&](int64_t begin, int64_t end) { kernels.dense_matmul(job, begin, end); });
    });
  }
};

}  // namespace

mx::array dense_matmul(const mx::array& x, const mx::array& weight) {
  check_dtype("x", x, mx::float32);
  check_storage("weight", weight);
  check_ndim("weight", weight, 2);
  if (weight.size() == 0) refuse("weight must not be empty, got shape ", shape_text(weight));
  const int N = weight.shape(0), K = weight.shape(1);
  if (x.ndim() == 0 || x.shape(-1) != K)
    refuse("x must have K = ", K, " as its last axis, got shape ", shape_text(x));
  mx::Shape shape = x.shape();
  shape.back() = N;
  return mx::array(std::move(shape), mx::float32, std::make_shared<DenseMatmul>(), {x, weight});
}

}  // namespace tiny_llm
