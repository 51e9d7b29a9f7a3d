// Whole blocks from one pool to another, or within one: plain copies of bytes, shared out among threads.
#include <cstring>
#include <vector>

#include "node.h"
#include "ops.h"

namespace tiny_llm {
namespace {

/// A block's way.
struct Way {
  int64_t from, to;
};

struct CopyJob {
  const char* source;
  char* target;
  const int32_t *from, *to;
  int64_t count, source_blocks, target_blocks, block_bytes;

  /// The ways whose ends are both there: an id outside must not touch other memory.
  std::vector<Way> ways() const {
    std::vector<Way> inside;
    for (int64_t i = 0; i < count; ++i) {
      const bool is_there = from[i] >= 0 && from[i] < source_blocks && to[i] >= 0 && to[i] < target_blocks;
      if (is_there) inside.push_back({from[i], to[i]});
    }
    return inside;
  }
};

/// `way(i)` says where the i-th copy goes.
template <typename WayOf>
void copy_each(const char* source, char* target, int64_t count, int64_t bytes, const WayOf& way) {
  parallel_for(count, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(target + way(i).to * bytes, source + way(i).from * bytes, bytes);
  });
}

/// Inputs: the target, ids to read, ids to write, and the source where it is another array.
class CopyBlocks : public Node {
 public:
  const char* name() const override { return "copy_blocks"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    const auto from = dense(inputs[1], queue), to = dense(inputs[2], queue);
    mx::array& out = outputs[0];
    if (inputs[0].is_donatable() && inputs[0].flags().row_contiguous) {
      out.copy_shared_buffer(inputs[0]);  // nobody else looks at it: in place
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
      const auto ways = job.ways();
      const auto count = static_cast<int64_t>(ways.size());
      if (!aside)
        return copy_each(job.source, job.target, count, job.block_bytes, [&](int64_t i) { return ways[i]; });
      // All are read before any is written.
      copy_each(job.source, aside, count, job.block_bytes, [&](int64_t i) { return Way{ways[i].from, i}; });
      copy_each(aside, job.target, count, job.block_bytes, [&](int64_t i) { return Way{i, ways[i].to}; });
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
    check_shape("source", *source, shape, "target's shape but for the number of blocks");
    inputs.push_back(*source);
  }
  return mx::array(target.shape(), target.dtype(), std::make_shared<CopyBlocks>(), std::move(inputs));
}

}  // namespace tiny_llm
