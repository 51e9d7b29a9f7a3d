// What a token sees of its sequence, and how that comes out of the pages: 32 positions at a time, as floats.
//
//   pool [num_blocks, Hkv, block_size, D]          table row of one sequence (block_size 4)
//
//     block 0 | kv head 0 | offset 0..3 | D          logical position   0 1 2 3 | 4 5 6 7 | 8 ...
//             | kv head 1 | offset 0..3 | D          table row             7    |    2    | 5
//     block 1 | ...                                  position 6 is block 2, offset 2
#pragma once

#include "kernels.h"
#include "vec.h"

namespace tiny_llm::TINY_LLM_ISA {

constexpr int TILE = 32;  // positions

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

/// Heads are worked on in whole vectors: D rounded up, the numbers behind D being zero.
INLINE int64_t padded(int64_t D) { return rounded_up(D, WIDE); }

/// The positions begin .. end - 1; none if end is not above begin.
struct Range {
  int64_t begin, end;
  bool empty() const { return end <= begin; }
};

INLINE Range both(Range a, Range b) { return {max(a.begin, b.begin), min(a.end, b.end)}; }

/// From the first position of either range to the last.
INLINE Range around(Range a, Range b) {
  if (a.empty() || b.empty()) return a.empty() ? b : a;
  return {min(a.begin, b.begin), max(a.end, b.end)};
}

/// The last `window` positions up to the token's own.
INLINE Range seen_by(const AttentionJob& job, int64_t token) {
  const int64_t end = int64_t{job.positions[token]} + 1;
  return {max(end - job.window, 0), end};
}

/// What the tile that begins at position `first` has of a range, counted from `first` on.
INLINE Range part_in_tile(Range range, int64_t first) {
  return {max(range.begin - first, 0), min(range.end - first, TILE)};
}

/// Keys and values as floats, for rows that share them.
struct alignas(64) Tile {
  float keys[TILE * MAX_HEAD_SIZE];    // [32, D padded]
  float values[TILE * MAX_HEAD_SIZE];  // [32, D padded]
  int64_t width;                       // D padded

  INLINE_MEMBER f32w key(int64_t i, int64_t d) const { return load_wide(keys + i * width + d); }
  INLINE_MEMBER f32w value(int64_t i, int64_t d) const { return load_wide(values + i * width + d); }
};

/// Calls `visit(i, count, place)` for the positions of a tile that lie side by side in one block, from the i-th
/// on: their numbers begin at `place` of the pools, D for each. -1: the table does not hold them.
template <typename Visit>
INLINE void each_stretch(const AttentionJob& job, int64_t head, int64_t table_row, int64_t first, Range part,
                         Visit visit) {
  const int32_t* table = job.tables + table_row * job.M;
  int64_t column = (first + part.begin) / job.block_size, offset = (first + part.begin) % job.block_size;
  for (int64_t i = part.begin; i < part.end; ++column, offset = 0) {
    const int64_t count = min(job.block_size - offset, part.end - i);
    const int64_t block = column < job.M ? table[column] : -1;
    const bool held = block >= 0 && block < job.num_blocks;
    visit(i, count, held ? ((block * job.Hkv + head) * job.block_size + offset) * job.D : -1);
    i += count;
  }
}

/// `count` positions of D stored numbers each, as floats with zeros behind them.
template <typename T>
INLINE void widen(const typename T::Storage* from, int64_t count, int64_t D, float* to) {
  const int64_t width = padded(D);
  if (width == D) {  // whole vectors: one long row
    for (int64_t d = 0; d < count * D; d += LANES) store(to + d, T::load8(from + d));
    return;
  }
  for (int64_t row = 0; row < count; ++row, from += D, to += width) {
    for (int64_t d = 0; d < width; d += LANES) {
      store(to + d, d + LANES <= D ? T::load8(from + d) : load_first_as<T>(from + d, max(D - d, 0)));
    }
  }
}

/// Loads a part of the tile that begins at position `first`; the rest of its first and its last four is zero.
/// A position that the table does not hold gives NaN: a wrong table must not read memory that is not the
/// pool's, nor pass unseen.
template <typename T>
static void load_tile(const AttentionJob& job, int64_t head, int64_t table_row, int64_t first, Range part,
                      Tile& tile) {
  const auto* keys = static_cast<const typename T::Storage*>(job.keys);
  const auto* values = static_cast<const typename T::Storage*>(job.values);
  const int64_t width = tile.width = padded(job.D);
  const auto fill = [&](int64_t begin, int64_t end, float value) {
    for (int64_t d = begin * width; d < end * width; d += LANES) {
      store(tile.keys + d, splat(value)), store(tile.values + d, splat(value));
    }
  };
  fill(part.begin / 4 * 4, part.begin, 0.0f);
  fill(part.end, rounded_up(part.end, 4), 0.0f);
  each_stretch(job, head, table_row, first, part, [&](int64_t i, int64_t count, int64_t place) {
    if (place < 0) return fill(i, i + count, __builtin_nanf(""));
    widen<T>(keys + place, count, job.D, tile.keys + i * width);
    widen<T>(values + place, count, job.D, tile.values + i * width);
  });
}

/// Keys and values where they lie, for rows that are the only ones to read them: each number is made a float on
/// its way into the sum. D is whole vectors.
template <typename T>
struct Pages {
  const typename T::Storage *keys[TILE], *values[TILE];
  alignas(64) typename T::Storage zeros[MAX_HEAD_SIZE], nans[MAX_HEAD_SIZE];

