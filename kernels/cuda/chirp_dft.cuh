#pragma once
// Discrete Fourier transforms of any length in fp64: powers of two as they are, others by Bluestein's identity 2 i j = i^2 + j^2 - (j - i)^2: a
// convolution of power-of-two length M = M1 M2, made by column and row transforms in shared memory. Between the two
// passes data stays in bit-reversed order, which the convolution does not notice.
#include "core/cuda/launch.cuh"
#include "kernels/cuda/fft.cuh"

namespace krait::kernels::cuda {

constexpr int kChirpThreads = 128;

/// out_j = sum_{i < n_in} in_i e^(sign 2 pi i j / n), j < n_out.
struct ChirpShape {
  int64_t n, n_in, n_out;
  int sign;
  int log2m1, log2m2;
  __host__ __device__ int64_t m1() const { return int64_t{1} << log2m1; }
  __host__ __device__ int64_t m2() const { return int64_t{1} << log2m2; }
  __host__ __device__ int64_t m() const { return int64_t{1} << (log2m1 + log2m2); }
  /// Columns of a block.
  __host__ __device__ int64_t columns() const {
    const int64_t fitting = log2m1 < 10 ? 1024 >> log2m1 : 1;
    return fitting < m2() ? fitting : m2();
  }
  /// e^(sign pi i k^2 / n)
  __device__ Complex64 chirp(int64_t k) const {
    Complex64 w;
    sincospi(static_cast<double>(k * k % (2 * n)) / static_cast<double>(n), &w.im, &w.re);
    return {w.re, sign * w.im};
  }
};

inline ChirpShape chirp_shape(int64_t n, int64_t n_in, int64_t n_out, int sign) {
  int log2m = 0;
  while ((int64_t{1} << log2m) < n_in + n_out - 1) ++log2m;
  KRAIT_CHECK(log2m <= 22, "a transform of length {} is too long for CUDA; the limit is about 2.7 million", n);
  const int log2m1 = log2m <= 10 ? 0 : log2m / 2;
  return {n, n_in, n_out, sign, log2m1, log2m - log2m1};
}

/// in_i times its chirp, and zeros.
template <class Load>
struct Chirped {
  Load load;
  ChirpShape shape;
  __device__ Complex64 operator()(int64_t row, int64_t i) const {
    return i < shape.n_in ? load(row, i) * shape.chirp(i) : Complex64{0, 0};
  }
};

/// The convolution's other factor, as input of the same transform.
struct ChirpFilter {
  ChirpShape shape;
  __device__ Complex64 operator()(int64_t, int64_t t) const {
    if (t < shape.n_out) return conj(shape.chirp(t));
    const int64_t back = shape.m() - t;
    return back < shape.n_in ? conj(shape.chirp(back)) : Complex64{0, 0};
  }
};

// Block (piece of the columns, row). y (rows, M1, M2), M1 in bit-reversed order. load(row, t), t < M.
template <class Load>
__global__ void __launch_bounds__(kChirpThreads) chirp_columns_kernel(Complex64* y, ChirpShape shape, Load load) {
  extern __shared__ __align__(16) unsigned char chirp_shared[];
  const int64_t m1 = shape.m1(), m2 = shape.m2(), columns = shape.columns();
  auto* x = reinterpret_cast<Complex64*>(chirp_shared);
  Complex64* twiddles = x + columns * m1;
  const int64_t first = int64_t{blockIdx.x} * columns, row = blockIdx.y;
  for (int64_t i = threadIdx.x; i < columns * m1; i += kChirpThreads) {
    const int64_t column = i % columns, t1 = i / columns;
    x[column * m1 + t1] = load(row, t1 * m2 + first + column);
  }
  fft_twiddles(twiddles, shape.log2m1);  // ends with a barrier
  if (m1 > 1)
    for (int64_t column = 0; column < columns; ++column) fft_forward(x + column * m1, twiddles, shape.log2m1);
  for (int64_t i = threadIdx.x; i < columns * m1; i += kChirpThreads) {
    const int64_t column = i % columns, at = i / columns;
    const int64_t k1 = bit_reversed(static_cast<uint32_t>(at), shape.log2m1), t2 = first + column;
    y[(row * m1 + at) * m2 + t2] = x[column * m1 + at] * root_of_unity<double>(k1 * t2, shape.m());
  }
}

// Block (row of M2, row of the batch): its transform; with a filter, times it and back.
static __global__ void __launch_bounds__(kChirpThreads)
    chirp_rows_kernel(Complex64* y, ChirpShape shape, const Complex64* filter) {
  extern __shared__ __align__(16) unsigned char chirp_shared[];
  const int64_t m1 = shape.m1(), m2 = shape.m2(), at = blockIdx.x;
  auto* x = reinterpret_cast<Complex64*>(chirp_shared);
  Complex64* twiddles = x + m2;
  Complex64* values = y + (int64_t{blockIdx.y} * m1 + at) * m2;
  for (int64_t i = threadIdx.x; i < m2; i += kChirpThreads) x[i] = values[i];
  fft_twiddles(twiddles, shape.log2m2);
  fft_forward(x, twiddles, shape.log2m2);
  if (!filter) {
    for (int64_t i = threadIdx.x; i < m2; i += kChirpThreads) values[i] = x[i];
    return;
  }
  for (int64_t i = threadIdx.x; i < m2; i += kChirpThreads) x[i] = x[i] * filter[at * m2 + i];
  __syncthreads();
  fft_inverse(x, twiddles, shape.log2m2);
  const int64_t k1 = bit_reversed(static_cast<uint32_t>(at), shape.log2m1);
  for (int64_t i = threadIdx.x; i < m2; i += kChirpThreads)
    values[i] = x[i] * conj(root_of_unity<double>(k1 * i, shape.m()));
}

// Block (piece of the columns, row): the columns back; store(row, j, out_j) for j < n_out.
template <class Store>
__global__ void __launch_bounds__(kChirpThreads)
    chirp_columns_back_kernel(const Complex64* y, ChirpShape shape, Store store) {
  extern __shared__ __align__(16) unsigned char chirp_shared[];
  const int64_t m1 = shape.m1(), m2 = shape.m2(), columns = shape.columns();
  auto* x = reinterpret_cast<Complex64*>(chirp_shared);
  Complex64* twiddles = x + columns * m1;
  const int64_t first = int64_t{blockIdx.x} * columns, row = blockIdx.y;
  for (int64_t i = threadIdx.x; i < columns * m1; i += kChirpThreads) {
    const int64_t column = i % columns, at = i / columns;
    x[column * m1 + at] = y[(row * m1 + at) * m2 + first + column];
  }
  fft_twiddles(twiddles, shape.log2m1);
  if (m1 > 1)
    for (int64_t column = 0; column < columns; ++column) fft_inverse(x + column * m1, twiddles, shape.log2m1);
  const double scale = 1.0 / static_cast<double>(shape.m());
  for (int64_t i = threadIdx.x; i < columns * m1; i += kChirpThreads) {
    const int64_t column = i % columns, j = i / columns * m2 + first + column;
    if (j < shape.n_out) store(row, j, scale * (x[column * m1 + i / columns] * shape.chirp(j)));
  }
}

/// Transforms `rows` sequences: load(row, i) gives in_i, i < n_in; store(row, j, out_j) takes out_j, j < n_out.
template <class Load, class Store>
void chirp_dft(const ChirpShape& shape, int64_t rows, Load load, Store store, Device device) {
  const Stream stream = current_stream(device);
  constexpr int64_t kSize = sizeof(Complex64);
  const int64_t m1 = shape.m1(), m2 = shape.m2(), m = shape.m(), columns = shape.columns();
  const Tensor work = empty({rows, m, 2}, DType::f64, device), filter = empty({m, 2}, DType::f64, device);
  auto* y = reinterpret_cast<Complex64*>(work.data<double>());
  auto* f = reinterpret_cast<Complex64*>(filter.data<double>());
  const int64_t column_bytes = (columns * m1 + m1 / 2) * kSize, row_bytes = (m2 + m2 / 2) * kSize;
  const auto by_columns = [&](int64_t count) {
    return LaunchConfig{.grid = m2 / columns, .grid_y = count, .block = kChirpThreads, .shared = column_bytes,
                        .stream = stream};
  };
  const auto by_rows = [&](int64_t count) {
    return LaunchConfig{.grid = m1, .grid_y = count, .block = kChirpThreads, .shared = row_bytes, .stream = stream};
  };
  launch(chirp_columns_kernel<ChirpFilter>, by_columns(1), f, shape, ChirpFilter{shape});
  launch(chirp_rows_kernel, by_rows(1), f, shape, static_cast<const Complex64*>(nullptr));
  launch(chirp_columns_kernel<Chirped<Load>>, by_columns(rows), y, shape, Chirped<Load>{load, shape});
  launch(chirp_rows_kernel, by_rows(rows), y, shape, static_cast<const Complex64*>(f));
  launch(chirp_columns_back_kernel<Store>, by_columns(rows), static_cast<const Complex64*>(y), shape, store);
}

constexpr int64_t kMaxPowerDft = 4096;  // 96 KB of shared memory

// Block: one row of n = 2^log2n.
template <class Load, class Store>
__global__ void __launch_bounds__(512)
    power_dft_kernel(int64_t n_in, int64_t n_out, int log2n, bool inverse, Load load, Store store) {
  extern __shared__ __align__(16) unsigned char chirp_shared[];
  const int n = 1 << log2n;
  auto* x = reinterpret_cast<Complex64*>(chirp_shared);
  Complex64* twiddles = x + n;
  const int64_t row = blockIdx.x;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const int at = inverse ? static_cast<int>(bit_reversed(static_cast<uint32_t>(i), log2n)) : i;
    x[at] = i < n_in ? load(row, i) : Complex64{0, 0};
  }
  fft_twiddles(twiddles, log2n);  // ends with a barrier
  if (inverse)
    fft_inverse(x, twiddles, log2n);
  else
    fft_forward(x, twiddles, log2n);
  for (int j = threadIdx.x; j < n_out; j += blockDim.x)
    store(row, j, x[inverse ? j : static_cast<int>(bit_reversed(static_cast<uint32_t>(j), log2n))]);
}

