// pack: MLX's quantized weights into the kernels' tiles (the layout is drawn in kernels/kernels.h).
// Runs once at load, in plain integer code that every processor shares.
#include <cstring>

#include "node.h"
#include "ops.h"

namespace tiny_llm {
namespace {

/// The even values of a word of 4- or 8-bit values, side by side in its low 16 bits.
uint32_t even_values(uint32_t word, int bits) {
  if (bits == 4) word = (word & 0x0f0f0f0f) | (word & 0x0f0f0f0f) >> 4;
  word &= 0x00ff00ff;
  return (word | word >> 8) & 0xffff;
}

struct PackJob {
  const uint32_t* weight;           // [N, K * bits / 32]
  const uint16_t *scales, *biases;  // [N, K/32] float16
  uint8_t* out;
  int64_t N, K;
  int bits;
};

void pack_tile(const PackJob& job, int64_t tile) {
  const int64_t groups = job.K / GROUP, words = GROUP * job.bits / 32;
  for (int64_t g = 0; g < groups; ++g) {
    uint8_t* record = job.out + (tile * groups + g) * record_bytes(job.bits);
    for (int64_t o = 0; o < TILE_OUTPUTS; ++o) {
      const int64_t n = tile * TILE_OUTPUTS + o;
      uint32_t source[8] = {};  // zeros where the last tile is not full
      uint16_t scale = 0, bias = 0;
      if (n < job.N) {
        std::memcpy(source, job.weight + (n * groups + g) * words, words * 4);
        scale = job.scales[n * groups + g];
        bias = job.biases[n * groups + g];
      }
      std::memcpy(record + 2 * o, &scale, 2);
      std::memcpy(record + 2 * (TILE_OUTPUTS + o), &bias, 2);
      uint8_t* quants = record + RECORD_HEADER + 4 * o;  // outputs 8..15 follow 0..7 without a gap
      for (int64_t j = 0; j < words; ++j) {
        const uint32_t lanes = even_values(source[j], job.bits) | even_values(source[j] >> job.bits, job.bits) << 16;
        std::memcpy(quants + 64 * j, &lanes, 4);
      }
    }
  }
}

/// Memory that starts at a cache line: the kernels read it in whole ones.
void allocate_aligned(mx::array& a) {
  auto memory = mx::allocator::malloc(a.nbytes() + 64);
  const auto address = reinterpret_cast<uintptr_t>(memory.buffer().raw_ptr());
  mx::array::Flags flags{};
  flags.contiguous = flags.row_contiguous = true;
  flags.col_contiguous = a.size() <= 1;
  const mx::Strides strides{int64_t{a.shape(1)} * a.shape(2), a.shape(2), 1};
  a.set_data(std::move(memory), a.size(), strides, flags, static_cast<int64_t>(-address & 63));
}

class Pack : public Node {
 public:
  explicit Pack(int bits) : bits_(bits) {}
  const char* name() const override { return "pack"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    const auto weight = dense(inputs[0], queue), scales = dense(inputs[1], queue), biases = dense(inputs[2], queue);
    allocate_aligned(outputs[0]);
    PackJob job{weight.data<uint32_t>(), scales.data<uint16_t>(), biases.data<uint16_t>(), outputs[0].data<uint8_t>(),
                weight.shape(0), weight.shape(1) * 32 / bits_, bits_};
    queue.dispatch([job, tiles = outputs[0].shape(0)] {
      parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) pack_tile(job, tile);
      });
    });
  }

 private:
  int bits_;
};

}  // namespace

mx::array pack(const mx::array& weight, const mx::array& scales, const mx::array& biases, int group_size, int bits) {
  if (group_size != GROUP) refuse("group_size ", group_size, " is not supported: only ", GROUP);
  if (bits != 4 && bits != 8) refuse("bits ", bits, " is not supported: only 4 and 8");
  check_dtype("weight", weight, mx::uint32);
  check_dtype("scales", scales, mx::float16);
  check_dtype("biases", biases, mx::float16);
  check_ndim("weight", weight, 2);
  if (weight.size() == 0) refuse("weight must not be empty, got shape ", shape_text(weight));
  const int N = weight.shape(0), words = weight.shape(1);
  if (words % bits) refuse("weight with ", bits, " bits must have a multiple of ", bits, " words a row (whole groups of 32), got shape ", shape_text(weight));
  const int groups = words / bits;
  check_shape("scales", scales, {N, groups}, "[N, K/32]");
  check_shape("biases", biases, {N, groups}, "[N, K/32]");
  const int tiles = (N + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
  return mx::array({tiles, groups, record_bytes(bits)}, mx::uint8, std::make_shared<Pack>(bits), {weight, scales, biases});
}

}  // namespace tiny_llm
