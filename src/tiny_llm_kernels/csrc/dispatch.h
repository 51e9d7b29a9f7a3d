// Which set of kernels runs: chosen once from what the processor can do, never at build time.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace tiny_llm {

/// The kernels in use.
const Kernels& kernels();

/// The name of the set in use, and those that this processor can run, best first.
std::string instruction_set();
std::vector<std::string> instruction_sets();

/// Throws std::invalid_argument for a set that is unknown or that this processor cannot run.
void select_instruction_set(const std::string& name);

}  // namespace tiny_llm
