// Attention over pages: each token's K and V are written to its slot, then every token attends to its
// sequence through the block table, reading back what was stored, its own K and V included. A job without
// slots only reads.
//
//   pool [num_blocks, Hkv, block_size, D]          table row of one sequence (block_size 4)
//
//     block 0 | kv head 0 | offset 0..3 | D          logical position   0 1 2 3 | 4 5 6 7 | 8 ...
//             | kv head 1 | offset 0..3 | D          table row             7    |    2    | 5
//     block 1 | ...                                  position 6 is block 2, offset 2
//
// The softmax runs online over tiles of 32 logical positions: 0-31, 32-63, ... whatever the block size.
//
//     m = largest score so far, l = sum of e^(score - m), o = sum of e^(score - m) v
//     a tile with a larger score first multiplies l and o by e^(m_old - m_new)
//
// A token sees the last `window` positions of its sequence, its own included, or all while there are fewer.
// The tiles stay where they are; the first and the last of them may be seen in part:
//
//   tile       |    0    |    1    |    2    |    3    |     window 40, a token at position 100
//   position    0      31 32     63 64     95 96    127
//   seen                         61 .......... 100
//
// What a row (one head of one token) computes depends on its own position and on the window only: it visits
// the tiles from that of the first position it sees to that of its own, in order, and in each leaves out what
// it does not see. Tokens of a run and the heads of a group only share the loaded tile, so a token's bits are
// the same in any batch. Positions before those that a run sees are not loaded: their blocks may have been
// given away, and hold anything.
#include "kernels.h"
#include "vec.h"

