#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "node.h"
#include "ops.h"

namespace tiny_llm {
namespace {

/// The rows to sample from, each with its own share of the total weight.
struct Draws {
  std::vector<int64_t> rows;
  std::vector<double> shares;
};

class Sample : public Node {
 public:
  Sample(const SampleJob& how, Draws draws) : how_(how), draws_(std::make_shared<Draws>(std::move(draws))) {}
  const char* name() const override { return "sample"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    const auto logits = dense(inputs[0], queue);
    const bool has_masks = inputs.size() > 1;
    const auto masks = has_masks ? dense(inputs[1], queue) : logits;
    for (auto& output : outputs) allocate(output);
    SampleJob job = how_;
    job.logits = logits.data<float>(), job.V = logits.shape(-1), job.token = outputs[0].data<uint32_t>();
    job.mask = has_masks ? masks.data<int32_t>() : nullptr;
    const int64_t words = has_masks ? masks.shape(-1) : 0;
    const auto count = static_cast<int64_t>(draws_->rows.size());
    const int64_t workers = std::min<int64_t>(count, num_threads());  // each has its own scratch memory
    const int64_t scratch = job.temperature > 0 ? 2 * rounded_up(job.V, 8) : 0;
    if (scratch) job.scratch = temporary<float>(workers * scratch, queue);
    auto* chosen = outputs[1].data<float>();
    queue.dispatch([job, chosen, count, workers, scratch, words, draws = draws_, &kernels = kernels()] {
      const auto work = [&](int64_t worker) {
        for (int64_t i = worker; i < count; i += workers) {
          SampleJob one = job;
          one.logits += draws->rows[i] * job.V, one.token += i, one.scratch += worker * scratch;
          if (one.mask) one.mask += i * words;
          one.share = draws->shares[i];
          kernels.sample(one, 0, 1);
          chosen[i] = one.logits[*one.token];
        }
      };
      if (workers == 1) return work(0);
      parallel_for_each(workers, [&](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; ++worker) work(worker);
      });
    });
  }

 private:
  SampleJob how_;  // without logits, token and share
  std::shared_ptr<const Draws> draws_;
};

}  // namespace

std::tuple<mx::array, mx::array> sample(const mx::array& logits, const std::vector<int64_t>& rows,
                                        float temperature, float min_p, int64_t top_k, float top_p,
                                        const std::vector<double>& uniforms,
                                        const std::optional<mx::array>& masks) {
  check_dtype("logits", logits, mx::float32);
  check_ndim("logits", logits, 2);
  const int64_t R = logits.shape(0);
  if (rows.empty()) refuse("rows must not be empty");
  if (logits.shape(1) == 0) refuse("logits must not be empty, got shape ", shape_text(logits));
  if (uniforms.size() != rows.size())
    refuse("uniforms must have one number for each row: ", rows.size(), ", not ", uniforms.size());
  if (!(temperature >= 0)) refuse("temperature must be 0 or above, got ", temperature);
  Draws draws{rows, {}};
  for (const int64_t row : rows) {
    if (row < 0 || row >= R) refuse("rows must be between 0 and ", R - 1, ", got ", row);
  }
  for (const double uniform : uniforms) {
    if (!(uniform >= 0 && uniform < 1)) refuse("uniforms must be at least 0 and below 1, got ", uniform);
    draws.shares.push_back(1 - uniform);
  }
  std::vector<mx::array> inputs{logits};
  if (masks) {
    check_dtype("masks", *masks, mx::int32);
    const mx::Shape shape{static_cast<int>(rows.size()), (logits.shape(1) + 31) / 32};
    check_shape("masks", *masks, shape, "[number of rows, V / 32 rounded up]");
    inputs.push_back(*masks);
  }
  SampleJob how{};
  how.temperature = temperature, how.min_p = min_p, how.top_k = top_k, how.top_p = top_p;
  const mx::Shape shape{static_cast<int>(rows.size())};
  auto out = mx::array::make_arrays({shape, shape}, {mx::uint32, mx::float32},
                                    std::make_shared<Sample>(how, std::move(draws)), inputs);
  return {out[0], out[1]};
}

}  // namespace tiny_llm
