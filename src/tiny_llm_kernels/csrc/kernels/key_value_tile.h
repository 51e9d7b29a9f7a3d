// The positions that a token attends to, and how their keys and values are read from pages: in tiles of 32.
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

/// D rounded up to whole vectors; the numbers after D are zero.
INLINE int64_t padded(int64_t D) { return rounded_up(D, WIDE); }

/// The positions begin .. end - 1; none if end is not above begin.
struct Range {
  int64_t begin, end;
  bool empty() const { return end <= begin; }
};

INLINE Range intersection(Range a, Range b) { return {max(a.begin, b.begin), min(a.end, b.end)}; }

/// The smallest range that contains both.
INLINE Range hull(Range a, Range b) {
  if (a.empty() || b.empty()) return a.empty() ? b : a;
  return {min(a.begin, b.begin), max(a.end, b.end)};
}

/// The last `window` positions up to the token's own.
INLINE Range seen_by(const AttentionJob& job, int64_t token) {
  const int64_t end = int64_t{job.positions[token]} + 1;
  return {max(end - job.window, 0), end};
}

/// The part of a range in the tile that starts at position `first`, relative to `first`.
INLINE Range part_in_tile(Range range, int64_t first) {
  return {max(range.begin - first, 0), min(range.end - first, TILE)};
}

/// Keys and values as floats, for several rows that share them. The keys are transposed, so that a vector has the same
/// component of adjacent positions, and scores need no sums over lanes.
struct alignas(64) Tile {
  float keys[MAX_HEAD_SIZE * TILE];    // [D padded, 32]
  float values[TILE * MAX_HEAD_SIZE];  // [32, D padded]
  int64_t width;                       // D padded

  INLINE_MEMBER f32w keys_from(int64_t i, int64_t d) const { return load_wide(keys + d * TILE + i); }
  INLINE_MEMBER f32w value(int64_t i, int64_t d) const { return load_wide(values + i * width + d); }
};

/// Calls `visit(i, count, place)` for each run of a tile's positions that are adjacent in one block. The run has
/// `count` positions and starts at position i of the tile. Its numbers, D per position, start at index `place` of
/// the pools; `place` is -1 if the block is invalid.
template <typename Visit>
INLINE void each_run(const AttentionJob& job, int64_t head, int64_t table_row, int64_t first, Range part,
                     Visit visit) {
  const int32_t* table = job.tables + table_row * job.M;
  int64_t column = (first + part.begin) / job.block_size, offset = (first + part.begin) % job.block_size;
  for (int64_t i = part.begin; i < part.end; ++column, offset = 0) {
    const int64_t count = min(job.block_size - offset, part.end - i);
    const int64_t block = column < job.M ? table[column] : -1;
    const bool valid = block >= 0 && block < job.num_blocks;
    visit(i, count, valid ? ((block * job.Hkv + head) * job.block_size + offset) * job.D : -1);
    i += count;
  }
}

/// Converts `count` positions of D stored numbers to floats, padded with zeros.
template <typename T>
INLINE void widen(const typename T::Storage* from, int64_t count, int64_t D, float* to) {
  const int64_t width = padded(D);
  if (width == D) {  // no padding: one long row
    for (int64_t d = 0; d < count * D; d += LANES) store(to + d, T::load8(from + d));
    return;
  }
  for (int64_t row = 0; row < count; ++row, from += D, to += width) {
    for (int64_t d = 0; d < width; d += LANES) {
      store(to + d, d + LANES <= D ? T::load8(from + d) : load_first_as<T>(from + d, max(D - d, 0)));
    }
  }
}

/// Writes `from` [32, width] as `to` [width, 32], for the positions of `part`.
static void transpose(const float* from, int64_t width, Range part, float* to) {
  for (int64_t i = part.begin / LANES * LANES; i < part.end; i += LANES) {
    for (int64_t d = 0; d < width; d += LANES) {
      f32x8 block[LANES];
      UNROLL
      for (int row = 0; row < LANES; ++row) block[row] = load(from + (i + row) * width + d);
      transpose(block);
      UNROLL
      for (int row = 0; row < LANES; ++row) store(to + (d + row) * TILE + i, block[row]);
    }
  }
}

