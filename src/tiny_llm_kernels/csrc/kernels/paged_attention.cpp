// Attention over pages: every token attends to its sequence through the block table and reads stored values, also
// for its own key and value (written by write_tokens.cpp). It attends to the last `window` positions, or to all.
//
// Positions are processed in tiles of 32 (key_value_tile.h) with an online softmax (online_softmax.h). Four tiles
// form a partition. Each partition starts a new softmax, and a row's partitions are merged in order, so that
// different threads can compute them:
//
//   position    0 ....... 127 | 128 ..... 255 | 256 ..... 383 |        a token at position 300
//   partition         0       |       1       |   2 (in part) |
//                     \               |             /
//                  merge(merge(merge(nothing, 0), 1), 2)
//
// Either one item computes all partitions of a row and merges them; or different items compute them and write the
// results to `partials`, which `reduce_partitions` merges in the same order. Tile and partition boundaries do not
// depend on the block size, and a window cuts off parts of them:
//
//   tile       |    0    |    1    |    2    |    3    |     window 40, a token at position 100
//   position    0      31 32     63 64     95 96    127
//   seen                         61 .......... 100
//
// So a row's result depends only on its own position and the window. The tokens of an item and the heads of a
// group share loaded tiles and nothing else: a token has the same bits in any batch. Positions before those that
// an item's tokens attend to are not loaded: their blocks may have been freed, and contain anything.
#include <new>

#include "kernels.h"
#include "online_softmax.h"

namespace tiny_llm::TINY_LLM_ISA {

/// The working memory for an item's rows.
template <typename T>
struct alignas(64) Scratch {
  Row rows[MAX_ROWS];
  Softmax totals[MAX_ROWS];
  float q[MAX_ROWS * MAX_HEAD_SIZE], part[MAX_ROWS * MAX_HEAD_SIZE], total[MAX_ROWS * MAX_HEAD_SIZE];
  Pages<T> pages;  // a tile in place, or as floats
  Tile tile;
  Prefetch prefetch;
};

/// Query heads first .. first + count - 1: whole groups, or part of one, as many as fit into the scratch memory.
struct Heads {
  int64_t first, count;
};

/// The partitions that a range touches.
INLINE Range partitions_of(Range range) {
  return {range.begin / PARTITION, rounded_up(range.end, PARTITION) / PARTITION};
}

/// Where the softmax of partition `p` is stored for token split[i]: m and l, then o.
INLINE float* partial_of(const AttentionJob& job, int64_t i, int64_t head, int64_t p) {
  const int64_t place = p - partitions_of(seen_by(job, job.split[i])).begin;
  return job.partials + ((i * job.H + head) * job.max_partitions + place) * partial_floats(job.D);
}

/// The first D numbers of `from`, padded with zeros to whole vectors.
static float* copy_padded(float* target, const float* from, int64_t D) {
  for (int64_t d = 0; d < padded(D); d += LANES)
    store(target + d, load_first(from + d, min(max(D - d, 0), LANES)));
  return target;
}

INLINE Softmax empty_softmax(float* o, int64_t width) {
  for (int64_t d = 0; d < width; d += WIDE) store_wide(o + d, f32w{});
  return {-INF, 0.0f, o};
}

/// Writes the D outputs of a row whose softmax is complete.
INLINE void write_output(const Softmax& total, int64_t D, float* out) {
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) store(out + d, load(total.o + d) / splat(total.l));
  if (d < D) store_first(out + d, load(total.o + d) / splat(total.l), D - d);
}

