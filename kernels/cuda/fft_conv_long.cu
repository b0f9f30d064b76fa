#include <map>
#include <mutex>

#include "core/cuda/launch.cuh"
#include "kernels/cuda/fft_conv.cuh"
#include "kernels/cuda/ring_fft.cuh"
#include "kernels/fft_conv.h"

namespace krait::kernels::cuda {

namespace {

// For loops over any number of values with a bounded grid.
LaunchConfig over(int64_t work, Device device) {
  return {.grid = std::min<int64_t>(ceil_div(work, 256), 132 * 32), .block = 256, .stream = current_stream(device)};
}
__device__ __forceinline__ int64_t first_index() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t index_step() { return int64_t{gridDim.x} * blockDim.x; }

template <class A>
Complex<A>* complex_of(const Tensor& t) {
  return reinterpret_cast<Complex<A>*>(t.data<A>());
}

// One or two levels in global memory: every block of 2^log2s values at the nodes first_node.. of each row.
template <class A, bool inverse>
__global__ void ring_level4_kernel(Complex<A>* z, const Complex<A>* __restrict__ table, int64_t quarters, int log2n,
                                   int log2s) {
  const int64_t s = int64_t{1} << (log2s - 2);
  for (int64_t i = first_index(); i < quarters; i += index_step()) {
    const int64_t row = i >> (log2n - 2), in_row = i & ((int64_t{1} << (log2n - 2)) - 1);
    const int64_t m = in_row >> (log2s - 2), node = (int64_t{1} << (log2n - log2s)) + m;
    Complex<A>* at = z + (row << log2n) + (m << log2s) + (in_row & (s - 1));
    Complex<A> p[4] = {at[0], at[s], at[2 * s], at[3 * s]};
    if constexpr (inverse)
      ring_join4(p, table[node]);
    else
      ring_split4(p, table[node]);
    at[0] = p[0];
    at[s] = p[1];
    at[2 * s] = p[2];
    at[3 * s] = p[3];
  }
}

template <class A, bool inverse>
__global__ void ring_level2_kernel(Complex<A>* z, const Complex<A>* __restrict__ table, int64_t halves, int log2n,
                                   int log2s) {
  const int64_t s = int64_t{1} << (log2s - 1);
  for (int64_t i = first_index(); i < halves; i += index_step()) {
    const int64_t row = i >> (log2n - 1), in_row = i & ((int64_t{1} << (log2n - 1)) - 1);
    const int64_t m = in_row >> (log2s - 1), node = (int64_t{1} << (log2n - log2s)) + m;
    Complex<A>* at = z + (row << log2n) + (m << log2s) + (in_row & (s - 1));
    const Complex<A> w = table[node] * table[node];
    if constexpr (inverse) {
      const Complex<A> a = at[0], b = at[s];
      at[0] = a + b;
      at[s] = conj(w) * (a - b);
    } else {
      const Complex<A> a = at[0], b = w * at[s];
      at[0] = a + b;
      at[s] = a - b;
    }
  }
}

// The lower levels: each block one piece of 2^log2s values in shared memory.
template <class A, bool inverse>
__global__ void __launch_bounds__(1024)
    ring_piece_kernel(Complex<A>* z, const Complex<A>* __restrict__ table, int log2n, int log2s) {
  extern __shared__ __align__(16) unsigned char shared[];
  A* re = reinterpret_cast<A*>(shared);
  A* im = re + ring_stride<A>(log2s);
  const int pieces = 1 << (log2n - log2s), q0 = pieces + static_cast<int>(blockIdx.x % pieces);
  z += int64_t{blockIdx.x} << log2s;
  for (int i = threadIdx.x; i < 1 << log2s; i += blockDim.x) {
    const Complex<A> v = z[i];
    re[ring_at<A>(i)] = v.re;
    im[ring_at<A>(i)] = v.im;
  }
  __syncthreads();
  if constexpr (inverse)
    ring_inverse(re, im, 1, log2s, q0, table);
  else
    ring_forward(re, im, 1, log2s, q0, table);
  for (int i = threadIdx.x; i < 1 << log2s; i += blockDim.x) z[i] = {re[ring_at<A>(i)], im[ring_at<A>(i)]};
}

template <class A, bool inverse>
void transform(Tensor& z, int log2n) {
  const int64_t rows = z.numel() >> (log2n + 1);
  const Tensor roots = ring_table(z.dtype(), log2n, z.device());
  const Complex<A>* table = complex_of<A>(roots);
  const int log2s = std::min(log2n, max_shared_log2(z.dtype()));
  const auto levels = [&](int size) {
    if ((size - log2s) % 2 == 0)
      launch(ring_level4_kernel<A, inverse>, over(rows << (log2n - 2), z.device()), complex_of<A>(z), table,
             rows << (log2n - 2), log2n, size);
    else
      launch(ring_level2_kernel<A, inverse>, over(rows << (log2n - 1), z.device()), complex_of<A>(z), table,
             rows << (log2n - 1), log2n, size);
  };
  const auto pieces = [&] {
    const int64_t n = int64_t{1} << log2s;
    launch(ring_piece_kernel<A, inverse>,
           {.grid = rows << (log2n - log2s),
            .block = static_cast<int>(std::clamp<int64_t>(n / 4, 32, n > 8192 ? 1024 : 512)),
            .shared = static_cast<int64_t>(sizeof(A)) * 2 * ring_stride<A>(log2s),
            .stream = current_stream(z.device())},
           complex_of<A>(z), table, log2n, log2s);
  };
  // An odd level first (last in the inverse), then pairs.
  std::vector<int> sizes;
  for (int size = log2n; size > log2s; size -= (size - log2s) % 2 ? 1 : 2) sizes.push_back(size);
  if (inverse) {
    pieces();
    for (auto size = sizes.rbegin(); size != sizes.rend(); ++size) levels(*size);
  } else {
    for (const int size : sizes) levels(size);
    pieces();
  }
}

template <class A>
__global__ void kernel_load_kernel(Complex<A>* w, const A* __restrict__ K, const A* __restrict__ K1,
                                   const A* __restrict__ D, int64_t c0, int64_t total, int64_t lk, int64_t lk1,
                                   int log2n) {
  const int64_t n = int64_t{1} << log2n;
  const A scale = A(1) / static_cast<A>(n);
  for (int64_t i = first_index(); i < total; i += index_step()) {
    const int64_t c = c0 + (i >> log2n), m = i & (n - 1);
    A re = m < lk ? K[c * lk + m] : A(0);
    if (D && m == 0) re += D[c];
    const A im = K1 && n - 1 - m < lk1 ? -K1[c * lk1 + n - 1 - m] : A(0);
    w[i] = {scale * re, scale * im};
  }
}

// The first group += the others, in order.
template <class A>
__global__ void sum_groups_kernel(A* z, int64_t count, int64_t groups) {
  for (int64_t i = first_index(); i < count; i += index_step()) {
    A sum = z[i];
    for (int64_t g = 1; g < groups; ++g) sum += z[g * count + i];
    z[i] = sum;
  }
}

// dk (channels, lk) from coefficients of reversed(dy) * u: lag m is real at n-1-m, lag -1-m imaginary at m.
template <class A>
__global__ void kernel_gradient_kernel(A* dk, const Complex<A>* __restrict__ z, int64_t total, int64_t lk,
                                       int64_t lags, bool reverse_kernel, int log2n) {
  const int64_t n = int64_t{1} << log2n;
  const A scale = A(1) / static_cast<A>(n);
  for (int64_t i = first_index(); i < total; i += index_step()) {
    const int64_t c = i / lk, m = i % lk;
    const Complex<A>* row = z + (c << log2n);
    dk[i] = m >= lags ? A(0) : scale * (reverse_kernel ? row[m].im : row[n - 1 - m].re);
  }
}

// Channels [c0, c0 + channels) of one sequence u (l, h) as rows of z (channels, n); 32 positions x 32 channels a block.
template <class T, class A>
__global__ void rows_load_kernel(Complex<A>* z, const T* __restrict__ u, int64_t l, int64_t h, int64_t c0,
                                 int64_t channels, int log2n, int64_t tiles_c, bool reversed) {
  __shared__ A tile[32][33];
  const int64_t n = int64_t{1} << log2n, first_c = blockIdx.x % tiles_c * 32, first_t = blockIdx.x / tiles_c * 32;
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  for (int j = y; j < 32; j += 8) {
    const int64_t t = first_t + j, c = first_c + x;
    tile[j][x] = t < l && c < channels ? static_cast<A>(u[t * h + c0 + c]) : A(0);
  }
  __syncthreads();
  for (int j = y; j < 32; j += 8) {
    const int64_t t = first_t + x, c = first_c + j;
    if (t < n && c < channels) z[(c << log2n) + (reversed ? n - 1 - t : t)] = {tile[x][j], A(0)};
  }
}

template <class T, class A>
__global__ void rows_store_kernel(T* y, const Complex<A>* __restrict__ z, int64_t l, int64_t h, int64_t c0,
                                  int64_t channels, int log2n, int64_t tiles_c, bool reversed) {
  __shared__ A tile[32][33];
  const int64_t n = int64_t{1} << log2n, first_c = blockIdx.x % tiles_c * 32, first_t = blockIdx.x / tiles_c * 32;
  const int tx = threadIdx.x % 32, ty = threadIdx.x / 32;
  for (int j = ty; j < 32; j += 8) {
    const int64_t t = first_t + tx, c = first_c + j;
    if (t < l && c < channels) tile[tx][j] = z[(c << log2n) + (reversed ? n - 1 - t : t)].re;
  }
  __syncthreads();
  for (int j = ty; j < 32; j += 8) {
    const int64_t t = first_t + j, c = first_c + tx;
    if (t < l && c < channels) y[t * h + c0 + c] = static_cast<T>(tile[j][tx]);
  }
}

template <class A>
__global__ void multiply_kernel(Complex<A>* z, const Complex<A>* __restrict__ w, int64_t count) {
  for (int64_t i = first_index(); i < count; i += index_step()) z[i] = z[i] * w[i];
}
template <class A>
__global__ void multiply_add_kernel(Complex<A>* sum, const Complex<A>* __restrict__ z, const Complex<A>* __restrict__ w,
                                    int64_t count, bool first) {
  for (int64_t i = first_index(); i < count; i += index_step()) sum[i] = first ? z[i] * w[i] : sum[i] + z[i] * w[i];
}

/// The work space of some channels of one sequence.
struct Rows {
  int64_t l, h, channels;  // at most `channels` at a time: 128 MB of spectra
  int log2n;
  Rows(const Tensor& u, DType a) : l(u.size(1)), h(u.size(2)), log2n(fft_conv_log2(u.size(1))) {
    channels = std::clamp<int64_t>((int64_t{64} << 20) / size_of(a) >> log2n, 1, h);
  }
  Tensor spectra(int64_t c0, const Tensor& like) const {
    return empty({std::min(h, c0 + channels) - c0, int64_t{1} << log2n, 2}, like.dtype(), like.device());
  }
  template <class T, class A>
  void load(Tensor& z, const Tensor& u, int64_t row, int64_t c0, bool reversed) const {
    const int64_t tiles_c = ceil_div(z.size(0), 32), tiles_t = ceil_div(int64_t{1} << log2n, 32);
    launch(rows_load_kernel<T, A>, {.grid = tiles_c * tiles_t, .block = 256, .stream = current_stream(u.device())},
           complex_of<A>(z), u.data<T>() + row * l * h, l, h, c0, z.size(0), log2n, tiles_c, reversed);
  }
  template <class T, class A>
  void store(Tensor& y, const Tensor& z, int64_t row, int64_t c0, bool reversed) const {
    const int64_t tiles_c = ceil_div(z.size(0), 32), tiles_t = ceil_div(l, 32);
    launch(rows_store_kernel<T, A>, {.grid = tiles_c * tiles_t, .block = 256, .stream = current_stream(y.device())},
           y.data<T>() + row * l * h, complex_of<A>(z), l, h, c0, z.size(0), log2n, tiles_c, reversed);
  }
};

}  // namespace

Tensor ring_table(DType dtype, int log2n, Device device) {
  static std::mutex mutex;
  // Never freed: captured graphs keep the addresses. Not destroyed at exit: the driver may be gone by then.
  static auto* tables = new std::map<std::tuple<int, DType, int>, Tensor>;
  const std::lock_guard lock(mutex);
  const auto key = std::make_tuple(device.index, dtype, log2n);
  if (const auto it = tables->find(key); it != tables->end()) return it->second;
  const int64_t size = std::max<int64_t>(2, (int64_t{1} << log2n) / 2);
  Tensor table = empty({size, 2}, dtype, device);
  visit_float(dtype, [&]<class T>() {
    using A = accum_t<T>;
    if constexpr (std::is_same_v<T, A>)
      launch(ring_table_kernel<A>, {.grid = ceil_div(size, 256), .block = 256, .stream = current_stream(device)},
             complex_of<A>(table), size);
  });
  if (!is_capturing(device)) tables->emplace(key, table);
  return table;
}

void ring_transform(Tensor& z, int log2n, bool inverse) {
  if (z.dtype() == DType::f64)
    inverse ? transform<double, true>(z, log2n) : transform<double, false>(z, log2n);
  else
    inverse ? transform<float, true>(z, log2n) : transform<float, false>(z, log2n);
}

Tensor kernel_spectrum(const Tensor& K, const Tensor& K1, const Tensor& D, int64_t c0, int64_t c1, int log2n) {
  const int64_t n = int64_t{1} << log2n, total = (c1 - c0) * n;
  Tensor w = empty({c1 - c0, n, 2}, K.dtype(), K.device());
  const auto load = [&]<class A>(A) {
    launch(kernel_load_kernel<A>, over(total, K.device()), complex_of<A>(w), K.data<A>(),
           K1.defined() ? K1.data<A>() : nullptr, D.defined() ? D.data<A>() : nullptr, c0, total, K.size(1),
           K1.defined() ? K1.size(1) : int64_t{0}, log2n);
  };
  K.dtype() == DType::f64 ? load(double{}) : load(float{});
  ring_transform(w, log2n, false);
  return w;
}

void kernel_gradient(Tensor& dK, Tensor& dK1, Tensor& z, int64_t l, int64_t c0, int64_t c1, int log2n) {
  const int64_t groups = z.size(0), count = (c1 - c0) << (log2n + 1);
  const auto write = [&]<class A>(A) {
    if (groups > 1) launch(sum_groups_kernel<A>, over(count, z.device()), z.data<A>(), count, groups);
    Tensor sum = z.select(0, 0);
    ring_transform(sum, log2n, true);
    const auto rows = [&](Tensor& dk, int64_t lags, bool reverse_kernel) {
      const int64_t total = (c1 - c0) * dk.size(1);
      launch(kernel_gradient_kernel<A>, over(total, z.device()), dk.data<A>() + c0 * dk.size(1), complex_of<A>(sum),
             total, dk.size(1), lags, reverse_kernel, log2n);
    };
    rows(dK, l, false);
    if (dK1.defined()) rows(dK1, l - 1, true);
  };
  dK.dtype() == DType::f64 ? write(double{}) : write(float{});
}

void fft_conv_long_forward(Tensor& y, const Tensor& u, const Tensor& K, const Tensor& K1, const Tensor& D) {
  const Rows rows(u, K.dtype());
  visit_float(u.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    for (int64_t c0 = 0; c0 < rows.h; c0 += rows.channels) {
      Tensor z = rows.spectra(c0, K);
      const Tensor w = kernel_spectrum(K, K1, D, c0, c0 + z.size(0), rows.log2n);
      for (int64_t row = 0; row < u.size(0); ++row) {
        rows.load<T, A>(z, u, row, c0, false);
        ring_transform(z, rows.log2n, false);
        launch(multiply_kernel<A>, over(z.numel() / 2, u.device()), complex_of<A>(z), complex_of<A>(w), z.numel() / 2);
        ring_transform(z, rows.log2n, true);
        rows.store<T, A>(y, z, row, c0, false);
      }
    }
  });
}

