#pragma once
#include <cuda_bf16.h>
#include <mma.h>

#include <algorithm>

#include "core/cuda/launch.cuh"
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/recurrence_plan.h"
#include "kernels/cuda/shared_limit.h"
#include "kernels/recurrence.h"
#include "kernels/recurrent_cells.h"

// Recurrent layers on the GPU: one launch for the whole sequence. See RecurrencePlan for how blocks share the work.
// A step is: the product of the block's weights with the group's vector (forward y_{t-1}, backward dr_{t+1}), its
// partial sums in shared memory; the cell, a thread per (unit, row); the new values to the vector, through global
// memory and a barrier of the group's blocks where there are several (they are resident: a cooperative launch).
// fp32 and fp64 multiply with plain arithmetic, bf16 with tensor cores: there the vector is rounded to bf16.
// Bound by latency: the steps depend on each other.
namespace krait::kernels::cuda {

inline constexpr int kRecurrenceThreads = 256;

template <class A>
struct CellMath;
template <>
struct CellMath<float> {
  static __device__ __forceinline__ float exp(float x) { return expf(x); }
  static __device__ __forceinline__ float tanh(float x) { return tanhf(x); }
  static __device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
  static __device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }
};
template <>
struct CellMath<double> {
  static __device__ __forceinline__ double exp(double x) { return ::exp(x); }
  static __device__ __forceinline__ double tanh(double x) { return ::tanh(x); }
  static __device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }
  static __device__ __forceinline__ double softplus(double x) { return fmax(x, 0.0) + ::log1p(::exp(-fabs(x))); }
};

/// What the vector is stored as: the factor of the product.
template <class T>
using vector_t = std::conditional_t<std::is_same_v<T, bf16>, bf16, accum_t<T>>;

// Tensors of both directions; what a direction does not use is null.
template <class T, class A = accum_t<T>>
struct RecurrenceArgs {
  int64_t b, l, h, p;
  const T* weights;         // packed: see pack_weights_kernel
  const int32_t* segments;  // may be null
  vector_t<T>* exchange;    // (2, groups, depth tile)
  unsigned* arrived;        // (groups), zero at the start
  // forward
  const T* x;
  const A *bias, *state0;
  T *y, *y_prev;
  A *state, *saved;
  // backward
  const T* dy;
  const A *dstate, *kept;
  T *dx, *dr;
  A* dstate0;
};

// The weights of each head and slice with padding rows and columns of zero: fp32 and fp64 (depth, rows), bf16
// (rows, depth). Forward: row u G + g is gate g of the slice's unit u, column the unit it reads. Backward: row u is the
// slice's unit u, column g p + j gate g of unit j.
template <class T>
__global__ void pack_weights_kernel(T* to, const T* w, int64_t total, int64_t p, int gates, RecurrencePlan plan,
                                    bool forward) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= total) return;
  const int64_t slice_size = int64_t{plan.rows} * plan.depth, in = i % slice_size, rest = i / slice_size;
  const int64_t slice = rest % plan.split, head = rest / plan.split;
  const bool mma = std::is_same_v<T, bf16>;
  const int64_t row = mma ? in / plan.depth : in % plan.rows, column = mma ? in % plan.depth : in / plan.rows;
  const int64_t u = forward ? row / gates : row, unit = slice * plan.units + u;
  T value{};
  if (u < plan.units && unit < p) {
    const int64_t g = forward ? row % gates : column / p, out = forward ? unit : column % p, from = forward ? column : unit;
    if (g < gates && from < p) value = w[((head * gates + g) * p + out) * p + from];
  }
  to[i] = value;
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// All blocks of the group have come here `turn` times; what they wrote before can be read (past the first-level cache).
__device__ __forceinline__ void group_barrier(unsigned* arrived, unsigned target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (load_acquire(arrived) < target) {
    }
    __threadfence();
  }
  __syncthreads();
}

template <class P>
__device__ __forceinline__ void prefetch(const P* p) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(p));
}