namespace tiny_llm::TINY_LLM_ISA {

constexpr int TILE = 32;          // positions
constexpr int MAX_ROWS = 64;      // rows (tokens x heads of the group) that share a tile
constexpr float INF = __builtin_inff();

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

/// Heads are worked on in whole vectors: D rounded up, the numbers behind D being zero.
INLINE int64_t padded(int64_t D) { return (D + LANES - 1) / LANES * LANES; }

// ---- writing ----

INLINE bool slot_inside(const AttentionJob& job, int64_t token) {
  return job.slots[token] >= 0 && job.slots[token] < job.num_blocks * job.block_size;
}

template <typename T>
static void write_with(const AttentionJob& job, int64_t begin, int64_t end) {
  auto* keys = static_cast<typename T::Storage*>(job.keys);
  auto* values = static_cast<typename T::Storage*>(job.values);
  for (int64_t token = begin; token < end; ++token) {
    if (!slot_inside(job, token)) continue;
    const int64_t block = job.slots[token] / job.block_size, offset = job.slots[token] % job.block_size;
    for (int64_t head = 0; head < job.Hkv; ++head) {
      const int64_t place = ((block * job.Hkv + head) * job.block_size + offset) * job.D;
      const float* k = job.k + head * job.k_head + token * job.k_token;
      const float* v = job.v + head * job.v_head + token * job.v_token;
      int64_t d = 0;
      for (; d + LANES <= job.D; d += LANES) {
        T::store8(keys + place + d, load(k + d));
        T::store8(values + place + d, load(v + d));
      }
      if (const int64_t left = job.D - d) {
        put_first<T>(keys + place + d, load_first(k + d, left), left);
        put_first<T>(values + place + d, load_first(v + d, left), left);
      }
    }
  }
}

void write_tokens(const AttentionJob& job, int64_t begin, int64_t end) {
  switch (job.storage) {
    case StorageType::float32: return write_with<Float32>(job, begin, end);
    case StorageType::float16: return write_with<Float16>(job, begin, end);
    case StorageType::bfloat16: return write_with<BFloat16>(job, begin, end);
  }
}

// ---- what a token sees ----

/// The positions begin .. end - 1; none if end is not above begin.
struct Range {
  int64_t begin, end;
  bool empty() const { return end <= begin; }
};

/// The last `window` positions up to the token's own.
INLINE Range seen_by(const AttentionJob& job, int64_t token) {
  const int64_t end = int64_t{job.positions[token]} + 1;
  return {max(end - job.window, 0), end};
}

/// From the first position of both ranges to the last.
INLINE Range around(Range a, Range b) {
  if (a.empty() || b.empty()) return a.empty() ? b : a;
  return {min(a.begin, b.begin), max(a.end, b.end)};
}

/// What the tile that begins at position `first` has of a range, counted from `first` on.
INLINE Range part_in_tile(Range range, int64_t first) { return {max(range.begin - first, 0), min(range.end - first, TILE)}; }

// ---- one tile of keys and values, as floats ----

struct alignas(64) Tile {
  float keys[TILE * MAX_HEAD_SIZE];    // [32, D padded]
  float values[TILE * MAX_HEAD_SIZE];  // [32, D padded]
};

/// Loads a part of the tile that begins at position `first`; the rest of its first and its last four is zero.
/// A position that the table does not hold gives NaN: a wrong table must not read memory that is not the
/// pool's, nor pass unseen.
template <typename T>
static void load_tile(const AttentionJob& job, int64_t head, int64_t table_row, int64_t first, Range part, Tile& tile) {
  const int32_t* table = job.tables + table_row * job.M;
  const auto* keys = static_cast<const typename T::Storage*>(job.keys);
  const auto* values = static_cast<const typename T::Storage*>(job.values);
  const int64_t width = padded(job.D);
  const auto fill = [&](int64_t i, float value) {
    float *k = tile.keys + i * width, *v = tile.values + i * width;
    for (int64_t d = 0; d < width; d += LANES) store(k + d, splat(value)), store(v + d, splat(value));
  };
  for (int64_t i = part.begin / 4 * 4; i < part.begin; ++i) fill(i, 0.0f);
  for (int64_t i = part.end; i % 4; ++i) fill(i, 0.0f);
  int64_t column = (first + part.begin) / job.block_size, offset = (first + part.begin) % job.block_size;
  for (int64_t i = part.begin; i < part.end; ++i) {
    const int64_t block = column < job.M ? table[column] : -1;
    if (block < 0 || block >= job.num_blocks) {
      fill(i, __builtin_nanf(""));
    } else {
      float *k = tile.keys + i * width, *v = tile.values + i * width;
      const int64_t place = ((block * job.Hkv + head) * job.block_size + offset) * job.D;
      int64_t d = 0;
      for (; d + LANES <= job.D; d += LANES) {
        store(k + d, T::load8(keys + place + d));
        store(v + d, T::load8(values + place + d));
      }
      if (const int64_t left = job.D - d) {
        store(k + d, load_first_as<T>(keys + place + d, left));
        store(v + d, load_first_as<T>(values + place + d, left));
      }
    }
    if (++offset == job.block_size) offset = 0, ++column;
  }
}

// ---- the arithmetic of up to three rows of one token on one tile ----

struct Row {
  const float* q;  // [D padded]
  float* o;        // [D padded], not yet divided by l
  float m;
  f32x8 l;         // eight partial sums: lane i adds the positions i, i+8, i+16, i+24 of each tile
};

/// scores[r][i] = scale * (q_r . k_i) where position i of the tile is seen, -inf for the others.
template <int ROWS>
INLINE void score(const Row* rows, const Tile& tile, int64_t D, Range seen, float scale, float (&scores)[ROWS][TILE]) {
  for (int64_t i = seen.begin / 4 * 4; i < seen.end; i += 4) {
    const float* k = tile.keys + i * D;
    f32x8 acc[ROWS][4] = {};
    for (int64_t d = 0; d < D; d += LANES) {
      f32x8 k0 = load(k + d), k1 = load(k + D + d), k2 = load(k + 2 * D + d), k3 = load(k + 3 * D + d);
      UNROLL for (int r = 0; r < ROWS; ++r) {
        f32x8 q = load(rows[r].q + d);
        acc[r][0] = fma(q, k0, acc[r][0]);
        acc[r][1] = fma(q, k1, acc[r][1]);
        acc[r][2] = fma(q, k2, acc[r][2]);
        acc[r][3] = fma(q, k3, acc[r][3]);
      }
    }
    UNROLL for (int r = 0; r < ROWS; ++r) {
      f32x4 four = sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]) * scale;
      std::memcpy(scores[r] + i, &four, sizeof(four));
    }
  }
  UNROLL for (int r = 0; r < ROWS; ++r) {
    for (int64_t i = 0; i < seen.begin; ++i) scores[r][i] = -INF;
    for (int64_t i = seen.end; i < TILE; ++i) scores[r][i] = -INF;
  }
}

