// Selects the set of kernels at run time, from what the processor supports, never at build time.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace tiny_llm {

/// The kernels in use.
const Kernels& kernels();

/// The name of the set in use, and the sets that this processor supports, best first.
std::string instruction_set();
std::vector<std::string> instruction_sets();

/// Throws std::invalid_argument for a set that is unknown or not supported by this processor.
void select_instruction_set(const std::string& name);

}  // namespace tiny_llm
