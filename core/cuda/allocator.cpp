#include "core/allocator.h"

#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

#include "core/counting_allocator.h"
#include "core/cpu/allocator.h"
#include "core/cuda/check.h"
#include "core/stream.h"

namespace krait::core {

namespace {

constexpr size_t kAlignment = 512;
constexpr size_t kSmall = size_t{1} << 20;     // up to here blocks come from 2 MiB segments
constexpr size_t kSegment = size_t{2} << 20;

struct Block {
  char* pointer;
  size_t size;
  int pool;
  bool free;
  Block* left;   // neighbours in the same segment
  Block* right;
};

struct BySize {
  bool operator()(const Block* a, const Block* b) const {
    return a->size != b->size ? a->size < b->size : a->pointer < b->pointer;
  }
};

// Best fit over free blocks that are split and joined within segments taken from cudaMalloc. All work of a
// device is queued on one stream, so a freed block may be reused at once: later work runs later.
class CudaAllocator final : public CountingAllocator {
 public:
  explicit CudaAllocator(int index) : index_(index) {}

  void* allocate(size_t bytes) override {
    if (bytes == 0) return nullptr;
    const size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const std::lock_guard lock(mutex_);
    auto& free = free_[pool_];
    Block key{nullptr, size, pool_, true, nullptr, nullptr};
    auto it = free.lower_bound(&key);
    Block* block = nullptr;
    if (it != free.end()) {
      block = *it;
      free.erase(it);
    } else {
      block = new_segment(size, bytes);
    }
    if (block->size >= size + kAlignment) {
      auto* rest = new Block{block->pointer + size, block->size - size, block->pool, true, block, block->right};
      if (block->right) block->right->left = rest;
      block->right = rest;
      block->size = size;
      free.insert(rest);
    }
    block->free = false;
    used_[block->pointer] = block;
    count(static_cast<int64_t>(block->size));
    return block->pointer;
  }

  void deallocate(void* pointer) noexcept override {
    const std::lock_guard lock(mutex_);
    const auto it = used_.find(static_cast<char*>(pointer));
    if (it == used_.end()) return;
    Block* block = it->second;
    used_.erase(it);
    stats_.current_bytes -= static_cast<int64_t>(block->size);
    block->free = true;
    auto& free = free_[block->pool];
    if (Block* r = block->right; r && r->free) {
      free.erase(r);
      block->size += r->size;
      block->right = r->right;
      if (r->right) r->right->left = block;
      delete r;
    }
    if (Block* l = block->left; l && l->free) {
      free.erase(l);
      l->size += block->size;
      l->right = block->right;
      if (block->right) block->right->left = l;
      delete block;
      block = l;
    }
    free.insert(block);
  }

  int create_pool() {
    const std::lock_guard lock(mutex_);
    return next_pool_++;
  }
  int enter_pool(int id) {
    const std::lock_guard lock(mutex_);
    return std::exchange(pool_, id);
  }
  // Everything free in the pool joins the common blocks; what is still in use does so when it is freed.
  void dissolve_pool(int id) {
    const std::lock_guard lock(mutex_);
    for (Block* b : free_[id]) {
      b->pool = 0;
      free_[0].insert(b);
    }
    free_.erase(id);
    for (auto& [pointer, block] : used_)
      if (block->pool == id) block->pool = 0;
  }

 private:
  Block* new_segment(size_t size, size_t wanted) {
    const size_t bytes = size <= kSmall ? kSegment : (size + kSegment - 1) / kSegment * kSegment;
    check(cudaSetDevice(index_));
    void* p = nullptr;
    cudaError_t status = cudaMalloc(&p, bytes);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      release_locked();
      status = cudaMalloc(&p, bytes);
    }
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      size_t free_bytes = 0, total = 0;
      check(cudaMemGetInfo(&free_bytes, &total));
      const auto gib = [](auto n) { return static_cast<double>(n) / (1 << 30); };
      throw OutOfMemory(fmt::format("out of GPU memory: wanted {:.2f} GiB, {:.2f} GiB of {:.1f} free ({:.2f} in use here)",
                                    gib(wanted), gib(free_bytes), gib(total), gib(stats_.current_bytes)));
    }
    check(status);
    stats_.reserved_bytes += static_cast<int64_t>(bytes);
    ++stats_.system_allocations;
    return new Block{static_cast<char*>(p), bytes, pool_, false, nullptr, nullptr};
  }

  // Whole free segments of the common pool go back to the driver.
  void release_locked() override {
    auto& free = free_[0];
    for (auto it = free.begin(); it != free.end();) {
      Block* b = *it;
      if (!b->left && !b->right) {
        cudaFree(b->pointer);
        stats_.reserved_bytes -= static_cast<int64_t>(b->size);
        it = free.erase(it);
        delete b;
      } else {
        ++it;
      }
    }
  }

  const int index_;
  std::map<int, std::set<Block*, BySize>> free_;
  std::unordered_map<char*, Block*> used_;
  int pool_ = 0, next_pool_ = 1;
};

CudaAllocator& cuda_allocator(int index) {
  static std::mutex mutex;
  static auto* instances = new std::map<int, CudaAllocator*>;
  const std::lock_guard lock(mutex);
  auto& a = (*instances)[index];
  if (!a) a = new CudaAllocator(index);
  return *a;
}

}  // namespace

Allocator& allocator(Device device) {
  if (device.is_cpu()) return cpu_allocator();
  return cuda_allocator(device.index);
}

MemoryPool::MemoryPool(Device device)
    : device_(device), id_(device.is_cuda() ? cuda_allocator(device.index).create_pool() : 0) {}
MemoryPool::~MemoryPool() {
  if (device_.is_cuda()) cuda_allocator(device_.index).dissolve_pool(id_);
}
MemoryPool::Scope::Scope(MemoryPool& pool)
    : device_(pool.device_), previous_(device_.is_cuda() ? cuda_allocator(device_.index).enter_pool(pool.id_) : 0) {}
MemoryPool::Scope::~Scope() {
  if (device_.is_cuda()) cuda_allocator(device_.index).enter_pool(previous_);
}

}  // namespace krait::core
