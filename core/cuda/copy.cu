#include "core/copy.h"

#include "core/cuda/launch.cuh"

namespace krait::core::cuda {

namespace {

constexpr int kMaxDims = 8;
// Dimensions that lie one behind the other in both tensors are one; divisions are 32-bit.
struct Layout {
  int n;
  uint32_t size[kMaxDims];
  int64_t dst[kMaxDims], src[kMaxDims];
};

// What neighbouring elements are copied as, where addresses allow.
template <int kBytes>
struct alignas(kBytes) Pack {
  uint32_t words[kBytes / 4];
};

template <class D, class S>
__device__ D convert(S value) {
  if constexpr (std::is_same_v<D, S>)
    return value;
  else if constexpr (std::is_same_v<D, bf16> || std::is_same_v<D, f16>)
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
__global__ void strided_kernel(D* dst, const S* src, uint32_t n, Layout layout) {
  const uint32_t stride = gridDim.x * blockDim.x;
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
    uint32_t rest = i;
    int64_t d = 0, s = 0;
    for (int k = layout.n - 1; k > 0; --k) {
      const uint32_t at = rest % layout.size[k];
      rest /= layout.size[k];
      d += at * layout.dst[k];
      s += at * layout.src[k];
    }
    dst[d + rest * layout.dst[0]] = convert<D>(src[s + rest * layout.src[0]]);
  }
}

template <class T>
__global__ void fill_kernel(T* dst, uint32_t n, Layout layout, double value) {
  const uint32_t stride = gridDim.x * blockDim.x;
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
    uint32_t rest = i;
    int64_t d = 0;
    for (int k = layout.n - 1; k > 0; --k) {
      d += rest % layout.size[k] * layout.dst[k];
      rest /= layout.size[k];
    }
    dst[d + rest * layout.dst[0]] = convert<T>(value);
  }
}

template <class T>
__global__ void arange_kernel(T* dst, int64_t n) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride) dst[i] = convert<T>(i);
}

constexpr int64_t kMaxElements = int64_t{1} << 31;  // of one launch, less one

// Of at most kMaxElements - 1 elements.
Layout layout_of(const Tensor& dst, const Tensor& src) {
  KRAIT_CHECK(dst.ndim() <= kMaxDims, "copy of {} dimensions; at most {} are supported on CUDA", dst.ndim(), kMaxDims);
  Layout l{0, {1}, {}, {}};
  for (int64_t i = 0; i < dst.ndim(); ++i) {
    const int64_t size = dst.size(i), to = dst.stride(i), from = src.stride(i);
    if (size == 1) continue;
    const int last = l.n - 1;
    if (l.n > 0 && l.dst[last] == to * size && l.src[last] == from * size) {
      l.size[last] *= static_cast<uint32_t>(size);
      l.dst[last] = to;
      l.src[last] = from;
    } else {
      l.size[l.n] = static_cast<uint32_t>(size);
      l.dst[l.n] = to;
      l.src[l.n] = from;
      ++l.n;
    }
  }
  if (l.n == 0) l.n = 1;  // a single element
  return l;
}

// The layout in packs of `count` elements of `bytes` each; false where sizes, strides or addresses do not allow them.
bool in_packs(Layout& l, int64_t count, int64_t bytes, const void* dst, const void* src) {
  const int last = l.n - 1;
  const auto bits = (reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src)) % static_cast<uintptr_t>(count * bytes);
  if (bits != 0 || l.dst[last] != 1 || l.src[last] != 1 || l.size[last] % count != 0) return false;
  for (int k = 0; k < last; ++k)
    if (l.dst[k] % count != 0 || l.src[k] % count != 0) return false;
  l.size[last] /= static_cast<uint32_t>(count);
  for (int k = 0; k < last; ++k) {
    l.dst[k] /= count;
    l.src[k] /= count;
  }
  return true;
}

LaunchConfig config(const Tensor& t, int64_t n) {
  return {.grid = std::min<int64_t>(ceil_div(n, 256), 132 * 32), .stream = current_stream(t.device())};
}