// Longer ones in two passes, n = M1 M2. in_i, or its conjugate, and zeros.
template <class Load>
struct Padded {
  Load load;
  ChirpShape shape;
  __device__ Complex64 operator()(int64_t row, int64_t i) const {
    if (i >= shape.n_in) return {0, 0};
    const Complex64 value = load(row, i);
    return shape.sign > 0 ? conj(value) : value;
  }
};

// Block (row of M2, row of the batch), behind chirp_columns_kernel: out_j of j = k1 + M1 k2.
template <class Store>
__global__ void __launch_bounds__(kChirpThreads)
    split_rows_kernel(const Complex64* y, ChirpShape shape, Store store) {
  extern __shared__ __align__(16) unsigned char chirp_shared[];
  const int64_t m1 = shape.m1(), m2 = shape.m2(), at = blockIdx.x, row = blockIdx.y;
  auto* x = reinterpret_cast<Complex64*>(chirp_shared);
  Complex64* twiddles = x + m2;
  const Complex64* values = y + (row * m1 + at) * m2;
  for (int64_t i = threadIdx.x; i < m2; i += kChirpThreads) x[i] = values[i];
  fft_twiddles(twiddles, shape.log2m2);
  fft_forward(x, twiddles, shape.log2m2);
  const int64_t k1 = bit_reversed(static_cast<uint32_t>(at), shape.log2m1);
  for (int64_t k2 = threadIdx.x; k2 < m2; k2 += kChirpThreads) {
    const int64_t j = k1 + m1 * k2;
    if (j >= shape.n_out) continue;
    const Complex64 value = x[bit_reversed(static_cast<uint32_t>(k2), shape.log2m2)];
    store(row, j, shape.sign > 0 ? conj(value) : value);
  }
}

