// The MLX operators: each checks its arguments and adds one node to the graph.
// The Python docstrings (../../__init__.py) document contracts, shapes and units.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "mlx/array.h"

namespace tiny_llm {

namespace mx = mlx::core;

mx::array pack(const mx::array& weight, const mx::array& scales, const mx::array& biases, int group_size,
               int bits);
mx::array stack_packed(const std::vector<mx::array>& parts);
mx::array ggml_quants(const mx::array& blocks, int bits);
mx::array quantized_matmul(const mx::array& x, const mx::array& packed, int out_features, int bits,
                           int activation_bits);
mx::array dequantize_rows(const mx::array& packed, const mx::array& ids, int in_features, int bits);
mx::array dense_matmul(const mx::array& x, const mx::array& weight);
mx::array flash_attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                          bool causal);
mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps);
mx::array swiglu(const mx::array& gate, const mx::array& up);
mx::array geglu(const mx::array& gate, const mx::array& up);
mx::array rope(const mx::array& x, const mx::array& positions, const mx::array& inv_freq);
std::tuple<mx::array, mx::array> sample(const mx::array& logits, const std::vector<int64_t>& rows,
                                        float temperature, float min_p, int64_t top_k, float top_p,
                                        const std::vector<double>& uniforms,
                                        const std::optional<mx::array>& masks);
std::vector<mx::array> zeros(int count, const mx::Shape& shape, mx::Dtype dtype);
mx::array copy_blocks(const mx::array& target, const mx::array& from, const mx::array& to,
                      const std::optional<mx::array>& source);
mx::array paged_attention(const mx::array& q, const mx::array& key_pool, const mx::array& value_pool,
                          const mx::array& tables, const mx::array& row_of_token, const mx::array& positions,
                          float scale, std::optional<int64_t> window);
std::tuple<mx::array, mx::array, mx::array> write_and_attend(
    const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& key_pool,
    const mx::array& value_pool, const mx::array& slots, const mx::array& tables,
    const mx::array& row_of_token, const mx::array& positions, float scale, std::optional<int64_t> window);

/// Multiplies integers in registers, in all threads; returns the number of multiplications.
int64_t integer_peak(int bits, int64_t rounds);

}  // namespace tiny_llm
