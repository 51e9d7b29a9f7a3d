// y = x W^T with 4- or 8-bit weights and activations rounded to 8 or 16 bits.
//
// Within a group of 32 inputs, all sums are over integers and therefore exact:
//
//     sum_k (s*q_k + b) * (a*x_k)  =  a * (s * I + b * S)      I = sum q_k x_k,   S = sum x_k
//
// Across groups, floats are added in a fixed order, group 0 first. So an output row has the same bits whether it
// is computed alone or among a thousand rows, in any thread and any tile.
#include "kernels.h"
#include "vec.h"

namespace tiny_llm::TINY_LLM_ISA {

// ---- single values ----

/// Input k of a group, for one output of a tile. `quants` points into a record, after its header.
INLINE int32_t weight_quant(const uint8_t* quants, int bits, int output, int k) {
  const int in_line = 32 / bits;  // inputs per 64 bytes
  const uint8_t byte = quants[k / in_line * 64 + 4 * output + k % 4];
  return byte >> (k % in_line / 4 * bits) & ((1 << bits) - 1);
}

/// Input k of group g of a row. The tiles below read four at once; this reads only one.
INLINE int32_t activation_quant(const MatmulJob& job, int64_t row, int64_t g, int k) {
  const int64_t first = place_of_group(row, g, job.K / GROUP) * GROUP;
  if (job.activation_bits == 8) return static_cast<const int8_t*>(job.quants)[first + k];
  const int exchanged = k % 4 == 1 ? k + 1 : k % 4 == 2 ? k - 1 : k;
  return static_cast<const int16_t*>(job.quants)[first + exchanged];
}

// ---- activations to integers ----

/// The numbers of a group as vectors.
constexpr int VECTORS = GROUP / LANES;

/// Rounds `count` groups of a row (at most 8), the first at `x`. The largest numbers of all groups, and the sums, are
/// found together: with groups as lanes, one operation serves eight of them. `quants` and `groups` point to the place
/// of the first group; the next ones are a band apart.
template <typename Activation>
INLINE void quantize_groups(const float* x, int64_t count, Activation* quants, GroupScale* groups) {
  constexpr float LIMIT = quant_max(8 * sizeof(Activation));
  f32x8 peaks[LANES] = {}, totals[LANES] = {};
  for (int64_t g = 0; g < count; ++g) {
    UNROLL
    for (int i = 0; i < VECTORS; ++i) peaks[g] = max(peaks[g], abs(load(x + g * GROUP + i * LANES)));
  }
  transpose(peaks);
  f32x8 absmax = peaks[0];
  UNROLL
  for (int i = 1; i < LANES; ++i) absmax = max(absmax, peaks[i]);
  const auto zero = absmax < splat(1e-30f);  // LIMIT / absmax must stay finite
  const f32x8 inverse = zero ? splat(0.0f) : splat(LIMIT) / absmax;
  const f32x8 scale = zero ? splat(0.0f) : absmax / splat(LIMIT);
  for (int64_t g = 0; g < count; ++g) {
    i32x8 total = {};
    UNROLL
    for (int i = 0; i < VECTORS; ++i) {
      const i32x8 q = to_int(round(load(x + g * GROUP + i * LANES) * splat(inverse[g])));
      total += q;
      store_narrow(quants + g * BAND * GROUP + i * LANES, q);
    }
    totals[g] = to_float(total);
  }
  transpose(totals);
  f32x8 sum = totals[0];
  UNROLL
  for (int i = 1; i < LANES; ++i) sum += totals[i];  // of integers below 2^24: exact in any order
  for (int64_t g = 0; g < count; ++g) groups[g * BAND] = {scale[g], sum[g]};
}

template <typename Activation>
static void quantize_items(const QuantizeJob& job, int64_t begin, int64_t end) {
  const int64_t count = job.K / GROUP;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = job.x.data + row * job.x.stride;
    for (int64_t g = 0; g < count; g += LANES) {
      const int64_t place = place_of_group(row, g, count);
      quantize_groups(x + g * GROUP, count - g < LANES ? count - g : LANES,
                      static_cast<Activation*>(job.quants) + place * GROUP, job.groups + place);
    }
  }
}

/// Rounds rows of x to 8 or 16 bits. Each group of 32 has its own scale, absmax / quant_max; ties go to even.
void quantize_rows(const QuantizeJob& job, int64_t begin, int64_t end) {
  job.bits == 8 ? quantize_items<int8_t>(job, begin, end) : quantize_items<int16_t>(job, begin, end);
}

