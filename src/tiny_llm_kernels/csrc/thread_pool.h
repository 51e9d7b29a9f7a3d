// A small thread pool for loops with independent items.
//
// The calling thread works too. Workers spin for a limited time (the next operator usually follows within
// microseconds), then sleep, so that an idle engine leaves the processors to other programs.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace tiny_llm {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class ThreadPool {
 public:
  using Body = std::function<void(int64_t begin, int64_t end)>;

  /// Starts `threads` threads, the caller included, or as many as the system allows.
  explicit ThreadPool(int threads) {
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {  // limit on processes or memory: use fewer, results are the same
    }
  }

  ~ThreadPool() {
    stop_ = true;
    announce();
    for (auto& worker : workers_) worker.join();
  }

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  /// Calls body(begin, end) on pieces until [0, count) is done. Each piece is 1/`parts` of the remaining items and
  /// at least `smallest`, so pieces are large at first and all threads finish together. The order of pieces and
  /// their threads are unspecified. Only one loop at a time uses the workers: a second caller (another MLX stream)
  /// runs its whole loop in its own thread.
  void parallel_for(int64_t count, int64_t smallest, int64_t parts, const Body& body) {
    std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
    if (!lock || workers_.empty() || count <= smallest) return body(0, count);
    body_ = &body, count_ = count, smallest_ = smallest, parts_ = parts, next_ = 0;
    announce();  // odd: open
    take_pieces();
    phase_.fetch_add(1);  // even: closed; a worker that is not inside by now stays out
    for (int spins = 1; inside_ != 0; ++spins) {
      spins % 256 ? relax() : std::this_thread::yield();  // a worker may have been descheduled
    }
  }

 private:
  void announce() {
    phase_.fetch_add(1);
    phase_.notify_all();
  }

  void take_pieces() {
    for (int64_t begin = next_; begin < count_;) {
      const int64_t end = std::min(count_, begin + std::max(smallest_, (count_ - begin) / parts_));
      if (!next_.compare_exchange_weak(begin, end)) continue;
      (*body_)(begin, end);
      begin = next_;
    }
  }

  void work() {
    for (uint32_t seen = 0; !stop_;) {
      seen = wait_for_change(seen);
      // First increment `inside_`, then check the phase. The caller first closes the phase and then waits for
      // `inside_`, so it never returns while a worker still reads the loop.
      inside_.fetch_add(1);
      if (phase_ % 2 == 1 && !stop_) take_pieces();
      inside_.fetch_sub(1);
    }
  }

  uint32_t wait_for_change(uint32_t seen) {
    const auto until = std::chrono::steady_clock::now() + SPIN;
    do {
      for (int i = 0; i < 32; ++i, relax()) {
        if (const uint32_t now = phase_; now != seen) return now;
      }
      std::this_thread::yield();  // to other threads that need a processor: MLX's main thread, a server
    } while (std::chrono::steady_clock::now() < until);
    phase_.wait(seen);
    return phase_;
  }

  static constexpr std::chrono::microseconds SPIN{100};

  const Body* body_ = nullptr;
  int64_t count_ = 0, smallest_ = 1, parts_ = 1;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int> inside_{0};
  std::atomic<bool> stop_{false};
  std::mutex busy_;
  std::vector<std::thread> workers_;
};

}  // namespace tiny_llm
