// Convolutions of 513 to 1024 positions in fp32: the transform lies in registers (register_fft.cuh) and passes through
// shared memory once each way.
#include <map>
#include <mutex>

#include "core/cuda/launch.cuh"
#include "kernels/cuda/fft_conv.cuh"
#include "kernels/cuda/register_fft.cuh"

namespace krait::kernels::cuda {

namespace {

using Value = Complex<float>;

constexpr int kPoints = 1 << kRegisterLog2;
constexpr int kChannels = 8;    // of a block: a sector of 32 bytes of each position
constexpr int kNeighbours = 4;  // tiles of a sequence side by side in the grid: whole lines of 128 bytes
constexpr int kThreads = kChannels * kSide;
constexpr int kLine = kSide + 1;             // of a block of 32 coefficients in shared memory
constexpr int kChannel = kSide * kLine + 4;  // so that 8 channels x 4 coefficients fall into 32 banks

// Tensors (b, l, h).
struct Sequences {
  int64_t b, l, h;
  int64_t tiles() const { return ceil_div(h, kChannels); }
  int64_t groups_of_tiles() const { return ceil_div(tiles(), kNeighbours); }
};

// Which tile and which of `count` sequences (or groups of them) a block serves; tiles beyond the last one are idle.
struct Work {
  int64_t c0, index;
  __device__ explicit Work(int64_t count)
      : c0((blockIdx.x / (kNeighbours * count) * kNeighbours + blockIdx.x % kNeighbours) * kChannels),
        index(blockIdx.x / kNeighbours % count) {}
};

// A thread's part before and after the exchange.
struct Part {
  int channel, at;
  // Channels fastest: neighbours read neighbouring values of a position.
  static __device__ Part of_coefficients() { return {int(threadIdx.x) % kChannels, int(threadIdx.x) / kChannels}; }
  // One warp a channel.
  static __device__ Part of_points() { return {int(threadIdx.x) / kSide, int(threadIdx.x) % kSide}; }
};

template <bool one_warp>
__device__ __forceinline__ void barrier() {
  if constexpr (one_warp)
    __syncwarp();
  else
    __syncthreads();
}

// Element j of the caller goes to shared[from + j * from_step], element j of the result comes from
// shared[to + j * to_step]; real parts, then imaginary ones. By a block, or by one warp of it.
template <bool one_warp>
__device__ __forceinline__ void exchange(Value (&v)[kSide], float* shared, int from, int from_step, int to,
                                         int to_step) {
  barrier<one_warp>();
#pragma unroll
  for (int j = 0; j < kSide; ++j) shared[from + j * from_step] = v[j].re;
  barrier<one_warp>();
#pragma unroll
  for (int j = 0; j < kSide; ++j) v[j].re = shared[to + j * to_step];
  barrier<one_warp>();
#pragma unroll
  for (int j = 0; j < kSide; ++j) shared[from + j * from_step] = v[j].im;
  barrier<one_warp>();
#pragma unroll
  for (int j = 0; j < kSide; ++j) v[j].im = shared[to + j * to_step];
}
template <bool one_warp = false>
__device__ __forceinline__ void to_points(Value (&v)[kSide], float* shared, Part from, Part to) {
  exchange<one_warp>(v, shared, from.channel * kChannel + from.at, kLine, to.channel * kChannel + to.at * kLine, 1);
}
template <bool one_warp = false>
__device__ __forceinline__ void to_coefficients(Value (&v)[kSide], float* shared, Part from, Part to) {
  exchange<one_warp>(v, shared, from.channel * kChannel + from.at * kLine, 1, to.channel * kChannel + to.at, kLine);
}

// A value that the compiler must not take for one it knows: it would keep 32 addresses or roots in registers from one
// use to the next.
template <class V>
__device__ __forceinline__ V forgotten(V v) {
  asm volatile("" : "+l"(v));
  return v;
}

// A thread's 32 coefficients in a sequence (l, h) of channels; 1023 - t with reversed.
struct Walk {
  int64_t first, step;  // elements
  int t, step_t, length;
  __device__ Walk(const Sequences& x, int64_t c, int i, bool reversed)
      : first((reversed ? kPoints - 1 - i : i) * x.h + c),
        step(forgotten(reversed ? -kSide * x.h : kSide * x.h)),
        t(reversed ? kPoints - 1 - i : i),
        step_t(reversed ? -kSide : kSide),
        length(c < x.h ? static_cast<int>(x.l) : 0) {}
};

// Zeros beyond the sequence.
template <class T>
__device__ __forceinline__ void load(Value (&v)[kSide], const T* __restrict__ from, Walk w) {
  from += w.first;
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
    v[j].re = w.t + w.step_t * j < w.length ? static_cast<float>(*from) : 0.0f;
    from += w.step;
  }
}
template <class T>
__device__ __forceinline__ void store(T* to, const Value (&v)[kSide], Walk w) {
  to += w.first;
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
    if (w.t + w.step_t * j < w.length) *to = static_cast<T>(v[j].re);
    to += w.step;
  }
}