// ---- one group: integers only ----

/// Scales and biases are stored as Float16 or as Float32.
template <typename Scale>
constexpr bool is_wide = sizeof(typename Scale::Storage) == 4;

/// Adds the products of four inputs: the weights of PARTS * WIDE outputs times the inputs `x` of ROWS rows.
template <int BITS, typename Activation, int ROWS, int PARTS>
INLINE void add_four(Dot<BITS, Activation> (&dots)[ROWS][PARTS], const u32w (&weights)[PARTS],
                     const Activation* x) {
  UNROLL
  for (int row = 0; row < ROWS; ++row) {
    const auto four = Dot<BITS, Activation>::everywhere(x + row * GROUP);
    UNROLL
    for (int part = 0; part < PARTS; ++part) dots[row][part].add(weights[part], four);
  }
}

/// Computes I for ROWS rows and PARTS * WIDE outputs. `quants`: the first quants of these outputs in a record; `x`:
/// the rows' inputs, 32 each.
template <int BITS, typename Activation, int ROWS, int PARTS>
INLINE void group_sums(const uint8_t* quants, const Activation* x, i32w (&sums)[ROWS][PARTS]) {
  Dot<BITS, Activation> dots[ROWS][PARTS];
  UNROLL
  for (int k = 0; k < GROUP; k += 32 / BITS, quants += 64) {
    u32w bytes[PARTS], four[PARTS];
    UNROLL
    for (int part = 0; part < PARTS; ++part) {
      bytes[part] = load_as<u32w>(quants + 4 * WIDE * part);
      four[part] = BITS == 8 ? bytes[part] : low_halves(bytes[part]);
    }
    add_four<BITS, Activation, ROWS, PARTS>(dots, four, x + k);
    if constexpr (BITS == 4) {
      UNROLL
      for (int part = 0; part < PARTS; ++part) four[part] = high_halves(bytes[part]);
      add_four<BITS, Activation, ROWS, PARTS>(dots, four, x + k + 4);
    }
  }
  UNROLL
  for (int row = 0; row < ROWS; ++row) {
    UNROLL
    for (int part = 0; part < PARTS; ++part) sums[row][part] = dots[row][part].total();
  }
}

// ---- one tile: 16 outputs, all groups ----

/// PARTS * WIDE of the tile's outputs, starting at `from`, for ROWS rows. Never inlined: in a function that contains
/// two of these, GCC would keep the variables that both use in memory, not in registers.
template <int BITS, typename Scale, typename Activation, int ROWS, int PARTS>
static NOINLINE void tile_part(const MatmulJob& job, int64_t tile, int64_t from, int64_t row) {
  constexpr int64_t RECORD = record_bytes(BITS, is_wide<Scale>), QUANTS = header_bytes(is_wide<Scale>);
  // A record is used for too few cycles to wait for it, and the processor itself prefetches too late: without this,
  // products of 16 rows take 12 to 14% longer on Zen 4.
  constexpr int64_t AHEAD = 12 * RECORD;
  const int64_t groups = job.K / GROUP;
  const uint8_t* record = job.packed + tile * groups * RECORD;
  const GroupScale* x_groups = job.groups + place_of_group(row, 0, groups);
  const Activation* x = static_cast<const Activation*>(job.quants) + place_of_group(row, 0, groups) * GROUP;

  f32w acc[ROWS][PARTS] = {};
  for (int64_t g = 0; g < groups; ++g, record += RECORD, x += BAND * GROUP, x_groups += BAND) {
    UNROLL
    for (int64_t line = 0; line < RECORD; line += 64) __builtin_prefetch(record + AHEAD + line);
    i32w sums[ROWS][PARTS];
    group_sums<BITS, Activation, ROWS, PARTS>(record + QUANTS + 4 * from, x, sums);
    const auto* header = reinterpret_cast<const typename Scale::Storage*>(record) + from;
    UNROLL
    for (int part = 0; part < PARTS; ++part) {
      const f32w scale = Scale::load_wide(header + part * WIDE);
      const f32w bias = Scale::load_wide(header + TILE_OUTPUTS + part * WIDE);
      UNROLL
      for (int r = 0; r < ROWS; ++r) {
        const f32w inner = fma(scale, to_float_wide(sums[r][part]), bias * splat_wide(x_groups[r].sum));
        acc[r][part] = fma(splat_wide(x_groups[r].scale), inner, acc[r][part]);
      }
    }
  }

  UNROLL
  for (int part = 0; part < PARTS; ++part) {
    const int64_t output = tile * TILE_OUTPUTS + from + part * WIDE;
    if (output >= job.N) break;
    UNROLL
    for (int r = 0; r < ROWS; ++r)
      store_wide(job.out + (row + r) * job.N + output, acc[r][part], job.N - output);
  }
}

