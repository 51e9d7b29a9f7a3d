// Attention over contiguous keys and values, in tiles of 32, with an online softmax for one query row at a time.
//
//     largest   the largest score so far
//     total     sum of e^(score - largest)
//     weighted  sum of e^(score - largest) v, [D]
//
//     a tile with a larger score first multiplies total and weighted by e^(old largest - new largest)
//
// A row visits its keys from the first on, in tiles that start at multiples of 32, so its bits do not depend on
// the number of other rows. Attention over pages (paged_attention.cpp) shares each tile among rows.
#include "kernels.h"
#include "vec.h"

namespace tiny_llm::TINY_LLM_ISA {

constexpr int64_t KEYS = 32;  // per tile

/// The softmax over the keys so far, not yet divided by the total.
struct Running {
  float largest, total;  // a local variable `largest` hides the function of vec.h
  float* weighted;       // [D]: the item's row of `out`, which has the memory for it
};

/// Calls `work(d, count)` for the D numbers of a head: eight at a time, then the rest.
template <typename Work>
INLINE void each_vector(int64_t D, Work work) {
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) work(d, LANES);
  if (d < D) work(d, D - d);
}

/// a . b over D numbers.
INLINE float dot(const float* a, const float* b, int64_t D) {
  f32x8 sums = {};
  each_vector(D, [&](int64_t d, int64_t count) {
    sums = fma(load_first(a + d, count), load_first(b + d, count), sums);
  });
  return sum(sums);
}

/// to = to * factor + addend * weight, for D numbers.
INLINE void add_scaled(float* to, float factor, const float* addend, float weight, int64_t D) {
  each_vector(D, [&](int64_t d, int64_t count) {
    const f32x8 kept = load_first(to + d, count) * splat(factor);
    store_first(to + d, fma(splat(weight), load_first(addend + d, count), kept), count);
  });
}

/// Adds `count` <= KEYS keys and values of one head to `run`; consecutive ones are `k_token`, `v_token` apart.
static void absorb(const FlashJob& job, const float* q, const float* k, const float* v, int64_t count,
                   Running& run) {
  float scores[KEYS], largest = run.largest;
  for (int64_t i = 0; i < count; ++i) {
    scores[i] = dot(q, k + i * job.k_token, job.D) * job.scale;
    if (scores[i] > largest) largest = scores[i];
  }
  for (int64_t i = count; i < KEYS; ++i) scores[i] = -__builtin_inff();
  const float kept = exp(splat(run.largest - largest))[0];
  f32x8 sums = {};
  for (int64_t i = 0; i < KEYS; i += LANES) {
    const f32x8 weights = exp(load(scores + i) - splat(largest));
    store(scores + i, weights);
    sums += weights;
  }
  run.total = run.total * kept + sum(sums);
  run.largest = largest;
  for (int64_t i = 0; i < count; ++i) {
    add_scaled(run.weighted, i == 0 ? kept : 1.0f, v + i * job.v_token, scores[i], job.D);
  }
}

/// An item is a row: query `l` of head `h` of sequence `b`, in the order of `out`, [B, L, H, D].
void flash_attention(const FlashJob& job, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t h = item % job.H, l = item / job.H % job.L, b = item / job.H / job.L;
    const int64_t kv_head = h / (job.H / job.Hkv), seen = job.causal ? job.S - job.L + l + 1 : job.S;
    const float* q = job.q + b * job.q_batch + h * job.q_head + l * job.q_token;
    const float* k = job.k + b * job.k_batch + kv_head * job.k_head;
    const float* v = job.v + b * job.v_batch + kv_head * job.v_head;
    Running run{-__builtin_inff(), 0.0f, job.out + item * job.D};
    each_vector(job.D, [&](int64_t d, int64_t count) { store_first(run.weighted + d, f32x8{}, count); });
    for (int64_t first = 0; first < seen; first += KEYS) {
      const int64_t count = seen - first < KEYS ? seen - first : KEYS;
      absorb(job, q, k + first * job.k_token, v + first * job.v_token, count, run);
    }
    const f32x8 total = splat(run.total);
    each_vector(job.D, [&](int64_t d, int64_t count) {
      store_first(run.weighted + d, load_first(run.weighted + d, count) / total, count);
    });
  }
}

}  // namespace tiny_llm::TINY_LLM_ISA
