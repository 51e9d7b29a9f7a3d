// The memory that a thread attends in: too much for a stack, so each thread keeps a piece of the heap.
//
// Work runs in threads where nothing may throw. So memory is taken where an operator is evaluated, and a thread
// that attends for the first time finds a piece that lies ready.
#pragma once

namespace tiny_llm {

/// Have a piece ready for every thread that may attend. Throws std::bad_alloc.
void provide_desks();

/// This thread's DESK_BYTES; its own until it ends.
void* own_desk();

}  // namespace tiny_llm
