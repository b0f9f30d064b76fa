// Convolutions of 513 to 1024 and of 2049 to 4096 positions in fp32: the transform lies in registers
// (register_fft.cuh) and passes through shared memory once or twice each way.
#include <algorithm>
#include <map>
#include <mutex>

#include "core/cuda/launch.cuh"
#include "kernels/cuda/fft_conv.cuh"
#include "kernels/cuda/register_fft.cuh"

namespace krait::kernels::cuda {

namespace {

using Value = Complex<float>;

// Tensors (b, l, h).
struct Sequences {
  int64_t b, l, h;
};

// Threads of a block, and blocks of a multiprocessor with 128 registers a thread.
template <class P>
constexpr int kBlock = P::kChannels * P::kThreads;
template <class P>
constexpr int kBlocks = 512 / kBlock<P>;
template <class P>
constexpr int64_t kExchange = int64_t{sizeof(float)} * P::kChannels * P::kShared;

// Tiles of a sequence that lie side by side in the grid: together whole lines of 128 bytes.
template <class P>
constexpr uint32_t kNeighbours = 32 / P::kChannels;
template <class P>
int64_t tiles_of(const Sequences& x) {
  return ceil_div(x.h, P::kChannels);
}
template <class P>
int64_t grid_of(const Sequences& x, int64_t count) {
  return ceil_div(tiles_of<P>(x), kNeighbours<P>) * kNeighbours<P> * count;
}

// Which tile and which of `count` sequences (or groups of them) a block serves; tiles beyond the last one are idle.
template <class P>
struct Work {
  int64_t c0, index;
  __device__ explicit Work(int64_t count) {
    const uint32_t along = static_cast<uint32_t>(count), place = blockIdx.x / kNeighbours<P>;
    c0 = int64_t{place / along * kNeighbours<P> + blockIdx.x % kNeighbours<P>} * P::kChannels;
    index = place % along;
  }
};

// A thread's place: channel of the tile, thread of the sequence.
struct Part {
  int channel, thread;
  // Channels fastest: neighbours read neighbouring values of a position.
  template <class P>
  static __device__ Part of_coefficients() {
    return {static_cast<int>(threadIdx.x) % P::kChannels, static_cast<int>(threadIdx.x) / P::kChannels};
  }
  template <class P>
  static __device__ Part of_points() {
    return {static_cast<int>(threadIdx.x) / P::kThreads, static_cast<int>(threadIdx.x) % P::kThreads};
  }
};

enum class Scope { warp, sequence, block };
template <class P, Scope scope>
__device__ __forceinline__ void barrier() {
  if constexpr (scope == Scope::warp)
    __syncwarp();
  else if constexpr (scope == Scope::sequence)  // the first kThreads threads of a block
    asm volatile("bar.sync 1, %0;" ::"n"(P::kThreads) : "memory");
  else
    __syncthreads();
}

// Element e goes to place from(old.thread, e) of its channel, the element of the result comes from place
// to(next.thread, e); real parts, then imaginary ones, which halves the memory.
template <class P, Scope scope, class From, class To>
__device__ __forceinline__ void exchange(Value (&v)[kValues], float* shared, Part old, From from, Part next, To to) {
  float *out = shared + old.channel * P::kShared, *in = shared + next.channel * P::kShared;
  barrier<P, scope>();
#pragma unroll
  for (int e = 0; e < kValues; ++e) out[from(old.thread, e)] = v[e].re;
  barrier<P, scope>();
#pragma unroll
  for (int e = 0; e < kValues; ++e) v[e].re = in[to(next.thread, e)];
  barrier<P, scope>();
#pragma unroll
  for (int e = 0; e < kValues; ++e) out[from(old.thread, e)] = v[e].im;
  barrier<P, scope>();
#pragma unroll
  for (int e = 0; e < kValues; ++e) v[e].im = in[to(next.thread, e)];
}

// A value that the compiler must not take for one it knows: it would keep 32 addresses or roots in registers from one
// use to the next.
template <class V>
__device__ __forceinline__ V forgotten(V v) {
  asm volatile("" : "+l"(v));
  return v;
}

// The transform behind its first pass, and what undoes it.
template <class P, Scope scope = Scope::block, bool early = false>
__device__ __forceinline__ void to_points(Value (&v)[kValues], float* shared, const Value* table, Part from, Part to) {
  const auto upper = [](int i, int e) { return P::upper(i, e); };
  const auto lower = [](int i, int e) { return P::lower(i, e); };
  exchange<P, scope>(v, shared, from, upper, to, lower);
  P::template split_rest<early>(v, forgotten(table), to.thread,
                [&](auto place, auto next) { exchange<P, Scope::warp>(v, shared, to, place, to, next); });
}
template <class P, Scope scope = Scope::block, bool early = false>
__device__ __forceinline__ void to_coefficients(Value (&v)[kValues], float* shared, const Value* table, Part from,
                                                Part to) {
  const auto upper = [](int i, int e) { return P::upper(i, e); };
  const auto lower = [](int i, int e) { return P::lower(i, e); };
  P::template join_rest<early>(v, forgotten(table), from.thread,
               [&](auto place, auto next) { exchange<P, Scope::warp>(v, shared, from, place, from, next); });
  exchange<P, scope>(v, shared, from, lower, to, upper);
}

template <class P>
__device__ __forceinline__ void first_split(Value (&v)[kValues]) {
#pragma unroll
  for (int s = 0; s < kValues; s += P::kRadix) register_split<1, P::kRadix>(v + s, FirstRoots{});
}
template <class P>
__device__ __forceinline__ void first_split_real(Value (&v)[kValues]) {
#pragma unroll
  for (int s = 0; s < kValues; s += P::kRadix) register_split_real<P::kRadix>(v + s);
}
template <class P>
__device__ __forceinline__ void last_join(Value (&v)[kValues]) {
#pragma unroll
  for (int s = 0; s < kValues; s += P::kRadix) register_join<1, P::kRadix>(v + s, FirstRoots{});
}
template <class P>
__device__ __forceinline__ void last_join_real(Value (&v)[kValues]) {
#pragma unroll
  for (int s = 0; s < kValues; s += P::kRadix) register_join_real<P::kRadix>(v + s);
}

template <class P>
__device__ __forceinline__ constexpr int coefficient(int thread, int e) {
  return thread + P::kThreads * (e / P::kRadix) + P::kStep * (e % P::kRadix);
}

// Its length forgotten: of the comparisons with it the compiler would keep 32 results.
__device__ __forceinline__ Sequences renewed(Sequences x) {
  x.l = forgotten(x.l);
  return x;
}

// A thread's coefficients in a sequence (l, h) of channels; position n-1-t instead of t when reversed. Addresses are
// one multiply-add each: a 32-bit step in bytes times a constant, added to 64 bits.
template <class P, bool reversed, class T>
struct Positions {
  int64_t first;  // element
  int step, thread, length;
  __device__ Positions(const Sequences& x, int64_t c, int i)
      : first((reversed ? P::kPoints - 1 - i : i) * x.h + c),
        step(static_cast<int>(forgotten((reversed ? -x.h : x.h) * static_cast<int64_t>(sizeof(T))))),
        thread(i),
        length(c < x.h ? static_cast<int>(x.l) : 0) {}
  __device__ bool has(int e) const {
    const int t = coefficient<P>(thread, e);
    return (reversed ? P::kPoints - 1 - t : t) < length;
  }
  template <class B>  // a byte
  __device__ B* at(B* bytes, int e) const {
    return bytes + int64_t{coefficient<P>(0, e)} * step;
  }
};

// Zeros beyond the sequence.
template <class P, bool reversed, class T>
__device__ __forceinline__ void load(float (&v)[kValues], const T* __restrict__ from, const Sequences& x, int64_t c,
                                     int i) {
  const Positions<P, reversed, T> p(x, c, i);
  const char* bytes = reinterpret_cast<const char*>(from + p.first);
#pragma unroll
  for (int e = 0; e < kValues; ++e)
    v[e] = p.has(e) ? static_cast<float>(*reinterpret_cast<const T*>(p.at(bytes, e))) : 0.0f;
}
template <class P, bool reversed, class T>
__device__ __forceinline__ void load(Value (&v)[kValues], const T* __restrict__ from, const Sequences& x, int64_t c,
                                     int i) {
  float re[kValues];
  load<P, reversed>(re, from, x, c, i);
#pragma unroll
  for (int e = 0; e < kValues; ++e) v[e].re = re[e];
}
template <class P, bool reversed, class T>
__device__ __forceinline__ void store(T* to, const Value (&v)[kValues], const Sequences& x, int64_t c, int i) {
  const Positions<P, reversed, T> p(x, c, i);
  char* bytes = reinterpret_cast<char*>(to + p.first);
#pragma unroll
  for (int e = 0; e < kValues; ++e)
    if (p.has(e)) *reinterpret_cast<T*>(p.at(bytes, e)) = static_cast<T>(v[e].re);
}

// Spectra (rows, 32, kThreads): element e of thread i at [e][i].
template <class P>
__device__ __forceinline__ int64_t spectrum_at(int64_t row, int i) {
  return row * P::kPoints + i;
}

// Block (tile, sequence). Bound by the instructions: about 3000 a thread of 32 values.
template <class P, class T>
__global__ void __launch_bounds__(kBlock<P>, kBlocks<P>)
    forward_kernel(T* y, const T* __restrict__ u, const Value* __restrict__ w, const Value* __restrict__ table,
                   Sequences x) {
  extern __shared__ __align__(16) float shared[];
  const Work<P> work(x.b);
  if (work.c0 >= x.h) return;
  const Part coefficients = Part::of_coefficients<P>(), points = Part::of_points<P>();
  const int64_t base = work.index * x.l * x.h, c = work.c0 + coefficients.channel;
  Value v[kValues];
  load<P, false>(v, u + base, x, c, coefficients.thread);
  first_split_real<P>(v);
  to_points<P, Scope::block, true>(v, shared, table, coefficients, points);
  if (work.c0 + points.channel < x.h) {
    w += spectrum_at<P>(work.c0 + points.channel, points.thread);
#pragma unroll
    for (int e = 0; e < kValues; ++e) v[e] = v[e] * w[e * P::kThreads];
  }
  to_coefficients<P, Scope::block, true>(v, shared, table, points, coefficients);
  last_join_real<P>(v);
  store<P, false>(y + base, v, x, c, coefficients.thread);
}

// Block (tile, group of sequences): it walks over its group, so that the sum of spectra for dK has a fixed order.
// sums like spectra (groups, h), in global memory as the walk goes on. The spectrum of u waits for that of dy in the
// block's piece of `scratch`.
template <class P, class T>
__global__ void __launch_bounds__(kBlock<P>, kBlocks<P>)
    backward_kernel(T* du, Value* sums, Value* scratch, const T* __restrict__ dy, const T* __restrict__ u,
                    const Value* __restrict__ w, const Value* __restrict__ table, int64_t groups, Sequences x) {
  extern __shared__ __align__(16) float shared[];
  Value* kept = scratch + int64_t{blockIdx.x} * kBlock<P> * kValues + threadIdx.x;
  const Work<P> work(groups);
  if (work.c0 >= x.h) return;
  const Part coefficients = Part::of_coefficients<P>(), points = Part::of_points<P>();
  const int64_t c = work.c0 + coefficients.channel, own = work.c0 + points.channel;
  const bool inside = own < x.h;
  w += spectrum_at<P>(own, points.thread);
  sums += spectrum_at<P>(work.index * x.h + own, points.thread);
  const int first = static_cast<int>(x.b * work.index / groups), last = static_cast<int>(x.b * (work.index + 1) / groups);
#pragma unroll 1
  for (int row = first; row < last; ++row) {
    const int64_t base = row * x.l * x.h;
    Value v[kValues];
    load<P, false>(v, u + base, renewed(x), c, coefficients.thread);
    first_split_real<P>(v);
    to_points<P>(v, shared, table, coefficients, points);
#pragma unroll
    for (int e = 0; e < kValues; ++e) kept[e * kBlock<P>] = v[e];  // the thread's own
    load<P, true>(v, dy + base, renewed(x), c, coefficients.thread);
    first_split_real<P>(v);
    to_points<P>(v, shared, table, coefficients, points);
    if (inside) {
#pragma unroll
      for (int e = 0; e < kValues; ++e) {
        const Value product = v[e] * kept[e * kBlock<P>];
        sums[e * P::kThreads] = row == first ? product : sums[e * P::kThreads] + product;
        v[e] = v[e] * w[e * P::kThreads];
      }
    }
    to_coefficients<P>(v, shared, table, points, coefficients);
    last_join_real<P>(v);
    store<P, true>(du + base, v, renewed(x), c, coefficients.thread);
  }
}

// The same with the sums in registers, the spectra of u and of the kernel in shared memory: one block of 8 warps a
// multiprocessor, which reads the next sequence while it works on one. Bound by the instructions: about 5600 a thread.
template <class P>
constexpr bool kSumsInRegisters = kBlock<P> <= 256;
template <class P>
constexpr int64_t kRegisterShared = kExchange<P> + int64_t{2 * sizeof(Value)} * kBlock<P> * kValues;
template <class P, class T>
__global__ void __launch_bounds__(kBlock<P>, 1)
    backward_in_registers_kernel(T* du, Value* sums, const T* __restrict__ dy, const T* __restrict__ u,
                                 const Value* __restrict__ w, const Value* __restrict__ table, int64_t groups,
                                 Sequences x) {
  extern __shared__ __align__(16) float shared[];
  Value* kept = reinterpret_cast<Value*>(shared + P::kChannels * P::kShared) + threadIdx.x;
  Value* weight = kept + kBlock<P> * kValues;
  const Work<P> work(groups);
  if (work.c0 >= x.h) return;
  const Part coefficients = Part::of_coefficients<P>(), points = Part::of_points<P>();
  const int64_t c = work.c0 + coefficients.channel, own = work.c0 + points.channel;
  const bool inside = own < x.h;
#pragma unroll
  for (int e = 0; e < kValues; ++e)
    weight[e * kBlock<P>] = inside ? w[spectrum_at<P>(own, points.thread) + e * P::kThreads] : Value{0.0f, 0.0f};
  const int first = static_cast<int>(x.b * work.index / groups), last = static_cast<int>(x.b * (work.index + 1) / groups);
  Value sum[kValues] = {};
  float ahead[kValues];
  load<P, false>(ahead, u + first * x.l * x.h, renewed(x), c, coefficients.thread);
#pragma unroll 1
  for (int row = first; row < last; ++row) {
    const int64_t base = row * x.l * x.h;
    Value v[kValues];
#pragma unroll
    for (int e = 0; e < kValues; ++e) v[e].re = ahead[e];
    load<P, true>(ahead, dy + base, renewed(x), c, coefficients.thread);
    first_split_real<P>(v);
    to_points<P>(v, shared, table, coefficients, points);
#pragma unroll
    for (int e = 0; e < kValues; ++e) {
      kept[e * kBlock<P>] = v[e];  // the thread's own
      v[e].re = ahead[e];
    }
    if (row + 1 < last) load<P, false>(ahead, u + base + x.l * x.h, renewed(x), c, coefficients.thread);
    first_split_real<P>(v);
    to_points<P>(v, shared, table, coefficients, points);
#pragma unroll
    for (int e = 0; e < kValues; ++e) {
      sum[e] = sum[e] + v[e] * kept[e * kBlock<P>];
      v[e] = v[e] * weight[e * kBlock<P>];
    }
    to_coefficients<P>(v, shared, table, points, coefficients);
    last_join_real<P>(v);
    store<P, true>(du + base, v, renewed(x), c, coefficients.thread);
  }
  if (!inside) return;
#pragma unroll
  for (int e = 0; e < kValues; ++e) sums[spectrum_at<P>(work.index * x.h + own, points.thread) + e * P::kThreads] = sum[e];
}

// Block: one channel. w = the spectrum of (K + D at lag 0 - i K1 reversed) / n.
template <class P>
__global__ void __launch_bounds__(P::kThreads)
    spectrum_kernel(Value* w, const float* __restrict__ K, const float* __restrict__ K1, const float* __restrict__ D,
                    const Value* __restrict__ table, int64_t lk, int64_t lk1) {
  __shared__ float shared[P::kShared];
  const Part own{0, static_cast<int>(threadIdx.x)};
  const int64_t c = blockIdx.x;
  const float scale = 1.0f / P::kPoints;
  Value v[kValues];
#pragma unroll
  for (int e = 0; e < kValues; ++e) {
    const int t = coefficient<P>(own.thread, e), back = P::kPoints - 1 - t;
    float re = t < lk ? K[c * lk + t] : 0.0f;
    if (e == 0 && D && t == 0) re += D[c];
    v[e] = {scale * re, K1 && back < lk1 ? -scale * K1[c * lk1 + back] : 0.0f};
  }
  first_split<P>(v);
  to_points<P, Scope::sequence>(v, shared, table, own, own);
#pragma unroll
  for (int e = 0; e < kValues; ++e) w[spectrum_at<P>(c, own.thread) + e * P::kThreads] = v[e];
}

// Block: one channel. All threads sum over the groups, in order; the first kThreads transform back: of
// reversed(dy) * u lag m is real at n-1-m, lag -1-m imaginary at m.
constexpr int kSumThreads = 256;
template <class P>
__global__ void __launch_bounds__(kSumThreads)
    gradient_kernel(float* dK, float* dK1, const Value* __restrict__ sums, const Value* __restrict__ table,
                    int64_t groups, int64_t h, int64_t l, int64_t lk, int64_t lk1) {
  extern __shared__ __align__(16) float shared[];
  Value* total = reinterpret_cast<Value*>(shared);  // kPoints, then the exchange
  const int64_t c = blockIdx.x;
  constexpr int kShare = P::kPoints / kSumThreads;
  Value sum[kShare] = {};
#pragma unroll 4
  for (int64_t g = 0; g < groups; ++g)
#pragma unroll
    for (int e = 0; e < kShare; ++e) sum[e] = sum[e] + sums[spectrum_at<P>(g * h + c, threadIdx.x) + e * kSumThreads];
#pragma unroll
  for (int e = 0; e < kShare; ++e) total[threadIdx.x + e * kSumThreads] = sum[e];
  for (int64_t m = P::kPoints + threadIdx.x; m < lk; m += kSumThreads) dK[c * lk + m] = 0.0f;
  if (dK1)
    for (int64_t m = P::kPoints + threadIdx.x; m < lk1; m += kSumThreads) dK1[c * lk1 + m] = 0.0f;
  __syncthreads();
  if (threadIdx.x >= P::kThreads) return;
  const Part own{0, static_cast<int>(threadIdx.x)};
  Value v[kValues];
#pragma unroll
  for (int e = 0; e < kValues; ++e) v[e] = total[own.thread + e * P::kThreads];
  to_coefficients<P, Scope::sequence>(v, shared + 2 * P::kPoints, table, own, own);
  last_join<P>(v);
  const float scale = 1.0f / P::kPoints;
#pragma unroll
  for (int e = 0; e < kValues; ++e) {
    const int t = coefficient<P>(own.thread, e), lag = P::kPoints - 1 - t;
    if (lag < lk) dK[c * lk + lag] = lag < l ? scale * v[e].re : 0.0f;
    if (dK1 && t < lk1) dK1[c * lk1 + t] = t < l - 1 ? scale * v[e].im : 0.0f;
  }
}

template <class P>
__global__ void table_kernel(Value* table) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= P::kTable) return;
  double s, c;
  sincospi(2.0 * node_turns(P::node(i)), &s, &c);
  table[i] = {static_cast<float>(c), static_cast<float>(s)};
}

