#include "kernels/cuda/fft_conv.cuh"

#include "core/cuda/launch.cuh"
#include "kernels/cuda/ring_fft.cuh"
#include "kernels/fft_conv.h"

namespace krait::kernels::cuda {

namespace {

// One tile of channels of one sequence at a time, wholly in shared memory. Element (t, c) of a sequence lies at
// t * step_t + c * step_c: channels last, or transposed.
struct Layout {
  int64_t l, h, step_b, step_t, step_c;
  int log2n, log2c;  // transform length and channels of a tile
  __host__ __device__ int values() const { return 1 << (log2n + log2c); }
};

template <class T, class A>
__device__ void load_tile(A* re, A* im, const T* __restrict__ from, const Layout& x, int64_t c0, bool reversed) {
  const int n = 1 << x.log2n, stride = ring_stride<A>(x.log2n);
  for (int i = threadIdx.x; i < x.values(); i += blockDim.x) {
    const int c = i & ((1 << x.log2c) - 1), t = i >> x.log2c;
    const int at = c * stride + ring_at<A>(reversed ? n - 1 - t : t);
    const bool inside = t < x.l && c0 + c < x.h;
    re[at] = inside ? static_cast<A>(from[t * x.step_t + (c0 + c) * x.step_c]) : A(0);
    im[at] = A(0);
  }
  __syncthreads();
}

template <class T, class A>
__device__ void store_tile(T* to, const A* re, const Layout& x, int64_t c0, bool reversed) {
  const int n = 1 << x.log2n, stride = ring_stride<A>(x.log2n);
  for (int i = threadIdx.x; i < x.values(); i += blockDim.x) {
    const int c = i & ((1 << x.log2c) - 1), t = i >> x.log2c;
    if (t < x.l && c0 + c < x.h)
      to[t * x.step_t + (c0 + c) * x.step_c] = static_cast<T>(re[c * stride + ring_at<A>(reversed ? n - 1 - t : t)]);
  }
}

// tile *= the spectra of its channels. Ends with a barrier.
template <class A>
__device__ void multiply_tile(A* re, A* im, const Complex<A>* __restrict__ w, const Layout& x, int64_t c0) {
  const int n = 1 << x.log2n, stride = ring_stride<A>(x.log2n);
  for (int i = threadIdx.x; i < x.values(); i += blockDim.x) {
    const int c = i >> x.log2n, k = i & (n - 1);
    if (c0 + c >= x.h) continue;
    const int at = c * stride + ring_at<A>(k);
    const Complex<A> v = Complex<A>{re[at], im[at]} * w[((c0 + c) << x.log2n) + k];
    re[at] = v.re;
    im[at] = v.im;
  }
  __syncthreads();
}

// Grid: sequence (fastest, so that blocks at work share a kernel's spectrum) x tile.
// Bound by shared memory: log2(n) / 2 passes of read and write, twice.
template <class T, class A>
__global__ void __launch_bounds__(1024) fft_conv_forward_kernel(T* y, const T* __restrict__ u,
                                                                const Complex<A>* __restrict__ w,
                                                                const Complex<A>* __restrict__ table, int64_t b,
                                                                Layout x) {
  extern __shared__ __align__(16) unsigned char shared[];
  A* re = reinterpret_cast<A*>(shared);
  A* im = re + (ring_stride<A>(x.log2n) << x.log2c);
  const int64_t row = blockIdx.x % b, c0 = (blockIdx.x / b) << x.log2c;
  load_tile(re, im, u + row * x.step_b, x, c0, false);
  ring_forward(re, im, 1 << x.log2c, x.log2n, 1, table);
  multiply_tile(re, im, w, x, c0);
  ring_inverse(re, im, 1 << x.log2c, x.log2n, 1, table);
  store_tile(y + row * x.step_b, re, x, c0, false);
}

// Grid: group of sequences (fastest) x tile; the block walks over its group, so that the sum of spectra for dK has a
// fixed order: sums (groups, h, n). The spectrum of dy waits in `kept`, the block's own piece of global memory, while
// shared memory holds that of u.
template <class T, class A>
__global__ void __launch_bounds__(1024)
    fft_conv_backward_kernel(T* du, Complex<A>* sums, Complex<A>* kept, const T* __restrict__ dy,
                             const T* __restrict__ u, const Complex<A>* __restrict__ w,
                             const Complex<A>* __restrict__ table, int64_t b, int64_t groups, Layout x) {
  extern __shared__ __align__(16) unsigned char shared[];
  A* re = reinterpret_cast<A*>(shared);
  A* im = re + (ring_stride<A>(x.log2n) << x.log2c);
  const int n = 1 << x.log2n, stride = ring_stride<A>(x.log2n);
  const int64_t group = blockIdx.x % groups, c0 = (blockIdx.x / groups) << x.log2c;
  kept += int64_t{blockIdx.x} * x.values();
  sums += (group * x.h + c0) << x.log2n;
  const int64_t first = b * group / groups, last = b * (group + 1) / groups;
  for (int64_t row = first; row < last; ++row) {
    load_tile(re, im, dy + row * x.step_b, x, c0, true);
    ring_forward(re, im, 1 << x.log2c, x.log2n, 1, table);
    for (int i = threadIdx.x; i < x.values(); i += blockDim.x) {
      const int at = (i >> x.log2n) * stride + ring_at<A>(i & (n - 1));
      kept[i] = {re[at], im[at]};
    }
    __syncthreads();
    multiply_tile(re, im, w, x, c0);
    ring_inverse(re, im, 1 << x.log2c, x.log2n, 1, table);
    store_tile(du + row * x.step_b, re, x, c0, true);
    __syncthreads();
    load_tile(re, im, u + row * x.step_b, x, c0, false);
    ring_forward(re, im, 1 << x.log2c, x.log2n, 1, table);
    for (int i = threadIdx.x; i < x.values(); i += blockDim.x) {  // the thread's own values of kept and sums
      const int c = i >> x.log2n, at = c * stride + ring_at<A>(i & (n - 1));
      if (c0 + c >= x.h) continue;
      const Complex<A> v = Complex<A>{re[at], im[at]} * kept[i];
      sums[i] = row == first ? v : sums[i] + v;
    }
    __syncthreads();
  }
}

// (b, m, k) -> (b, k, m), 32 x 32 values at a time.
template <class T>
__global__ void transpose_kernel(T* to, const T* __restrict__ from, int64_t m, int64_t k, int64_t tiles_k) {
  __shared__ accum_t<T> tile[32][33];
  const int64_t tiles = tiles_k * ((m + 31) / 32);
  const int64_t b = blockIdx.x / tiles, i = blockIdx.x % tiles;
  const int64_t k0 = i % tiles_k * 32, m0 = i / tiles_k * 32, base = b * m * k;
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  for (int j = y; j < 32; j += 8)
    if (m0 + j < m && k0 + x < k) tile[j][x] = static_cast<accum_t<T>>(from[base + (m0 + j) * k + k0 + x]);
  __syncthreads();
  for (int j = y; j < 32; j += 8)
    if (k0 + j < k && m0 + x < m) to[base + (k0 + j) * m + m0 + x] = static_cast<T>(tile[x][j]);
}

/// (b, m, k) -> (b, k, m): one read and one write of the tensor.
Tensor transposed(const Tensor& t) {
  const int64_t b = t.size(0), m = t.size(1), k = t.size(2);
  Tensor out = empty({b, k, m}, t.dtype(), t.device());
  visit_float(t.dtype(), [&]<class T>() {
    launch(transpose_kernel<T>, {.grid = b * ceil_div(k, 32) * ceil_div(m, 32), .block = 256,
                                      .stream = current_stream(t.device())},
           out.data<T>(), t.data<T>(), m, k, ceil_div(k, 32));
  });
  return out;
}

/// Up to 8 channels a tile while 64 KB hold them: channels last is then read in whole sectors. Longer sequences take
/// one channel a block and transposed tensors, which cost one more read and write of each.
Layout layout_of(const Tensor& u, DType a) {
  Layout x{u.size(1), u.size(2), u.size(1) * u.size(2), u.size(2), 1, fft_conv_log2(u.size(1)), 0};
  const int limit = a == DType::f64 ? 12 : 13;
  const int fits = std::max(0, std::min(3, limit - x.log2n));
  if (fits >= 2 || x.h == 1) {
    while (x.log2c < fits && (int64_t{1} << x.log2c) < x.h) ++x.log2c;
  } else {
    x.step_t = 1;
    x.step_c = x.l;
  }
  return x;
}
bool is_transposed(const Layout& x) { return x.step_c != 1; }

template <class A>
LaunchConfig config(const Layout& x, int64_t grid, Device device) {
  const int64_t work = std::max<int64_t>(32, x.values() / 4);
  return {.grid = grid,
          .block = static_cast<int>(std::min<int64_t>(x.log2n + x.log2c > 13 ? 1024 : 512, work)),
          .shared = static_cast<int64_t>(sizeof(A)) * 2 * (ring_stride<A>(x.log2n) << x.log2c),
          .stream = current_stream(device)};
}

int64_t tiles_of(const Layout& x) { return ceil_div(x.h, int64_t{1} << x.log2c); }

}  // namespace

void fft_conv_forward(Tensor& y, const Tensor& u, const Tensor& K, const Tensor& K1, const Tensor& D,
                      const Tensor& segments) {
  if (segments.defined()) return document_conv_forward(y, u, K, K1, D, segments);
  const int log2n = fft_conv_log2(u.size(1));
  if (serves_registers(log2n, K.dtype())) return fft_conv_registers_forward(y, u, K, K1, D);
  if (log2n > max_shared_log2(K.dtype())) return fft_conv_long_forward(y, u, K, K1, D);
  const Layout x = layout_of(u, K.dtype());
  const Tensor w = kernel_spectrum(K, K1, D, 0, x.h, x.log2n), table = ring_table(K.dtype(), x.log2n, u.device());
  const Tensor in = is_transposed(x) ? transposed(u) : u;
  Tensor out = is_transposed(x) ? empty(in.shape(), y.dtype(), y.device()) : y;
  visit_float(u.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    launch(fft_conv_forward_kernel<T, A>, config<A>(x, u.size(0) * tiles_of(x), u.device()), out.data<T>(),
           in.data<T>(), reinterpret_cast<const Complex<A>*>(w.data<A>()),
           reinterpret_cast<const Complex<A>*>(table.data<A>()), u.size(0), x);
  });
  if (is_transposed(x)) y = transposed(out);
}

