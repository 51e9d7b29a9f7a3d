// The arithmetic of attention: rows (one head of one token) and one tile of keys and values.
//
//     m = largest score so far,  l = sum of e^(score - m),  o = sum of e^(score - m) v
//     a tile with a larger score first multiplies l and o by e^(m_old - m_new)
//
// Several rows are computed together, so that they share each loaded key or value. A row's own numbers are added in
// the same order whichever rows are computed with it.
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

/// ROWS of the rows that visit a tile. All see its positions from `begin` on, and row r those before ends[r].
template <int ROWS>
struct Block {
  Row* rows[ROWS];
  int64_t begin, ends[ROWS];

  /// The positions that at least one row sees.
  INLINE_MEMBER Range reach() const {
    int64_t end = ends[0];
    UNROLL
    for (int r = 1; r < ROWS; ++r) end = max(end, ends[r]);
    return {begin, end};
  }
  /// The positions that all rows see.
  INLINE_MEMBER Range common() const {
    int64_t end = ends[0];
    UNROLL
    for (int r = 1; r < ROWS; ++r) end = min(end, ends[r]);
    return {begin, end};
  }
};

// A score adds its D products in this order, whether lanes are components (Pages) or positions (Tile): component
// d goes to partial sum d % WIDE; these are added as `narrow` and `sum` add the lanes of a vector.

/// The partial sum `lane` of ROWS rows, for KEYS vectors of positions from i on.
template <int ROWS, int KEYS>
INLINE void partial_scores(const float* const* q, const Tile& tile, int64_t i, int64_t lane,
                           f32w (&sums)[ROWS][KEYS]) {
  for (int64_t d = lane; d < tile.width; d += WIDE) {
    f32w keys[KEYS];
    UNROLL
    for (int k = 0; k < KEYS; ++k) keys[k] = in_register(tile.keys_from(i + k * WIDE, d));
    UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const f32w query = splat_wide(q[r][d]);
      UNROLL
      for (int k = 0; k < KEYS; ++k) sums[r][k] = fma(query, keys[k], sums[r][k]);
    }
  }
}

/// The scores of ROWS rows, for KEYS vectors of positions from i on.
template <int ROWS, int KEYS>
INLINE void tile_scores(const float* const* q, const Tile& tile, int64_t i, float scale,
                        float (*scores)[TILE]) {
  f32w partial[LANES][ROWS][KEYS];
  KEEP_LOOP
  for (int64_t lane = 0; lane < LANES; ++lane) {
    f32w sums[ROWS][KEYS] = {};
    partial_scores<ROWS, KEYS>(q, tile, i, lane, sums);
    if constexpr (WIDE > LANES) {  // lane + 8 is added as `narrow` does it
      f32w more[ROWS][KEYS] = {};
      partial_scores<ROWS, KEYS>(q, tile, i, lane + LANES, more);
      UNROLL
      for (int r = 0; r < ROWS; ++r) {
        UNROLL
        for (int k = 0; k < KEYS; ++k) sums[r][k] += more[r][k];
      }
    }
    std::memcpy(partial[lane], sums, sizeof(sums));
  }
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    UNROLL
    for (int k = 0; k < KEYS; ++k) {
      const auto at = [&](int lane) { return partial[lane][r][k]; };
      const f32w low = (at(0) + at(2)) + (at(1) + at(3)), high = (at(4) + at(6)) + (at(5) + at(7));
      store_wide(scores[r] + i + k * WIDE, (low + high) * splat_wide(scale));
    }
  }
}

template <int ROWS>
INLINE void scores_of(Row* const* rows, const Tile& tile, int64_t, Range seen, float scale,
                      float (*scores)[TILE], Prefetch& prefetch) {
  constexpr int KEYS = 2;
  const float* q[ROWS];
  UNROLL
  for (int r = 0; r < ROWS; ++r) q[r] = rows[r]->q;
  for (int64_t i = seen.begin / WIDE * WIDE; i < seen.end;) {
    if (i + (KEYS - 1) * WIDE < seen.end) {
      prefetch.request(KEYS * WIDE);
      tile_scores<ROWS, KEYS>(q, tile, i, scale, scores);
      i += KEYS * WIDE;
    } else {
      prefetch.request(WIDE);
      tile_scores<ROWS, 1>(q, tile, i, scale, scores);
      i += WIDE;
    }
  }
}

