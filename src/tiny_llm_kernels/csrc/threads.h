// The thread pool of the process.
#pragma once

#include "thread_pool.h"

namespace tiny_llm {

/// The number of threads in the pool; before its first loop, the number that it will try to start.
int num_threads();
void set_num_threads(int threads);

/// ThreadPool::parallel_for on the process's pool, with pieces small enough for an even distribution.
void parallel_for(int64_t count, int64_t smallest_piece, const ThreadPool::Body& body);

/// The same with pieces of one item: for few, long items of unequal length.
void parallel_for_each(int64_t count, const ThreadPool::Body& body);

}  // namespace tiny_llm
