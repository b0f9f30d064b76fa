#include "core/upload.h"

#include <cstring>
#include <vector>

#include "core/cuda/check.h"
#include "core/parallel.h"
#include "core/stream.h"

namespace krait::core {

// Large tensors cross the bus on a stream of its own, beside the work that is still queued, to a place on the device
// from where the current stream fetches them.
struct Uploader::Impl {
  static constexpr int64_t kStaged = int64_t{256} << 10;     // bytes from which on that pays
  static constexpr int64_t kCopyGrain = int64_t{512} << 10;  // bytes for a thread
  static constexpr size_t kMostBuffers = 16, kMostStaged = 4;  // of a size; then the host waits for the device

  struct Buffer {
    void* pointer = nullptr;
    int64_t bytes = 0;
    uint64_t used = 0;
    cudaEvent_t read = nullptr;     // the device has read it
    Tensor staged;                  // its place on the device, of large ones
    cudaEvent_t arrived = nullptr;  // there
  };
  Device device;
  cudaStream_t bus = nullptr;
  std::vector<Buffer> buffers;
  uint64_t uses = 0;

  ~Impl() {
    for (const Buffer& b : buffers) {
      cudaEventSynchronize(b.read);
      cudaEventDestroy(b.read);
      if (b.arrived) cudaEventDestroy(b.arrived);
      cudaFreeHost(b.pointer);
    }
    if (bus) cudaStreamDestroy(bus);
  }

  Buffer& take(int64_t bytes) {
    Buffer* oldest = nullptr;
    size_t fitting = 0;
    for (Buffer& b : buffers) {
      if (b.bytes < bytes || b.bytes > 2 * bytes) continue;
      const cudaError_t status = cudaEventQuery(b.read);
      if (status == cudaSuccess) return b;
      if (status != cudaErrorNotReady) check(status);
      ++fitting;
      if (!oldest || b.used < oldest->used) oldest = &b;
    }
    if (fitting >= (bytes >= kStaged ? kMostStaged : kMostBuffers)) {
      check(cudaEventSynchronize(oldest->read));
      return *oldest;
    }
    Buffer b;
    b.bytes = bytes;
    check(cudaMallocHost(&b.pointer, static_cast<size_t>(bytes)));
    check(cudaEventCreateWithFlags(&b.read, cudaEventDisableTiming));
    if (bytes >= kStaged) stage(b);
    buffers.push_back(b);
    return buffers.back();
  }

  // The block may still be in use by what is queued on the current stream: the first copy begins behind that.
  void stage(Buffer& b) {
    b.staged = empty({b.bytes}, DType::u8, device);
    check(cudaEventCreateWithFlags(&b.arrived, cudaEventDisableTiming));
    if (!bus) check(cudaStreamCreateWithFlags(&bus, cudaStreamNonBlocking));
    check(cudaEventRecord(b.arrived, static_cast<cudaStream_t>(current_stream(device).handle)));
    check(cudaStreamWaitEvent(bus, b.arrived));
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
  b.used = ++impl_->uses;
  parallel_for(0, src.nbytes(), Impl::kCopyGrain, [&](int64_t first, int64_t last) {
    std::memcpy(static_cast<char*>(b.pointer) + first, static_cast<const char*>(src.raw_data()) + first,
                static_cast<size_t>(last - first));
  });
  const auto stream = static_cast<cudaStream_t>(current_stream(dst.device()).handle);
  const auto bytes = static_cast<size_t>(src.nbytes());
  if (b.staged.defined()) {
    check(cudaMemcpyAsync(b.staged.raw_data(), b.pointer, bytes, cudaMemcpyHostToDevice, impl_->bus));
    check(cudaEventRecord(b.arrived, impl_->bus));
    check(cudaStreamWaitEvent(stream, b.arrived));
    check(cudaMemcpyAsync(dst.raw_data(), b.staged.raw_data(), bytes, cudaMemcpyDeviceToDevice, stream));
  } else {
    check(cudaMemcpyAsync(dst.raw_data(), b.pointer, bytes, cudaMemcpyHostToDevice, stream));
  }
  check(cudaEventRecord(b.read, stream));
}

}  // namespace krait::core