// Calls f with halves of the tensors until they are small enough for one launch.
template <class F>
void in_parts(const Tensor& dst, const Tensor& src, F&& f) {
  if (dst.numel() < kMaxElements) return f(dst, src);
  int64_t dim = 0;
  while (dst.size(dim) == 1) ++dim;
  const int64_t half = dst.size(dim) / 2;
  in_parts(dst.slice(dim, 0, half), src.slice(dim, 0, half), f);
  in_parts(dst.slice(dim, half, dst.size(dim)), src.slice(dim, half, src.size(dim)), f);
}

template <int kBytes>
bool packed_copy(const Tensor& dst, const Tensor& src, Layout l) {
  const int64_t bytes = size_of(dst.dtype());
  if (kBytes <= bytes || !in_packs(l, kBytes / bytes, bytes, dst.raw_data(), src.raw_data())) return false;
  const int64_t n = dst.numel() * bytes / kBytes;
  launch(strided_kernel<Pack<kBytes>, Pack<kBytes>>, config(dst, n), static_cast<Pack<kBytes>*>(dst.raw_data()),
         static_cast<const Pack<kBytes>*>(src.raw_data()), static_cast<uint32_t>(n), l);
  return true;
}

}  // namespace

// Bound by memory. Rows of 16-byte multiples reach it; a transposition reads or writes single elements.
void strided_copy(Tensor& dst, const Tensor& src) {
  const bool contiguous = dst.is_contiguous() && src.is_contiguous();
  if (contiguous && dst.dtype() == src.dtype()) {
    check(cudaMemcpyAsync(dst.raw_data(), src.raw_data(), static_cast<size_t>(dst.nbytes()), cudaMemcpyDeviceToDevice,
                          native(current_stream(dst.device()))));
    return;
  }
  if (contiguous) {
    visit_all(dst.dtype(), [&]<class D>() {
      visit_all(src.dtype(), [&]<class S>() {
        launch(contiguous_kernel<D, S>, config(dst, dst.numel()), dst.data<D>(), src.data<S>(), dst.numel());
      });
    });
    return;
  }
  in_parts(dst, src, [](const Tensor& to, const Tensor& from) {
    const Layout l = layout_of(to, from);
    if (to.dtype() == from.dtype() &&
        (packed_copy<16>(to, from, l) || packed_copy<8>(to, from, l) || packed_copy<4>(to, from, l)))
      return;
    const int64_t n = to.numel();
    visit_all(to.dtype(), [&]<class D>() {
      visit_all(from.dtype(), [&]<class S>() {
        launch(strided_kernel<D, S>, config(to, n), to.data<D>(), from.data<S>(), static_cast<uint32_t>(n), l);
      });
    });
  });
}

void fill(Tensor& dst, double value) {
  if (value == 0.0 && dst.is_contiguous()) {
    check(cudaMemsetAsync(dst.raw_data(), 0, static_cast<size_t>(dst.nbytes()), native(current_stream(dst.device()))));
    return;
  }
  in_parts(dst, dst, [value](const Tensor& to, const Tensor&) {
    const int64_t n = to.numel();
    visit_all(to.dtype(), [&]<class T>() {
      launch(fill_kernel<T>, config(to, n), to.data<T>(), static_cast<uint32_t>(n), layout_of(to, to), value);
    });
  });
}

void arange(Tensor& dst) {
  const int64_t n = dst.numel();
  visit_all(dst.dtype(), [&]<class T>() { launch(arange_kernel<T>, config(dst, n), dst.data<T>(), n); });
}

void transfer(void* dst, Device dst_device, const void* src, Device src_device, int64_t bytes) {
  const Device gpu = dst_device.is_cuda() ? dst_device : src_device;
  // A graph would copy the same host addresses at every replay, whatever lies there by then.
  KRAIT_ASSERT(!is_capturing(gpu), "a captured step copies {} bytes between host and device", bytes);
  const cudaStream_t stream = native(current_stream(gpu));
  check(cudaMemcpyAsync(dst, src, static_cast<size_t>(bytes), cudaMemcpyDefault, stream));
  check(cudaStreamSynchronize(stream));
}

}  // namespace krait::core::cuda