// Where value k of row i of the vector lies: fp32 and fp64 (k, tile), bf16 (tile, k) with a row distance of ld.
template <class T>
__device__ __forceinline__ int64_t vector_index(int k, int i, int tile, int ld) {
  return std::is_same_v<T, bf16> ? int64_t{i} * ld + k : int64_t{k} * tile + i;
}

// partial[s][column][row] (+)= sum over part s of the chunk of w (depth, rows) times vec (chunk, tile).
template <class A>
__device__ void multiply_plain(A* __restrict__ partial, const A* __restrict__ w, const A* __restrict__ vec, int chunk,
                               bool add, const RecurrencePlan& plan) {
  struct alignas(16) Four { A v[4]; };
  const int quads = plan.rows / 4, columns = plan.tile / 8;
  for (int item = threadIdx.x; item < quads * columns * plan.k_split; item += kRecurrenceThreads) {
    const int quad = item % quads, column = item / quads % columns * 8, s = item / (quads * columns);
    A acc[8][4] = {};
    const int end = chunk * (s + 1) / plan.k_split;
#pragma unroll 2
    for (int k = chunk * s / plan.k_split; k < end; ++k) {
      const Four weight = *reinterpret_cast<const Four*>(w + int64_t{k} * plan.rows + quad * 4);
      const Four low = *reinterpret_cast<const Four*>(vec + k * plan.tile + column);
      const Four high = *reinterpret_cast<const Four*>(vec + k * plan.tile + column + 4);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          acc[i][r] += low.v[i] * weight.v[r];
          acc[i + 4][r] += high.v[i] * weight.v[r];
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      Four* to = reinterpret_cast<Four*>(partial + (int64_t{s} * plan.tile + column + i) * plan.rows + quad * 4);
      Four sum;
#pragma unroll
      for (int r = 0; r < 4; ++r) sum.v[r] = acc[i][r];
      if (add)
#pragma unroll
        for (int r = 0; r < 4; ++r) sum.v[r] += to->v[r];
      *to = sum;
    }
  }
}

// The same with tensor cores: w (rows, ld_w), vec (tile, chunk + 8).
__device__ inline void multiply_mma(float* partial, const bf16* w_in, int ld_w, const bf16* vec_in, int ld_vec, int chunk,
                                    bool add, const RecurrencePlan& plan) {
  using namespace nvcuda;
  const auto* w = reinterpret_cast<const __nv_bfloat16*>(w_in);
  const auto* vec = reinterpret_cast<const __nv_bfloat16*>(vec_in);
  const int row_tiles = plan.rows / 32, columns = plan.tile / 8, steps = chunk / 16;
  for (int item = static_cast<int>(threadIdx.x) / 32; item < row_tiles * columns * plan.k_split;
       item += kRecurrenceThreads / 32) {
    const int row = item % row_tiles * 32, column = item / row_tiles % columns * 8, s = item / (row_tiles * columns);
    float* to = partial + (int64_t{s} * plan.tile + column) * plan.rows + row;
    wmma::fragment<wmma::accumulator, 32, 8, 16, float> acc;
    if (add)
      wmma::load_matrix_sync(acc, to, static_cast<unsigned>(plan.rows), wmma::mem_col_major);
    else
      wmma::fill_fragment(acc, 0.0f);
    const int end = steps * (s + 1) / plan.k_split;
    for (int k = steps * s / plan.k_split; k < end; ++k) {
      wmma::fragment<wmma::matrix_a, 32, 8, 16, __nv_bfloat16, wmma::row_major> a;
      wmma::fragment<wmma::matrix_b, 32, 8, 16, __nv_bfloat16, wmma::col_major> b;
      wmma::load_matrix_sync(a, w + int64_t{row} * ld_w + k * 16, static_cast<unsigned>(ld_w));
      wmma::load_matrix_sync(b, vec + column * ld_vec + k * 16, static_cast<unsigned>(ld_vec));
      wmma::mma_sync(acc, a, b, acc);
    }
    wmma::store_matrix_sync(to, acc, static_cast<unsigned>(plan.rows), wmma::mem_col_major);
  }
}

