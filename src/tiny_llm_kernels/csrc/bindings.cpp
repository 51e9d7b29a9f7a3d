// The extension module tiny_llm_kernels._kernels. Only bindings: the documentation is in __init__.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "dispatch.h"
#include "mlx/mlx.h"
#include "ops/ops.h"
#include "ops/transformer_block.h"
#include "threads.h"

// Python searches the file for this stamp before loading it (_loading.py). An extension needs the MLX version
// that it was built for.
extern "C" __attribute__((used, visibility("default"))) const char tiny_llm_stamp[] =
    "tiny_llm_kernels built for mlx=" TINY_LLM_MLX_VERSION ";";

namespace nb = nanobind;
using namespace nb::literals;
namespace mx = mlx::core;

NB_MODULE(_kernels, m) {
  m.def("pack", &tiny_llm::pack, "weight"_a, "scales"_a, "biases"_a, "group_size"_a, "bits"_a);
  m.def("stack_packed", &tiny_llm::stack_packed, "parts"_a);
  m.def("ggml_quants", &tiny_llm::ggml_quants, "blocks"_a, "bits"_a);
  m.def("quantized_matmul", &tiny_llm::quantized_matmul, "x"_a, "packed"_a, "out_features"_a, "bits"_a,
        "activation_bits"_a);
  m.def("dequantize_rows", &tiny_llm::dequantize_rows, "packed"_a, "ids"_a, "in_features"_a, "bits"_a);
  m.def("dense_matmul", &tiny_llm::dense_matmul, "x"_a, "weight"_a);
  m.def("flash_attention", &tiny_llm::flash_attention, "q"_a, "k"_a, "v"_a, "scale"_a, "causal"_a);
  m.def("rms_norm", &tiny_llm::rms_norm, "x"_a, "weight"_a, "eps"_a);
  m.def("swiglu", &tiny_llm::swiglu, "gate"_a, "up"_a);
  m.def("geglu", &tiny_llm::geglu, "gate"_a, "up"_a);
  m.def("rope", &tiny_llm::rope, "x"_a, "positions"_a, "inv_freq"_a);
  m.def("sample", &tiny_llm::sample, "logits"_a, "rows"_a, "temperature"_a, "min_p"_a, "top_k"_a, "top_p"_a,
        "uniforms"_a, "masks"_a = nb::none());
  m.def(
      "zeros",
      [](int count, const std::vector<int>& shape, mx::Dtype dtype) {
        return tiny_llm::zeros(count, mx::Shape(shape.begin(), shape.end()), dtype);
      },
      "count"_a, "shape"_a, "dtype"_a);
  m.def("copy_blocks", &tiny_llm::copy_blocks, "target"_a, "from_blocks"_a, "to_blocks"_a,
        "source"_a = nb::none());
  m.def("paged_attention", &tiny_llm::paged_attention, "q"_a, "key_pool"_a, "value_pool"_a, "tables"_a,
        "row_of_token"_a, "positions"_a, "scale"_a, "window"_a = nb::none());
  m.def("write_and_attend", &tiny_llm::write_and_attend, "q"_a, "k"_a, "v"_a, "key_pool"_a, "value_pool"_a,
        "slots"_a, "tables"_a, "row_of_token"_a, "positions"_a, "scale"_a, "window"_a = nb::none());
  using tiny_llm::BlockWeights, tiny_llm::TransformerBlock;
  using Matrix = std::tuple<mx::array, int, int>;
  using Vector = std::optional<mx::array>;
  nb::class_<TransformerBlock>(m, "TransformerBlock")
      .def(
          "__init__",
          [](TransformerBlock* self, const mx::array& attention_norm, const mx::array& mlp_norm,
             const Matrix& qkv, const Matrix& o, const Matrix& gate_up, const Matrix& down,
             const mx::array& inv_freq, int H, int Hkv, int D, float eps, int activation_bits,
             const Vector& qkv_bias, const Vector& q_norm, const Vector& k_norm,
             const Vector& attention_out_norm, const Vector& mlp_out_norm, bool gelu) {
            const auto matrix = [](const Matrix& m) {
              return tiny_llm::PackedMatrix{std::get<0>(m), std::get<1>(m), std::get<2>(m)};
            };
            new (self) TransformerBlock(BlockWeights{attention_norm, mlp_norm, attention_out_norm,
                                                     mlp_out_norm, matrix(qkv), matrix(o), matrix(gate_up),
                                                     matrix(down), qkv_bias, q_norm, k_norm, inv_freq, H, Hkv,
                                                     D, activation_bits, eps, gelu});
          },
          "attention_norm"_a, "mlp_norm"_a, "qkv"_a, "o"_a, "gate_up"_a, "down"_a, "inv_freq"_a,
          "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "eps"_a, "activation_bits"_a,
          "qkv_bias"_a = nb::none(), "q_norm"_a = nb::none(), "k_norm"_a = nb::none(),
          "attention_out_norm"_a = nb::none(), "mlp_out_norm"_a = nb::none(), "gelu"_a = false)
      .def("__call__", &TransformerBlock::operator(), "x"_a, "key_pool"_a, "value_pool"_a, "slots"_a,
           "tables"_a, "row_of_token"_a, "positions"_a, "scale"_a, "window"_a = nb::none(),
           "out_rows"_a = nb::none());
  m.def("integer_peak", &tiny_llm::integer_peak, "bits"_a, "rounds"_a);
  m.def("set_num_threads", &tiny_llm::set_num_threads, "n"_a);
  m.def("num_threads", &tiny_llm::num_threads);
  m.def("instruction_set", &tiny_llm::instruction_set);
  m.def("instruction_sets", &tiny_llm::instruction_sets);
  m.def("select_instruction_set", &tiny_llm::select_instruction_set, "name"_a);
}