/// Scores become weights e^(score - m), m and l move on; returns what o must be multiplied by.
INLINE float soften(Row& row, float (&scores)[TILE]) {
  f32x8 s[4];
  UNROLL for (int i = 0; i < 4; ++i) s[i] = load(scores + i * LANES);
  const float tile_max = largest(max(max(s[0], s[1]), max(s[2], s[3])));
  const float m = tile_max > row.m ? tile_max : row.m;
  const f32x8 decay = exp(splat(row.m - m));
  UNROLL for (int i = 0; i < 4; ++i) {
    s[i] = exp(s[i] - splat(m));
    store(scores + i * LANES, s[i]);
  }
  row.m = m;
  row.l = fma(row.l, decay, (s[0] + s[1]) + (s[2] + s[3]));
  return decay[0];
}

/// o_r = o_r * decay_r + sum over the seen i of weights[r][i] * v_i, for VECS x 8 of the D numbers. What is not
/// seen is left out, not multiplied by a weight of zero: it may be NaN.
template <int ROWS, int VECS>
INLINE void mix(Row* rows, const Tile& tile, int64_t D, int64_t d, Range seen, const float (&weights)[ROWS][TILE], const float (&decay)[ROWS]) {
  f32x8 o[ROWS][VECS];
  UNROLL for (int r = 0; r < ROWS; ++r) {
    UNROLL for (int c = 0; c < VECS; ++c) o[r][c] = load(rows[r].o + d + c * LANES) * splat(decay[r]);
  }
  const float* v = tile.values + seen.begin * D + d;
  for (int64_t i = seen.begin; i < seen.end; ++i, v += D) {
    UNROLL for (int r = 0; r < ROWS; ++r) {
      const f32x8 weight = splat(weights[r][i]);
      UNROLL for (int c = 0; c < VECS; ++c) o[r][c] = fma(weight, load(v + c * LANES), o[r][c]);
    }
  }
  UNROLL for (int r = 0; r < ROWS; ++r) {
    UNROLL for (int c = 0; c < VECS; ++c) store(rows[r].o + d + c * LANES, o[r][c]);
  }
}

template <int ROWS>
static void visit(Row* rows, const Tile& tile, int64_t D, Range seen, float scale) {
  float scores[ROWS][TILE], decay[ROWS];
  score<ROWS>(rows, tile, D, seen, scale, scores);
  UNROLL for (int r = 0; r < ROWS; ++r) decay[r] = soften(rows[r], scores[r]);
  int64_t d = 0;
  for (; d + 4 * LANES <= D; d += 4 * LANES) mix<ROWS, 4>(rows, tile, D, d, seen, scores, decay);
  for (; d < D; d += LANES) mix<ROWS, 1>(rows, tile, D, d, seen, scores, decay);
}

// ---- a run of tokens ----

/// Where rows whose D is no whole number of vectors are worked on.
struct alignas(64) PaddedRows {
  float q[MAX_ROWS * MAX_HEAD_SIZE], o[MAX_ROWS * MAX_HEAD_SIZE];
};

/// The first D numbers of `from`, and zeros up to whole vectors.
static float* copy_padded(float* target, const float* from, int64_t D) {
  for (int64_t d = 0; d < D; d += LANES) {
    store(target + d, load_first(from + d, D - d < LANES ? D - d : LANES));
  }
  return target;
}