// What the cell of one direction does with one (unit, row) pair. `sums` reads the product's result for the pair.
template <class Cell, class T, bool kForward>
struct Direction;

template <class Cell, class T>
struct Direction<Cell, T, true> {
  using A = accum_t<T>;
  static constexpr int kRows = Cell::kGates, kVector = 1;

  static __device__ void begin(const RecurrenceArgs<T>& a, int64_t row, int64_t head, int64_t unit, A (&s)[Cell::kStates]) {
#pragma unroll
    for (int k = 0; k < Cell::kStates; ++k)
      s[k] = a.state0 != nullptr ? a.state0[((k * a.b + row) * a.h + head) * a.p + unit] : A(0);
  }

  // out: the pair's values of the next vector.
  static __device__ void step(const Cell& cell, const RecurrenceArgs<T>& a, int64_t t, int64_t row, int64_t head,
                              int64_t unit, A (&s)[Cell::kStates], A (&sum)[kRows], A (&out)[kVector]) {
    const int64_t at = row * a.l + t, c = a.h * a.p, column = head * a.p + unit;
    const bool starts = a.segments != nullptr && t > 0 && a.segments[at] != a.segments[at - 1];
    A x[Cell::kGates], saved[Cell::kSaved];
#pragma unroll
    for (int g = 0; g < Cell::kGates; ++g) {
      const T* from = a.x + (at * Cell::kGates + g) * c + column;
      x[g] = static_cast<A>(*from);
      if (t + 1 < a.l) prefetch(from + Cell::kGates * c);
      sum[g] = (starts ? A(0) : sum[g]) + a.bias[g * c + column];
    }
    if (starts)
#pragma unroll
      for (int k = 0; k < Cell::kStates; ++k) s[k] = A(0);
    const A before = s[0];
    cell.template forward<CellMath<A>>(x, sum, s, saved);
    a.y[at * c + column] = static_cast<T>(s[0]);
    if (a.saved != nullptr) {
      a.y_prev[at * c + column] = static_cast<T>(before);
#pragma unroll
      for (int k = 0; k < Cell::kSaved; ++k) a.saved[(at * Cell::kSaved + k) * c + column] = saved[k];
    }
    out[0] = s[0];
  }

  static __device__ void end(const RecurrenceArgs<T>& a, int64_t row, int64_t head, int64_t unit,
                             const A (&s)[Cell::kStates], const A (&)[kRows]) {
#pragma unroll
    for (int k = 0; k < Cell::kStates; ++k) a.state[((k * a.b + row) * a.h + head) * a.p + unit] = s[k];
  }
};

template <class Cell, class T>
struct Direction<Cell, T, false> {
  using A = accum_t<T>;
  static constexpr int kRows = 1, kVector = Cell::kGates;

  static __device__ void begin(const RecurrenceArgs<T>& a, int64_t row, int64_t head, int64_t unit, A (&s)[Cell::kStates]) {
#pragma unroll
    for (int k = 0; k < Cell::kStates; ++k)
      s[k] = a.dstate != nullptr ? a.dstate[((k * a.b + row) * a.h + head) * a.p + unit] : A(0);
  }

  static __device__ void step(const Cell& cell, const RecurrenceArgs<T>& a, int64_t t, int64_t row, int64_t head,
                              int64_t unit, A (&s)[Cell::kStates], A (&sum)[kRows], A (&out)[kVector]) {
    const int64_t at = row * a.l + t, c = a.h * a.p, column = head * a.p + unit;
    // Nothing comes back from another document.
    if (a.segments != nullptr && t + 1 < a.l && a.segments[at] != a.segments[at + 1]) {
      sum[0] = A(0);
#pragma unroll
      for (int k = 0; k < Cell::kStates; ++k) s[k] = A(0);
    }
    A saved[Cell::kSaved], dx[Cell::kGates];
#pragma unroll
    for (int k = 0; k < Cell::kSaved; ++k) {
      const A* from = a.kept + (at * Cell::kSaved + k) * c + column;
      saved[k] = *from;
      if (t > 0) prefetch(from - Cell::kSaved * c);
    }
    const A dy = (a.dy != nullptr ? static_cast<A>(a.dy[at * c + column]) : A(0)) + sum[0];
    cell.template backward<CellMath<A>>(saved, dy, s, dx, out);
#pragma unroll
    for (int g = 0; g < Cell::kGates; ++g) {
      const int64_t to = (at * Cell::kGates + g) * c + column;
      a.dx[to] = static_cast<T>(dx[g]);
      if constexpr (Cell::kSplits)
        a.dr[to] = static_cast<T>(out[g]);
      else
        out[g] = dx[g];
    }
  }

