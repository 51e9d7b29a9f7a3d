// The interface between engine and kernels: plain pointers and sizes, no MLX arrays, no threads.
//
// Every kernel processes a range [begin, end) of independent items. How the items are distributed over threads,
// and in which order they run, cannot change a bit of any result.
// Legend: M rows, N outputs, K inputs, T tokens, H query heads, Hkv key-value heads, D head size.
#pragma once

#include <cstdint>

namespace tiny_llm {

constexpr int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/// Rows of floats, not necessarily adjacent: row i starts at data + i * stride.
struct Rows {
  const float* data;
  int64_t count, stride;
};

// ---- quantized matmul ----
//
// The packed weights: tiles of 16 outputs; a tile has one record per group of 32 inputs:
//
//     tile 0: | group 0 | group 1 | ... | group K/32-1 |  tile 1: | group 0 | ...
//
//     record: | 16 scales | 16 biases | 16 x 32 quants |                 weight = scale * q + bias
//
//     scales and biases are float16, 32 bytes each, or float32, 64 bytes each, if float16 is not exact;
//     the quants take 256 (4 bits) or 512 (8 bits) bytes.
//
//     quants: 64 bytes for 8 (4 bits) or 4 (8 bits) inputs, with four adjacent bytes for each output:
//
//       4 bits, inputs 8j .. 8j+7:   byte 4o+i   | k8j+4+i : k8j+i |   for i = 0..3: high half, low half
//       8 bits, inputs 4j .. 4j+3:   byte 4o+i   |      k4j+i      |
//
//     so one mask, or one shift and a mask, extracts four inputs of every output, as the processor's byte
//     products need them.

constexpr int TILE_OUTPUTS = 16;
constexpr int GROUP = 32;
constexpr int packed_bits(int bits) { return bits <= 4 ? 4 : 8; }  // of a value in a record
constexpr int header_bytes(bool wide) { return (wide ? 8 : 4) * TILE_OUTPUTS; }
constexpr int record_bytes(int bits, bool wide) {
  return header_bytes(wide) + TILE_OUTPUTS * GROUP * bits / 8;
}

// The activations are rounded to 8 or 16 bits, |q| <= 127 or 32767. Eight bits are enough for good text; sixteen
// give the same text as float32. With eight, the second-best token can win if the best two nearly tie. Activations
// are stored in bands of 8 rows, which are multiplied together, and within a band group by group:
//
//     band 0: | group 0 of row 0, of row 1, ... of row 7 | group 1 of row 0, ... | ...    band 1: ...
//
// With 16 bits, the middle two of each four inputs are exchanged: k, k+2, k+1, k+3. The reason: a byte product
// multiplies four neighbouring inputs, a 16-bit product only two, and a mask selects every second byte of the
// weights, not two neighbours.
constexpr int BAND = 8;
constexpr int64_t bands(int64_t rows) { return rounded_up(rows, BAND) / BAND; }

/// The index of group g of a row in that order; a row has `groups` groups.
constexpr int64_t place_of_group(int64_t row, int64_t g, int64_t groups) {
  return (row / BAND * groups + g) * BAND + row % BAND;
}

constexpr int quant_max(int activation_bits) { return (1 << (activation_bits - 1)) - 1; }

/// The scale of a group of 32 rounded activations, x ~ scale * q, and the sum of its q.
struct GroupScale {
  float scale, sum;
};

struct QuantizeJob {
  Rows x;
  int64_t K;
  int bits;            // of an activation: 8 or 16
  void* quants;        // [bands, K/32, 8, 32] int8 or int16
  GroupScale* groups;  // [bands, K/32, 8]
};

struct MatmulJob {
  // The last band has memory for all 8 rows. Rows from M on may be read, but contain anything.
  const void* quants;        // [bands, K/32, 8, 32] int8 or int16
  int activation_bits;       // 8 or 16
  const GroupScale* groups;  // [bands, K/32, 8]
  const uint8_t* packed;     // [ceil(N/16), K/32, record]
  float* out;                // [M, N]
  int64_t M, N, K;
  int bits;   // of a weight in a record: 4 or 8
  bool wide;  // scales and biases in float32

  // An item is one tile of outputs for up to ROW_BLOCK rows: tile = item % tiles, block = item / tiles.
  static constexpr int64_t ROW_BLOCK = 48;
  int64_t tiles() const { return (N + TILE_OUTPUTS - 1) / TILE_OUTPUTS; }
  int64_t items() const { return tiles() * ((M + ROW_BLOCK - 1) / ROW_BLOCK); }
};

struct DequantizeJob {
  const uint8_t* packed;
  const int32_t* ids;
  float* out;  // [number of ids, K]
  int64_t tiles, K;
  int bits;
  bool wide;
};

// ---- dense matmul ----

enum class StorageType { float32, float16, bfloat16 };

struct DenseJob {
  Rows x;              // [M, K]
  const void* weight;  // [N, K]
  StorageType storage;
  float* out;  // [M, N]
  int64_t M, N, K;

