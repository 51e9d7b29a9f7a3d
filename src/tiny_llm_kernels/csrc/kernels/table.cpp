// The kernels of this instruction set, as a table of function pointers.
#include "kernels.h"

namespace tiny_llm::TINY_LLM_ISA {

void quantize_rows(const QuantizeJob&, int64_t, int64_t);
void quantized_matmul(const MatmulJob&, int64_t, int64_t);
void dequantize_rows(const DequantizeJob&, int64_t, int64_t);
void dense_matmul(const DenseJob&, int64_t, int64_t);
void write_tokens(const AttentionJob&, int64_t, int64_t);
void attend(const AttentionJob&, int64_t, int64_t);
void reduce_partitions(const AttentionJob&, int64_t, int64_t);
void flash_attention(const FlashJob&, int64_t, int64_t);
void rms_norm(const RmsNormJob&, int64_t, int64_t);
void add(const AddJob&, int64_t, int64_t);
void swiglu(const SwigluJob&, int64_t, int64_t);
void rope(const RopeJob&, int64_t, int64_t);
void sample(const SampleJob&, int64_t, int64_t);
void integer_peak(const PeakJob&, int64_t, int64_t);

extern const Kernels kernels;
const Kernels kernels = {quantize_rows,
                         quantized_matmul,
                         dequantize_rows,
                         dense_matmul,
                         write_tokens,
                         attend,
                         reduce_partitions,
                         flash_attention,
                         rms_norm,
                         add,
                         swiglu,
                         rope,
                         sample,
                         integer_peak};

}  // namespace tiny_llm::TINY_LLM_ISA
