// pack: repacks MLX's quantized weights into the kernels' tiles (kernels/kernels.h shows the layout).
// It runs once, at load, in plain integer code for all processors.
#include <cstring>

#include "huge_pages.h"
#include "node.h"
#include "ops.h"

namespace tiny_llm {
namespace {

/// Eight 4-bit values in order, as four bytes: value i in the low half of byte i, value i + 4 in the high half.
uint32_t four_over_four(uint32_t word) {
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) bytes |= ((word >> 4 * i & 15) | (word >> 4 * (i + 4) & 15) << 4) << 8 * i;
  return bytes;
}

struct PackJob {
  const uint32_t* weight;       // [N, K * bits / 32]
  const char *scales, *biases;  // [N, K/group_size], float16 or float32
  uint8_t* out;
  int64_t N, K, group_size;
  int bits;
  bool wide;
};

/// Converts the 32 values of one group (`bits` words) to `wider` bits per value.
void widen(const uint32_t* words, int bits, int wider, uint32_t (&source)[8]) {
  for (int k = 0; k < GROUP; ++k) {
    const int first = k * bits, word = first / 32, shift = first % 32;
    uint64_t two = words[word];
    if (shift + bits > 32) two |= uint64_t{words[word + 1]} << 32;
    const uint32_t q = static_cast<uint32_t>(two >> shift) & ((1u << bits) - 1);
    source[k * wider / 32] |= q << k * wider % 32;
  }
}

void pack_tile(const PackJob& job, int64_t tile) {
  const int64_t groups = job.K / GROUP, scale_groups = job.K / job.group_size, size = job.wide ? 4 : 2;
  const int bits = packed_bits(job.bits);
  for (int64_t g = 0; g < groups; ++g) {
    uint8_t* record = job.out + (tile * groups + g) * record_bytes(bits, job.wide);
    for (int64_t o = 0; o < TILE_OUTPUTS; ++o) {
      const int64_t n = tile * TILE_OUTPUTS + o;
      uint32_t source[8] = {};  // zeros if the last tile is not full
      uint8_t scale[4] = {}, bias[4] = {};
      if (n < job.N) {
        const uint32_t* words = job.weight + (n * groups + g) * job.bits;
        const int64_t place = (n * scale_groups + g * GROUP / job.group_size) * size;
        bits == job.bits ? void(std::memcpy(source, words, bits * 4)) : widen(words, job.bits, bits, source);
        std::memcpy(scale, job.scales + place, size);
        std::memcpy(bias, job.biases + place, size);
      }
      std::memcpy(record + size * o, scale, size);
      std::memcpy(record + size * (TILE_OUTPUTS + o), bias, size);
      uint8_t* quants = record + header_bytes(job.wide) + 4 * o;
      for (int j = 0; j < bits; ++j) {
        const uint32_t bytes = bits == 4 ? four_over_four(source[j]) : source[j];
        std::memcpy(quants + 64 * j, &bytes, 4);
      }
    }
  }
}

class Pack : public Node {
 public:
  Pack(int group_size, int bits) : group_size_(group_size), bits_(bits) {}
  const char* name() const override { return "pack"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    const auto weight = dense(inputs[0], queue), scales = dense(inputs[1], queue),
               biases = dense(inputs[2], queue);
    allocate_weights(outputs[0]);
    PackJob job{weight.data<uint32_t>(),
                scales.data<char>(),
                biases.data<char>(),
                outputs[0].data<uint8_t>(),
                weight.shape(0),
                int64_t{weight.shape(1)} * 32 / bits_,
                group_size_,
                bits_,
                scales.dtype() == mx::float32};
    queue.dispatch([job, tiles = outputs[0].shape(0)] {
      parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) pack_tile(job, tile);
      });
    });
  }

 private:
  int group_size_, bits_;
};

/// Concatenates packed weights. All tiles are full, so the matrices' outputs are adjacent.
class StackPacked : public Node {
 public:
  using Node::Node;
  const char* name() const override { return "stack_packed"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    allocate_weights(outputs[0]);
    char* target = outputs[0].data<char>();
    for (const auto& input : inputs) {
      const auto part = dense(input, queue);
      queue.dispatch(
          [=, source = part.data<char>(), bytes = part.nbytes()] { std::memcpy(target, source, bytes); });
      target += part.nbytes();
    }
  }
};

