// Attention over pages: every token attends to its sequence through the block table, reading back what was
// stored, its own key and value included (write_tokens.cpp). It sees the last `window` positions, or all.
//
// Positions are taken in tiles of 32 (key_value_tile.h), and the softmax runs online over them
// (online_softmax.h). Four tiles are a partition: within one the softmax begins anew, and a row's partitions
// are merged one after the other, so that partitions can be worked on at the same time:
//
//   position    0 ....... 127 | 128 ..... 255 | 256 ..... 383 |        a token at position 300
//   partition         0       |       1       |   2 (in part) |
//                     \               |             /
//                  merge(merge(merge(nothing, 0), 1), 2)
//
// One thread goes through all of a row's partitions and keeps what they come to; or each goes to whoever is
// free, what it came to is written down, and `reduce_partitions` merges in the same order. Tiles and partitions
// stay where they are whatever the block size, and a window cuts off parts of them:
//
//   tile       |    0    |    1    |    2    |    3    |     window 40, a token at position 100
//   position    0      31 32     63 64     95 96    127
//   seen                         61 .......... 100
//
// So what a row computes depends on its own position and on the window only. Tokens of a run and the heads of a
// group share the loaded tile and nothing else: a token's bits are the same in any batch. Positions before
// those that a run sees are not loaded: their blocks may have been given away, and hold anything.
#include <new>

#include "kernels.h"
#include "online_softmax.h"

namespace tiny_llm::TINY_LLM_ISA {

/// Where an item's rows are worked on.
template <typename T>
struct alignas(64) Desk {
  Row rows[MAX_ROWS];
  Softmax totals[MAX_ROWS];
  float q[MAX_ROWS * MAX_HEAD_SIZE], part[MAX_ROWS * MAX_HEAD_SIZE], total[MAX_ROWS * MAX_HEAD_SIZE];
  Pages<T> pages;  // a tile as it lies, or as floats
  Tile tile;
  Ahead ahead;
};

/// Query heads first .. first + count - 1: of whole groups, or a part of one, as many as fit on the desk.
struct Heads {
  int64_t first, count;
};

/// The partitions that hold a range.
INLINE Range partitions_of(Range range) {
  return {range.begin / PARTITION, rounded_up(range.end, PARTITION) / PARTITION};
}

/// Where partition `p` of a row is written down, the row being of token apart[i]: m and l, and o behind them.
INLINE float* written_down(const AttentionJob& job, int64_t i, int64_t head, int64_t p) {
  const int64_t place = p - partitions_of(seen_by(job, job.apart[i])).begin;
  return job.partials + ((i * job.H + head) * job.max_partitions + place) * partial_floats(job.D);
}

/// The first D numbers of `from`, and zeros up to whole vectors.
static float* copy_padded(float* target, const float* from, int64_t D) {
  for (int64_t d = 0; d < padded(D); d += LANES)
    store(target + d, load_first(from + d, min(max(D - d, 0), LANES)));
  return target;
}

INLINE Softmax nothing_seen(float* o, int64_t width) {
  for (int64_t d = 0; d < width; d += WIDE) store_wide(o + d, f32w{});
  return {-INF, 0.0f, o};
}

/// The D numbers of a row that has seen all.
INLINE void put_out(const Softmax& total, int64_t D, float* out) {
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) store(out + d, load(total.o + d) / splat(total.l));
  if (d < D) store_first(out + d, load(total.o + d) / splat(total.l), D - d);
}

/// The item's tokens take in the tile that begins at position `first`: `count` rows of each token, from `rows` on,
/// and those of the next token `step` rows behind.
template <typename Source>
static void visit_tile(const AttentionJob& job, const AttentionItem& item, const Source& tile, int64_t first,
                       Row* rows, int64_t count, int64_t step, Ahead& ahead) {
  const int64_t width = padded(job.D);
  for (int64_t t = 0; t < item.tokens; ++t, rows += step) {
    const Range seen = part_in_tile(seen_by(job, item.first_token + t), first);
    if (seen.empty()) continue;
    Row* row = rows;
    for (int64_t left = count; left > 0; left -= 3, row += 3) {
      switch (left) {
        case 1: visit<1>(row, tile, width, seen, job.scale, ahead); break;
        case 2: visit<2>(row, tile, width, seen, job.scale, ahead); break;
        default: visit<3>(row, tile, width, seen, job.scale, ahead);
      }
    }
  }
}

/// The item's tokens take in the positions `here`, which lie in one partition; the item goes on up to `until`.
/// All kv heads of a tile follow each other, as they do in a block: a processor that reads on ahead reads what is
/// wanted next.
template <typename T>
static void visit_partition(const AttentionJob& job, const AttentionItem& item, Heads heads, Range here,
                            int64_t until, Desk<T>& desk) {
  const int64_t table_row = job.row_of_token[item.first_token], group = job.H / job.Hkv;
  const int64_t begin = heads.first / group, end = begin + max(heads.count / group, 1);
  const int64_t count = min(heads.count, group);
  const bool is_read_once = item.tokens * count <= 3 && job.D == padded(job.D);
  for (int64_t first = here.begin / TILE * TILE; first < here.end; first += TILE) {
    const Range part = part_in_tile(here, first);
    for (int64_t head = begin; head < end; ++head) {
      const bool is_last = head + 1 == end;
      const int64_t next = is_last ? first + TILE : first;
      desk.ahead.template look<T>(job, is_last ? begin : head + 1, table_row, next,
                                  part_in_tile({here.begin, until}, next));
      Row* rows = desk.rows + (head - begin) * count;
      if (is_read_once) {
        desk.pages.find(job, head, table_row, first, part);
        visit_tile(job, item, desk.pages, first, rows, count, heads.count, desk.ahead);
      } else {
        load_tile<T>(job, head, table_row, first, part, desk.tile);
        visit_tile(job, item, desk.tile, first, rows, count, heads.count, desk.ahead);
      }
    }
  }
}