  static __device__ void end(const RecurrenceArgs<T>& a, int64_t row, int64_t head, int64_t unit,
                             const A (&s)[Cell::kStates], const A (&sum)[kRows]) {
    if (a.dstate0 == nullptr) return;
#pragma unroll
    for (int k = 0; k < Cell::kStates; ++k)
      a.dstate0[((k * a.b + row) * a.h + head) * a.p + unit] = s[k] + (k == 0 ? sum[0] : A(0));
  }
};

// Copies n bytes (a multiple of 16) by all threads; kL2: past the first-level cache, for what other blocks wrote.
template <bool kL2>
__device__ __forceinline__ void copy_rows(void* to, const void* from, int rows, int64_t bytes, int64_t to_stride,
                                          int64_t from_stride) {
  const int words = static_cast<int>(bytes / 16);
  for (int i = threadIdx.x; i < rows * words; i += kRecurrenceThreads) {
    const int row = i / words, word = i % words;
    const auto* source =
        reinterpret_cast<const uint4*>(static_cast<const unsigned char*>(from) + row * from_stride) + word;
    *(reinterpret_cast<uint4*>(static_cast<unsigned char*>(to) + row * to_stride) + word) =
        kL2 ? __ldcg(source) : __ldg(source);
  }
}

template <class Cell, class T, bool kForward>
__global__ void __launch_bounds__(kRecurrenceThreads, 1)
    recurrence_kernel(const RecurrencePlan plan, const RecurrenceArgs<T> a, const Cell cell, int64_t first_group) {
  using A = accum_t<T>;
  using V = vector_t<T>;
  using D = Direction<Cell, T, kForward>;
  constexpr bool kMma = std::is_same_v<T, bf16>;
  extern __shared__ __align__(128) unsigned char shared[];
  V* vec = reinterpret_cast<V*>(shared + plan.vector_at);
  A* partial = reinterpret_cast<A*>(shared + plan.partial_at);
  A* states = reinterpret_cast<A*>(shared + plan.state_at);

  const int64_t group = first_group + blockIdx.x / plan.split;
  const int slice = static_cast<int>(blockIdx.x) % plan.split, first_unit = slice * plan.units;
  const int64_t head = group % a.h, first_row = group / a.h * plan.tile;
  const int units = static_cast<int>(min(int64_t{plan.units}, a.p - first_unit));
  const int rows = static_cast<int>(min(int64_t{plan.tile}, a.b - first_row)), pairs = units * rows;
  const int ld_vec = plan.chunk + 8, ld_w = plan.resident ? plan.depth + 8 : plan.depth;
  const T* weights = a.weights + (head * plan.split + slice) * plan.rows * plan.depth;
  if (plan.resident) {
    if constexpr (kMma)
      copy_rows<false>(shared, weights, plan.rows, int64_t{plan.depth} * 2, int64_t{ld_w} * 2, int64_t{plan.depth} * 2);
    else
      copy_rows<false>(shared, weights, 1, int64_t{plan.rows} * plan.depth * static_cast<int64_t>(sizeof(T)), 0, 0);
    weights = reinterpret_cast<const T*>(shared);
  }

  // Publication n of the vector goes to half n % 2 of the exchange; the product of step n reads it.
  const int64_t vector_size = int64_t{plan.depth} * plan.tile;
  V* const exchange = plan.exchange ? a.exchange + group * vector_size : nullptr;
  const int64_t other_half = plan.groups * vector_size;
  unsigned arrivals = 0;
  const auto publish = [&](int64_t n, int i, int u, const A (&out)[D::kVector]) {
#pragma unroll
    for (int g = 0; g < D::kVector; ++g) {
      const int k = static_cast<int>(g * a.p) + first_unit + u;
      if (plan.exchange)
        exchange[(n & 1) * other_half + vector_index<T>(k, i, plan.tile, plan.depth)] = static_cast<V>(out[g]);
      else
        vec[vector_index<T>(k, i, plan.tile, ld_vec)] = static_cast<V>(out[g]);
    }
  };
  const auto published = [&] {
    if (plan.exchange)
      group_barrier(a.arrived + group, static_cast<unsigned>(plan.split) * ++arrivals);
    else
      __syncthreads();
  };

  if (!plan.exchange)  // padding stays zero
    for (int i = threadIdx.x; i < plan.tile * (kMma ? ld_vec : plan.chunk); i += kRecurrenceThreads) vec[i] = V{};
  __syncthreads();
  for (int pair = threadIdx.x; pair < pairs; pair += kRecurrenceThreads) {
    const int u = pair % units, i = pair / units;
    A s[Cell::kStates];
    D::begin(a, first_row + i, head, first_unit + u, s);
#pragma unroll
    for (int k = 0; k < Cell::kStates; ++k) states[k * pairs + pair] = s[k];
    if constexpr (kForward) {
      const A out[1] = {s[0]};
      publish(0, i, u, out);
    }
  }
  published();

  const bool at_once = kForward && a.state0 != nullptr;  // else the first product would be of zeros
  const int64_t steps = a.l + (!kForward && a.dstate0 == nullptr ? 0 : 1);
  for (int64_t step = 0; step < steps; ++step) {
    const bool last = step == a.l, product = (step > 0 || at_once) && !(kForward && last);
    if (product) {
      for (int begin = 0; begin < plan.depth; begin += plan.chunk) {
        const int chunk = min(plan.chunk, plan.depth - begin);
        if (plan.exchange) {
          const V* from = exchange + (step & 1) * other_half;
          if constexpr (kMma)
            copy_rows<true>(vec, from + begin, plan.tile, int64_t{chunk} * 2, int64_t{ld_vec} * 2, int64_t{plan.depth} * 2);
          else
            copy_rows<true>(vec, from + int64_t{begin} * plan.tile, 1,
                            int64_t{chunk} * plan.tile * static_cast<int64_t>(sizeof(V)), 0, 0);
          __syncthreads();
        }
        if constexpr (kMma)
          multiply_mma(partial, weights + begin, ld_w, vec, ld_vec, chunk, begin > 0, plan);
        else
          multiply_plain<A>(partial, weights + int64_t{begin} * plan.rows, vec, chunk, begin > 0, plan);
        __syncthreads();
      }
    }
    const int64_t t = kForward ? step : a.l - 1 - step;
    for (int pair = threadIdx.x; pair < pairs; pair += kRecurrenceThreads) {
      const int u = pair % units, i = pair / units;
      A s[Cell::kStates], sum[D::kRows] = {}, out[D::kVector];
      if (product)
        for (int part = 0; part < plan.k_split; ++part)
#pragma unroll
          for (int r = 0; r < D::kRows; ++r)
            sum[r] += partial[(int64_t{part} * plan.tile + i) * plan.rows + u * D::kRows + r];
#pragma unroll
      for (int k = 0; k < Cell::kStates; ++k) s[k] = states[k * pairs + pair];
      if (last) {
        D::end(a, first_row + i, head, first_unit + u, s, sum);
        continue;
      }
      D::step(cell, a, t, first_row + i, head, first_unit + u, s, sum, out);
#pragma unroll
      for (int k = 0; k < Cell::kStates; ++k) states[k * pairs + pair] = s[k];
      publish(step + 1, i, u, out);
    }
    if (step + 1 < steps) published();
  }
}