Value* values_of(const Tensor& t) { return reinterpret_cast<Value*>(t.data<float>()); }

// The roots of a plan's blocks, kept like those of ring_table.
template <class P>
Tensor block_table(Device device) {
  static std::mutex mutex;
  static auto* tables = new std::map<int, Tensor>;
  const std::lock_guard lock(mutex);
  if (const auto it = tables->find(device.index); it != tables->end()) return it->second;
  Tensor table = empty({P::kTable, 2}, DType::f32, device);
  launch(table_kernel<P>, {.grid = ceil_div(P::kTable, 256), .block = 256, .stream = current_stream(device)},
         values_of(table));
  if (!is_capturing(device)) tables->emplace(device.index, table);
  return table;
}

const float* data_or_null(const Tensor& t) { return t.defined() ? t.data<float>() : nullptr; }
int64_t lags_of(const Tensor& t) { return t.defined() ? t.size(1) : 0; }

template <class P>
Tensor spectrum(const Tensor& K, const Tensor& K1, const Tensor& D, const Tensor& table) {
  const int64_t h = K.size(0);
  Tensor w = empty({h, P::kPoints, 2}, DType::f32, K.device());
  launch(spectrum_kernel<P>, {.grid = h, .block = P::kThreads, .stream = current_stream(K.device())}, values_of(w),
         K.data<float>(), data_or_null(K1), data_or_null(D), values_of(table), K.size(1), lags_of(K1));
  return w;
}