/// In ggml, byte i of a block of 32 has value i in its low half and value i + 16 in its high half; in MLX, byte i
/// has values 2i and 2i + 1. Takes the low halves of eight bytes and joins them without gaps.
uint32_t joined_halves(uint64_t halves) {
  uint64_t v = halves & 0x0f0f0f0f0f0f0f0f;
  v = (v | v >> 4) & 0x00ff00ff00ff00ff;
  v = (v | v >> 8) & 0x0000ffff0000ffff;
  return static_cast<uint32_t>(v | v >> 16);
}

/// One block's values as MLX's words: 4 bits reordered, 8 bits from two's complement to 0 .. 255.
void mlx_words(const uint8_t* quants, int bits, uint32_t* words) {
  uint64_t bytes[4];
  std::memcpy(bytes, quants, bits * 4);
  if (bits == 8) {
    for (uint64_t& eight : bytes) eight ^= 0x8080808080808080;
    std::memcpy(words, bytes, sizeof(bytes));
  } else {
    for (int i = 0; i < 4; ++i) words[i] = joined_halves(bytes[i % 2] >> (i / 2 * 4));
  }
}

class GgmlQuants : public Node {
 public:
  explicit GgmlQuants(int bits) : bits_(bits) {}
  const char* name() const override { return "ggml_quants"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    const auto blocks = dense(inputs[0], queue);
    allocate(outputs[0]);
    const int64_t groups = blocks.shape(1), nbytes = blocks.shape(2), bits = bits_;
    queue.dispatch(
        [=, source = blocks.data<uint8_t>(), target = outputs[0].data<uint32_t>(), rows = blocks.shape(0)] {
          parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin * groups; i < end * groups; ++i) {
              mlx_words(source + (i + 1) * nbytes - bits * 4, bits, target + i * bits);
            }
          });
        });
  }

 private:
  int bits_;
};

}  // namespace

mx::array ggml_quants(const mx::array& blocks, int bits) {
  if (bits != 4 && bits != 8) refuse("bits ", bits, " is not supported: only 4 and 8");
  check_dtype("blocks", blocks, mx::uint8);
  check_ndim("blocks", blocks, 3);
  if (blocks.shape(2) < bits * 4)
    refuse("blocks of ", bits, " bits must have ", bits * 4, " bytes or more, got shape ",
           shape_text(blocks));
  return mx::array({blocks.shape(0), blocks.shape(1) * bits}, mx::uint32, std::make_shared<GgmlQuants>(bits),
                   {blocks});
}

mx::array pack(const mx::array& weight, const mx::array& scales, const mx::array& biases, int group_size,
               int bits) {
  if (group_size < GROUP || group_size % GROUP)
    refuse("group_size ", group_size, " is not supported: only multiples of ", GROUP);
  if (bits < 2 || bits > 8 || bits == 7) refuse("bits ", bits, " is not supported: only 2, 3, 4, 5, 6 and 8");
  check_dtype("weight", weight, mx::uint32);
  if (scales.dtype() != mx::float16) check_dtype("scales", scales, mx::float32);
  check_dtype("biases", biases, scales.dtype());
  check_ndim("weight", weight, 2);
  if (weight.size() == 0) refuse("weight must not be empty, got shape ", shape_text(weight));
  const int N = weight.shape(0), words = weight.shape(1);
  if (words % bits)
    refuse("weight with ", bits, " bits must have a multiple of ", bits,
           " words per row (whole groups of 32), got shape ", shape_text(weight));
  const int groups = words / bits, K = groups * GROUP;
  if (K % group_size) refuse("group_size ", group_size, " does not divide K = ", K);
  check_shape("scales", scales, {N, K / group_size}, "[N, K/group_size]");
  check_shape("biases", biases, {N, K / group_size}, "[N, K/group_size]");
  const int tiles = (N + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
  const int record = record_bytes(packed_bits(bits), scales.dtype() == mx::float32);
  return mx::array({tiles, groups, record}, mx::uint8, std::make_shared<Pack>(group_size, bits),
                   {weight, scales, biases});
}

mx::array stack_packed(const std::vector<mx::array>& parts) {
  if (parts.empty()) refuse("parts must not be empty");
  int tiles = 0;
  for (const auto& part : parts) {
    check_dtype("parts", part, mx::uint8);
    check_ndim("parts", part, 3);
    check_shape("parts", part, {part.shape(0), parts[0].shape(1), parts[0].shape(2)},
                "[any, K/32, bytes of a record]");
    tiles += part.shape(0);
  }
  return mx::array({tiles, parts[0].shape(1), parts[0].shape(2)}, mx::uint8, std::make_shared<StackPacked>(),
                   parts);
}

}  // namespace tiny_llm