template <class Cell, class T, bool kForward>
void run_recurrence(RecurrenceArgs<T> a, const Tensor& w, const Cell& cell) {
  using D = Direction<Cell, T, kForward>;
  const Device device = w.device();
  const Stream stream = current_stream(device);
  const GpuLimits gpu{device_info(device).multiprocessors, shared_limit(device)};
  const RecurrencePlan plan =
      plan_recurrence({a.b, a.h, a.p, D::kRows, D::kVector, Cell::kStates, dtype_of<T>}, gpu);

  const Tensor packed = empty({a.h, plan.split, plan.rows, plan.depth}, dtype_of<T>, device);
  a.weights = packed.data<T>();
  launch(pack_weights_kernel<T>, {.grid = ceil_div(packed.numel(), 256), .block = 256, .stream = stream},
         packed.data<T>(), w.data<T>(), packed.numel(), a.p, Cell::kGates, plan, kForward);
  Tensor exchange, arrived;
  if (plan.exchange) {
    exchange = zeros({2, plan.groups, int64_t{plan.depth} * plan.tile}, dtype_of<vector_t<T>>, device);
    arrived = zeros({plan.groups}, DType::i32, device);
    a.exchange = exchange.data<vector_t<T>>();
    a.arrived = reinterpret_cast<unsigned*>(arrived.data<int32_t>());
  }
  const auto kernel = recurrence_kernel<Cell, T, kForward>;
  for (int64_t first = 0; first < plan.groups; first += plan.concurrent) {
    const int64_t groups = std::min(plan.concurrent, plan.groups - first);
    if (plan.split == 1) {
      launch(kernel, {.grid = groups, .block = kRecurrenceThreads, .shared = plan.shared, .stream = stream}, plan, a,
             cell, first);
      continue;
    }
    // Never below the 48 KiB that every other launch of the kernel may take without asking.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(std::max<int64_t>(plan.shared, 48 * 1024))));
    RecurrencePlan plan_copy = plan;
    Cell cell_copy = cell;
    void* arguments[] = {&plan_copy, &a, &cell_copy, &first};
    check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                      dim3(static_cast<unsigned>(groups * plan.split)), dim3(kRecurrenceThreads),
                                      arguments, static_cast<size_t>(plan.shared), native(stream)));
  }
}

