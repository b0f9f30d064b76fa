#pragma once
#include <memory>

#include "core/tensor.h"

namespace krait {
inline namespace core {

/// Copies CPU tensors into device tensors without waiting: through page-locked buffers that are reused once the
/// device has read them. On a CPU destination it is a plain copy.
class Uploader {
 public:
  explicit Uploader(Device device);
  ~Uploader();
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;
  /// dst and src: same shape and dtype, contiguous.
  void upload(Tensor& dst, const Tensor& src);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace core
}  // namespace krait
