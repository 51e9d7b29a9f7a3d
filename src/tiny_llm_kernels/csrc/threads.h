// The process's one thread pool.
#pragma once

#include "thread_pool.h"

namespace tiny_llm {

/// The threads of the pool; until its first loop, those that it will ask the system for.
int num_threads();
void set_num_threads(int threads);

/// ThreadPool::parallel_for on the process's pool, with pieces small enough to share out evenly.
void parallel_for(int64_t count, int64_t smallest_piece, const ThreadPool::Body& body);

/// The same with pieces of one item: for few, long and unequal items.
void parallel_for_each(int64_t count, const ThreadPool::Body& body);

}  // namespace tiny_llm