template <int ROWS, typename T>
INLINE void scores_of(Row* const* rows, const Pages<T>& tile, int64_t D, Range seen, float scale,
                      float (*scores)[TILE], Prefetch& prefetch) {
  for (int64_t i = seen.begin / 4 * 4; i < seen.end; i += 4) {
    prefetch.request(4);
    f32w acc[ROWS][4] = {};
    for (int64_t d = 0; d < D; d += WIDE) {
      f32w q[ROWS];
      UNROLL
      for (int r = 0; r < ROWS; ++r) q[r] = load_wide(rows[r]->q + d);
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

/// scores[r][i] = scale * (q_r . k_i) for the positions i of the tile that row r sees, -inf for the others.
template <int ROWS, typename Source>
INLINE void score(const Block<ROWS>& block, const Source& tile, int64_t D, float scale, float (*scores)[TILE],
                  Prefetch& prefetch) {
  scores_of<ROWS>(block.rows, tile, D, block.reach(), scale, scores, prefetch);
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    for (int64_t i = 0; i < block.begin; ++i) scores[r][i] = -INF;
    for (int64_t i = block.ends[r]; i < TILE; ++i) scores[r][i] = -INF;
  }
}

/// Turns scores into weights e^(score - m) and updates m and l; decay[r]: the factor that o_r must be multiplied by.
template <int ROWS>
INLINE void to_weights(Row* const (&rows)[ROWS], float (*scores)[TILE], float* decay) {
  constexpr int PARTS = TILE / WIDE;
  f32x8 fallen = {};  // lane r: row r's old m minus its new one, 0 or below
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    f32x8 s[4];
    UNROLL
    for (int i = 0; i < 4; ++i) s[i] = load(scores[r] + i * LANES);
    const float tile_max = largest(max(max(s[0], s[1]), max(s[2], s[3])));
    const float m = tile_max > rows[r]->m ? tile_max : rows[r]->m;
    if (m != rows[r]->m) fallen[r] = rows[r]->m - m;
    rows[r]->m = m;
  }
  fallen = exp(fallen);
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    f32w s[PARTS];
    UNROLL
    for (int i = 0; i < PARTS; ++i) {
      s[i] = exp(load_wide(scores[r] + i * WIDE) - splat_wide(rows[r]->m));
      store_wide(scores[r] + i * WIDE, s[i]);
    }
    f32x8 sums;  // of the positions i, i+8, i+16, i+24
    if constexpr (WIDE > LANES) {
      sums = narrow(s[0]) + narrow(s[1]);
    } else {
      sums = (s[0] + s[1]) + (s[PARTS - 2] + s[PARTS - 1]);
    }
    decay[r] = fallen[r];
    rows[r]->l = fma(rows[r]->l, splat(decay[r]), sums);
  }
}

/// o_r = o_r * decay_r + sum of weights[r][i] * v_i over the positions in `seen`, for VECS vectors of the D numbers.
template <int ROWS, int VECS, typename Source>
INLINE void mix_part(Row* const* rows, const Source& tile, int64_t d, Range seen,
                     const float (*weights)[TILE], const float* decay, Prefetch& prefetch) {
  f32w o[ROWS][VECS];
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    UNROLL
    for (int c = 0; c < VECS; ++c) o[r][c] = load_wide(rows[r]->o + d + c * WIDE) * splat_wide(decay[r]);
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
    for (int c = 0; c < VECS; ++c) store_wide(rows[r]->o + d + c * WIDE, o[r][c]);
  }
}