void fft_conv_long_backward(Tensor& du, Tensor& dK, Tensor& dK1, const Tensor& dy, const Tensor& u, const Tensor& K,
                            const Tensor& K1, const Tensor& D) {
  const Rows rows(u, K.dtype());
  visit_float(u.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    for (int64_t c0 = 0; c0 < rows.h; c0 += rows.channels) {
      Tensor g = rows.spectra(c0, K), z = rows.spectra(c0, K), sum = rows.spectra(c0, K);
      const int64_t count = z.numel() / 2;
      const Tensor w = kernel_spectrum(K, K1, D, c0, c0 + z.size(0), rows.log2n);
      for (int64_t row = 0; row < u.size(0); ++row) {
        rows.load<T, A>(g, dy, row, c0, true);
        ring_transform(g, rows.log2n, false);
        rows.load<T, A>(z, u, row, c0, false);
        ring_transform(z, rows.log2n, false);
        launch(multiply_add_kernel<A>, over(count, u.device()), complex_of<A>(sum), complex_of<A>(z), complex_of<A>(g),
               count, row == 0);
        launch(multiply_kernel<A>, over(count, u.device()), complex_of<A>(g), complex_of<A>(w), count);
        ring_transform(g, rows.log2n, true);
        rows.store<T, A>(du, g, row, c0, true);
      }
      Tensor one_group = sum.unsqueeze(0);
      kernel_gradient(dK, dK1, one_group, rows.l, c0, c0 + z.size(0), rows.log2n);
    }
  });
}

}  // namespace krait::kernels::cuda
