#include <cstring>

#include "huge_pages.h"
#include "node.h"
#include "ops.h"

namespace tiny_llm {
namespace {

class Zeros : public Node {
 public:
  using Node::Node;
  const char* name() const override { return "zeros"; }

  void eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>& outputs) override {
    allocate_together(outputs);
    for (mx::array& out : outputs) {
      encoder().dispatch([data = out.data<char>(), bytes = static_cast<int64_t>(out.nbytes())] {
        parallel_for(bytes, 1 << 20,
                     [&](int64_t begin, int64_t end) { std::memset(data + begin, 0, end - begin); });
      });
    }
  }
};

}  // namespace

std::vector<mx::array> zeros(int count, const mx::Shape& shape, mx::Dtype dtype) {
  if (count < 1) refuse("count must be at least 1, got ", count);
  return mx::array::make_arrays(std::vector<mx::Shape>(count, shape), std::vector<mx::Dtype>(count, dtype),
                                std::make_shared<Zeros>(), {});
}

}  // namespace tiny_llm
