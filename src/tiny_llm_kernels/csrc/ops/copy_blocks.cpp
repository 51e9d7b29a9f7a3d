// Copies whole blocks from one pool to another, or within one: plain byte copies, distributed over threads.
#include <cstring>
#include <vector>

#include "node.h"
#include "ops.h"

namespace tiny_llm {
namespace {

/// The copy of one block.
struct Copy {
  int64_t from, to;
};

struct CopyJob {
  const char* source;
  char* target;
  const int32_t *from, *to;
  int64_t count, source_blocks, target_blocks, block_bytes;

  /// The copies whose ids are both in range; others must not touch memory.
  std::vector<Copy> copies() const {
    std::vector<Copy> valid;
    for (int64_t i = 0; i < count; ++i) {
      const bool in_range = from[i] >= 0 && from[i] < source_blocks && to[i] >= 0 && to[i] < target_blocks;
      if (in_range) valid.push_back({from[i], to[i]});
    }
    return valid;
  }
};

/// Runs `count` copies; `copy(i)` is the i-th.
template <typename CopyAt>
void copy_each(const char* source, char* target, int64_t count, int64_t bytes, const CopyAt& copy) {
  parallel_for(count, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(target + copy(i).to * bytes, source + copy(i).from * bytes, bytes);
  });
}

/// Inputs: the target, ids to read, ids to write, and the source if it is another array.
class CopyBlocks : public Node {
 public:
  const char* name() const override { return "copy_blocks"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    const auto from = dense(inputs[1], queue), to = dense(inputs[2], queue);
    mx::array& out = outputs[0];
    if (inputs[0].is_donatable() && inputs[0].flags().row_contiguous) {
      out.copy_shared_buffer(inputs[0]);  // no other reference: in place
    } else {
      const auto whole = dense(inputs[0], queue);
      allocate(out);
      queue.dispatch([to = out.data<char>(), from = whole.data<char>(), bytes = out.nbytes()] {
        std::memcpy(to, from, bytes);
      });
    }
    const bool within = inputs.size() == 3;
    const auto source = within ? out : dense(inputs[3], queue);
    const CopyJob job{source.data<char>(),
                      out.data<char>(),
                      from.data<int32_t>(),
                      to.data<int32_t>(),
                      static_cast<int64_t>(from.size()),
                      source.shape(0),
                      out.shape(0),
                      static_cast<int64_t>(out.nbytes()) / out.shape(0)};
    char* aside = within ? temporary<char>(job.count * job.block_bytes, queue) : nullptr;
    queue.dispatch([job, aside] {
      const auto copies = job.copies();
      const auto count = static_cast<int64_t>(copies.size());
      if (!aside)
        return copy_each(job.source, job.target, count, job.block_bytes,
                         [&](int64_t i) { return copies[i]; });
      // All blocks are read before any is written.
      copy_each(job.source, aside, count, job.block_bytes,
                [&](int64_t i) { return Copy{copies[i].from, i}; });
      copy_each(aside, job.target, count, job.block_bytes, [&](int64_t i) { return Copy{i, copies[i].to}; });
    });
  }
};

void check_ids(const char* name, const mx::array& ids, const mx::array& like) {
  check_dtype(name, ids, mx::int32);
  check_ndim(name, ids, 1);
  check_shape(name, ids, like.shape(), "[P]");
}

}  // namespace

mx::array copy_blocks(const mx::array& target, const mx::array& from, const mx::array& to,
                      const std::optional<mx::array>& source) {
  if (target.ndim() < 2 || target.size() == 0)
    refuse("target must be [num_blocks, ...] and not empty, got shape ", shape_text(target));
  check_ids("from_blocks", from, to);
  check_ids("to_blocks", to, from);
  std::vector<mx::array> inputs = {target, from, to};
  if (source) {
    check_dtype("source", *source, target.dtype());
    mx::Shape shape = target.shape();
    shape[0] = source->ndim() ? source->shape(0) : 0;
    check_same_shape("source", *source, shape, "target, except for the number of blocks");
    inputs.push_back(*source);
  }
  return mx::array(target.shape(), target.dtype(), std::make_shared<CopyBlocks>(), std::move(inputs));
}

}  // namespace tiny_llm
