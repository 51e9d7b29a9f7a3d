// Shared by the operators: a graph node that runs on the CPU, argument checks, and array views.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "../dispatch.h"
#include "../threads.h"
#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"
#include "mlx/stream.h"
#include "mlx/utils.h"

namespace tiny_llm {

namespace mx = mlx::core;

/// A node whose work is a task on MLX's CPU stream.
class Node : public mx::Primitive {
 public:
  Node() : Primitive(mx::default_stream(mx::Device(mx::Device::cpu))) {}

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error(std::string(name()) + " of tiny_llm_kernels runs on the CPU only");
  }

 protected:
  mx::cpu::CommandEncoder& encoder() { return mx::cpu::get_command_encoder(stream()); }
};

// ---- argument checks ----

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline std::string shape_text(const mx::Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline std::string shape_text(const mx::array& a) { return shape_text(a.shape()); }

inline void check_dtype(const char* name, const mx::array& a, mx::Dtype dtype) {
  if (a.dtype() != dtype) refuse(name, " must be ", dtype, ", got ", a.dtype());
}

inline void check_ndim(const char* name, const mx::array& a, size_t ndim) {
  if (a.ndim() != ndim)
    refuse(name, " must have ", ndim, ndim == 1 ? " axis" : " axes", ", got shape ", shape_text(a));
}

/// Requires a type that keys, values or weights may be stored in.
inline void check_storage(const char* name, const mx::array& a) {
  if (a.dtype() != mx::float32 && a.dtype() != mx::float16 && a.dtype() != mx::bfloat16) {
    refuse(name, " must be float32, float16 or bfloat16, got ", a.dtype());
  }
}

inline StorageType storage_of(mx::Dtype dtype) {
  return dtype == mx::float32   ? StorageType::float32
         : dtype == mx::float16 ? StorageType::float16
                                : StorageType::bfloat16;
}

/// `shape`: the required sizes; `letters`: how the message names them, such as "[T]".
inline void check_shape(const char* name, const mx::array& a, const mx::Shape& shape, const char* letters) {
  if (a.shape() != shape)
    refuse(name, " must have shape ", letters, " = ", shape_text(shape), ", got ", shape_text(a));
}

/// `shape`: the required sizes; `other`: the name of the array that they are taken from.
inline void check_same_shape(const char* name, const mx::array& a, const mx::Shape& shape,
                             const char* other) {
  if (a.shape() != shape)
    refuse(name, " must have the shape of ", other, ", ", shape_text(shape), ", got ", shape_text(a));
}

// ---- views ----

/// `a` if it is row-contiguous, else a row-contiguous copy (made by a task before the node's own).
mx::array dense(const mx::array& a, mx::cpu::CommandEncoder& encoder);

/// `a` if its last axis is contiguous, else a row-contiguous copy.
mx::array dense_last_axis(const mx::array& a, mx::cpu::CommandEncoder& encoder);

/// The array as rows over its last axis, at equal distances.
/// If that is not possible, `a` is replaced by a copy.
Rows rows_of(mx::array& a, mx::cpu::CommandEncoder& encoder);

/// Memory for an output or a temporary, row-contiguous.
inline void allocate(mx::array& a) { a.set_data(mx::allocator::malloc(a.nbytes())); }

/// Memory for a [B, H, L, D] output stored as [B, L, H, D], so that its `transpose(0, 2, 1, 3)` is free.
void allocate_heads_inside(mx::array& a);

template <typename T>
T* temporary(size_t count, mx::cpu::CommandEncoder& encoder) {
  mx::array a({static_cast<int>(count * sizeof(T))}, mx::uint8, nullptr, {});
  allocate(a);
  T* data = a.data<T>();
  encoder.add_temporary(std::move(a));
  return data;
}

}  // namespace tiny_llm
