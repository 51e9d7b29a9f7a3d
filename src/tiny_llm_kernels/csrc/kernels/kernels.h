// What the engine asks of a kernel: plain pointers and sizes, no arrays, no threads.
//
// Every kernel works on a range [begin, end) of items that do not depend on each other; how the items
// are shared out among threads, and in which order they run, cannot change a bit of any result.
// Legend: M rows, N outputs, K inputs, T tokens, H query heads, Hkv key-value heads, D head size.
#pragma once

#include <cstdint>

namespace tiny_llm {

constexpr int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/// Rows of floats that may lie apart: row i starts at data + i * stride.
struct Rows {
  const float* data;
  int64_t count, stride;
};

// ---- quantized matmul ----
//
// The packed weights: tiles of 16 outputs x 1 group of 32 inputs, one record after the other:
//
//     tile 0: | group 0 | group 1 | ... | group K/32-1 |  tile 1: | group 0 | ...
//
//     record: | 16 scales | 16 biases | 16 x 32 quants |                 weight = scale * q + bias
//
//     scales and biases are float16, 32 bytes each, or, where float16 cannot hold them exactly, float32, 64
//     bytes each; the quants have 256 (4 bits) or 512 (8 bits) bytes.
//
//     quants: 64 bytes for 8 (4 bits) or 4 (8 bits) inputs, four bytes of each output side by side:
//
//       4 bits, inputs 8j .. 8j+7:   byte 4o+i   | k8j+4+i : k8j+i |   for i = 0..3: high half, low half
//       8 bits, inputs 4j .. 4j+3:   byte 4o+i   |      k4j+i      |
//
//     so one mask, or one shift and a mask, gives four inputs of every output: what a processor's byte
//     products want.

constexpr int TILE_OUTPUTS = 16;
constexpr int GROUP = 32;
constexpr int packed_bits(int bits) { return bits <= 4 ? 4 : 8; }  // of a value, in a record
constexpr int header_bytes(bool wide) { return (wide ? 8 : 4) * TILE_OUTPUTS; }
constexpr int record_bytes(int bits, bool wide) {
  return header_bytes(wide) + TILE_OUTPUTS * GROUP * bits / 8;
}

// The activations are rounded to 8 or to 16 bits, |q| <= 127 or 32767. Eight are enough for a good text, and
// sixteen for the same text as float32's: where the two likeliest tokens nearly tie, eight let the other one win.
// They lie in bands of 8 rows, which are multiplied together, and a band group by group:
//
//     band 0: | group 0 of row 0, of row 1, ... of row 7 | group 1 of row 0, ... | ...    band 1: ...
//
// Of 16 bits, the middle two of each four inputs change places: k, k+2, k+1, k+3. A byte product takes four
// neighbours, a product of 16 bits two, and masking a weight's bytes leaves every second one.
constexpr int BAND = 8;
constexpr int64_t bands(int64_t rows) { return rounded_up(rows, BAND) / BAND; }

/// Which group of all it is in that order: group g of `groups` of a row.
constexpr int64_t place_of_group(int64_t row, int64_t g, int64_t groups) {
  return (row / BAND * groups + g) * BAND + row % BAND;
}

constexpr int quant_max(int activation_bits) { return (1 << (activation_bits - 1)) - 1; }

/// What one group of 32 activations was rounded to: x is about scale * q, and sum is the sum of its q.
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
  const void* quants;        // [bands, K/32, 8, 32] int8 or int16
  int activation_bits;       // 8 or 16
  const GroupScale* groups;  // [bands, K/32, 8]
  const uint8_t* packed;     // [ceil(N/16), K/32, record]
  float* out;                // [M, N]
  int64_t M, N, K;
  int bits;
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

constexpr int PARTITION = 128;  // positions; what one is for: paged_attention.cpp

constexpr int MAX_ROWS = 64;  // rows (token, query head) that are worked on together

constexpr int64_t DESK_BYTES = 544 << 10;  // that `attend` works in; a thread's stack may be smaller

/// What one call attends: tokens of one sequence side by side, with the query heads of one kv head; or with those
/// of several, if all these rows fit beside each other.
struct AttentionItem {
  int32_t first_token, tokens, first_head, heads;  // kv heads
  int32_t first_partition, end_partition;          // what lies outside is left to others
  int32_t apart;  // the place of `first_token` in the job's `apart`; -1: this item has all its partitions
};

/// What one row (token, head) comes to in one partition: the softmax's m and l, then o.
constexpr int64_t PARTIAL_HEADER = 16;
constexpr int64_t partial_floats(int64_t D) { return PARTIAL_HEADER + rounded_up(D, 16); }

struct AttentionJob {
  const float *q, *k, *v;  // each [H or Hkv, T, D], the last axis contiguous
  int64_t q_head, q_token, k_head, k_token, v_head, v_token;  // strides
  void *keys, *values;                                        // the pools: [num_blocks, Hkv, block_size, D]
  StorageType storage;
  const int32_t* slots;   // [T] where each token is written: block * block_size + offset; null: nothing is
  const int32_t* tables;  // [S, M] block ids of each sequence
  const int32_t* row_of_token;  // [T] the table row of each token
  const int32_t* positions;     // [T] the last position that each token sees: its own
  int64_t window;               // how many positions a token sees at most, its own being the last of them
  float* out;                   // [T, H, D]
  int64_t T, H, Hkv, D, S, M, block_size, num_blocks;
  float scale;
  const AttentionItem* items;
  const int32_t* apart;  // the tokens whose partitions are worked on apart
  float* partials;       // [apart, H, max_partitions, partial_floats(D)], from the first that a token sees
  int64_t max_partitions;
  void* desk;  // DESK_BYTES that only the calling thread uses, aligned to 64

