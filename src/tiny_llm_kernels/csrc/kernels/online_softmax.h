// The arithmetic of attention: rows (one head of one token) and one tile of keys and values.
//
//     m = largest score so far,  l = sum of e^(score - m),  o = sum of e^(score - m) v
//     a tile with a larger score first multiplies l and o by e^(m_old - m_new)
//
// Up to three rows are computed together, so that they share each loaded key or value. A row's own numbers are
// added in the same order whichever rows are computed with it.
#pragma once

#include "key_value_tile.h"

namespace tiny_llm::TINY_LLM_ISA {

/// The softmax over the positions so far; o is not yet divided by l.
struct Softmax {
  float m, l;
  float* o;  // [D padded]
};

struct Row {
  const float* q;  // [D padded]
  float* o;        // [D padded]
  float m;
  f32x8 l;  // eight partial sums: lane i adds the positions i, i+8, i+16, i+24 of each tile

  INLINE_MEMBER void begin(float* output, int64_t D) {
    o = output, m = -INF, l = f32x8{};
    for (int64_t d = 0; d < D; d += WIDE) store_wide(o + d, f32w{});
  }
  INLINE_MEMBER Softmax softmax() const { return {m, sum(l), o}; }
};

// A score adds its D products in this order, whether lanes are components (Pages) or positions (Tile): component
// d goes to partial sum d % WIDE; these are added as `narrow` and `sum` add the lanes of a vector.

/// The partial sum `lane` of ROWS rows, for WIDE positions from i on.
template <int ROWS>
INLINE void partial_scores(const Row* rows, const Tile& tile, int64_t i, int64_t lane, f32w (&sums)[ROWS]) {
  UNROLL
  for (int r = 0; r < ROWS; ++r) sums[r] = f32w{};
  for (int64_t d = lane; d < tile.width; d += WIDE) {
    const f32w keys = tile.keys_from(i, d);
    UNROLL
    for (int r = 0; r < ROWS; ++r) sums[r] = fma(splat_wide(rows[r].q[d]), keys, sums[r]);
  }
}

/// The same for lane and lane + 8, added, if a vector has 16 lanes.
template <int ROWS>
INLINE void folded_scores(const Row* rows, const Tile& tile, int64_t i, int64_t lane, f32w (&sums)[ROWS]) {
  partial_scores<ROWS>(rows, tile, i, lane, sums);
  if constexpr (WIDE > LANES) {
    f32w more[ROWS];
    partial_scores<ROWS>(rows, tile, i, lane + LANES, more);
    UNROLL
    for (int r = 0; r < ROWS; ++r) sums[r] += more[r];
  }
}

template <int ROWS>
INLINE void scores_of(const Row* rows, const Tile& tile, int64_t, Range seen, float scale,
                      float (&scores)[ROWS][TILE], Prefetch& prefetch) {
  for (int64_t i = seen.begin / WIDE * WIDE; i < seen.end; i += WIDE) {
    prefetch.request(WIDE);
    f32w halves[2][ROWS];
    UNROLL
    for (int half = 0; half < 2; ++half) {  // ((0+2)+(1+3)), ((4+6)+(5+7))
      f32w pairs[2][ROWS];
      UNROLL
      for (int pair = 0; pair < 2; ++pair) {
        f32w first[ROWS], second[ROWS];
        folded_scores<ROWS>(rows, tile, i, 4 * half + pair, first);
        folded_scores<ROWS>(rows, tile, i, 4 * half + pair + 2, second);
        UNROLL
        for (int r = 0; r < ROWS; ++r) pairs[pair][r] = first[r] + second[r];
      }
      UNROLL
      for (int r = 0; r < ROWS; ++r) halves[half][r] = pairs[0][r] + pairs[1][r];
    }
    UNROLL
    for (int r = 0; r < ROWS; ++r)
      store_wide(scores[r] + i, (halves[0][r] + halves[1][r]) * splat_wide(scale));
  }
}

template <int ROWS, typename T>
INLINE void scores_of(const Row* rows, const Pages<T>& tile, int64_t D, Range seen, float scale,
                      float (&scores)[ROWS][TILE], Prefetch& prefetch) {
  for (int64_t i = seen.begin / 4 * 4; i < seen.end; i += 4) {
    prefetch.request(4);
    f32w acc[ROWS][4] = {};
    for (int64_t d = 0; d < D; d += WIDE) {
      f32w q[ROWS];
      UNROLL
      for (int r = 0; r < ROWS; ++r) q[r] = load_wide(rows[r].q + d);
      UNROLL
      for (int j = 0; j < 4; ++j) {
        const f32w key = tile.key(i + j, d);
        UNROLL
        for (int r = 0; r < ROWS; ++r) acc[r][j] = fma(q[r], key, acc[r][j]);
      }
    }
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const f32x4 four =
          sum4(narrow(acc[r][0]), narrow(acc[r][1]), narrow(acc[r][2]), narrow(acc[r][3])) * scale;
      std::memcpy(scores[r] + i, &four, sizeof(four));
    }
  }
}

