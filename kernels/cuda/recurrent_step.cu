#include "kernels/recurrent_step.h"

#include <map>
#include <mutex>

#include "kernels/cuda/aligned.h"
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/recurrence.cuh"
#include "kernels/cuda/step_known.h"
#include "kernels/cuda/step_values.cuh"
#include "kernels/linear.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMaxRows = 16;  // beyond, products of the library are faster
constexpr int kMaxGroups = kMaxRows;  // of rows

template <class T>
struct StepJob {
  T* y;
  float *state, *fresh;  // fresh (b, p): y in fp32 until all have read the one before
  unsigned* arrived;     // blocks of each group of rows, 0 between launches
  const T *x, *w_ih, *w_hh, *b_ih, *b_hh;
  int64_t b;
  int d, p;
};

/// The sums that a unit's cell needs, by place: those of the input and of y that a gate adds share one, but for the GRU's
/// last, where the reset gate comes between.
template <class Cell>
struct Places {
  static constexpr int kCount = Cell::kGates == 1 ? 1 : 4;
  /// The gate whose weights fill the place, from x or from y; -1: none.
  static __host__ __device__ constexpr int gate(int place, bool of_y) {
    if (Cell::kGates != 3 || place < 2) return place;
    return of_y ? (place == 3 ? 2 : -1) : (place == 2 ? 2 : -1);
  }
};

// sums: a place's, of one unit and row.
template <class Cell, class T>
__device__ __forceinline__ void advance(const StepJob<T>& j, int64_t row, int unit, const float (&sums)[Places<Cell>::kCount]) {
  constexpr int G = Cell::kGates;
  float x[G], r[G], s[Cell::kStates], saved[Cell::kSaved];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    x[g] = sums[g] + static_cast<float>(j.b_ih[g * j.p + unit]);
    r[g] = static_cast<float>(j.b_hh[g * j.p + unit]) + (G == 3 && g == 2 ? sums[Places<Cell>::kCount - 1] : 0.0f);
  }
  float* const state = j.state + row * Cell::kStates * j.p + unit;
#pragma unroll
  for (int k = 0; k < Cell::kStates; ++k) s[k] = state[k * j.p];
  Cell{}.template forward<CellMath<float>>(x, r, s, saved);
#pragma unroll
  for (int k = 1; k < Cell::kStates; ++k) state[k * j.p] = s[k];
  j.fresh[row * j.p + unit] = s[0];
  j.y[row * j.p + unit] = static_cast<T>(s[0]);
}

// y of the rows becomes the state's when the last of the blocks that read it has come.
template <class Cell, class T>
__device__ void hand_over(const StepJob<T>& j, int64_t row0, int64_t end) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(j.arrived + blockIdx.y, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  const int64_t count = (end - row0) * j.p;
  for (int64_t i = threadIdx.x; i < count; i += kThreads)
    j.state[(row0 + i / j.p) * Cell::kStates * j.p + i % j.p] = __ldcg(j.fresh + row0 * j.p + i);
}

