// The working memory of attention: too large for a stack, so each thread keeps heap memory for it.
//
// Kernels run in threads that must not throw. So memory is allocated when an operator is evaluated, and a thread
// that computes attention for the first time takes a prepared piece.
#pragma once

namespace tiny_llm {

/// Prepares memory for every thread that may compute attention. Throws std::bad_alloc.
void provide_scratch();

/// SCRATCH_BYTES for the calling thread, until it exits.
void* thread_scratch();

}  // namespace tiny_llm
