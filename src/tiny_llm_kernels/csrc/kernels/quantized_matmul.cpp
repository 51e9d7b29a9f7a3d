// y = x W^T with 4- or 8-bit weights and activations rounded to 16 bits.
//
// Within a group of 32 inputs everything is an integer and therefore exact:
//
//     sum_k (s*q_k + b) * (a*x_k)  =  a * (s * I + b * S)      I = sum q_k x_k,   S = sum x_k
//
// Across groups the floats are added in one order, group 0 first. So an output row is the same bits
// whether it was computed alone or among a thousand rows, by whichever thread, in whichever tile.
#include "kernels.h"
#include "vec.h"

namespace tiny_llm::TINY_LLM_ISA {

// ---- activations to int16 ----

/// Rounds rows of x to 16 bits, each group of 32 with its own scale: absmax / QUANT_MAX, ties to even.
void quantize_rows(const QuantizeJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t g = 0; g < job.K / GROUP; ++g) {
      const float* x = job.x.data + row * job.x.stride + g * GROUP;
      int16_t* quants = job.quants + row * job.K + g * GROUP;
      f32x8 v[4], peak = {};
      for (int i = 0; i < 4; ++i) {
        v[i] = load(x + i * LANES);
        peak = max(peak, abs(v[i]));
      }
      const float absmax = largest(peak);
      const bool zero = absmax < 1e-30f;  // QUANT_MAX / absmax must stay finite
      const f32x8 inverse = splat(zero ? 0.0f : QUANT_MAX / absmax);
      i32x8 total = {};
      for (int i = 0; i < 4; ++i) {
        i32x8 q = to_int(round(v[i] * inverse));
        total += q;
        store_int16(quants + i * LANES, q);
      }
      job.groups[row * (job.K / GROUP) + g] = {zero ? 0.0f : absmax / QUANT_MAX, sum(to_float(total))};
    }
  }
}

// ---- one group: integers only ----

constexpr int PAIRS = GROUP / 2;

/// Scales and biases are stored as Float16 or as Float32.
template <typename Scale>
constexpr bool is_wide = sizeof(typename Scale::Storage) == 4;

/// The quants of one record as they are: a lane holds one input each of PER_LANE pairs, taken apart here.
template <int BITS, typename Scale>
struct PackedQuants {
  static constexpr int64_t GROUP_BYTES = record_bytes(BITS, is_wide<Scale>);
  static constexpr int PER_LANE = 16 / BITS;
  /// The pair first + i, for outputs 8 * half .. 8 * half + 7; `first` is a multiple of PER_LANE.
  INLINE i16x16 load(const uint8_t* quants, int first, int i, int half) {
    constexpr uint16_t MASK = (1 << BITS) - 1;
    const u16x16 lanes = load_as<u16x16>(quants + first / PER_LANE * 64 + half * 32) >> (i * BITS);
    return bits_as<i16x16>(i == PER_LANE - 1 ? lanes : lanes & MASK);  // the last has nothing above it
  }
};

/// The quants taken apart beforehand, for many rows.
struct UnpackedQuants {
  static constexpr int64_t GROUP_BYTES = PAIRS * 64;
  static constexpr int PER_LANE = 4;  // pairs in one round of the loop
  INLINE i16x16 load(const uint8_t* quants, int first, int i, int half) {
    return load_as<i16x16>(quants + (first + i) * 64 + half * 32);
  }
};

/// I for ROWS rows x 16 outputs. `quants` are a record's, `x` the rows, of which inputs `from` on count.
template <int ROWS, typename Quants>
INLINE void group_sums(const uint8_t* quants, const int16_t* const (&x)[ROWS], int64_t from, i32x8 (&sums)[ROWS][2]) {
  UNROLL for (int row = 0; row < ROWS; ++row) sums[row][0] = sums[row][1] = i32x8{};
  _Pragma("GCC unroll 1") for (int first = 0; first < PAIRS; first += Quants::PER_LANE) {
    UNROLL for (int i = 0; i < Quants::PER_LANE; ++i) {
      const i16x16 w0 = Quants::load(quants, first, i, 0), w1 = Quants::load(quants, first, i, 1);
      UNROLL for (int row = 0; row < ROWS; ++row) {
        const i16x16 two = splat2(x[row] + from + 2 * (first + i));
        add_dot2(sums[row][0], w0, two);
        add_dot2(sums[row][1], w1, two);
      }
    }
  }
}

// ---- one tile: 16 outputs, all groups ----

/// `headers` are the tile's records, of which only scales and biases are read; `quants` its quants.
template <int BITS, typename Scale, int ROWS, typename Quants>
static void tile_rows(const MatmulJob& job, int64_t tile, int64_t row, const uint8_t* quants) {
  constexpr int64_t RECORD = record_bytes(BITS, is_wide<Scale>);
  const int64_t groups = job.K / GROUP;
  const uint8_t* record = job.packed + tile * groups * RECORD;
  const GroupScale* x_groups = job.groups + row * groups;
  const int16_t* x[ROWS];
  UNROLL for (int r = 0; r < ROWS; ++r) x[r] = job.quants + (row + r) * job.K;

  f32x8 acc[ROWS][2] = {};
  for (int64_t g = 0; g < groups; ++g) {
    i32x8 sums[ROWS][2];
    group_sums<ROWS, Quants>(quants, x, g * GROUP, sums);
    const auto* header = reinterpret_cast<const typename Scale::Storage*>(record);
    UNROLL for (int half = 0; half < 2; ++half) {
      const f32x8 scale = Scale::load8(header + half * LANES);
      const f32x8 bias = Scale::load8(header + TILE_OUTPUTS + half * LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) {
        const GroupScale* group = x_groups + r * groups;
        const f32x8 inner = fma(scale, to_float(sums[r][half]), bias * splat(group->sum));
        acc[r][half] = fma(splat(group->scale), inner, acc[r][half]);
      }
    }
    record += RECORD, quants += Quants::GROUP_BYTES, ++x_groups;
  }

  const int64_t first = tile * TILE_OUTPUTS, width = job.N - first;
  UNROLL for (int r = 0; r < ROWS; ++r) {
    UNROLL for (int half = 0; half < 2; ++half) {
      float* out = job.out + (row + r) * job.N + first + half * LANES;
      const int64_t left = width - half * LANES;
      if (left >= LANES) {
        store(out, acc[r][half]);
      } else if (left > 0) {
        store_first(out, acc[r][half], left);
      }
    }
  }
}

