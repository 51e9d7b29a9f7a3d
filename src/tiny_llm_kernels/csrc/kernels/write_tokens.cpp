// The writes of attention over pages: stores each token's key and value in its slot, in the pool's type.
//
//   slot = block * block_size + offset       pool [num_blocks, Hkv, block_size, D]: D adjacent numbers per head
#include "kernels.h"
#include "vec.h"

namespace tiny_llm::TINY_LLM_ISA {

/// Stores D floats in the pool.
template <typename T>
INLINE void put(typename T::Storage* to, const float* from, int64_t D) {
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) T::store8(to + d, load(from + d));
  if (const int64_t left = D - d) put_first<T>(to + d, load_first(from + d, left), left);
}

template <typename T>
static void write_with(const AttentionJob& job, int64_t begin, int64_t end) {
  auto* keys = static_cast<typename T::Storage*>(job.keys);
  auto* values = static_cast<typename T::Storage*>(job.values);
  for (int64_t token = begin; token < end; ++token) {
    if (!job.slot_in_range(token)) continue;
    const int64_t block = job.slots[token] / job.block_size, offset = job.slots[token] % job.block_size;
    for (int64_t head = 0; head < job.Hkv; ++head) {
      const int64_t place = ((block * job.Hkv + head) * job.block_size + offset) * job.D;
      put<T>(keys + place, job.k + head * job.k_head + token * job.k_token, job.D);
      put<T>(values + place, job.v + head * job.v_head + token * job.v_token, job.D);
    }
  }
}

/// An item is a token. A slot out of range is not written.
void write_tokens(const AttentionJob& job, int64_t begin, int64_t end) {
  switch (job.storage) {
    case StorageType::float32: return write_with<Float32>(job, begin, end);
    case StorageType::float16: return write_with<Float16>(job, begin, end);
    case StorageType::bfloat16: return write_with<BFloat16>(job, begin, end);
  }
}

}  // namespace tiny_llm::TINY_LLM_ISA