template <class Load, class Store>
void split_dft(const ChirpShape& shape, int64_t rows, Load load, Store store, Device device) {
  const Stream stream = current_stream(device);
  constexpr int64_t kSize = sizeof(Complex64);
  const int64_t m1 = shape.m1(), m2 = shape.m2(), columns = shape.columns();
  const Tensor work = empty({rows, shape.m(), 2}, DType::f64, device);
  auto* y = reinterpret_cast<Complex64*>(work.data<double>());
  launch(chirp_columns_kernel<Padded<Load>>,
         {.grid = m2 / columns, .grid_y = rows, .block = kChirpThreads, .shared = (columns * m1 + m1 / 2) * kSize,
          .stream = stream},
         y, shape, Padded<Load>{load, shape});
  launch(split_rows_kernel<Store>,
         {.grid = m1, .grid_y = rows, .block = kChirpThreads, .shared = (m2 + m2 / 2) * kSize, .stream = stream},
         static_cast<const Complex64*>(y), shape, store);
}

inline bool is_power_of_two(int64_t n) { return (n & (n - 1)) == 0; }
inline int log2_of(int64_t n) {
  int log2n = 0;
  while ((int64_t{1} << log2n) < n) ++log2n;
  return log2n;
}

/// chirp_dft by the transform that suits the length.
template <class Load, class Store>
void any_dft(int64_t n, int64_t n_in, int64_t n_out, int sign, int64_t rows, Load load, Store store, Device device) {
  if (!is_power_of_two(n) || n > int64_t{1} << 22)
    return chirp_dft(chirp_shape(n, n_in, n_out, sign), rows, load, store, device);
  const int log2n = log2_of(n);
  if (n > kMaxPowerDft)
    return split_dft(ChirpShape{n, n_in, n_out, sign, log2n / 2, log2n - log2n / 2}, rows, load, store, device);
  launch(power_dft_kernel<Load, Store>,
         {.grid = rows, .block = static_cast<int>(std::clamp<int64_t>(n / 4, 32, 512)),
          .shared = (n + n / 2) * static_cast<int64_t>(sizeof(Complex64)), .stream = current_stream(device)},
         n_in, n_out, log2n, sign > 0, load, store);
}
/// Complex values of workspace for a row of it.
inline int64_t any_dft_workspace(int64_t n, int64_t n_in, int64_t n_out) {
  if (!is_power_of_two(n) || n > int64_t{1} << 22) return chirp_shape(n, n_in, n_out, 1).m();
  return n > kMaxPowerDft ? n : 0;
}

}  // namespace krait::kernels::cuda