/// Rows first .. last-1, several at a time: they share the loaded weights.
template <int BITS, typename Scale, typename Quants>
static void tile_block(const MatmulJob& job, int64_t tile, int64_t first, int64_t last, const uint8_t* quants) {
  constexpr int AT_ONCE = 4;  // as many as the registers hold
  int64_t row = first;
  for (; row + AT_ONCE <= last; row += AT_ONCE) tile_rows<BITS, Scale, AT_ONCE, Quants>(job, tile, row, quants);
  switch (last - row) {
    case 3: return tile_rows<BITS, Scale, 3, Quants>(job, tile, row, quants);
    case 2: return tile_rows<BITS, Scale, 2, Quants>(job, tile, row, quants);
    case 1: return tile_rows<BITS, Scale, 1, Quants>(job, tile, row, quants);
  }
}

template <int BITS, typename Scale>
static void matmul_items(const MatmulJob& job, int64_t begin, int64_t end) {
  using Packed = PackedQuants<BITS, Scale>;
  constexpr int64_t MOST_BYTES = 64 * 1024, WORTH_IT = 12;  // rows from which unpacking first pays
  alignas(64) uint8_t unpacked[MOST_BYTES];
  const int64_t groups = job.K / GROUP;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item % job.tiles(), first = item / job.tiles() * MatmulJob::ROW_BLOCK;
    const int64_t last = first + MatmulJob::ROW_BLOCK < job.M ? first + MatmulJob::ROW_BLOCK : job.M;
    const uint8_t* quants = job.packed + tile * groups * Packed::GROUP_BYTES + header_bytes(is_wide<Scale>);
    if (last - first < WORTH_IT || groups * UnpackedQuants::GROUP_BYTES > MOST_BYTES) {
      tile_block<BITS, Scale, Packed>(job, tile, first, last, quants);
      continue;
    }
    uint8_t* target = unpacked;
    for (int64_t g = 0; g < groups; ++g, quants += Packed::GROUP_BYTES) {
      for (int first = 0; first < PAIRS; first += Packed::PER_LANE) {
        UNROLL for (int i = 0; i < Packed::PER_LANE; ++i, target += 64) {
          const i16x16 w[2] = {Packed::load(quants, first, i, 0), Packed::load(quants, first, i, 1)};
          std::memcpy(target, w, sizeof(w));
        }
      }
    }
    tile_block<BITS, Scale, UnpackedQuants>(job, tile, first, last, unpacked);
  }
}

/// out = x W^T for the items begin .. end - 1: each is one tile of 16 outputs (fewer at the end) and up to
/// ROW_BLOCK rows. A row's groups are added in order, the first one first.
void quantized_matmul(const MatmulJob& job, int64_t begin, int64_t end) {
  if (job.wide) {
    job.bits == 4 ? matmul_items<4, Float32>(job, begin, end) : matmul_items<8, Float32>(job, begin, end);
  } else {
    job.bits == 4 ? matmul_items<4, Float16>(job, begin, end) : matmul_items<8, Float16>(job, begin, end);
  }
}

// ---- rows back to floats ----

template <typename Scale>
static void dequantize_items(const DequantizeJob& job, int64_t begin, int64_t end) {
  constexpr bool WIDE = is_wide<Scale>;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t tile = job.ids[i] / TILE_OUTPUTS, output = job.ids[i] % TILE_OUTPUTS;
    const bool inside = job.ids[i] >= 0 && tile < job.tiles;
    for (int64_t g = 0; g < job.K / GROUP; ++g) {
      float* out = job.out + i * job.K + g * GROUP;
      if (!inside) {
        for (int k = 0; k < GROUP; k += LANES) store(out + k, splat(__builtin_nanf("")));
        continue;
      }
      const uint8_t* record = job.packed + (tile * (job.K / GROUP) + g) * record_bytes(job.bits, WIDE);
      const auto* header = reinterpret_cast<const typename Scale::Storage*>(record) + output;
      const float scale = load_first_as<Scale>(header, 1)[0], bias = load_first_as<Scale>(header + TILE_OUTPUTS, 1)[0];
      const uint8_t* quants = record + header_bytes(WIDE) + 4 * output;
      const int per_lane = 16 / job.bits;
      for (int k = 0; k < GROUP; ++k) {
        const int pair = k / 2;
        const uint16_t lane = load_as<uint16_t>(quants + pair / per_lane * 64 + k % 2 * 2);
        const int q = lane >> (pair % per_lane * job.bits) & ((1 << job.bits) - 1);
        out[k] = scale * static_cast<float>(q) + bias;
      }
    }
  }
}

/// The rows `ids` of the weights as floats: an embedding lookup. An id out of range gives NaN.
void dequantize_rows(const DequantizeJob& job, int64_t begin, int64_t end) {
  job.wide ? dequantize_items<Float32>(job, begin, end) : dequantize_items<Float16>(job, begin, end);
}

}  // namespace tiny_llm::TINY_LLM_ISA