// A block: 16 places (4 units, or 16 of the RNN's) of up to 8 kTiles rows, on tensor cores. Warps take pieces of 32 inputs in
// turn, first x's, then y's; a lane holds 8 neighbours of two places, which is all its warp needs of the weights: they are
// read once, the first of them before the kernels in front have finished. Bound by reading the weights at few rows.
template <class Cell, int kTiles>
__global__ void __launch_bounds__(kThreads) mma_step_kernel(const StepJob<bf16> j) {
  constexpr int P = Places<Cell>::kCount, kUnits = 16 / P, kRows = 8 * kTiles, kAhead = 8;
  __shared__ float part[kWarps][16][kRows + 1];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int quad = lane / 4, within = lane % 4 * 8, first = static_cast<int>(blockIdx.x) * kUnits;
  const int pieces_x = (j.d + 31) / 32, pieces = pieces_x + (j.p + 31) / 32;
  const int64_t row0 = int64_t{blockIdx.y} * kRows, end = min(j.b, row0 + kRows);
  const auto weights = [&](int piece, int half) {
    const bool of_y = piece >= pieces_x;
    const int place = quad + 8 * half, unit = first + place / P, gate = Places<Cell>::gate(place % P, of_y);
    const int k = (of_y ? piece - pieces_x : piece) * 32 + within, depth = of_y ? j.p : j.d;
    if (piece >= pieces || k >= depth || unit >= j.p || gate < 0) return uint4{};
    return *reinterpret_cast<const uint4*>((of_y ? j.w_hh : j.w_ih) + (int64_t{gate} * j.p + unit) * depth + k);
  };
  uint4 w[kAhead][2];
  const auto load = [&](int from) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) w[i][half] = weights(from + i * kWarps, half);
  };
  let_next_begin();
  load(warp);
  wait_for_previous();

  float sums[kTiles][4] = {};
  for (int from = warp; from < pieces; from += kAhead * kWarps) {
    if (from != warp) load(from);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int piece = from + i * kWarps;
      if (piece >= pieces) break;
      const bool of_y = piece >= pieces_x;
      const int k = (of_y ? piece - pieces_x : piece) * 32 + within;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int64_t row = row0 + tile * 8 + quad;
        uint4 in{};
        if (row < end && k < (of_y ? j.p : j.d)) {
          if (of_y) {
            const float4* const y = reinterpret_cast<const float4*>(j.state + row * Cell::kStates * j.p + k);
            const float4 low = y[0], high = y[1];
            in = {pack(low.x, low.y), pack(low.z, low.w), pack(high.x, high.y), pack(high.z, high.w)};
          } else {
            in = *reinterpret_cast<const uint4*>(j.x + row * j.d + k);
          }
        }
        mma(sums[tile], {w[i][0].x, w[i][1].x, w[i][0].y, w[i][1].y}, in.x, in.y);
        mma(sums[tile], {w[i][0].z, w[i][1].z, w[i][0].w, w[i][1].w}, in.z, in.w);
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) part[warp][quad + i / 2 * 8][tile * 8 + lane % 4 * 2 + i % 2] = sums[tile][i];
  __syncthreads();
  for (int pair = static_cast<int>(threadIdx.x); pair < kUnits * kRows; pair += kThreads) {
    const int u = pair % kUnits, r = pair / kUnits;
    if (first + u >= j.p || row0 + r >= end) continue;
    float all[P] = {};
#pragma unroll
    for (int from = 0; from < kWarps; ++from)
#pragma unroll
      for (int q = 0; q < P; ++q) all[q] += part[from][u * P + q][r];
    advance<Cell>(j, row0 + r, first + u, all);
  }
  hand_over<Cell>(j, row0, end);
}

// fp32: a warp makes a unit of kRows rows.
template <class Cell, int kRows>
__global__ void __launch_bounds__(kThreads) plain_step_kernel(const StepJob<float> j) {
  constexpr int P = Places<Cell>::kCount;
  const int lane = static_cast<int>(threadIdx.x) % 32, unit = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  const int64_t row0 = int64_t{blockIdx.y} * kRows, end = min(j.b, row0 + kRows);
  take_over();
  if (unit < j.p) {
    float sums[kRows][P] = {};
    const auto add = [&]<bool kOfY>() {
      const int depth = kOfY ? j.p : j.d;
#pragma unroll 2
      for (int k = lane * 4; k < depth; k += 128) {
        float4 in[kRows], w[P];
#pragma unroll
        for (int q = 0; q < P; ++q)
          if (Places<Cell>::gate(q, kOfY) >= 0)
            w[q] = *reinterpret_cast<const float4*>((kOfY ? j.w_hh : j.w_ih) + (int64_t{Places<Cell>::gate(q, kOfY)} * j.p + unit) * depth + k);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          in[r] = row0 + r < end ? *reinterpret_cast<const float4*>((kOfY ? j.state + (row0 + r) * Cell::kStates * j.p : j.x + (row0 + r) * j.d) + k)
                                 : float4{};
#pragma unroll
        for (int q = 0; q < P; ++q)
          if (Places<Cell>::gate(q, kOfY) >= 0)
#pragma unroll
            for (int r = 0; r < kRows; ++r) sums[r][q] += w[q].x * in[r].x + w[q].y * in[r].y + w[q].z * in[r].z + w[q].w * in[r].w;
      }
    };
    add.template operator()<false>();
    add.template operator()<true>();
    float own[P] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int q = 0; q < P; ++q) {
        const float sum = sum_lanes<32>(sums[r][q]);
        if (lane == r) own[q] = sum;
      }
    if (lane < kRows && row0 + lane < end) advance<Cell>(j, row0 + lane, unit, own);
  }
  hand_over<Cell>(j, row0, end);
}

// The cell of one unit and row: pre (b, G p) is W_ih x + b_ih, recurrent (b, G p) W_hh y.
template <class Cell, class T>
__global__ void __launch_bounds__(kThreads)
    cell_kernel(T* y, accum_t<T>* state, const T* pre, const accum_t<T>* recurrent, const T* b_hh, int64_t total, int64_t p) {
  using A = accum_t<T>;
  constexpr int G = Cell::kGates;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, row = i / p, unit = i % p;
  take_over();
  if (i >= total) return;
  A x[G], r[G], s[Cell::kStates], saved[Cell::kSaved];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const int64_t at = (row * G + g) * p + unit;
    x[g] = static_cast<A>(pre[at]);
    r[g] = recurrent[at] + static_cast<A>(b_hh[g * p + unit]);
  }
