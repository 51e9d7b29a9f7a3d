// Draws a token from a row of logits: temperature, min-p, top-k, top-p, then the draw.
//
// weight = e^(logit / temperature - the largest one). Every filter is a threshold, the least logit that stays:
//
//   min-p   the least logit whose weight is at least min_p (the largest weight is 1)
//   top-k   the least logit with fewer than k logits above it
//   top-p   the least logit with less than p * all weights above it
//
// top-k and top-p are the same search, over a count or over weights, and need no sorting. The logits' bits are
// read as integers that have the same order, and counts or weights are added up in bins, by the first 11 bits. The
// answer is in the lowest bin for which the bins above it add up to little enough. Its next 11 bits are found in
// the same way among that bin's logits, and then the last 10.
//
//   bins, high to low   | 0.31 | 0.22 | 0.19 | 0.11 | ...      p = 0.6: above the third bin is 0.53, above the
//                                        ^^^^                   fourth 0.72, so the answer is in the third
//
// A row is always summed in the same order, whatever other rows there are. A token that is not allowed has the logit
// -inf, before anything else; only a NaN is found everywhere.
#include "kernels.h"
#include "vec.h"

namespace tiny_llm::TINY_LLM_ISA {

constexpr float GREATEST = 0x1.fffffep127f;

/// A row during sampling, in whole vectors; after the end, logits are -inf and weights 0.
struct Candidates {
  float *logits, *weights;
  int64_t count;  // a multiple of LANES
  float least;    // threshold: the least logit that stays
};

/// The bits of a float as an integer with the same order.
INLINE uint32_t in_order(float x) {
  const uint32_t bits = bits_as<uint32_t>(x + 0.0f);  // 0 for -0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

INLINE float from_order(uint32_t order) {
  return bits_as<float>(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

/// Eight logits, with -inf after the end.
INLINE f32x8 logits_at(const SampleJob& job, int64_t i) {
  if (i + LANES <= job.V) return load(job.logits + i);
  f32x8 last = splat(-INF);
  std::memcpy(&last, job.logits + i, (job.V - i) * sizeof(float));
  return last;
}

/// Eight logits at i, a multiple of 8, with -inf for tokens that are not allowed.
template <bool MASKED>
INLINE f32x8 only_allowed(const SampleJob& job, int64_t i, f32x8 x) {
  if constexpr (MASKED) {
    constexpr i32x8 bits = {1, 2, 4, 8, 16, 32, 64, 128};
    const int32_t eight = job.mask[i / 32] >> i % 32 & 255;
    return (bits & eight) != 0 ? x : splat(-INF);
  }
  return x;
}

/// The index of the first NaN; if there is none, of the first of the largest logits.
template <bool MASKED>
static int64_t largest_logit(const SampleJob& job) {
  f32x8 top = splat(-INF);
  for (int64_t i = 0; i < job.V; i += LANES) {
    const f32x8 x = logits_at(job, i);
    if (any(x != x)) {
      while (job.logits[i] == job.logits[i]) ++i;
      return i;
    }
    top = max(top, only_allowed<MASKED>(job, i, x));
  }
  const float wanted = largest(top);
  for (int64_t i = 0;; i += LANES) {
    const i32x8 found = only_allowed<MASKED>(job, i, logits_at(job, i)) == splat(wanted);
    if (!any(found)) continue;
    int64_t lane = 0;
    while (!found[lane]) ++lane;
    return i + lane;
  }
}

/// Divides by the temperature and computes the weights; returns the least logit with a weight of at least min_p.
template <bool MASKED>
static float weigh(const SampleJob& job, float top, Candidates& row) {
  f32x8 least = splat(INF);
  for (int64_t i = 0; i < row.count; i += LANES) {
    const f32x8 x = only_allowed<MASKED>(job, i, logits_at(job, i)) / splat(job.temperature);
    const f32x8 weight = exp(x - splat(top));
    const f32x8 kept = weight >= splat(job.min_p) ? x : splat(INF);
    least = kept < least ? kept : least;
    store(row.logits + i, x);
    store(row.weights + i, weight);
  }
  return -largest(-least);
}

/// The least logit with less than `target` above it: total weight if `by_weight`, else number of logits. Its
/// weight must be known to be at least `least_weight`.
static float least_with(const Candidates& row, bool by_weight, double target, float least_weight) {
  uint32_t found = 0, known = 0;  // the answer's first bits, and a mask of them
  double above = 0;
  constexpr int lows[] = {21, 10, 0};
  for (int low : lows) {
    const uint32_t last = low == 0 ? 1023 : 2047;
    double bins[2048] = {};
    const float highest = known ? from_order(found | ~known) : GREATEST;
    float lowest = known ? from_order(found) : -GREATEST;  // excludes -inf
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

/// The total weight of the remaining logits among `count` logits from `first` on.
INLINE double weight_of(const Candidates& row, int64_t first, int64_t count) {
  f32x8 total = {};
  for (int64_t i = first; i < first + count; i += LANES) {
    total += load(row.logits + i) >= splat(row.least) ? load(row.weights + i) : f32x8{};
  }
  return sum(total);
}

/// The first remaining logit at which the cumulative weight reaches `share` of the total; share > 0.
static int64_t draw(const Candidates& row, double share) {
  constexpr int64_t STRETCH = 256;
  const auto length = [&](int64_t first) {
    return row.count - first < STRETCH ? row.count - first : STRETCH;
  };
  double total = 0, before = 0;
  for (int64_t first = 0; first < row.count; first += STRETCH) total += weight_of(row, first, length(first));
  int64_t drawn = 0;  // the last candidate
  for (int64_t first = 0; first < row.count; first += STRETCH) {
    const double in_stretch = weight_of(row, first, length(first));
    if (in_stretch == 0) continue;
    const bool is_here = before + in_stretch >= share * total;
    double cumulative = before;
    for (int64_t i = first; i < first + length(first); ++i) {
      if (row.logits[i] < row.least || row.weights[i] == 0) continue;
      drawn = i, cumulative += row.weights[i];
      if (is_here && cumulative >= share * total) return i;
    }
    if (is_here) return drawn;  // rounding: added one by one, the weights sum to slightly less
    before += in_stretch;
  }
  return drawn;
}

template <bool MASKED>
static void sample_row(const SampleJob& job) {
  const int64_t top = largest_logit<MASKED>(job);
  *job.token = static_cast<uint32_t>(top);
  const bool is_finite = job.logits[top] - job.logits[top] == 0;
  if (job.temperature == 0 || !is_finite) return;
  Candidates row{job.scratch, job.scratch + rounded_up(job.V, LANES), rounded_up(job.V, LANES), -INF};
  const float least = weigh<MASKED>(job, job.logits[top] / job.temperature, row);
  if (job.min_p > 0) row.least = least;
  if (job.top_k > 0) row.least = least_with(row, false, static_cast<double>(job.top_k), 0.0f);
  if (job.top_p < 1) {
    const double all = weight_of(row, 0, row.count);
    // The logits with less weight than this add up to less than 1 - p of all weight: the others reach p.
    const auto least_weight = static_cast<float>((1 - job.top_p) * all / static_cast<double>(2 * row.count));
    row.least = least_with(row, true, job.top_p * all, least_weight);
  }
  *job.token = static_cast<uint32_t>(draw(row, job.share));
}

/// Chooses the token of one row. If a logit is NaN, or is +infinity and allowed, the token is its index.
void sample(const SampleJob& job, int64_t, int64_t) {
  if (job.mask) return sample_row<true>(job);
  sample_row<false>(job);
}

}  // namespace tiny_llm::TINY_LLM_ISA