/// Adds the tile that starts at position `first` to the softmaxes of the item's tokens. A token has `count` rows;
/// the first token's start at `rows`, and those of the next token `step` rows later.
static void visit_tile(const AttentionJob& job, const AttentionItem& item, const Tile& tile, int64_t first,
                       Row* rows, int64_t count, int64_t step, Prefetch& prefetch) {
  Group group;
  for (int64_t t = 0; t < item.tokens; ++t, rows += step) {
    const Range seen = part_in_tile(seen_by(job, item.first_token + t), first);
    if (seen.empty()) continue;
    for (int64_t r = 0; r < count; ++r) {
      if (group.count == Group::MOST || (group.count > 0 && seen.begin != group.begin)) {
        visit(group, tile, tile.width, job.scale, prefetch);
        group.count = 0;
      }
      group.begin = seen.begin, group.ends[group.count] = seen.end, group.rows[group.count++] = rows + r;
    }
  }
  if (group.count > 0) visit(group, tile, tile.width, job.scale, prefetch);
}

/// The same for keys and values in place. A token has at most three rows.
template <typename T>
static void visit_tile(const AttentionJob& job, const AttentionItem& item, const Pages<T>& pages,
                       int64_t first, Row* rows, int64_t count, int64_t step, Prefetch& prefetch) {
  for (int64_t t = 0; t < item.tokens; ++t, rows += step) {
    const Range seen = part_in_tile(seen_by(job, item.first_token + t), first);
    if (seen.empty()) continue;
    switch (count) {
      case 1: visit_in_place<1>(rows, pages, job.D, seen, job.scale, prefetch); break;
      case 2: visit_in_place<2>(rows, pages, job.D, seen, job.scale, prefetch); break;
      case 3: visit_in_place<3>(rows, pages, job.D, seen, job.scale, prefetch); break;
    }
  }
}

/// Adds the positions `here`, all in one partition, to the tokens' softmaxes; the item continues up to `until`.
/// The kv heads of a tile are processed in their order within a block, so that the hardware prefetcher reads what
/// is needed next.
template <typename T>
static void visit_partition(const AttentionJob& job, const AttentionItem& item, Heads heads, Range here,
                            int64_t until, Scratch<T>& scratch) {
  const int64_t table_row = job.row_of_token[item.first_token], group = job.H / job.Hkv;
  const int64_t begin = heads.first / group, end = begin + max(heads.count / group, 1);
  const int64_t count = min(heads.count, group);
  const bool is_read_once = item.tokens * count <= 3 && job.D == padded(job.D);
  for (int64_t first = here.begin / TILE * TILE; first < here.end; first += TILE) {
    const Range part = part_in_tile(here, first);
    for (int64_t head = begin; head < end; ++head) {
      const bool is_last = head + 1 == end;
      const int64_t next = is_last ? first + TILE : first;
      scratch.prefetch.template select<T>(job, is_last ? begin : head + 1, table_row, next,
                                          part_in_tile({here.begin, until}, next));
      Row* rows = scratch.rows + (head - begin) * count;
      if (is_read_once) {
        scratch.pages.find(job, head, table_row, first, part);
        visit_tile(job, item, scratch.pages, first, rows, count, heads.count, scratch.prefetch);
      } else {
        load_tile<T>(job, head, table_row, first, part, scratch.tile);
        visit_tile(job, item, scratch.tile, first, rows, count, heads.count, scratch.prefetch);
      }
    }
  }
}