/// Loads a part of the tile that starts at position `first`. A position without a valid block gives NaN: an invalid
/// table must not read memory outside the pool, and must not go unnoticed. Positions outside the part may contain
/// anything.
template <typename T>
static void load_tile(const AttentionJob& job, int64_t head, int64_t table_row, int64_t first, Range part,
                      Tile& tile) {
  const int64_t width = tile.width = padded(job.D);
  const auto read = [&](const void* pool, float* rows) {
    each_run(job, head, table_row, first, part, [&](int64_t i, int64_t count, int64_t place) {
      float* to = rows + i * width;
      if (place >= 0)
        return widen<T>(static_cast<const typename T::Storage*>(pool) + place, count, job.D, to);
      for (int64_t d = 0; d < count * width; d += LANES) store(to + d, splat(__builtin_nanf("")));
    });
  };
  read(job.keys, tile.values);  // to be transposed from there
  transpose(tile.values, width, part, tile.keys);
  read(job.values, tile.values);
}

/// Keys and values in place, for rows that do not share them: numbers are converted to floats while they are
/// multiplied. Only for D without padding.
template <typename T>
struct Pages {
  const typename T::Storage *keys[TILE], *values[TILE];
  alignas(64) typename T::Storage zeros[MAX_HEAD_SIZE], nans[MAX_HEAD_SIZE];

  Pages() {
    for (int64_t d = 0; d < MAX_HEAD_SIZE; d += LANES) {
      T::store8(zeros + d, f32x8{}), T::store8(nans + d, splat(__builtin_nanf("")));
    }
  }

  INLINE_MEMBER f32w key(int64_t i, int64_t d) const { return T::load_wide(keys[i] + d); }
  INLINE_MEMBER f32w value(int64_t i, int64_t d) const { return T::load_wide(values[i] + d); }

  /// The counterpart of `load_tile`: sets the pointers instead of loading.
  INLINE_MEMBER void find(const AttentionJob& job, int64_t head, int64_t table_row, int64_t first,
                          Range part) {
    for (int64_t i = part.begin / 4 * 4; i < part.begin; ++i) keys[i] = values[i] = zeros;
    for (int64_t i = part.end; i < rounded_up(part.end, 4); ++i) keys[i] = values[i] = zeros;
    each_run(job, head, table_row, first, part, [&](int64_t begin, int64_t count, int64_t place) {
      const auto* key = static_cast<const typename T::Storage*>(job.keys) + place;
      const auto* value = static_cast<const typename T::Storage*>(job.values) + place;
      for (int64_t i = begin; i < begin + count; ++i, key += job.D, value += job.D) {
        keys[i] = place < 0 ? nans : key, values[i] = place < 0 ? nans : value;
      }
    });
  }
};

/// Prefetches the next tile's keys and values a few at a time while a tile is computed. Pages are scattered, so
/// the processor cannot predict the next address, and it can have only a limited number of requests in flight.
class Prefetch {
 public:
  /// Selects the positions `part` of the tile that starts at position `first`: their keys, then their values.
  template <typename T>
  INLINE_MEMBER void select(const AttentionJob& job, int64_t head, int64_t table_row, int64_t first,
                            Range part) {
    next_ = count_ = 0, bytes_ = job.D * sizeof(typename T::Storage);
    const void* const pools[] = {job.keys, job.values};
    for (const void* pool : pools) {
      each_run(job, head, table_row, first, part, [&](int64_t, int64_t count, int64_t place) {
        for (int64_t i = 0; place >= 0 && i < count; ++i) {
          places_[count_++] =
              static_cast<const char*>(pool) + (place + i * job.D) * sizeof(typename T::Storage);
        }
      });
    }
  }

  /// Prefetches `count` more keys or values into the second-level cache; the first level holds the current tile.
  INLINE_MEMBER void request(int count) {
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