/// Rows first .. last-1, as many at a time as there are registers: they share the unpacked weights. If only one or
/// two rows are left, more outputs are computed at once, which share the loaded inputs. `first` is the start of a
/// band.
template <int BITS, typename Scale, typename Activation>
static void tile_block(const MatmulJob& job, int64_t tile, int64_t first, int64_t last) {
  constexpr int ALL = TILE_OUTPUTS / WIDE, PARTS = sizeof(Activation) == 1 ? 1 : ALL;
  constexpr int MANY = BAND / Dot<BITS, Activation>::REGISTERS / PARTS;
  int64_t row = first;
  for (; row + MANY <= last; row += MANY) {
    for (int64_t from = 0; from < TILE_OUTPUTS; from += PARTS * WIDE) {
      tile_part<BITS, Scale, Activation, MANY, PARTS>(job, tile, from, row);
    }
  }
  for (; row + 2 <= last; row += 2) tile_part<BITS, Scale, Activation, 2, ALL>(job, tile, 0, row);
  if (row < last) tile_part<BITS, Scale, Activation, 1, ALL>(job, tile, 0, row);
}

template <int BITS, typename Scale, typename Activation>
static void matmul_items(const MatmulJob& job, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item % job.tiles(), first = item / job.tiles() * MatmulJob::ROW_BLOCK;
    const int64_t last = first + MatmulJob::ROW_BLOCK < job.M ? first + MatmulJob::ROW_BLOCK : job.M;
    tile_block<BITS, Scale, Activation>(job, tile, first, last);
  }
}

template <typename Scale, typename Activation>
static void matmul_of(const MatmulJob& job, int64_t begin, int64_t end) {
  job.bits == 4 ? matmul_items<4, Scale, Activation>(job, begin, end)
                : matmul_items<8, Scale, Activation>(job, begin, end);
}

/// out = x W^T for the items begin .. end - 1. An item is one tile of 16 outputs (fewer at the end) for up to
/// ROW_BLOCK rows. A row's groups are added in order, starting with the first.
void quantized_matmul(const MatmulJob& job, int64_t begin, int64_t end) {
  if (job.activation_bits == 8) {
    job.wide ? matmul_of<Float32, int8_t>(job, begin, end) : matmul_of<Float16, int8_t>(job, begin, end);
  } else {
    job.wide ? matmul_of<Float32, int16_t>(job, begin, end) : matmul_of<Float16, int16_t>(job, begin, end);
  }
}

// ---- dequantization of rows ----

template <typename Scale>
static void dequantize_items(const DequantizeJob& job, int64_t begin, int64_t end) {
  constexpr bool IS_WIDE = is_wide<Scale>;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t tile = job.ids[i] / TILE_OUTPUTS, output = job.ids[i] % TILE_OUTPUTS;
    const bool inside = job.ids[i] >= 0 && tile < job.tiles;
    for (int64_t g = 0; g < job.K / GROUP; ++g) {
      float* out = job.out + i * job.K + g * GROUP;
      if (!inside) {
        for (int k = 0; k < GROUP; k += LANES) store(out + k, splat(__builtin_nanf("")));
        continue;
      }
      const uint8_t* record = job.packed + (tile * (job.K / GROUP) + g) * record_bytes(job.bits, IS_WIDE);
      const auto* header = reinterpret_cast<const typename Scale::Storage*>(record) + output;
      const float scale = load_first_as<Scale>(header, 1)[0],
                  bias = load_first_as<Scale>(header + TILE_OUTPUTS, 1)[0];
      const uint8_t* quants = record + header_bytes(IS_WIDE);
      for (int k = 0; k < GROUP; ++k) {
        out[k] =
            scale * static_cast<float>(weight_quant(quants, job.bits, static_cast<int>(output), k)) + bias;
      }
    }
  }
}

/// The rows `ids` of the weights as floats: an embedding lookup. An id out of range gives NaN.
void dequantize_rows(const DequantizeJob& job, int64_t begin, int64_t end) {
  job.wide ? dequantize_items<Float32>(job, begin, end) : dequantize_items<Float16>(job, begin, end);
}

}  // namespace tiny_llm::TINY_LLM_ISA