  // An item is one tile of outputs for up to ROW_BLOCK rows, as in MatmulJob.
  static constexpr int64_t ROW_BLOCK = 48;
  int64_t tiles() const { return (N + TILE_OUTPUTS - 1) / TILE_OUTPUTS; }
  int64_t items() const { return tiles() * ((M + ROW_BLOCK - 1) / ROW_BLOCK); }
};

// ---- attention over pages ----

constexpr int MAX_HEAD_SIZE = 512;

constexpr int PARTITION = 128;  // positions; see paged_attention.cpp

constexpr int MAX_ROWS = 64;  // rows (token, query head) that are processed together

constexpr int64_t SCRATCH_BYTES = 544 << 10;  // working memory of `attend`; a thread's stack may be smaller

/// The work of one call of `attend`: adjacent tokens of one sequence with the query heads of one kv head, or of
/// several kv heads if all these rows fit together.
struct AttentionItem {
  int32_t first_token, tokens, first_head, heads;  // kv heads
  int32_t first_partition, end_partition;          // other items have the other partitions
  int32_t split;  // the index of `first_token` in the job's `split`; -1: this item has all its partitions
};

/// The softmax of one row (token, head) over one partition: m and l, then o.
constexpr int64_t PARTIAL_HEADER = 16;
constexpr int64_t partial_floats(int64_t D) { return PARTIAL_HEADER + rounded_up(D, 16); }

struct AttentionJob {
  const float *q, *k, *v;  // each [H or Hkv, T, D], the last axis contiguous
  int64_t q_head, q_token, k_head, k_token, v_head, v_token;  // strides
  void *keys, *values;                                        // the pools: [num_blocks, Hkv, block_size, D]
  StorageType storage;
  const int32_t* slots;   // [T] where each token is written: block * block_size + offset; null: no writes
  const int32_t* tables;  // [S, M] block ids of each sequence
  const int32_t* row_of_token;  // [T] the table row of each token
  const int32_t* positions;     // [T] each token's own position, the last one that it attends to
  int64_t window;               // the maximum number of positions that a token attends to, its own included
  float* out;                   // [T, H, D]
  int64_t T, H, Hkv, D, S, M, block_size, num_blocks;
  float scale;
  const AttentionItem* items;
  const int32_t* split;  // the tokens whose partitions are computed by different items
  float* partials;       // [split, H, max_partitions, partial_floats(D)], from a token's first partition on
  int64_t max_partitions;
  void* scratch;  // SCRATCH_BYTES for the calling thread only, aligned to 64

  __attribute__((always_inline)) bool slot_in_range(int64_t token) const {
    return slots[token] >= 0 && slots[token] < num_blocks * block_size;
  }
};

// ---- attention over contiguous keys and values ----

struct FlashJob {
  const float *q, *k, *v;  // [B, H, L, D], [B, Hkv, S, D], [B, Hkv, S, D]: the last axis contiguous
  int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token;  // strides
  float* out;  // [B, L, H, D]; an item is one of its rows
  int64_t B, H, Hkv, L, S, D;
  float scale;
  bool causal;  // query l is at position S - L + l and attends to positions up to its own
};

// ---- other operators of a layer ----

struct RmsNormJob {
  Rows x;
  const float* weight;
  float* out;  // [rows, K]
  int64_t K;
  float eps;
};

struct AddJob {
  float* x;  // rows of K numbers, changed in place
  int64_t x_stride;
  const float* y;
  int64_t y_stride;  // 0: the same row for all
  int64_t K;
};

struct SwigluJob {
  Rows gate, up;
  float* out;  // [rows, K]
  int64_t K;
  bool gelu;  // instead of silu
};

struct RopeJob {
  const float* x;                    // [B, H, L, D]
  int64_t x_batch, x_head, x_token;  // strides
  const int32_t* positions;          // [L]
  const float* inv_freq;             // [D/2]
  float* out;                        // [B, L, H, D]
  int64_t B, H, L, D;                // an item is one token: (batch, position in the row)
};

// ---- from logits to a token ----

struct SampleJob {
  const float* logits;  // [V]
  const int32_t*
      mask;  // [V / 32 rounded up]: bit t % 32 of word t / 32 allows token t; null: all are allowed
  int64_t V;
  float temperature;  // 0: the largest logit
  float min_p, top_p;
  int64_t top_k;    // 0 or less: no limit
  double share;     // in (0, 1]: draw the token at which this share of the total weight is reached
  float* scratch;   // [2, V rounded up to 8], unless the temperature is 0
  uint32_t* token;  // the result; there is one item
};

// ---- the processor's limit ----

struct PeakJob {
  int bits;           // of an activation: 8 or 16
  int64_t rounds;     // in each item
  int32_t* sums;      // [items], so that nothing can be left out
  int64_t* products;  // [items], the number of multiplications
};

/// One set of kernels, compiled for one instruction set.
struct Kernels {
  void (*quantize_rows)(const QuantizeJob&, int64_t begin, int64_t end);       // items: rows
  void (*quantized_matmul)(const MatmulJob&, int64_t begin, int64_t end);      // items: see MatmulJob
  void (*dequantize_rows)(const DequantizeJob&, int64_t begin, int64_t end);   // items: ids
  void (*dense_matmul)(const DenseJob&, int64_t begin, int64_t end);           // items: see DenseJob
  void (*write_tokens)(const AttentionJob&, int64_t begin, int64_t end);       // items: tokens
  void (*attend)(const AttentionJob&, int64_t begin, int64_t end);             // items: the job's `items`
  void (*reduce_partitions)(const AttentionJob&, int64_t begin, int64_t end);  // items: [split, H]
  void (*flash_attention)(const FlashJob&, int64_t begin, int64_t end);        // items: rows of out
  void (*rms_norm)(const RmsNormJob&, int64_t begin, int64_t end);             // items: rows
  void (*add)(const AddJob&, int64_t begin, int64_t end);                      // items: rows
  void (*swiglu)(const SwigluJob&, int64_t begin, int64_t end);                // items: rows
  void (*rope)(const RopeJob&, int64_t begin, int64_t end);                    // items: tokens
  void (*sample)(const SampleJob&, int64_t begin, int64_t end);                // one item
  void (*integer_peak)(const PeakJob&, int64_t begin, int64_t end);            // items: repetitions
};

}  // namespace tiny_llm
