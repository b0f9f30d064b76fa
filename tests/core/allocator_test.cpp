#include "core/allocator.h"

#include <thread>
#include <vector>

#include "core/tensor.h"
#include "tests/testing/catch.h"

using namespace krait;

TEST_CASE("the allocator counts bytes in use, the peak and what it took from the system") {
  Allocator& a = allocator(kCpu);
  a.release_cached();
  a.reset_peak();
  const MemoryStats before = a.stats();
  CHECK(before.peak_bytes == before.current_bytes);
  void* p = a.allocate(1 << 20);
  void* q = a.allocate(1 << 20);
  CHECK(a.stats().current_bytes == before.current_bytes + (2 << 20));
  a.deallocate(p);
  CHECK(a.stats().current_bytes == before.current_bytes + (1 << 20));
  CHECK(a.stats().peak_bytes == before.current_bytes + (2 << 20));
  CHECK(a.stats().reserved_bytes == before.reserved_bytes + (2 << 20));
  a.deallocate(q);
  a.release_cached();
  CHECK(a.stats().reserved_bytes == before.reserved_bytes);
  CHECK(a.stats().system_allocations == before.system_allocations + 2);
}

TEST_CASE("a warm loop asks the system for nothing") {
  const auto step = [] {
    const Tensor a = empty({1000, 37}, DType::f32, kCpu), b = a.clone(), c = empty({3}, DType::i64, kCpu);
    return b.to(DType::f64);
  };
  step();
  const int64_t warm = allocator(kCpu).stats().system_allocations;
  for (int i = 0; i < 10; ++i) step();
  CHECK(allocator(kCpu).stats().system_allocations == warm);
}

TEST_CASE("blocks are aligned to 64 bytes and do not overlap") {
  std::vector<std::pair<char*, size_t>> blocks;
  for (size_t bytes = 1; bytes < 5000; bytes = bytes * 3 / 2 + 1) {
    auto* p = static_cast<char*>(allocator(kCpu).allocate(bytes));
    CHECK(reinterpret_cast<uintptr_t>(p) % 64 == 0);
    for (const auto& [q, n] : blocks) CHECK((p + bytes <= q || q + n <= p));
    blocks.emplace_back(p, bytes);
  }
  for (const auto& [p, n] : blocks) allocator(kCpu).deallocate(p);
  CHECK(allocator(kCpu).allocate(0) == nullptr);
}

TEST_CASE("threads may allocate at once") {
  const int64_t before = allocator(kCpu).stats().current_bytes;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([t] {
      for (int i = 0; i < 500; ++i) {
        Tensor a = full({100 + t, 3}, t, DType::f32, kCpu);
        if (a.to_vector<float>() != std::vector<float>(static_cast<size_t>(300 + 3 * t), static_cast<float>(t))) std::abort();
      }
    });
  for (std::thread& t : threads) t.join();
  CHECK(allocator(kCpu).stats().current_bytes == before);
}

TEST_CASE("too large a request names what was wanted") {
  CHECK(contains(error_of([] { empty({int64_t{1} << 50}, DType::f64, kCpu); }), "out of memory: wanted"));
}
