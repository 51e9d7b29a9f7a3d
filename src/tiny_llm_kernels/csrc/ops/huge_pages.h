// Memory that a step reads from end to end lies on huge pages: 2 MiB behind one entry of the processor's table of
// addresses, which has room for some thousands of pages of 4 KiB and would else be missed all the time.
#pragma once

#include "mlx/array.h"

namespace tiny_llm {

/// Memory for weights, row-contiguous, from a cache line on. Large ones lie side by side in stretches of memory
/// that MLX does not count; the others, and all where the system has no huge pages, where MLX puts them.
void allocate_weights(mlx::core::array& a);

/// Memory for arrays that belong together, each MLX's own, on huge pages where they happen to lie side by side.
/// What is in it is not said.
void allocate_together(std::vector<mlx::core::array>& arrays);

}  // namespace tiny_llm