// Spectra (rows, 32, 32): point k of block m at [k][m].
__device__ __forceinline__ int64_t spectrum_at(int64_t row, int m) { return row * kPoints + m; }

// Block (tile, sequence). Bound by the instructions: about 2600 a thread, 8192 sequences of a channel 25 us.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    forward_kernel(T* y, const T* __restrict__ u, const Value* __restrict__ w, const Value* __restrict__ table,
                   Sequences x) {
  __shared__ float shared[kChannels * kChannel];
  const Work work(x.b);
  if (work.c0 >= x.h) return;
  const Part coefficients = Part::of_coefficients(), points = Part::of_points();
  const int64_t base = work.index * x.l * x.h, c = work.c0 + coefficients.channel;
  Value v[kSide];
  load(v, u + base, Walk(x, c, coefficients.at, false));
  register_split_real(v);
  to_points(v, shared, coefficients, points);
  register_split<1, kSide>(v, BlockRoots{forgotten(table + points.at)});
  if (work.c0 + points.channel < x.h) {
    w += spectrum_at(work.c0 + points.channel, points.at);
#pragma unroll
    for (int k = 0; k < kSide; ++k) v[k] = v[k] * w[k * kSide];
  }
  register_join<1, kSide>(v, BlockRoots{forgotten(table + points.at)});
  to_coefficients(v, shared, points, coefficients);
  register_join_real(v);
  store(y + base, v, Walk(x, c, coefficients.at, false));
}

// Block (tile, group of sequences): it walks over its group, so that the sum of spectra for dK has a fixed order.
// sums (groups, h, 32, 32). The spectrum of u waits in shared memory for that of dy.
constexpr int64_t kBackwardShared = sizeof(Value) * kThreads * kSide + sizeof(float) * kChannels * kChannel;
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(T* du, Value* sums, const T* __restrict__ dy, const T* __restrict__ u, const Value* __restrict__ w,
                    const Value* __restrict__ table, int64_t groups, Sequences x) {
  extern __shared__ __align__(16) unsigned char bytes[];
  Value* kept = reinterpret_cast<Value*>(bytes) + threadIdx.x;
  float* shared = reinterpret_cast<float*>(bytes + sizeof(Value) * kThreads * kSide);
  const Work work(groups);
  if (work.c0 >= x.h) return;
  const Part coefficients = Part::of_coefficients(), points = Part::of_points();
  const int64_t c = work.c0 + coefficients.channel, own = work.c0 + points.channel;
  const bool inside = own < x.h;
  w += spectrum_at(own, points.at);
  sums += spectrum_at(work.index * x.h + own, points.at);
  const int64_t first = x.b * work.index / groups, last = x.b * (work.index + 1) / groups;
  for (int64_t row = first; row < last; ++row) {
    const int64_t base = row * x.l * x.h;
    Value v[kSide];
    load(v, u + base, Walk(x, c, coefficients.at, false));
    register_split_real(v);
    to_points(v, shared, coefficients, points);
    register_split<1, kSide>(v, BlockRoots{forgotten(table + points.at)});
#pragma unroll
    for (int k = 0; k < kSide; ++k) kept[k * kThreads] = v[k];  // the thread's own
    load(v, dy + base, Walk(x, c, coefficients.at, true));
    register_split_real(v);
    to_points(v, shared, coefficients, points);
    register_split<1, kSide>(v, BlockRoots{forgotten(table + points.at)});
    if (inside) {
#pragma unroll
      for (int k = 0; k < kSide; ++k) {
        const Value product = v[k] * kept[k * kThreads];
        sums[k * kSide] = row == first ? product : sums[k * kSide] + product;
        v[k] = v[k] * w[k * kSide];
      }
    }
    register_join<1, kSide>(v, BlockRoots{forgotten(table + points.at)});
    to_coefficients(v, shared, points, coefficients);
    register_join_real(v);
    store(du + base, v, Walk(x, c, coefficients.at, true));
  }
}

