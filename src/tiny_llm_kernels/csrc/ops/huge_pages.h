// Memory that a step reads from end to end lies on huge pages: 2 MiB behind one entry of the processor's table of
// addresses, which has room for some thousands of pages of 4 KiB and would else be missed all the time.
#pragma once

#include <vector>

#include "mlx/array.h"

namespace tiny_llm {

/// Memory for weights, row-contiguous, from a cache line on. Those of 64 KiB and more lie side by side in
/// stretches of 64 MiB, or of one larger array, which MLX does not count and which are on huge pages where the
/// system has them; smaller ones lie where MLX puts them. What is given back stays with its stretch and is used
/// again; a stretch goes back to the system when nothing of it is in use.
void allocate_weights(mlx::core::array& a);

/// Memory for arrays that belong together, each MLX's own, on huge pages where they happen to lie side by side.
/// What is in it is not said.
void allocate_together(std::vector<mlx::core::array>& arrays);

}  // namespace tiny_llm