  Pages() {
    for (int64_t d = 0; d < MAX_HEAD_SIZE; d += LANES) {
      T::store8(zeros + d, f32x8{}), T::store8(nans + d, splat(__builtin_nanf("")));
    }
  }

  INLINE_MEMBER f32w key(int64_t i, int64_t d) const { return load_wide_as<T>(keys[i] + d); }
  INLINE_MEMBER f32w value(int64_t i, int64_t d) const { return load_wide_as<T>(values[i] + d); }

  /// The same as `load_tile`.
  INLINE_MEMBER void find(const AttentionJob& job, int64_t head, int64_t table_row, int64_t first,
                          Range part) {
    for (int64_t i = part.begin / 4 * 4; i < part.begin; ++i) keys[i] = values[i] = zeros;
    for (int64_t i = part.end; i < rounded_up(part.end, 4); ++i) keys[i] = values[i] = zeros;
    each_stretch(job, head, table_row, first, part, [&](int64_t begin, int64_t count, int64_t place) {
      const auto* key = static_cast<const typename T::Storage*>(job.keys) + place;
      const auto* value = static_cast<const typename T::Storage*>(job.values) + place;
      for (int64_t i = begin; i < begin + count; ++i, key += job.D, value += job.D) {
        keys[i] = place < 0 ? nans : key, values[i] = place < 0 ? nans : value;
      }
    });
  }
};

/// The next tile's keys and values, asked for a few at a time while one tile is worked on: pages lie anywhere, so
/// the processor cannot guess what comes next, and it has only so many requests to memory under way.
class Ahead {
 public:
  /// All that `part` has of the tile that begins at position `first`: keys, then values.
  template <typename T>
  INLINE_MEMBER void look(const AttentionJob& job, int64_t head, int64_t table_row, int64_t first,
                          Range part) {
    next_ = count_ = 0, bytes_ = job.D * sizeof(typename T::Storage);
    const void* const pools[] = {job.keys, job.values};
    for (const void* pool : pools) {
      each_stretch(job, head, table_row, first, part, [&](int64_t, int64_t count, int64_t place) {
        for (int64_t i = 0; place >= 0 && i < count; ++i) {
          places_[count_++] =
              static_cast<const char*>(pool) + (place + i * job.D) * sizeof(typename T::Storage);
        }
      });
    }
  }

  /// Asks for the next `count` of them, up to the second cache: the first one holds what is worked on.
  INLINE_MEMBER void ask(int count) {
    for (; count > 0 && next_ < count_; --count, ++next_) {
      for (int64_t line = 0; line < bytes_; line += 64) __builtin_prefetch(places_[next_] + line, 0, 2);
    }
  }

 private:
  const char* places_[2 * TILE];
  int next_ = 0, count_ = 0;
  int64_t bytes_ = 0;
};

}  // namespace tiny_llm::TINY_LLM_ISA