/// scores[r][i] = scale * (q_r . k_i) for the positions i of the tile in `seen`, -inf for the others.
template <int ROWS, typename Source>
INLINE void score(const Row* rows, const Source& tile, int64_t D, Range seen, float scale,
                  float (&scores)[ROWS][TILE], Prefetch& prefetch) {
  scores_of<ROWS>(rows, tile, D, seen, scale, scores, prefetch);
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    for (int64_t i = 0; i < seen.begin; ++i) scores[r][i] = -INF;
    for (int64_t i = seen.end; i < TILE; ++i) scores[r][i] = -INF;
  }
}

/// Turns scores into weights e^(score - m) and updates m and l; decay[r]: the factor that o_r must be multiplied by.
template <int ROWS>
INLINE void to_weights(Row* rows, float (&scores)[ROWS][TILE], float (&decay)[ROWS]) {
  constexpr int PARTS = TILE / WIDE;
  f32x8 fallen = {};  // lane r: row r's old m minus its new one, 0 or below
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    f32x8 s[4];
    UNROLL
    for (int i = 0; i < 4; ++i) s[i] = load(scores[r] + i * LANES);
    const float tile_max = largest(max(max(s[0], s[1]), max(s[2], s[3])));
    const float m = tile_max > rows[r].m ? tile_max : rows[r].m;
    if (m != rows[r].m) fallen[r] = rows[r].m - m;
    rows[r].m = m;
  }
  fallen = exp(fallen);
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    f32w s[PARTS];
    UNROLL
    for (int i = 0; i < PARTS; ++i) {
      s[i] = exp(load_wide(scores[r] + i * WIDE) - splat_wide(rows[r].m));
      store_wide(scores[r] + i * WIDE, s[i]);
    }
    f32x8 sums;  // of the positions i, i+8, i+16, i+24
    if constexpr (WIDE > LANES) {
      sums = narrow(s[0]) + narrow(s[1]);
    } else {
      sums = (s[0] + s[1]) + (s[PARTS - 2] + s[PARTS - 1]);
    }
    decay[r] = fallen[r];
    rows[r].l = fma(rows[r].l, splat(decay[r]), sums);
  }
}

/// o_r = o_r * decay_r + sum of weights[r][i] * v_i over the positions in `seen`, for VECS vectors of the D
/// numbers. Other positions are skipped, not multiplied by zero, because they may be NaN.
template <int ROWS, int VECS, typename Source>
INLINE void mix(Row* rows, const Source& tile, int64_t d, Range seen, const float (&weights)[ROWS][TILE],
                const float (&decay)[ROWS], Prefetch& prefetch) {
  f32w o[ROWS][VECS];
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    UNROLL
    for (int c = 0; c < VECS; ++c) o[r][c] = load_wide(rows[r].o + d + c * WIDE) * splat_wide(decay[r]);
  }
  for (int64_t i = seen.begin; i < seen.end; ++i) {
    prefetch.request(1);
    f32w weight[ROWS];
    UNROLL
    for (int r = 0; r < ROWS; ++r) weight[r] = splat_wide(weights[r][i]);
    UNROLL
    for (int c = 0; c < VECS; ++c) {
      const f32w value = in_register(tile.value(i, d + c * WIDE));
      UNROLL
      for (int r = 0; r < ROWS; ++r) o[r][c] = fma(weight[r], value, o[r][c]);
    }
  }
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    UNROLL
    for (int c = 0; c < VECS; ++c) store_wide(rows[r].o + d + c * WIDE, o[r][c]);
  }
}

/// Adds a tile's positions in `seen` to the softmaxes of one token's rows, and prefetches meanwhile.
template <int ROWS, typename Source>
static void visit(Row* rows, const Source& tile, int64_t D, Range seen, float scale, Prefetch& prefetch) {
  float scores[ROWS][TILE], decay[ROWS];
  score<ROWS>(rows, tile, D, seen, scale, scores, prefetch);
  to_weights<ROWS>(rows, scores, decay);
  int64_t d = 0;
  for (; d + 4 * WIDE <= D; d += 4 * WIDE) mix<ROWS, 4>(rows, tile, d, seen, scores, decay, prefetch);
  for (; d < D; d += WIDE) mix<ROWS, 1>(rows, tile, d, seen, scores, decay, prefetch);
}

/// Merges the softmax `part`, over other positions, into `total`.
INLINE void merge(Softmax& total, const Softmax& part, int64_t D) {
  const float m = part.m > total.m ? part.m : total.m;
  const float kept = exp(splat(total.m - m))[0], gained = exp(splat(part.m - m))[0];
  for (int64_t d = 0; d < D; d += WIDE) {
    store_wide(total.o + d,
               fma(load_wide(part.o + d), splat_wide(gained), load_wide(total.o + d) * splat_wide(kept)));
  }
  total.l = total.l * kept + part.l * gained;
  total.m = m;
}

}  // namespace tiny_llm::TINY_LLM_ISA
