// Paged attention for operators that contain it: argument checks, the job, and how it is run.
#pragma once

#include <optional>
#include <vector>

#include "node.h"

namespace tiny_llm {

/// A job that reads `keys` and `values` through `tables`; the caller adds q, out and what is to be written.
/// Prepares the threads' working memory. Throws std::bad_alloc.
AttentionJob reading_job(const mx::array& keys, const mx::array& values, const mx::array& tables,
                         const mx::array& row_of_token, const mx::array& positions, float scale,
                         int64_t window);

/// Computes the attention of all tokens, distributed over the threads (attention_items.cpp). Call it in a task of
/// the CPU stream, after all writes of the step. skipped: one element for each token, true if its output is not
/// needed and stays as it is; empty: none is skipped.
void attend_all(AttentionJob job, const Kernels& kernels, const std::vector<bool>& skipped = {});

/// The window as a number; without a window, or with one longer than any sequence, all positions.
int64_t checked_window(std::optional<int64_t> window);

/// Throws unless pools, tables, rows and positions match T tokens with H query and Hkv kv heads of size D.
void check_reading(int H, int Hkv, int T, int D, const mx::array& key_pool, const mx::array& value_pool,
                   const mx::array& tables, const mx::array& row_of_token, const mx::array& positions);

}  // namespace tiny_llm
