#include "scratch.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "../kernels/kernels.h"
#include "../threads.h"

namespace tiny_llm {
namespace {

using Memory = std::unique_ptr<void, decltype(&std::free)>;

Memory new_memory() {
  Memory memory(std::aligned_alloc(64, SCRATCH_BYTES), &std::free);
  if (!memory) throw std::bad_alloc();
  return memory;
}

struct State {
  std::mutex mutex;
  std::vector<Memory> ready;
  int in_use = 0;
};

// Never destroyed: threads may exit after static destructors have run.
State& state() {
  static State* state = new State;
  return *state;
}

/// The memory of one thread; another thread can use it when the thread exits.
struct ThreadScratch {
  Memory memory{nullptr, &std::free};

  void* get() {
    if (memory) return memory.get();
    std::lock_guard lock(state().mutex);
    if (state().ready.empty()) state().ready.push_back(new_memory());
    memory = std::move(state().ready.back());
    state().ready.pop_back();
    state().in_use += 1;
    return memory.get();
  }

  ~ThreadScratch() {
    if (!memory) return;
    std::lock_guard lock(state().mutex);
    state().in_use -= 1;
    state().ready.push_back(std::move(memory));
  }
};

}  // namespace

void provide_scratch() {
  const int threads = num_threads();
  std::lock_guard lock(state().mutex);
  const size_t wanted = std::max(1, threads - state().in_use);
  while (state().ready.size() < wanted) state().ready.push_back(new_memory());
}

void* thread_scratch() {
  static thread_local ThreadScratch scratch;
  return scratch.get();
}

}  // namespace tiny_llm
