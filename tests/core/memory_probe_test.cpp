#include "core/memory_probe.h"

#include "tests/testing/catch.h"

using namespace krait;

TEST_CASE("a memory probe counts tensors, and of a kernel what it says and not what the CPU takes") {
  const Tensor before = empty({1000}, DType::f32, kCpu);
  MemoryProbe probe;
  CHECK(probe.held() == 0);
  const Tensor kept = empty({1 << 10}, DType::u8, kCpu);
  {
    const KernelMemory kernel(1 << 14);
    const Tensor scratch = empty({1 << 20}, DType::u8, kCpu);
    const KernelMemory inner(1 << 18);  // of a kernel that this one calls
  }
  CHECK(probe.held() == 1 << 10);
  CHECK(probe.peak() == (1 << 10) + (1 << 14));
  { const Tensor between = empty({1 << 16}, DType::u8, kCpu); }
  CHECK(probe.peak() == (1 << 10) + (1 << 16));
  probe.reset_peak();
  CHECK(probe.peak() == 1 << 10);
}

TEST_CASE("what a kernel keeps takes under a probe what it would on a GPU") {
  const Tensor t = full({8, 4}, 3.0, DType::f32, kCpu);
  CHECK(as_kept(t, 1 << 12).raw_data() == t.raw_data());
  CHECK_FALSE(as_kept({}, 1 << 12).defined());
  MemoryProbe probe;
  const Tensor large = as_kept(t, 1 << 12), small = as_kept(t, 16), own = as_kept({}, 1 << 8);
  CHECK(probe.held() == (1 << 12) + (1 << 8));
  CHECK(large.shape() == t.shape());
  CHECK(large.to_vector<double>() == t.to_vector<double>());
  CHECK(small.raw_data() == t.raw_data());
}