template <class Cell, class T>
void recurrence_forward(RecurrenceForward& f, const Cell& cell) {
  using A = accum_t<T>;
  RecurrenceArgs<T> a{};
  a.b = f.x.size(0);
  a.l = f.x.size(1);
  a.h = f.x.size(3);
  a.p = f.x.size(4);
  a.segments = pointer_or_null<int32_t>(f.segments);
  a.x = f.x.data<T>();
  a.bias = f.bias.data<A>();
  a.state0 = pointer_or_null<A>(f.state0);
  a.y = f.out.y.data<T>();
  a.y_prev = pointer_or_null<T>(f.out.y_prev);
  a.state = f.out.state.data<A>();
  a.saved = pointer_or_null<A>(f.out.saved);
  run_recurrence<Cell, T, true>(a, f.w, cell);
}

template <class Cell, class T>
void recurrence_backward(RecurrenceBackward& f, const Cell& cell) {
  using A = accum_t<T>;
  RecurrenceArgs<T> a{};
  a.b = f.dx.size(0);
  a.l = f.dx.size(1);
  a.h = f.dx.size(3);
  a.p = f.dx.size(4);
  a.segments = pointer_or_null<int32_t>(f.segments);
  a.dy = pointer_or_null<T>(f.dy);
  a.dstate = pointer_or_null<A>(f.dstate);
  a.kept = f.saved.data<A>();
  a.dx = f.dx.data<T>();
  a.dr = pointer_or_null<T>(f.dr);
  a.dstate0 = pointer_or_null<A>(f.dstate0);
  run_recurrence<Cell, T, false>(a, f.w, cell);
}

}  // namespace krait::kernels::cuda