template <typename T>
static void attend_heads(const AttentionJob& job, const AttentionItem& item, Heads heads,
                         Scratch<T>& scratch) {
  const int64_t width = padded(job.D), num_rows = item.tokens * heads.count;
  const auto token_of = [&](int64_t row) { return item.first_token + row / heads.count; };
  const auto head_of = [&](int64_t row) { return heads.first + row % heads.count; };
  Range reach{0, 0};  // all positions that the item's tokens attend to
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* q = job.q + head_of(row) * job.q_head + token_of(row) * job.q_token;
    if (width != job.D) q = copy_padded(scratch.q + row * width, q, job.D);
    scratch.rows[row].q = q;
    reach = hull(reach, seen_by(job, token_of(row)));
    scratch.totals[row] = empty_softmax(scratch.total + row * width, width);
  }

  const Range partitions = intersection(partitions_of(reach), {item.first_partition, item.end_partition});
  const int64_t until = min(reach.end, partitions.end * PARTITION);
  for (int64_t p = partitions.begin; p < partitions.end; ++p) {
    const Range here = intersection(reach, {p * PARTITION, (p + 1) * PARTITION});
    for (int64_t row = 0; row < num_rows; ++row) scratch.rows[row].begin(scratch.part + row * width, width);
    visit_partition<T>(job, item, heads, here, until, scratch);
    for (int64_t row = 0; row < num_rows; ++row) {
      if (intersection(here, seen_by(job, token_of(row))).empty()) continue;
      const Softmax part = scratch.rows[row].softmax();
      if (item.split < 0) {
        merge(scratch.totals[row], part, width);
      } else {
        float* partial = partial_of(job, item.split + row / heads.count, head_of(row), p);
        partial[0] = part.m, partial[1] = part.l;
        std::memcpy(partial + PARTIAL_HEADER, part.o, width * sizeof(float));
      }
    }
  }
  if (item.split >= 0) return;  // `reduce_partitions` does the rest
  for (int64_t row = 0; row < num_rows; ++row) {
    write_output(scratch.totals[row], job.D, job.out + (token_of(row) * job.H + head_of(row)) * job.D);
  }
}

/// Whether a token's slot, table row and position are in range. If not, its output is NaN, so that the error shows.
INLINE bool is_valid(const AttentionJob& job, int64_t token) {
  const bool has_table = job.row_of_token[token] >= 0 && job.row_of_token[token] < job.S;
  return has_table && job.positions[token] >= 0 && (!job.slots || job.slot_in_range(token));
}

INLINE void write_nan(const AttentionJob& job, int64_t token, Heads heads) {
  float* out = job.out + (token * job.H + heads.first) * job.D;
  for (int64_t d = 0; d < heads.count * job.D; ++d) out[d] = __builtin_nanf("");
}

template <typename T>
static void attend_items(const AttentionJob& job, int64_t begin, int64_t end) {
  static_assert(sizeof(Scratch<T>) <= SCRATCH_BYTES);
  const int64_t group = job.H / job.Hkv;
  Scratch<T>& scratch = *new (job.scratch) Scratch<T>;
  for (int64_t i = begin; i < end; ++i) {
    const AttentionItem& item = job.items[i];
    const int64_t table_row = job.row_of_token[item.first_token];
    const bool has_table = table_row >= 0 && table_row < job.S;
    const Heads all{item.first_head * group, item.heads * group};
    const int64_t at_once = MAX_ROWS / item.tokens;
    for (int64_t h = 0; has_table && h < all.count; h += at_once) {
      attend_heads<T>(job, item, {all.first + h, min(all.count - h, at_once)}, scratch);
    }
    for (int64_t t = 0; t < item.tokens && item.split < 0; ++t) {
      if (!is_valid(job, item.first_token + t)) write_nan(job, item.first_token + t, all);
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

/// Merges the partitions of a row (token, head) in order. Items: the rows of the tokens in `split`.
void reduce_partitions(const AttentionJob& job, int64_t begin, int64_t end) {
  alignas(64) float o[MAX_HEAD_SIZE];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t token = job.split[item / job.H], head = item % job.H;
    if (!is_valid(job, token)) {
      write_nan(job, token, {head, 1});
      continue;
    }
    Softmax total = empty_softmax(o, padded(job.D));
    const Range partitions = partitions_of(seen_by(job, token));
    for (int64_t p = partitions.begin; p < partitions.end; ++p) {
      float* partial = partial_of(job, item / job.H, head, p);
      merge(total, {partial[0], partial[1], partial + PARTIAL_HEADER}, padded(job.D));
    }
    write_output(total, job.D, job.out + (token * job.H + head) * job.D);
  }
}

}  // namespace tiny_llm::TINY_LLM_ISA
