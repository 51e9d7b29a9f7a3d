#include "node.h"
#include "ops.h"

namespace tiny_llm {
namespace {

/// Packed weights are [tiles, K/32, record]: the size of a record identifies their format.
void check_packed(const mx::array& packed, int bits) {
  if (bits != 4 && bits != 8) refuse("bits ", bits, " is not supported: only 4 and 8");
  check_dtype("packed", packed, mx::uint8);
  check_ndim("packed", packed, 3);
  if (packed.shape(2) != record_bytes(bits, false) && packed.shape(2) != record_bytes(bits, true)) {
    refuse("packed must have ", bits, "-bit weights: found records of ", packed.shape(2), " bytes, expected ",
           record_bytes(bits, false), " or ", record_bytes(bits, true));
  }
}

bool is_wide(const mx::array& packed, int bits) { return packed.shape(2) == record_bytes(bits, true); }

class QuantizedMatmul : public Node {
 public:
  QuantizedMatmul(int bits, int activation_bits) : bits_(bits), activation_bits_(activation_bits) {}
  const char* name() const override { return "quantized_matmul"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    mx::array x = inputs[0];
    const Rows rows = rows_of(x, queue);
    const mx::array packed = dense(inputs[1], queue);
    mx::array& out = outputs[0];
    allocate(out);

    const int64_t M = rows.count, K = x.shape(-1), N = out.shape(-1);
    QuantizeJob quantize{rows, K, activation_bits_,
                         temporary<uint8_t>(bands(M) * BAND * K * activation_bits_ / 8, queue),
                         temporary<GroupScale>(bands(M) * BAND * K / GROUP, queue)};
    MatmulJob multiply{quantize.quants,
                       activation_bits_,
                       quantize.groups,
                       packed.data<uint8_t>(),
                       out.data<float>(),
                       M,
                       N,
                       K,
                       bits_,
                       is_wide(packed, bits_)};
    queue.dispatch([quantize, multiply, &kernels = kernels()] {
      parallel_for(multiply.M, 8,
                   [&](int64_t begin, int64_t end) { kernels.quantize_rows(quantize, begin, end); });
      parallel_for(multiply.items(), 1,
                   [&](int64_t begin, int64_t end) { kernels.quantized_matmul(multiply, begin, end); });
    });
  }

 private:
  int bits_, activation_bits_;
};

class DequantizeRows : public Node {
 public:
  explicit DequantizeRows(int bits) : bits_(bits) {}
  const char* name() const override { return "dequantize_rows"; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& queue = encoder();
    const auto packed = dense(inputs[0], queue), ids = dense(inputs[1], queue);
    allocate(outputs[0]);
    DequantizeJob job{packed.data<uint8_t>(), ids.data<int32_t>(),  outputs[0].data<float>(),
                      packed.shape(0),        outputs[0].shape(-1), bits_,
                      is_wide(packed, bits_)};
    queue.dispatch([job, count = static_cast<int64_t>(ids.size()), &kernels = kernels()] {
      parallel_for(count, 16, [&](int64_t begin, int64_t end) { kernels.dequantize_rows(job, begin, end); });
    });
  }

 private:
  int bits_;
};

}  // namespace

mx::array quantized_matmul(const mx::array& x, const mx::array& packed, int out_features, int bits,
                           int activation_bits) {
  check_packed(packed, bits);
  if (activation_bits != 8 && activation_bits != 16)
    refuse("activation_bits ", activation_bits, " is not supported: only 8 and 16");
  check_dtype("x", x, mx::float32);
  const int K = packed.shape(1) * GROUP, limit = packed.shape(0) * TILE_OUTPUTS;
  if (x.ndim() == 0 || x.shape(-1) != K)
    refuse("x must have K = ", K, " as its last axis, got shape ", shape_text(x));
  if (out_features <= limit - TILE_OUTPUTS || out_features > limit) {
    refuse("out_features ", out_features, " does not match packed weights of ", packed.shape(0), " tiles of ",
           TILE_OUTPUTS);
  }
  mx::Shape shape = x.shape();
  shape.back() = out_features;
  return mx::array(std::move(shape), mx::float32, std::make_shared<QuantizedMatmul>(bits, activation_bits),
                   {x, packed});
}

mx::array dequantize_rows(const mx::array& packed, const mx::array& ids, int in_features, int bits) {
  check_packed(packed, bits);
  check_dtype("ids", ids, mx::int32);
  if (in_features != packed.shape(1) * GROUP) {
    refuse("in_features ", in_features, " does not match packed weights with K = ", packed.shape(1) * GROUP);
  }
  mx::Shape shape = ids.shape();
  shape.push_back(in_features);
  return mx::array(std::move(shape), mx::float32, std::make_shared<DequantizeRows>(bits), {packed, ids});
}

}  // namespace tiny_llm
