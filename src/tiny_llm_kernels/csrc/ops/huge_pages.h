// Places memory that a step reads sequentially on huge pages: one entry of the processor's TLB covers 2 MiB. The
// TLB has a few thousand entries, so with pages of 4 KiB it would miss all the time.
#pragma once

#include <vector>

#include "mlx/array.h"

namespace tiny_llm {

/// Allocates a weight: row-contiguous, aligned to a cache line. Weights of 64 KiB and more are placed next to each
/// other in stretches of 64 MiB (or of one larger array), which are on huge pages if the system has them and are
/// not in MLX's memory statistics. MLX allocates smaller ones. Freed memory stays in its stretch for reuse; a
/// stretch returns to the system when nothing in it is in use.
void allocate_weights(mlx::core::array& a);

/// Allocates arrays that are read together. MLX allocates them; those that happen to be adjacent are moved to huge
/// pages. The contents are uninitialized.
void allocate_together(std::vector<mlx::core::array>& arrays);

}  // namespace tiny_llm
