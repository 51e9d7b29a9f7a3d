// From a row of logits to a token: temperature, min-p, top-k, top-p, and a draw.
//
// weight = e^(logit / temperature - the largest one). Every filter is a least logit that stays:
//
//   min-p   the least one whose weight is at least min_p (the largest weight is 1)
//   top-k   the least one with fewer than k logits above it
//   top-p   the least one with less than p * all weights above it
//
// The last two are the same question, asked of a count and of a weight, and it takes no sorting: the logits'
// bits are read as whole numbers in the same order, and added up by their first 11 bits. Going down from the
// highest bin, the last one with little enough above it holds the answer; its next 11 bits are found in the
// same way among the logits of that bin, and then the last 10.
//
//   bins, high to low   | 0.31 | 0.22 | 0.19 | 0.11 | ...      p = 0.6: above the third lies 0.53, above the
//                                        ^^^^                   fourth 0.72, so the answer is in the third
//
// A row is summed in one order, whatever other rows there are.
#include "kernels.h"
#include "vec.h"

namespace tiny_llm::TINY_LLM_ISA {

constexpr float GREATEST = 0x1.fffffep127f;

/// A row under way: whole vectors, with logits of -inf and weights of 0 behind the end.
struct Candidates {
  float *logits, *weights;
  int64_t count;  // a multiple of LANES
  float least;    // of the logits that stay
};

/// The bits of a float as a number: the larger the float, the larger the number.
INLINE uint32_t in_order(float x) {
  const uint32_t bits = bits_as<uint32_t>(x + 0.0f);  // 0 for -0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

INLINE float from_order(uint32_t order) {
  return bits_as<float>(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

/// Eight logits, -inf behind the end.
INLINE f32x8 logits_at(const SampleJob& job, int64_t i) {
  if (i + LANES <= job.V) return load(job.logits + i);
  f32x8 last = splat(-INF);
  std::memcpy(&last, job.logits + i, (job.V - i) * sizeof(float));
  return last;
}

/// The first logit that is a NaN, else the first of the largest ones.
static int64_t largest_logit(const SampleJob& job) {
  f32x8 top = splat(-INF);
  for (int64_t i = 0; i < job.V; i += LANES) {
    const f32x8 x = logits_at(job, i);
    if (any(x != x)) {
      while (job.logits[i] == job.logits[i]) ++i;
      return i;
    }
    top = max(top, x);
  }
  const float wanted = largest(top);
  int64_t i = 0;
  while (!any(logits_at(job, i) == splat(wanted))) i += LANES;
  while (job.logits[i] != wanted) ++i;
  return i;
}

/// Divides by the temperature and makes weights of the logits; returns the least logit with a weight of min_p.
static float weigh(const SampleJob& job, float top, Candidates& row) {
  f32x8 least = splat(INF);
  for (int64_t i = 0; i < row.count; i += LANES) {
    const f32x8 x = logits_at(job, i) / splat(job.temperature);
    const f32x8 weight = exp(x - splat(top));
    const f32x8 kept = weight >= splat(job.min_p) ? x : splat(INF);
    least = kept < least ? kept : least;
    store(row.logits + i, x);
    store(row.weights + i, weight);
  }
  return -largest(-least);
}

/// The least logit with less than `target` above it: of weight, or of logits where `by_weight` is false. It is
/// known to have a weight of `least_weight`.
static float least_with(const Candidates& row, bool by_weight, double target, float least_weight) {
  uint32_t found = 0, known = 0;  // the answer's first bits, and which they are
  double above = 0;
  constexpr int lows[] = {21, 10, 0};
  for (int low : lows) {
    const uint32_t last = low == 0 ? 1023 : 2047;
    double bins[2048] = {};
    const float highest = known ? from_order(found | ~known) : GREATEST;
    float lowest = known ? from_order(found) : -GREATEST;  // -inf stays out of it
    if (lowest < row.least) lowest = row.least;
    for (int64_t first = 0; first < row.count; first += LANES) {
      const f32x8 eight = load(row.logits + first);
      const i32x8 inside = (eight >= splat(lowest)) & (eight <= splat(highest));
      const i32x8 in_bin = inside & (load(row.weights + first) >= splat(least_weight));
      if (!any(in_bin)) continue;
      for (int64_t i = first; i < first + LANES; ++i) {
        if (!in_bin[i - first]) continue;
        bins[in_order(row.logits[i]) >> low & last] += by_weight ? row.weights[i] : 1.0;
      }
    }
    int64_t chosen = -1;
    for (int64_t bin = last; bin >= 0; --bin) {
      if (bins[bin] == 0) continue;
      const double above_this = chosen < 0 ? above : above + bins[chosen];
      if (chosen >= 0 && above_this >= target) break;
      above = above_this, chosen = bin;
    }
    if (chosen < 0) return row.least;
    found |= static_cast<uint32_t>(chosen) << low, known |= last << low;
  }
  return from_order(found);
}

/// The weight of the logits that stay among `count` from `first` on.
INLINE double weight_of(const Candidates& row, int64_t first, int64_t count) {
  f32x8 total = {};
  for (int64_t i = first; i < first + count; i += LANES) {
    total += load(row.logits + i) >= splat(row.least) ? load(row.weights + i) : f32x8{};
  }
  return sum(total);
}

/// The first logit that stays where the weights up to it, its own included, reach `share` of all; share > 0.
static int64_t draw(const Candidates& row, double share) {
  constexpr int64_t STRETCH = 256;
  const auto length = [&](int64_t first) {
    return row.count - first < STRETCH ? row.count - first : STRETCH;
  };
  double total = 0, before = 0;
  for (int64_t first = 0; first < row.count; first += STRETCH) total += weight_of(row, first, length(first));
  int64_t drawn = 0;  // the last one that could be
  for (int64_t first = 0; first < row.count; first += STRETCH) {
    const double in_stretch = weight_of(row, first, length(first));
    if (in_stretch == 0) continue;
    const bool is_here = before + in_stretch >= share * total;
    double so_far = before;
    for (int64_t i = first; i < first + length(first); ++i) {
      if (row.logits[i] < row.least || row.weights[i] == 0) continue;
      drawn = i, so_far += row.weights[i];
      if (is_here && so_far >= share * total) return i;
    }
    if (is_here) return drawn;  // the stretch adds up to a little less one by one
    before += in_stretch;
  }
  return drawn;
}

/// The token of one row; that of a NaN or of an infinite logit where there is one.
void sample(const SampleJob& job, int64_t, int64_t) {
  const int64_t top = largest_logit(job);
  *job.token = static_cast<uint32_t>(top);
  const bool is_finite = job.logits[top] - job.logits[top] == 0;
  if (job.temperature == 0 || !is_finite) return;
  Candidates row{job.scratch, job.scratch + rounded_up(job.V, LANES), rounded_up(job.V, LANES), -INF};
  const float least = weigh(job, job.logits[top] / job.temperature, row);
  if (job.min_p > 0) row.least = least;
  if (job.top_k > 0) row.least = least_with(row, false, static_cast<double>(job.top_k), 0.0f);
  if (job.top_p < 1) {
    const double all = weight_of(row, 0, row.count);
    // All that weigh less than this come to less than (1 - p) of all: the others reach p without them.
    const auto least_weight = static_cast<float>((1 - job.top_p) * all / static_cast<double>(2 * row.count));
    row.least = least_with(row, true, job.top_p * all, least_weight);
  }
  *job.token = static_cast<uint32_t>(draw(row, job.share));
}

}  // namespace tiny_llm::TINY_LLM_ISA
