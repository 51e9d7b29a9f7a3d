#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <memory>

namespace tiny_llm {
namespace {

int available_cpus() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? std::max(1, CPU_COUNT(&set)) : 1;
}

struct State {
  std::mutex mutex;
  int threads = available_cpus();
  std::shared_ptr<ThreadPool> pool;  // created at first use; a running loop keeps its pool alive
};

// Never destroyed: MLX's own threads may still run a kernel while the process exits.
State& state() {
  static State* state = [] {
    // A forked child has the pool's memory but none of its threads: it leaks that pool and creates a new one at
    // first use.
    pthread_atfork([] { tiny_llm::state().mutex.lock(); }, [] { tiny_llm::state().mutex.unlock(); },
                   [] {
                     new std::shared_ptr<ThreadPool>(std::move(tiny_llm::state().pool));
                     tiny_llm::state().pool = nullptr;
                     tiny_llm::state().mutex.unlock();
                   });
    return new State;
  }();
  return *state;
}

std::shared_ptr<ThreadPool> pool() {
  std::lock_guard lock(state().mutex);
  if (!state().pool) {
    state().pool = std::make_shared<ThreadPool>(state().threads);
    state().threads = state().pool->threads();
  }
  return state().pool;
}

}  // namespace

int num_threads() {
  std::lock_guard lock(state().mutex);
  return state().threads;
}

void set_num_threads(int threads) {
  std::shared_ptr<ThreadPool> old;  // destroyed, its threads joined, outside the lock
  std::lock_guard lock(state().mutex);
  state().threads = threads;
  old = std::move(state().pool);
  state().pool = nullptr;
}

void parallel_for(int64_t count, int64_t smallest_piece, const ThreadPool::Body& body) {
  if (count <= smallest_piece) return body(0, count);
  const auto here = pool();
  here->parallel_for(count, smallest_piece, 2 * here->threads(), body);
}

void parallel_for_each(int64_t count, const ThreadPool::Body& body) {
  if (count <= 1) return body(0, count);
  pool()->parallel_for(count, 1, count, body);
}

}  // namespace tiny_llm
