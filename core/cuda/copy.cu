#include "core/copy.h"

#include "core/cuda/launch.cuh"

namespace krait::core::cuda {

namespace {

constexpr int kMaxDims = 8;
struct Layout {
  int n;
  int64_t size[kMaxDims], dst[kMaxDims], src[kMaxDims];
};

template <class D, class S>
__device__ D convert(S value) {
  if constexpr (std::is_same_v<D, bf16> || std::is_same_v<D, f16>)
    return D(static_cast<float>(value));
  else if constexpr (std::is_same_v<S, bf16> || std::is_same_v<S, f16>)
    return static_cast<D>(static_cast<float>(value));
  else
    return static_cast<D>(value);
}

template <class D, class S>
__global__ void contiguous_kernel(D* dst, const S* src, int64_t n) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride) dst[i] = convert<D>(src[i]);
}

template <class D, class S>
__global__ void strided_kernel(D* dst, const S* src, int64_t n, Layout layout) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride) {
    int64_t rest = i, d = 0, s = 0;
    for (int k = layout.n - 1; k >= 0; --k) {
      const int64_t at = rest % layout.size[k];
      rest /= layout.size[k];
      d += at * layout.dst[k];
      s += at * layout.src[k];
    }
    dst[d] = convert<D>(src[s]);
  }
}

template <class T>
__global__ void fill_kernel(T* dst, int64_t n, Layout layout, double value) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride) {
    int64_t rest = i, d = 0;
    for (int k = layout.n - 1; k >= 0; --k) {
      d += rest % layout.size[k] * layout.dst[k];
      rest /= layout.size[k];
    }
    dst[d] = convert<T>(value);
  }
}

Layout layout_of(const Tensor& dst, const Tensor& src) {
  KRAIT_CHECK(dst.ndim() <= kMaxDims, "copy of {} dimensions; at most {} are supported on CUDA", dst.ndim(), kMaxDims);
  Layout l{static_cast<int>(dst.ndim()), {}, {}, {}};
  for (int i = 0; i < l.n; ++i) {
    l.size[i] = dst.size(i);
    l.dst[i] = dst.stride(i);
    l.src[i] = src.stride(i);
  }
  return l;
}

LaunchConfig config(const Tensor& t) {
  return {.grid = std::min<int64_t>(ceil_div(t.numel(), 256), 132 * 32), .stream = current_stream(t.device())};
}

}  // namespace

void strided_copy(Tensor& dst, const Tensor& src) {
  const bool packed = dst.is_contiguous() && src.is_contiguous();
  if (packed && dst.dtype() == src.dtype()) {
    check(cudaMemcpyAsync(dst.raw_data(), src.raw_data(), static_cast<size_t>(dst.nbytes()), cudaMemcpyDeviceToDevice,
                          native(current_stream(dst.device()))));
    return;
  }
  visit_all(dst.dtype(), [&]<class D>() {
    visit_all(src.dtype(), [&]<class S>() {
      if (packed)
        launch(contiguous_kernel<D, S>, config(dst), dst.data<D>(), src.data<S>(), dst.numel());
      else
        launch(strided_kernel<D, S>, config(dst), dst.data<D>(), src.data<S>(), dst.numel(), layout_of(dst, src));
    });
  });
}

void fill(Tensor& dst, double value) {
  if (value == 0.0 && dst.is_contiguous()) {
    check(cudaMemsetAsync(dst.raw_data(), 0, static_cast<size_t>(dst.nbytes()), native(current_stream(dst.device()))));
    return;
  }
  visit_all(dst.dtype(), [&]<class T>() {
    launch(fill_kernel<T>, config(dst), dst.data<T>(), dst.numel(), layout_of(dst, dst), value);
  });
}

void transfer(void* dst, Device dst_device, const void* src, Device src_device, int64_t bytes) {
  const Device gpu = dst_device.is_cuda() ? dst_device : src_device;
  const cudaStream_t stream = native(current_stream(gpu));
  check(cudaMemcpyAsync(dst, src, static_cast<size_t>(bytes), cudaMemcpyDefault, stream));
  if (!is_capturing(gpu)) check(cudaStreamSynchronize(stream));
}

}  // namespace krait::core::cuda
