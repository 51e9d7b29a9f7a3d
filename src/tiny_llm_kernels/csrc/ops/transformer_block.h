// A whole transformer block as one operator: its weights and its call.
#pragma once

#include <optional>
#include <tuple>

#include "mlx/array.h"

namespace tiny_llm {

namespace mx = mlx::core;

/// A packed matrix: see `pack`.
struct PackedMatrix {
  mx::array packed;
  int out_features, bits;
};

/// The weights of a block, all evaluated. Legend: H query heads, Hkv key-value heads, D head size.
struct BlockWeights {
  mx::array attention_norm, mlp_norm;                         // [E] before each half
  std::optional<mx::array> attention_out_norm, mlp_out_norm;  // [E] after each half, if any
  PackedMatrix qkv, o, gate_up, down;
  std::optional<mx::array> qkv_bias;        // [(H + 2 Hkv) D]
  std::optional<mx::array> q_norm, k_norm;  // [D]
  mx::array inv_freq;                       // [D/2]
  int H, Hkv, D, activation_bits;
  float eps;
  bool gelu;  // instead of silu
};

/// x [1, T, E] -> (x after the block, both pools): see tiny_llm_kernels.TransformerBlock.
class TransformerBlock {
 public:
  explicit TransformerBlock(BlockWeights weights);

  std::tuple<mx::array, mx::array, mx::array> operator()(
      const mx::array& x, const mx::array& key_pool, const mx::array& value_pool, const mx::array& slots,
      const mx::array& tables, const mx::array& row_of_token, const mx::array& positions, float scale,
      std::optional<int64_t> window, const std::optional<mx::array>& out_rows) const;

 private:
  std::shared_ptr<const BlockWeights> weights_;
};

}  // namespace tiny_llm