template <typename T>
static void attend_heads(const AttentionJob& job, const AttentionItem& item, Heads heads, Desk<T>& desk) {
  const int64_t width = padded(job.D), num_rows = item.tokens * heads.count;
  const auto token_of = [&](int64_t row) { return item.first_token + row / heads.count; };
  const auto head_of = [&](int64_t row) { return heads.first + row % heads.count; };
  Range reach{0, 0};  // what the item's tokens see, together
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* q = job.q + head_of(row) * job.q_head + token_of(row) * job.q_token;
    if (width != job.D) q = copy_padded(desk.q + row * width, q, job.D);
    desk.rows[row].q = q;
    reach = around(reach, seen_by(job, token_of(row)));
    desk.totals[row] = nothing_seen(desk.total + row * width, width);
  }

  const Range partitions = both(partitions_of(reach), {item.first_partition, item.end_partition});
  const int64_t until = min(reach.end, partitions.end * PARTITION);
  for (int64_t p = partitions.begin; p < partitions.end; ++p) {
    const Range here = both(reach, {p * PARTITION, (p + 1) * PARTITION});
    for (int64_t row = 0; row < num_rows; ++row) desk.rows[row].begin(desk.part + row * width, width);
    visit_partition<T>(job, item, heads, here, until, desk);
    for (int64_t row = 0; row < num_rows; ++row) {
      if (both(here, seen_by(job, token_of(row))).empty()) continue;
      const Softmax part = desk.rows[row].seen();
      if (item.apart < 0) {
        merge(desk.totals[row], part, width);
      } else {
        float* noted = written_down(job, item.apart + row / heads.count, head_of(row), p);
        noted[0] = part.m, noted[1] = part.l;
        std::memcpy(noted + PARTIAL_HEADER, part.o, width * sizeof(float));
      }
    }
  }
  if (item.apart >= 0) return;  // `reduce_partitions` does the rest
  for (int64_t row = 0; row < num_rows; ++row) {
    put_out(desk.totals[row], job.D, job.out + (token_of(row) * job.H + head_of(row)) * job.D);
  }
}

/// A token without a slot, a table row or a position gets NaN: it must not pass for an answer.
INLINE bool is_sound(const AttentionJob& job, int64_t token) {
  const bool has_table = job.row_of_token[token] >= 0 && job.row_of_token[token] < job.S;
  return has_table && job.positions[token] >= 0 && (!job.slots || job.slot_inside(token));
}

INLINE void refuse(const AttentionJob& job, int64_t token, Heads heads) {
  float* out = job.out + (token * job.H + heads.first) * job.D;
  for (int64_t d = 0; d < heads.count * job.D; ++d) out[d] = __builtin_nanf("");
}

template <typename T>
static void attend_items(const AttentionJob& job, int64_t begin, int64_t end) {
  static_assert(sizeof(Desk<T>) <= DESK_BYTES);
  const int64_t group = job.H / job.Hkv;
  Desk<T>& desk = *new (job.desk) Desk<T>;
  for (int64_t i = begin; i < end; ++i) {
    const AttentionItem& item = job.items[i];
    const int64_t table_row = job.row_of_token[item.first_token];
    const bool has_table = table_row >= 0 && table_row < job.S;
    const Heads all{item.first_head * group, item.heads * group};
    const int64_t at_once = MAX_ROWS / item.tokens;
    for (int64_t h = 0; has_table && h < all.count; h += at_once) {
      attend_heads<T>(job, item, {all.first + h, min(all.count - h, at_once)}, desk);
    }
    for (int64_t t = 0; t < item.tokens && item.apart < 0; ++t) {
      if (!is_sound(job, item.first_token + t)) refuse(job, item.first_token + t, all);
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

/// Items are rows (token, head) of the tokens in `apart`: their partitions, first to last.
void reduce_partitions(const AttentionJob& job, int64_t begin, int64_t end) {
  alignas(64) float o[MAX_HEAD_SIZE];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t token = job.apart[item / job.H], head = item % job.H;
    if (!is_sound(job, token)) {
      refuse(job, token, {head, 1});
      continue;
    }
    Softmax total = nothing_seen(o, padded(job.D));
    const Range partitions = partitions_of(seen_by(job, token));
    for (int64_t p = partitions.begin; p < partitions.end; ++p) {
      float* noted = written_down(job, item / job.H, head, p);
      merge(total, {noted[0], noted[1], noted + PARTIAL_HEADER}, padded(job.D));
    }
    put_out(total, job.D, job.out + (token * job.H + head) * job.D);
  }
}

}  // namespace tiny_llm::TINY_LLM_ISA