// f.template operator()<Plan, T>() for the length and dtype of u.
template <class F>
void visit_plan(const Tensor& u, F f) {
  const bool short_one = u.size(1) <= 1024;
  if (u.dtype() == DType::bf16)
    short_one ? f.template operator()<Plan1024, bf16>() : f.template operator()<Plan4096, bf16>();
  else
    short_one ? f.template operator()<Plan1024, float>() : f.template operator()<Plan4096, float>();
}

}  // namespace

void fft_conv_registers_forward(Tensor& y, const Tensor& u, const Tensor& K, const Tensor& K1, const Tensor& D) {
  visit_plan(u, [&]<class P, class T>() {
    const Sequences x{u.size(0), u.size(1), u.size(2)};
    const Tensor table = block_table<P>(u.device()), w = spectrum<P>(K, K1, D, table);
    launch(forward_kernel<P, T>,
           {.grid = grid_of<P>(x, x.b), .block = kBlock<P>, .shared = kExchange<P>, .stream = current_stream(u.device())},
           y.data<T>(), u.data<T>(), values_of(w), values_of(table), x);
  });
}

void fft_conv_registers_backward(Tensor& du, Tensor& dK, Tensor& dK1, const Tensor& dy, const Tensor& u,
                                 const Tensor& K, const Tensor& K1, const Tensor& D) {
  const Stream stream = current_stream(u.device());
  visit_plan(u, [&]<class P, class T>() {
    const Sequences x{u.size(0), u.size(1), u.size(2)};
    const int64_t at_once = 132 * (kSumsInRegisters<P> ? 1 : kBlocks<P>);  // of 132 multiprocessors
    const int64_t groups = std::clamp<int64_t>(at_once / tiles_of<P>(x), 1, x.b);
    const int64_t grid = grid_of<P>(x, groups);
    const Tensor table = block_table<P>(u.device()), w = spectrum<P>(K, K1, D, table);
    const Tensor sums = empty({groups, x.h, P::kPoints, 2}, DType::f32, u.device());
    if constexpr (kSumsInRegisters<P>) {
      launch(backward_in_registers_kernel<P, T>,
             {.grid = grid, .block = kBlock<P>, .shared = kRegisterShared<P>, .stream = stream}, du.data<T>(),
             values_of(sums), dy.data<T>(), u.data<T>(), values_of(w), values_of(table), groups, x);
    } else {
      const Tensor scratch = empty({grid, kBlock<P>, kValues, 2}, DType::f32, u.device());
      launch(backward_kernel<P, T>, {.grid = grid, .block = kBlock<P>, .shared = kExchange<P>, .stream = stream},
             du.data<T>(), values_of(sums), values_of(scratch), dy.data<T>(), u.data<T>(), values_of(w),
             values_of(table), groups, x);
    }
    launch(gradient_kernel<P>,
           {.grid = x.h, .block = kSumThreads,
            .shared = static_cast<int64_t>(sizeof(float)) * (2 * P::kPoints + P::kShared), .stream = stream},
           dK.data<float>(), dK1.defined() ? dK1.data<float>() : nullptr, values_of(sums), values_of(table), groups,
           x.h, x.l, K.size(1), lags_of(K1));
  });
}

}  // namespace krait::kernels::cuda