/// The same for all D numbers.
template <int ROWS, typename Source>
INLINE void mix(Row* const* rows, const Source& tile, int64_t D, Range seen, const float (*weights)[TILE],
                const float* decay, Prefetch& prefetch) {
  constexpr int VECS = WIDE > LANES || ROWS <= 3 ? 4 : 2;
  int64_t d = 0;
  for (; d + VECS * WIDE <= D; d += VECS * WIDE)
    mix_part<ROWS, VECS>(rows, tile, d, seen, weights, decay, prefetch);
  for (; d < D; d += WIDE) mix_part<ROWS, 1>(rows, tile, d, seen, weights, decay, prefetch);
}

/// The same for the positions of `rest`, which only some rows of a block see.
template <typename Source>
NOINLINE static void mix_rest(Row* row, const Source& tile, int64_t D, Range rest, const float* weights,
                              Prefetch& prefetch) {
  const float kept = 1.0f;
  mix<1>(&row, tile, D, rest, reinterpret_cast<const float (*)[TILE]>(weights), &kept, prefetch);
}

/// The same for a block: the positions that all rows see, then those that some rows see. Others are skipped, not
/// multiplied by zero, because they may be NaN.
template <int ROWS, typename Source>
INLINE void mix(const Block<ROWS>& block, const Source& tile, int64_t D, const float (*weights)[TILE],
                const float* decay, Prefetch& prefetch) {
  const Range common = block.common();
  mix<ROWS>(block.rows, tile, D, common, weights, decay, prefetch);
  if (block.reach().end == common.end) return;
  for (int r = 0; r < ROWS; ++r) {
    if (block.ends[r] > common.end)
      mix_rest(block.rows[r], tile, D, {common.end, block.ends[r]}, weights[r], prefetch);
  }
}

/// Rows that visit a tile together, in blocks that share each loaded key and value. All see the tile's positions from
/// `begin` on, and row r those before ends[r].
struct Group {
  static constexpr int BLOCK = 4, MOST = 3 * BLOCK;
  Row* rows[MOST];
  int64_t begin, ends[MOST];
  int count = 0;

  /// Calls `work(block, r)` for each block; r is its first row.
  template <typename Work>
  INLINE_MEMBER void each_block(Work work) const {
    int r = 0;
    for (; r + BLOCK <= count; r += BLOCK) work(block<BLOCK>(r), r);
    switch (count - r) {
      case 1: return work(block<1>(r), r);
      case 2: return work(block<2>(r), r);
      case 3: return work(block<3>(r), r);
    }
  }

 private:
  template <int ROWS>
  INLINE_MEMBER Block<ROWS> block(int first) const {
    Block<ROWS> block;
    block.begin = begin;
    UNROLL
    for (int r = 0; r < ROWS; ++r) block.rows[r] = rows[first + r], block.ends[r] = ends[first + r];
    return block;
  }
};

/// Adds a tile's positions to the softmaxes of the rows, and prefetches meanwhile. Each stage goes through all
/// blocks, so that the processor can begin with a block while the sums of the one before are not complete.
static void visit(const Group& group, const Tile& tile, int64_t D, float scale, Prefetch& prefetch) {
  float scores[Group::MOST][TILE], decay[Group::MOST];
  group.each_block([&](const auto& block, int r) { score(block, tile, D, scale, scores + r, prefetch); });
  group.each_block([&](const auto& block, int r) { to_weights(block.rows, scores + r, decay + r); });
  group.each_block([&](const auto& block, int r) { mix(block, tile, D, scores + r, decay + r, prefetch); });
}

/// The same for one token's rows, up to three, and keys and values in place.
template <int ROWS, typename T>
static void visit_in_place(Row* rows, const Pages<T>& pages, int64_t D, Range seen, float scale,
                           Prefetch& prefetch) {
  float scores[ROWS][TILE], decay[ROWS];
  Block<ROWS> block;
  block.begin = seen.begin;
  UNROLL
  for (int r = 0; r < ROWS; ++r) block.rows[r] = rows + r, block.ends[r] = seen.end;
  score(block, pages, D, scale, scores, prefetch);
  to_weights(block.rows, scores, decay);
  mix<ROWS>(block.rows, pages, D, seen, scores, decay, prefetch);
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
