#pragma once
#include "core/tensor.h"

namespace krait {
inline namespace core {

/// Counts what a computation would hold on a GPU while a CPU runs it in its place (krait plan). Tensors are as large on
/// both; what a kernel takes while it runs and what it keeps for its backward is not: kernels for which that matters tell
/// through KernelMemory and as_kept. One at a time; computations of other threads count too.
class MemoryProbe {
 public:
  MemoryProbe();
  ~MemoryProbe();
  MemoryProbe(const MemoryProbe&) = delete;
  MemoryProbe& operator=(const MemoryProbe&) = delete;
  static MemoryProbe* current();

  int64_t held() const;  // bytes more than at the start
  int64_t peak() const;  // the same at most, since reset_peak
  void reset_peak();

 private:
  friend class KernelMemory;
  int64_t start_, peak_ = 0;  // peak_: of the kernels that told
  bool inside_ = false;
};

/// Lives around a backend's call. Under a probe `workspace` bytes count while it runs, and what the CPU's kernel takes and
/// gives back does not.
class KernelMemory {
 public:
  explicit KernelMemory(int64_t workspace);
  ~KernelMemory();
  KernelMemory(const KernelMemory&) = delete;
  KernelMemory& operator=(const KernelMemory&) = delete;

 private:
  MemoryProbe* probe_;
};

/// t, which a kernel keeps for its backward and which takes `bytes` on a GPU: under a probe in a block of that size (t may
/// be undefined: a CPU's kernel keeps nothing), else t itself.
Tensor as_kept(const Tensor& t, int64_t bytes);

}  // namespace core
}  // namespace krait