void fft_conv_backward(Tensor& du, Tensor& dK, Tensor& dK1, const Tensor& dy, const Tensor& u, const Tensor& K,
                       const Tensor& K1, const Tensor& D, const Tensor& segments) {
  if (segments.defined()) return document_conv_backward(du, dK, dK1, dy, u, K, K1, D, segments);
  const int log2n = fft_conv_log2(u.size(1));
  if (serves_registers(log2n, K.dtype())) return fft_conv_registers_backward(du, dK, dK1, dy, u, K, K1, D);
  if (log2n > max_shared_log2(K.dtype())) return fft_conv_long_backward(du, dK, dK1, dy, u, K, K1, D);
  const Layout x = layout_of(u, K.dtype());
  const int64_t b = u.size(0), n = int64_t{1} << x.log2n, tiles = tiles_of(x);
  const int64_t groups = std::min(b, ceil_div(264, tiles));  // two blocks for each of 132 multiprocessors
  const Tensor w = kernel_spectrum(K, K1, D, 0, x.h, x.log2n), table = ring_table(K.dtype(), x.log2n, u.device());
  Tensor sums = empty({groups, x.h, n, 2}, K.dtype(), u.device());
  const Tensor kept = empty({groups * tiles, x.values(), 2}, K.dtype(), u.device());
  const Tensor in = is_transposed(x) ? transposed(u) : u, d_in = is_transposed(x) ? transposed(dy) : dy;
  Tensor out = is_transposed(x) ? empty(in.shape(), du.dtype(), du.device()) : du;
  visit_float(u.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    launch(fft_conv_backward_kernel<T, A>, config<A>(x, groups * tiles, u.device()), out.data<T>(),
           reinterpret_cast<Complex<A>*>(sums.data<A>()), reinterpret_cast<Complex<A>*>(kept.data<A>()),
           d_in.data<T>(), in.data<T>(), reinterpret_cast<const Complex<A>*>(w.data<A>()),
           reinterpret_cast<const Complex<A>*>(table.data<A>()), b, groups, x);
  });
  if (is_transposed(x)) du = transposed(out);
  kernel_gradient(dK, dK1, sums, x.l, 0, x.h, x.log2n);
}

void fft_conv_kernel_name(std::string& name, int64_t length, DType dtype, bool has_segments) {
  const int log2n = fft_conv_log2(length);
  if (has_segments)
    name = length > 4096 ? "own sums inside documents (slow: quadratic in their length)" : "own sums inside documents";
  else if (serves_registers(log2n, accum_dtype(dtype)))
    name = fmt::format("own fused FFT of {} points in registers", int64_t{1} << log2n);
  else if (log2n <= max_shared_log2(accum_dtype(dtype)))
    name = fmt::format("own fused FFT of {} points in shared memory", int64_t{1} << log2n);
  else
    name = fmt::format("own FFT of {} points through global memory", int64_t{1} << log2n);
}

}  // namespace krait::kernels::cuda
