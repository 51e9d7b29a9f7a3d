#include "huge_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "mlx/allocator.h"
#include "node.h"

namespace tiny_llm {
namespace {

constexpr size_t HUGE_PAGE = size_t{2} << 20, CACHE_LINE = 64, STRETCH = size_t{64} << 20;
constexpr size_t MIN_BYTES = HUGE_PAGE / 32;  // smaller arrays are not placed in a stretch

char* rounded_up(char* address, int64_t to) {
  return reinterpret_cast<char*>(tiny_llm::rounded_up(reinterpret_cast<int64_t>(address), to));
}

/// For memory that is not in use yet. Has no effect on systems without huge pages.
void ask_for_huge_pages(char* begin, size_t bytes) {
#ifdef MADV_HUGEPAGE
  madvise(begin, bytes, MADV_HUGEPAGE);
#endif
}

/// For memory that is partly in use: its contents are moved. Covers all pages that the range touches, with
/// whatever else is on them. Linux 6.1 and later replace the pages immediately, earlier versions in the background.
void move_to_huge_pages(char* begin, char* end) {
#ifdef MADV_HUGEPAGE
  constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, which many system headers lack
  for (char* page = rounded_up(begin - HUGE_PAGE + 1, HUGE_PAGE); page < end; page += HUGE_PAGE) {
    madvise(page, HUGE_PAGE, MADV_HUGEPAGE);
    madvise(page, HUGE_PAGE, COLLAPSE);
  }
#endif
}

/// A range of addresses for first-fit allocation. The system provides memory at the first write. It lives as long
/// as any allocation in it.
class Stretch {
 public:
  explicit Stretch(size_t bytes) : bytes_(bytes + HUGE_PAGE) {
    void* mapped =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    mapped_ = static_cast<char*>(mapped);
    char* first = rounded_up(mapped_, HUGE_PAGE);
    ask_for_huge_pages(first, bytes);
    gaps_[first] = bytes;
  }
  ~Stretch() { munmap(mapped_, bytes_); }
  Stretch(const Stretch&) = delete;

  /// Allocates whole cache lines; null if no gap is large enough.
  char* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto gap =
        std::find_if(gaps_.begin(), gaps_.end(), [=](const auto& g) { return g.second >= bytes; });
    if (gap == gaps_.end()) return nullptr;
    const auto [place, size] = *gap;
    gaps_.erase(gap);
    if (size > bytes) gaps_[place + bytes] = size - bytes;
    return place;
  }

  void give_back(char* place, size_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto here = gaps_.emplace(place, bytes).first, next = std::next(here);
    if (next != gaps_.end() && here->first + here->second == next->first) {
      here->second += next->second;
      gaps_.erase(next);
    }
    if (here == gaps_.begin()) return;
    const auto before = std::prev(here);
    if (before->first + before->second != here->first) return;
    before->second += here->second;
    gaps_.erase(here);
  }

 private:
  char* mapped_;
  size_t bytes_;
  std::mutex mutex_;
  std::map<char*, size_t> gaps_;
};

/// An allocation, which keeps its stretch alive.
struct Piece {
  std::shared_ptr<Stretch> stretch;
  char* begin;
};

Piece take(size_t bytes) {
  static std::mutex mutex;
  static std::vector<std::weak_ptr<Stretch>> stretches;
  const std::lock_guard lock(mutex);
  std::erase_if(stretches, [](const auto& stretch) { return stretch.expired(); });
  for (const auto& some : stretches) {
    auto stretch = some.lock();
    if (char* begin = stretch ? stretch->take(bytes) : nullptr) return {std::move(stretch), begin};
  }
  auto stretch = std::make_shared<Stretch>(std::max(bytes, STRETCH));
  stretches.push_back(stretch);
  return {stretch, stretch->take(bytes)};
}

/// Makes `a` row-contiguous in `memory`, starting `offset` bytes from its start.
void put(mx::array& a, mx::allocator::Data memory, int64_t offset) {
  mx::array::Flags flags{};
  flags.contiguous = flags.row_contiguous = true;
  flags.col_contiguous = a.size() <= 1;
  mx::Strides strides(a.ndim(), 1);
  for (size_t axis = a.ndim() - 1; axis > 0; --axis) strides[axis - 1] = strides[axis] * a.shape(axis);
  a.set_data(std::move(memory), a.size(), strides, flags, offset);
}

/// Allocates with MLX, aligned to a cache line.
void allocate_aligned(mx::array& a) {
  auto memory = mx::allocator::malloc(a.nbytes() + CACHE_LINE);
  const auto address = reinterpret_cast<uintptr_t>(memory.buffer().raw_ptr());
  put(a, std::move(memory), static_cast<int64_t>(-address % CACHE_LINE));
}

}  // namespace

void allocate_weights(mx::array& a) {
  const size_t bytes = a.nbytes();
  if (bytes < MIN_BYTES) return allocate_aligned(a);
  // One more cache line: MLX stores a buffer's size directly before the buffer, at the end of this line.
  const size_t taken = CACHE_LINE + tiny_llm::rounded_up(bytes, CACHE_LINE);
  const Piece piece = take(taken);
  auto* size = reinterpret_cast<size_t*>(piece.begin + CACHE_LINE) - 1;
  *size = bytes;
  const auto give_back = [piece, taken](mx::allocator::Buffer) {
    piece.stretch->give_back(piece.begin, taken);
  };
  put(a, mx::allocator::Data(mx::allocator::Buffer(size), give_back), 0);
}

void allocate_together(std::vector<mx::array>& arrays) {
  struct Range {
    char *begin, *end;
  };
  std::vector<Range> ranges;
  for (mx::array& a : arrays) {
    allocate_aligned(a);
    ranges.push_back({a.data<char>(), a.data<char>() + a.nbytes()});
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 0; i < ranges.size();) {
    Range all = ranges[i];
    for (++i; i < ranges.size() && ranges[i].begin - all.end < 1 << 16; ++i) all.end = ranges[i].end;
    if (all.end - all.begin >= static_cast<int64_t>(HUGE_PAGE)) move_to_huge_pages(all.begin, all.end);
  }
}

}  // namespace tiny_llm
