#include "core/upload.h"

#include <cstring>
#include <vector>

#include "core/cuda/check.h"
#include "core/stream.h"

namespace krait::core {

struct Uploader::Impl {
  struct Buffer {
    void* pointer = nullptr;
    int64_t bytes = 0;
    cudaEvent_t read = nullptr;  // the device has read it
  };
  Device device;
  std::vector<Buffer> buffers;

  ~Impl() {
    for (const Buffer& b : buffers) {
      cudaEventSynchronize(b.read);
      cudaEventDestroy(b.read);
      cudaFreeHost(b.pointer);
    }
  }

  Buffer& take(int64_t bytes) {
    for (Buffer& b : buffers) {
      if (b.bytes < bytes) continue;
      const cudaError_t status = cudaEventQuery(b.read);
      if (status == cudaSuccess) return b;
      if (status != cudaErrorNotReady) check(status);
    }
    Buffer b;
    b.bytes = bytes;
    check(cudaMallocHost(&b.pointer, static_cast<size_t>(bytes)));
    check(cudaEventCreateWithFlags(&b.read, cudaEventDisableTiming));
    buffers.push_back(b);
    return buffers.back();
  }
};

Uploader::Uploader(Device device) : impl_(std::make_unique<Impl>()) { impl_->device = device; }
Uploader::~Uploader() = default;

void Uploader::upload(Tensor& dst, const Tensor& src) {
  KRAIT_CHECK(dst.shape() == src.shape() && dst.dtype() == src.dtype() && dst.is_contiguous() &&
                  src.is_contiguous() && src.device().is_cpu(),
              "upload: {} from {}", describe(dst), describe(src));
  if (dst.device().is_cpu()) return copy_(dst, src);
  if (src.numel() == 0) return;
  Impl::Buffer& b = impl_->take(src.nbytes());
  std::memcpy(b.pointer, src.raw_data(), static_cast<size_t>(src.nbytes()));
  const auto stream = static_cast<cudaStream_t>(current_stream(dst.device()).handle);
  check(cudaMemcpyAsync(dst.raw_data(), b.pointer, static_cast<size_t>(src.nbytes()), cudaMemcpyHostToDevice, stream));
  check(cudaEventRecord(b.read, stream));
}

}  // namespace krait::core
