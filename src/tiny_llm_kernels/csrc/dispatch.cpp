#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace tiny_llm {

// To add an instruction set: compile its namespace with add_kernels(NAME flags) in CMakeLists.txt, declare it
// here, and list it in `variants`, best first.
namespace portable { extern const Kernels kernels; }
#ifdef TINY_LLM_X86
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif

namespace {

struct Variant {
  const char* name;
  const Kernels* kernels;
  bool runs_here;
};

const std::vector<Variant>& variants() {
#ifdef TINY_LLM_X86
  static const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                                 __builtin_cpu_supports("avx512vnni");
#endif
  static const std::vector<Variant> all = {
#ifdef TINY_LLM_X86
      {"avx512", &avx512::kernels, has_avx512},
      {"avx2", &avx2::kernels, has_avx2},
#endif
      {"portable", &portable::kernels, true},
  };
  return all;
}

const Variant* best() {
  for (const auto& variant : variants()) {
    if (variant.runs_here) return &variant;
  }
  return nullptr;
}

std::atomic<const Variant*>& current() {
  static std::atomic<const Variant*> variant{best()};
  return variant;
}

}  // namespace

const Kernels& kernels() { return *current().load()->kernels; }

std::string instruction_set() { return current().load()->name; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto& variant : variants()) {
    if (variant.runs_here) names.emplace_back(variant.name);
  }
  return names;
}

void select_instruction_set(const std::string& name) {
  for (const auto& variant : variants()) {
    if (variant.runs_here && name == variant.name) {
      current() = &variant;
      return;
    }
  }
  std::string can;
  for (const auto& known : instruction_sets()) can += (can.empty() ? "" : ", ") + known;
  throw std::invalid_argument("instruction set '" + name +
                              "' is not supported here; this processor supports: " + can);
}

}  // namespace tiny_llm
