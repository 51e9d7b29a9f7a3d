// Divides the attention of a step into items and distributes them over the threads.
#include <algorithm>
#include <new>
#include <vector>

#include "paged_attention.h"
#include "scratch.h"

namespace tiny_llm {
namespace {

/// Adjacent tokens of one sequence, and the partitions that they attend to.
struct Run {
  int32_t first, count;
  int64_t begin, end;  // partitions
  int64_t partitions() const { return end - begin; }
};

/// The range of partitions that a token attends to.
std::pair<int64_t, int64_t> partitions_of(const AttentionJob& job, int32_t token) {
  const int64_t end = std::max<int64_t>(job.positions[token], -1) + 1;
  return {std::max<int64_t>(end - job.window, 0) / PARTITION, rounded_up(end, PARTITION) / PARTITION};
}

/// Divides the packed tokens into runs of one sequence each. The length of a run only decides how many tokens share
/// a loaded tile and how evenly the work is spread, not what a token computes.
std::vector<Run> divide_into_runs(const AttentionJob& job, int threads, const std::vector<bool>& skipped) {
  constexpr int64_t MAX_RUN_ROWS = 48;
  const int64_t share = job.T * job.Hkv / (4 * threads);
  const int64_t limit = std::max<int64_t>(1, std::min(share, MAX_RUN_ROWS / (job.H / job.Hkv)));
  std::vector<Run> runs;
  for (int32_t token = 0; token < job.T; ++token) {
    if (!skipped.empty() && skipped[token]) continue;
    const auto [begin, end] = partitions_of(job, token);
    const bool joins = !runs.empty() && runs.back().count < limit &&
                       runs.back().first + runs.back().count == token &&
                       job.row_of_token[token] == job.row_of_token[token - 1];
    if (joins) {
      Run& run = runs.back();
      run = {run.first, run.count + 1, std::min(run.begin, begin), std::max(run.end, end)};
    } else {
      runs.push_back({token, 1, begin, end});
    }
  }
  std::reverse(runs.begin(), runs.end());  // later tokens attend to more: start with the longest work
  return runs;
}

/// The items of a step, and the tokens whose partitions are merged afterwards.
struct Items {
  std::vector<AttentionItem> all;
  std::vector<int32_t> split;
  int64_t max_partitions = 0;

  /// Adds a run as few items of at most `share` work each: first by grouping kv heads, then by splitting partitions.
  void add(const AttentionJob& job, const Run& run, int64_t share) {
    const int64_t fitting = MAX_ROWS * job.Hkv / (run.count * job.H);
    const auto heads =
        static_cast<int32_t>(std::clamp<int64_t>(std::min(share / run.count, fitting), 1, job.Hkv));
    const int64_t work = run.count * heads;  // per partition
    const bool in_table =
        run.end <= job.M * job.block_size / PARTITION + 1;  // an invalid position must not cost memory
    const bool is_split = in_table && run.partitions() > 1 && run.partitions() * work > share;
    const int64_t at_once = std::max<int64_t>(1, is_split ? share / work : run.partitions());
    int64_t begin = run.begin;
    const auto place = static_cast<int32_t>(is_split ? split.size() : -1);
    do {  // at least once: tokens that attend to nothing need an item, which writes NaN
      const auto first = static_cast<int32_t>(begin),
                 end = static_cast<int32_t>(std::min(begin + at_once, run.end));
      for (int32_t head = 0; head < job.Hkv; head += heads) {
        const auto count = std::min(heads, static_cast<int32_t>(job.Hkv) - head);
        all.push_back({run.first, run.count, head, count, first, end, place});
      }
      begin = end;
    } while (begin < run.end);
    if (!is_split) return;
    for (int32_t token = run.first; token < run.first + run.count; ++token) split.push_back(token);
    max_partitions = std::max(max_partitions, run.partitions());
  }
};

Items divide_into_items(const AttentionJob& job, const std::vector<Run>& runs, int64_t share) {
  Items items;
  for (const Run& run : runs) items.add(job, run, share);
  return items;
}

/// Memory for `count` floats, reused because the next step needs as much; null if there is not enough.
float* reused_floats(size_t count) {
  static thread_local std::vector<float> floats;
  try {
    floats.resize(std::max(floats.size(), count));
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
  return floats.data();
}

/// The most work of one item: small enough to spread evenly, but all kv heads of a partition if every thread then
/// still gets two items. The heads of a block are adjacent in memory, so they are read faster together.
int64_t fair_share(int64_t work, int64_t kv_heads, int64_t threads) {
  return std::max(work / (8 * threads), std::min(kv_heads, work / (2 * threads)));
}

}  // namespace

void attend_all(AttentionJob job, const Kernels& kernels, const std::vector<bool>& skipped) {
  const int64_t threads = num_threads();
  const auto runs = divide_into_runs(job, threads, skipped);
  int64_t work = 0;
  for (const Run& run : runs) work += run.partitions() * run.count * job.Hkv;
  Items items = divide_into_items(job, runs, fair_share(work, job.Hkv, threads));
  const size_t needed = items.split.size() * job.H * items.max_partitions * partial_floats(job.D);
  job.partials = reused_floats(needed);
  if (needed && !job.partials) items = divide_into_items(job, runs, work);  // slower, but needs no memory
  job.items = items.all.data(), job.split = items.split.data();
  job.max_partitions = items.max_partitions;
  parallel_for_each(items.all.size(), [&](int64_t begin, int64_t end) {
    AttentionJob local = job;
    local.scratch = thread_scratch();
    kernels.attend(local, begin, end);
  });
  parallel_for(items.split.size() * job.H, 4,
               [&](int64_t begin, int64_t end) { kernels.reduce_partitions(job, begin, end); });
}

}  // namespace tiny_llm
