#include "node.h"

#include <cstring>

namespace tiny_llm {
namespace {

/// Copies any strides into row-contiguous order: the slow path, which keeps the kernels simple.
void copy_strided(const char* source, const mx::Shape& shape, const mx::Strides& strides, size_t axis,
                  size_t itemsize, char*& target) {
  const bool row = axis + 1 == shape.size() && strides[axis] == 1;
  if (row || axis == shape.size()) {
    const size_t bytes = row ? shape[axis] * itemsize : itemsize;
    std::memcpy(target, source, bytes);
    target += bytes;
    return;
  }
  for (int i = 0; i < shape[axis]; ++i) {
    copy_strided(source + i * strides[axis] * static_cast<int64_t>(itemsize), shape, strides, axis + 1,
                 itemsize, target);
  }
}

mx::array copied(const mx::array& a, mx::cpu::CommandEncoder& encoder) {
  mx::array copy(a.shape(), a.dtype(), nullptr, {});
  allocate(copy);
  encoder.add_temporary(copy);
  encoder.dispatch(
      [source = a.data<char>(), target = copy.data<char>(), shape = a.shape(), strides = a.strides(),
       itemsize = a.itemsize()]() mutable { copy_strided(source, shape, strides, 0, itemsize, target); });
  return copy;
}

}  // namespace

mx::array dense(const mx::array& a, mx::cpu::CommandEncoder& encoder) {
  return a.flags().row_contiguous ? a : copied(a, encoder);
}

mx::array dense_last_axis(const mx::array& a, mx::cpu::CommandEncoder& encoder) {
  return a.shape(-1) == 1 || a.strides(-1) == 1 ? a : copied(a, encoder);
}

Rows rows_of(mx::array& a, mx::cpu::CommandEncoder& encoder) {
  a = dense_last_axis(a, encoder);
  for (bool again = true;; again = false) {
    int64_t count = 1, stride = a.shape(-1);
    bool even = true;
    for (int axis = static_cast<int>(a.ndim()) - 2; axis >= 0; --axis) {
      if (a.shape(axis) == 1) continue;
      if (count == 1) {
        stride = a.strides(axis);
      } else {
        even = even && a.strides(axis) == stride * count;
      }
      count *= a.shape(axis);
    }
    if (even || !again) return {a.data<float>(), count, stride};
    a = copied(a, encoder);
  }
}

void allocate_heads_inside(mx::array& a) {
  const int64_t H = a.shape(1), L = a.shape(2), D = a.shape(3);
  mx::array::Flags flags{};
  flags.contiguous = true;
  flags.row_contiguous = H == 1 || L == 1;
  flags.col_contiguous = a.size() <= 1;
  a.set_data(mx::allocator::malloc(a.nbytes()), a.size(), {L * H * D, D, H * D, 1}, flags);
}

}  // namespace tiny_llm
