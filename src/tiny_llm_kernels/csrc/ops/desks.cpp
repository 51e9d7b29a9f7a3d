#include "desks.h"

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

using Desk = std::unique_ptr<void, decltype(&std::free)>;

Desk new_desk() {
  Desk desk(std::aligned_alloc(64, DESK_BYTES), &std::free);
  if (!desk) throw std::bad_alloc();
  return desk;
}

struct State {
  std::mutex mutex;
  std::vector<Desk> ready;
  int in_use = 0;
};

// Never destroyed: threads may end after everything else.
State& state() {
  static State* state = new State;
  return *state;
}

/// A thread's own; ready for another one when the thread ends.
struct Own {
  Desk desk{nullptr, &std::free};

  void* get() {
    if (desk) return desk.get();
    std::lock_guard lock(state().mutex);
    if (state().ready.empty()) state().ready.push_back(new_desk());
    desk = std::move(state().ready.back());
    state().ready.pop_back();
    state().in_use += 1;
    return desk.get();
  }

  ~Own() {
    if (!desk) return;
    std::lock_guard lock(state().mutex);
    state().in_use -= 1;
    state().ready.push_back(std::move(desk));
  }
};

}  // namespace

void provide_desks() {
  const int threads = num_threads();
  std::lock_guard lock(state().mutex);
  const size_t wanted = std::max(1, threads - state().in_use);
  while (state().ready.size() < wanted) state().ready.push_back(new_desk());
}

void* own_desk() {
  static thread_local Own own;
  return own.get();
}

}  // namespace tiny_llm