/// Tokens `run`, kv head `head`, its query heads `first_head` .. `first_head + heads - 1`.
template <typename T>
static void attend_run(const AttentionJob& job, TokenRun run, int64_t head, int64_t first_head, int64_t heads) {
  Row rows[MAX_ROWS];
  PaddedRows aside;
  const int64_t width = padded(job.D);
  const bool whole = width == job.D;
  const auto out = [&](int64_t t, int64_t h) { return job.out + ((run.first + t) * job.H + first_head + h) * job.D; };
  Range reach{0, 0};  // what the tokens of the run see, together
  for (int64_t t = 0; t < run.count; ++t) {
    const int64_t token = run.first + t;
    reach = around(reach, seen_by(job, token));
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t place = t * heads + h;
      const float* q = job.q + (first_head + h) * job.q_head + token * job.q_token;
      Row& row = rows[place];
      row.q = whole ? q : copy_padded(aside.q + place * width, q, job.D);
      row.o = whole ? out(t, h) : aside.o + place * width;
      row.m = -INF;
      row.l = f32x8{};
      for (int64_t d = 0; d < width; d += LANES) store(row.o + d, f32x8{});
    }
  }

  Tile tile;
  const int64_t table_row = job.row_of_token[run.first];
  for (int64_t first = reach.begin / TILE * TILE; first < reach.end; first += TILE) {
    load_tile<T>(job, head, table_row, first, part_in_tile(reach, first), tile);
    for (int64_t t = 0; t < run.count; ++t) {
      const Range seen = part_in_tile(seen_by(job, run.first + t), first);
      if (seen.empty()) continue;
      Row* row = rows + t * heads;
      for (int64_t left = heads; left > 0; left -= 3, row += 3) {
        switch (left) {
          case 1: visit<1>(row, tile, width, seen, job.scale); break;
          case 2: visit<2>(row, tile, width, seen, job.scale); break;
          default: visit<3>(row, tile, width, seen, job.scale);
        }
      }
    }
  }

  for (int64_t r = 0; r < run.count * heads; ++r) {
    const f32x8 total = splat(sum(rows[r].l));
    float* target = out(r / heads, r % heads);
    int64_t d = 0;
    for (; d + LANES <= job.D; d += LANES) store(target + d, load(rows[r].o + d) / total);
    if (d < job.D) store_first(target + d, load(rows[r].o + d) / total, job.D - d);
  }
}

/// A token without a slot, a table row or a position gets NaN: it must not pass for an answer.
static void refuse(const AttentionJob& job, int64_t token, int64_t first_head, int64_t heads) {
  float* out = job.out + (token * job.H + first_head) * job.D;
  for (int64_t d = 0; d < heads * job.D; ++d) out[d] = __builtin_nanf("");
}

template <typename T>
static void attend_items(const AttentionJob& job, int64_t begin, int64_t end) {
  const int64_t group = job.H / job.Hkv;
  for (int64_t item = begin; item < end; ++item) {
    const TokenRun run = job.runs[item / job.Hkv];
    const int64_t head = item % job.Hkv, table_row = job.row_of_token[run.first];
    const bool has_table = table_row >= 0 && table_row < job.S;
    const int64_t at_once = MAX_ROWS / run.count;  // query heads that fit beside each other
    for (int64_t h = 0; has_table && h < group; h += at_once) {
      attend_run<T>(job, run, head, head * group + h, group - h < at_once ? group - h : at_once);
    }
    for (int64_t token = run.first; token < run.first + run.count; ++token) {
      const bool stored = !job.slots || slot_inside(job, token);
      const bool sound = has_table && stored && job.positions[token] >= 0;
      if (!sound) refuse(job, token, head * group, group);
    }
  }
}

void attend(const AttentionJob& job, int64_t begin, int64_t end) {
  switch (job.storage) {
    case StorageType::float32: return attend_items<Float32>(job, begin, end);
    case StorageType::float16: return attend_items<Float16>(job, begin, end);
    case StorageType::bfloat16: return attend_items<BFloat16>(job, begin, end);
  }
}

}  // namespace tiny_llm::TINY_LLM_ISA
