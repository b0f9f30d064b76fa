#include "core/cpu/allocator.h"

#include <sys/mman.h>

#include <bit>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include "core/counting_allocator.h"

namespace krait::core {

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;

// Large blocks lie in huge pages where the system gives them: a walk along columns misses the address cache at every
// page. It is advice only, so its result does not matter.
void* fresh(size_t size) {
  const bool large = size >= kHugePage;
  void* p = nullptr;
  if (posix_memalign(&p, large ? kHugePage : kAlignment, size) != 0) return nullptr;  // aligned_alloc wants multiples
  if (large) madvise(p, size, MADV_HUGEPAGE);
  return p;
}

// Blocks are rounded up to a quarter of a power of two and kept by size when freed: a training step asks for
// the same sizes again and again, and fresh pages from the system cost a fault each.
class CpuAllocator final : public CountingAllocator {
 public:
  void* allocate(size_t bytes) override {
    if (bytes == 0) return nullptr;
    const size_t size = rounded(bytes);
    const std::lock_guard lock(mutex_);
    void* p = nullptr;
    if (auto it = free_.find(size); it != free_.end() && !it->second.empty()) {
      p = it->second.back();
      it->second.pop_back();
    } else {
      p = fresh(size);
      if (!p) {
        release_locked();
        p = fresh(size);
      }
      if (!p)
        throw OutOfMemory(fmt::format("out of memory: wanted {:.2f} GiB more, {:.2f} GiB in use", static_cast<double>(bytes) / (1 << 30),
                                      static_cast<double>(stats_.current_bytes) / (1 << 30)));
      stats_.reserved_bytes += static_cast<int64_t>(size);
      ++stats_.system_allocations;
    }
    const size_t asked = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    used_[p] = {size, asked};
    count(static_cast<int64_t>(asked));
    return p;
  }

  void deallocate(void* pointer) noexcept override {
    const std::lock_guard lock(mutex_);
    const auto it = used_.find(pointer);
    if (it == used_.end()) return;
    stats_.current_bytes -= static_cast<int64_t>(it->second.asked);
    free_[it->second.size].push_back(pointer);
    used_.erase(it);
  }

 private:
  static size_t rounded(size_t bytes) {
    const size_t step = std::max(kAlignment, std::bit_floor(bytes) / 4);
    return (bytes + step - 1) / step * step;
  }
  void release_locked() override {
    for (auto& [size, blocks] : free_) {
      for (void* p : blocks) std::free(p);
      stats_.reserved_bytes -= static_cast<int64_t>(size * blocks.size());
      blocks.clear();
    }
  }

  struct Block { size_t size, asked; };
  std::unordered_map<size_t, std::vector<void*>> free_;
  std::unordered_map<void*, Block> used_;
};

}  // namespace

Allocator& cpu_allocator() {
  static auto* instance = new CpuAllocator;  // outlives every static tensor
  return *instance;
}

}  // namespace krait::core
