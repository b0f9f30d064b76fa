#include "core/memory_probe.h"

#include <algorithm>

#include "core/allocator.h"

namespace krait::core {

namespace {

MemoryProbe* g_current = nullptr;

int64_t held_bytes() { return allocator(kCpu).stats().current_bytes; }

}  // namespace

MemoryProbe::MemoryProbe() : start_(held_bytes()) {
  KRAIT_ASSERT(g_current == nullptr, "two memory probes at a time.");
  g_current = this;
  reset_peak();
}
MemoryProbe::~MemoryProbe() { g_current = nullptr; }
MemoryProbe* MemoryProbe::current() { return g_current; }

int64_t MemoryProbe::held() const { return held_bytes() - start_; }
int64_t MemoryProbe::peak() const { return std::max(peak_, allocator(kCpu).stats().peak_bytes) - start_; }
void MemoryProbe::reset_peak() {
  allocator(kCpu).reset_peak();
  peak_ = held_bytes();
}

KernelMemory::KernelMemory(int64_t workspace) : probe_(MemoryProbe::current()) {
  if (probe_ && probe_->inside_) probe_ = nullptr;  // a kernel's own call of another is part of it
  if (!probe_) return;
  probe_->inside_ = true;
  probe_->peak_ = std::max({probe_->peak_, allocator(kCpu).stats().peak_bytes, held_bytes() + workspace});
}

KernelMemory::~KernelMemory() {
  if (!probe_) return;
  probe_->inside_ = false;
  allocator(kCpu).reset_peak();
}

Tensor as_kept(const Tensor& t, int64_t bytes) {
  if (!MemoryProbe::current()) return t;
  if (!t.defined()) return empty({bytes}, DType::u8, kCpu);
  const int64_t elements = (bytes + size_of(t.dtype()) - 1) / size_of(t.dtype());
  if (elements <= t.numel()) return t;
  Tensor block = empty({elements}, t.dtype(), kCpu).slice(0, 0, t.numel()).view(t.shape());
  copy_(block, t);
  return block;
}

}  // namespace krait::core