// Block: one channel, one warp. w = the spectrum of (K + D at lag 0 - i K1 reversed) / n.
__global__ void __launch_bounds__(kSide)
    spectrum_kernel(Value* w, const float* __restrict__ K, const float* __restrict__ K1, const float* __restrict__ D,
                    const Value* __restrict__ table, int64_t lk, int64_t lk1) {
  __shared__ float shared[kChannel];
  const Part own{0, static_cast<int>(threadIdx.x)};
  const int64_t c = blockIdx.x;
  Value v[kSide];
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
    const int t = own.at + kSide * j, back = kPoints - 1 - t;
    v[j] = {t < lk ? K[c * lk + t] : 0.0f, K1 && back < lk1 ? -K1[c * lk1 + back] : 0.0f};
  }
  if (D && own.at == 0) v[0].re += D[c];
#pragma unroll
  for (int j = 0; j < kSide; ++j) v[j] = (1.0f / kPoints) * v[j];
  register_split<1, kSide>(v, FirstRoots{});
  to_points<true>(v, shared, own, own);
  register_split<1, kSide>(v, BlockRoots{table + own.at});
#pragma unroll
  for (int k = 0; k < kSide; ++k) w[spectrum_at(c, own.at) + k * kSide] = v[k];
}

// Block: one channel. The sums over groups in order, then the first warp's transform back: of reversed(dy) * u lag m is
// real at n-1-m, lag -1-m imaginary at m.
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(float* dK, float* dK1, const Value* __restrict__ sums, const Value* __restrict__ table,
                    int64_t groups, int64_t h, int64_t l, int64_t lk, int64_t lk1) {
  __shared__ float shared[kChannel];
  __shared__ Value total[kPoints];
  const int64_t c = blockIdx.x;
  Value v[kSide];
#pragma unroll
  for (int e = 0; e < kPoints / kThreads; ++e) v[e] = {0.0f, 0.0f};
#pragma unroll 4
  for (int64_t g = 0; g < groups; ++g)
#pragma unroll
    for (int e = 0; e < kPoints / kThreads; ++e)
      v[e] = v[e] + sums[spectrum_at(g * h + c, threadIdx.x) + e * kThreads];
#pragma unroll
  for (int e = 0; e < kPoints / kThreads; ++e) total[threadIdx.x + e * kThreads] = v[e];
  for (int64_t m = kPoints + threadIdx.x; m < lk; m += kThreads) dK[c * lk + m] = 0.0f;
  if (dK1)
    for (int64_t m = kPoints + threadIdx.x; m < lk1; m += kThreads) dK1[c * lk1 + m] = 0.0f;
  __syncthreads();
  if (threadIdx.x >= kSide) return;
  const Part own{0, static_cast<int>(threadIdx.x)};
#pragma unroll
  for (int k = 0; k < kSide; ++k) v[k] = total[own.at + k * kSide];
  register_join<1, kSide>(v, BlockRoots{table + own.at});
  to_coefficients<true>(v, shared, own, own);
  register_join<1, kSide>(v, FirstRoots{});
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
    const int t = own.at + kSide * j, lag = kPoints - 1 - t;
    if (lag < lk) dK[c * lk + lag] = lag < l ? v[j].re * (1.0f / kPoints) : 0.0f;
    if (dK1 && t < lk1) dK1[c * lk1 + t] = t < l - 1 ? v[j].im * (1.0f / kPoints) : 0.0f;
  }
}