#pragma unroll
  for (int k = 0; k < Cell::kStates; ++k) s[k] = state[(row * Cell::kStates + k) * p + unit];
  Cell{}.template forward<CellMath<A>>(x, r, s, saved);
#pragma unroll
  for (int k = 0; k < Cell::kStates; ++k) state[(row * Cell::kStates + k) * p + unit] = s[k];
  y[i] = static_cast<T>(s[0]);
}

// Many rows, and sizes that the kernels above do not serve: products of the library, then the cell.
void step_by_products(Tensor& y, Tensor& state, const Tensor& x, const RecurrentStepWeights& w, RecurrentCell cell) {
  const int64_t b = x.size(0), p = w.w_hh.size(1);
  const Tensor before = state.select(1, 0).reshape({b, p}).to(x.dtype());
  const Tensor pre = kernels::linear_forward(x, w.w_ih, w.b_ih, Epilogue::none, false).y;
  Tensor recurrent = empty(pre.shape(), state.dtype(), x.device());
  matmul_out(recurrent, before, w.w_hh, false, true);
  visit_float(x.dtype(), [&]<class T>() {
    visit_cell(cell, [&]<class Cell>() {
      launch_overlapped(cell_kernel<Cell, T>, {.grid = ceil_div(y.numel(), kThreads), .block = kThreads, .stream = current_stream(x.device())},
                        y.data<T>(), state.data<accum_t<T>>(), pre.data<T>(), recurrent.data<accum_t<T>>(), w.b_hh.data<T>(), y.numel(), p);
    });
  });
}

// Of the stream, whose steps come one after the other; recorded ones are replayed on the stream that recorded them. Steps of
// two streams would count each other's blocks.
unsigned* arrivals(const Stream& stream, Tensor& held) {
  static std::mutex mutex;
  static auto* all = new std::map<void*, Tensor>;
  const std::lock_guard lock(mutex);
  const auto it = all->find(stream.handle);
  held = it != all->end() ? it->second : zeros({kMaxGroups}, DType::i32, stream.device);
  if (!is_capturing(stream.device)) all->emplace(stream.handle, held);
  return reinterpret_cast<unsigned*>(held.data<int32_t>());
}

}  // namespace

void recurrent_step(bool& done, Tensor& y, Tensor& state, const Tensor& x, const RecurrentStepWeights& w, RecurrentCell cell) {
  const int64_t b = x.size(0), d = x.size(1), p = w.w_hh.size(1), width = 16 / size_of(x.dtype());
  done = true;
  if ((x.dtype() != DType::bf16 && x.dtype() != DType::f32) || b > kMaxRows || d % width != 0 || p % width != 0 || d >= (1 << 24) ||
      p >= (1 << 24) || !aligned(x, state, w.w_ih, w.w_hh)) {
    step_by_products(y, state, x, w, cell);
    known_to_step(y);
    return;
  }
  const Tensor fresh = empty({b, p}, DType::f32, x.device());
  Tensor held;
  unsigned* const arrived = arrivals(current_stream(x.device()), held);
  const auto job = [&]<class T>() {
    return StepJob<T>{y.data<T>(), state.data<float>(), fresh.data<float>(), arrived, x.data<T>(), w.w_ih.data<T>(), w.w_hh.data<T>(),
                      w.b_ih.data<T>(), w.b_hh.data<T>(), b, static_cast<int>(d), static_cast<int>(p)};
  };
  visit_cell(cell, [&]<class Cell>() {
    const auto run = [&](auto kernel, const auto& of, int units, int rows) {
      launch_overlapped(kernel, {.grid = ceil_div(p, units), .grid_y = ceil_div(b, rows), .block = kThreads, .stream = current_stream(x.device())}, of);
    };
    if (x.dtype() == DType::f32) {
      const auto of = job.template operator()<float>();
      if (b == 1) return run(plain_step_kernel<Cell, 1>, of, kWarps, 1);
      return b <= 4 ? run(plain_step_kernel<Cell, 4>, of, kWarps, 4) : run(plain_step_kernel<Cell, 8>, of, kWarps, 8);
    }
    const auto of = job.template operator()<bf16>();
    constexpr int kUnits = 16 / Places<Cell>::kCount;
    if (b <= 8) return run(mma_step_kernel<Cell, 1>, of, kUnits, 8);
    run(mma_step_kernel<Cell, 2>, of, kUnits, 16);
  });
  known_to_step(y);
}

}  // namespace krait::kernels::cuda