  __attribute__((always_inline)) bool slot_inside(int64_t token) const {
    return slots[token] >= 0 && slots[token] < num_blocks * block_size;
  }
};

// ---- attention over contiguous keys and values ----

struct FlashJob {
  const float *q, *k, *v;  // [B, H, L, D], [B, Hkv, S, D], the same: the last axis contiguous
  int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token;  // strides
  float* out;  // [B, L, H, D]; an item is one of its rows
  int64_t B, H, Hkv, L, S, D;
  float scale;
  bool causal;  // query l is at position S - L + l and sees positions up to its own
};

// ---- the operators between ----

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
  bool gelu;  // for silu
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
  int64_t V;
  float temperature;  // 0: the largest logit
  float min_p, top_p;
  int64_t top_k;    // 0 or less: all
  double share;     // above 0 and up to 1: how far up the weights the draw goes
  float* scratch;   // [2, V rounded up to 8], unless the temperature is 0
  uint32_t* token;  // the one item
};

/// One set of kernels, compiled for one instruction set.
struct Kernels {
  void (*quantize_rows)(const QuantizeJob&, int64_t begin, int64_t end);       // items: rows
  void (*quantized_matmul)(const MatmulJob&, int64_t begin, int64_t end);      // items: see MatmulJob
  void (*dequantize_rows)(const DequantizeJob&, int64_t begin, int64_t end);   // items: ids
  void (*dense_matmul)(const DenseJob&, int64_t begin, int64_t end);           // items: see DenseJob
  void (*write_tokens)(const AttentionJob&, int64_t begin, int64_t end);       // items: tokens
  void (*attend)(const AttentionJob&, int64_t begin, int64_t end);             // items: the job's own
  void (*reduce_partitions)(const AttentionJob&, int64_t begin, int64_t end);  // items: [apart, H]
  void (*flash_attention)(const FlashJob&, int64_t begin, int64_t end);        // items: rows of out
  void (*rms_norm)(const RmsNormJob&, int64_t begin, int64_t end);             // items: rows
  void (*add)(const AddJob&, int64_t begin, int64_t end);                      // items: rows
  void (*swiglu)(const SwigluJob&, int64_t begin, int64_t end);                // items: rows
  void (*rope)(const RopeJob&, int64_t begin, int64_t end);                    // items: tokens
  void (*sample)(const SampleJob&, int64_t begin, int64_t end);                // one item
};

}  // namespace tiny_llm
