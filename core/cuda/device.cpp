#include "core/device.h"

#include <map>
#include <mutex>

#include "core/cpu/allocator.h"
#include "core/cuda/check.h"
#include "core/deferred.h"
#include "core/stream.h"

namespace krait::core {

DeviceInfo cpu_info();

void check(cudaError_t status, std::source_location where) {
  if (status == cudaSuccess) return;
  throw_error(fmt::format("CUDA error {} ({}) at {}:{}", cudaGetErrorName(status), cudaGetErrorString(status),
                          where.file_name(), where.line()));
}

bool built_with_cuda() { return true; }

int cuda_device_count() {
  static const int count = [] {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) {
      cudaGetLastError();  // no driver or no device: an ordinary answer here
      return 0;
    }
    return n;
  }();
  return count;
}

DeviceInfo device_info(Device device) {
  if (device.is_cpu()) return cpu_info();
  // The driver takes milliseconds to gather all properties, and kernels ask at every launch.
  static std::mutex mutex;
  static auto* known = new std::map<int, DeviceInfo>;
  const std::lock_guard lock(mutex);
  const auto at = known->find(device.index);
  if (at != known->end()) return at->second;
  cudaDeviceProp p{};
  check(cudaGetDeviceProperties(&p, device.index));
  return (*known)[device.index] = {p.name, p.major * 10 + p.minor, p.multiProcessorCount,
                                   static_cast<int64_t>(p.totalGlobalMem)};
}

void synchronize(Device device) {
  if (device.is_cuda()) check(cudaStreamSynchronize(static_cast<cudaStream_t>(current_stream(device).handle)));
}

namespace {
struct StreamSlot {
  cudaStream_t stream = nullptr;
};
StreamSlot& slot(int index) {
  static StreamSlot slots[64];
  KRAIT_CHECK(index >= 0 && index < cuda_device_count(), "cuda:{} does not exist: {} CUDA device(s) found{}", index,
              cuda_device_count(), cuda_device_count() == 0 ? "; set runtime.device=cpu" : "");
  return slots[index];
}

cudaStream_t stream_of(Device device) {
  StreamSlot& s = slot(device.index);
  if (!s.stream) {
    check(cudaSetDevice(device.index));
    check(cudaStreamCreateWithFlags(&s.stream, cudaStreamNonBlocking));
  }
  return s.stream;
}
}  // namespace

Stream current_stream(Device device) {
  if (device.is_cpu()) return {device, nullptr};
  if (Deferred* gathered = current_deferred()) gathered->flush();
  return {device, stream_of(device)};
}

bool is_capturing(Device device) {
  if (device.is_cpu()) return false;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_of(device), &status));
  return status != cudaStreamCaptureStatusNone;
}

struct CapturedGraph::Impl {
  Stream stream;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
};

CapturedGraph::CapturedGraph(Device device) : impl_(nullptr) {
  KRAIT_CHECK(device.is_cuda(), "a CUDA graph needs a CUDA device; set runtime.cuda_graphs=false");
  impl_ = new Impl{current_stream(device)};
}

CapturedGraph::~CapturedGraph() {
  if (impl_->exec) cudaGraphExecDestroy(impl_->exec);
  if (impl_->graph) cudaGraphDestroy(impl_->graph);
  delete impl_;
}

void CapturedGraph::begin() {
  // Relaxed: the allocator may have to take memory from the system while recording.
  check(cudaStreamBeginCapture(static_cast<cudaStream_t>(impl_->stream.handle), cudaStreamCaptureModeRelaxed));
}

void CapturedGraph::end() {
  check(cudaStreamEndCapture(static_cast<cudaStream_t>(impl_->stream.handle), &impl_->graph));
  check(cudaGraphInstantiate(&impl_->exec, impl_->graph, 0));
}

void CapturedGraph::replay() {
  KRAIT_ASSERT(impl_->exec, "replay() before end().");
  check(cudaGraphLaunch(impl_->exec, static_cast<cudaStream_t>(impl_->stream.handle)));
}

int64_t CapturedGraph::node_count() const {
  size_t n = 0;
  check(cudaGraphGetNodes(impl_->graph, nullptr, &n));
  return static_cast<int64_t>(n);
}

}  // namespace krait::core