__global__ void table_kernel(Value* table) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < kSide) {
    table[i] = {1.0f, 0.0f};
    return;
  }
  double s, c;
  sincospi(2.0 * node_turns(node_of_entry(i)), &s, &c);
  table[i] = {static_cast<float>(c), static_cast<float>(s)};
}

Value* values_of(const Tensor& t) { return reinterpret_cast<Value*>(t.data<float>()); }

// BlockRoots' table, kept like that of ring_table.
Tensor block_table(Device device) {
  static std::mutex mutex;
  static auto* tables = new std::map<int, Tensor>;
  const std::lock_guard lock(mutex);
  if (const auto it = tables->find(device.index); it != tables->end()) return it->second;
  Tensor table = empty({kSide, kSide, 2}, DType::f32, device);
  launch(table_kernel, {.grid = 1, .block = kSide * kSide, .stream = current_stream(device)}, values_of(table));
  if (!is_capturing(device)) tables->emplace(device.index, table);
  return table;
}

const float* data_or_null(const Tensor& t) { return t.defined() ? t.data<float>() : nullptr; }
int64_t lags_of(const Tensor& t) { return t.defined() ? t.size(1) : 0; }

Tensor spectrum(const Tensor& K, const Tensor& K1, const Tensor& D, const Tensor& table) {
  const int64_t h = K.size(0);
  Tensor w = empty({h, kPoints, 2}, DType::f32, K.device());
  launch(spectrum_kernel, {.grid = h, .block = kSide, .stream = current_stream(K.device())}, values_of(w),
         K.data<float>(), data_or_null(K1), data_or_null(D), values_of(table), K.size(1), lags_of(K1));
  return w;
}

// f is called with a zero of the type of u.
template <class F>
void visit_input(const Tensor& u, F f) {
  u.dtype() == DType::bf16 ? f(bf16{}) : f(float{});
}

}  // namespace

void fft_conv_registers_forward(Tensor& y, const Tensor& u, const Tensor& K, const Tensor& K1, const Tensor& D) {
  const Sequences x{u.size(0), u.size(1), u.size(2)};
  const Tensor table = block_table(u.device()), w = spectrum(K, K1, D, table);
  visit_input(u, [&]<class T>(T) {
    launch(forward_kernel<T>,
           {.grid = x.b * x.groups_of_tiles() * kNeighbours, .block = kThreads, .stream = current_stream(u.device())},
           y.data<T>(), u.data<T>(), values_of(w), values_of(table), x);
  });
}

void fft_conv_registers_backward(Tensor& du, Tensor& dK, Tensor& dK1, const Tensor& dy, const Tensor& u,
                                 const Tensor& K, const Tensor& K1, const Tensor& D) {
  const Sequences x{u.size(0), u.size(1), u.size(2)};
  const Stream stream = current_stream(u.device());
  const int64_t groups = std::clamp<int64_t>(264 / x.tiles(), 1, x.b);  // two blocks for each of 132 multiprocessors
  const Tensor table = block_table(u.device()), w = spectrum(K, K1, D, table);
  const Tensor sums = empty({groups, x.h, kPoints, 2}, DType::f32, u.device());
  visit_input(u, [&]<class T>(T) {
    launch(backward_kernel<T>,
           {.grid = groups * x.groups_of_tiles() * kNeighbours, .block = kThreads, .shared = kBackwardShared,
            .stream = stream},
           du.data<T>(), values_of(sums), dy.data<T>(), u.data<T>(), values_of(w), values_of(table), groups, x);
  });
  launch(gradient_kernel, {.grid = x.h, .block = kThreads, .stream = stream}, dK.data<float>(),
         dK1.defined() ? dK1.data<float>() : nullptr, values_of(sums), values_of(table), groups, x.h, x.l, K.size(1),
         lags_of(K1));
}

}  // namespace krait::kernels::cuda
