// Paged attention for operators that contain it: its checks, its job, and how that is run.
#pragma once

#include <optional>

#include "node.h"

namespace tiny_llm {

/// A job that reads `keys` and `values` through `tables`; the caller adds q and out, and what is written.
/// Provides the memory that threads attend in. Throws std::bad_alloc.
AttentionJob reading_job(const mx::array& keys, const mx::array& values, const mx::array& tables,
                         const mx::array& row_of_token, const mx::array& positions, float scale,
                         int64_t window);

/// Runs in a task of the CPU stream: all tokens attend, shared out among the threads (attention_items.cpp).
/// Every write of the step must be done.
void attend_all(AttentionJob job, const Kernels& kernels);

/// The window as a number: every position where there is none, or where it is longer than any sequence.
int64_t checked_window(std::optional<int64_t> window);

/// Refuses pools, tables, rows and positions that do not fit T tokens with H and Hkv heads of D numbers.
void check_reading(int H, int Hkv, int T, int D, const mx::array& key_pool, const mx::array& value_pool,
                   const mx::array& tables, const mx::array& row_of_token, const mx::array& positions);

}  // namespace tiny_llm
