#include "kernels/mlstm_block.h"

#include "core/cuda/launch.cuh"
#include "kernels/cuda/mlstm_maps.cuh"
#include "kernels/cuda/norm_backward.cuh"
#include "kernels/cuda/packed.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 128, kGates = kMapsGates;
constexpr int kForwardRows = 64, kBackwardRows = 128;  // of one block of threads

template <class T, int N>
struct alignas(sizeof(T) * N) Side {
  T at[N];
};

template <class T>
__device__ __forceinline__ Side<T, 4> load_four(const T* from) {
  return *reinterpret_cast<const Side<T, 4>*>(from);
}
template <class T, class A>
__device__ __forceinline__ void store_four(T* to, const A (&v)[4]) {
  Side<T, 4> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.at[i] = static_cast<T>(v[i]);
  *reinterpret_cast<Side<T, 4>*>(to) = out;
}

template <class T>
struct Maps : MapsWeights<T> {
  // Block n of map `part`.
  template <class A>
  __device__ __forceinline__ void load(A (&m)[4][4], int part, int n) const {
#pragma unroll
    for (int o = 0; o < 4; ++o)
#pragma unroll
      for (int i = 0; i < 4; ++i) m[o][i] = static_cast<A>(this->w[part][(int64_t{n} * 4 + o) * 4 + i]);
  }
  // e += G W of this block: the gates as a map of x.
  template <class A>
  __device__ __forceinline__ void add_gates(A (&e)[kGates][4], const A (&m)[4][4], int part, int n) const {
#pragma unroll
    for (int k = 0; k < kGates; ++k) {
      const Side<T, 4> row = load_four(this->gates_of(k, part, n));
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int o = 0; o < 4; ++o) e[k][i] += static_cast<A>(row.at[o]) * m[o][i];
    }
  }
};

// Sums over a warp of 8 values a lane: that of value lane / 4 in every lane.
template <class A>
__device__ __forceinline__ A warp_sums(A (&v)[8], int lane) {
#pragma unroll
  for (int half = 4, mask = 16; half > 0; half /= 2, mask /= 2) {
    const bool high = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const A send = high ? v[i] : v[i + half], keep = high ? v[i + half] : v[i];
      v[i] = keep + __shfl_xor_sync(0xffffffffu, send, mask);
    }
  }
  v[0] += __shfl_xor_sync(0xffffffffu, v[0], 2);
  return v[0] + __shfl_xor_sync(0xffffffffu, v[0], 1);
}

// A thread has a block of the three maps in registers and walks down a chunk of rows; neighbouring threads have
// neighbouring blocks. The gates' sums over a warp's blocks go to partial (rows, warps, 8).
// Bound by memory: 5 r e sizeof(T) bytes.
template <class T>
__global__ void __launch_bounds__(kThreads)
    maps_forward_kernel(T* q, T* k, T* v, accum_t<T>* partial, const T* x_c, const T* x_m, int64_t m_stride, Maps<T> maps,
                        int64_t rows, int warps) {
  using A = accum_t<T>;
  const int n_own = static_cast<int>(blockIdx.x * kThreads + threadIdx.x), lane = static_cast<int>(threadIdx.x) % 32;
  const bool real = n_own < maps.blocks;
  const int n = real ? n_own : 0, warp = n_own / 32;
  A m[3][4][4], by_c[kGates][4] = {}, by_m[kGates][4] = {};
#pragma unroll
  for (int part = 0; part < 3; ++part) maps.load(m[part], part, n);
  maps.add_gates(by_c, m[0], 0, n);
  maps.add_gates(by_c, m[1], 1, n);
  maps.add_gates(by_m, m[2], 2, n);
  const int64_t e = int64_t{maps.blocks} * 4, first = int64_t{blockIdx.y} * kForwardRows;
  const int64_t last = min(first + kForwardRows, rows);
#pragma unroll 2
  for (int64_t r = first; r < last; ++r) {
    const Side<T, 4> c_in = load_four(x_c + r * e + n * 4), m_in = load_four(x_m + r * m_stride + n * 4);
    A c[4], x[4], out[3][4], gates[kGates];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      c[i] = static_cast<A>(c_in.at[i]);
      x[i] = static_cast<A>(m_in.at[i]);
    }
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      out[0][o] = out[1][o] = out[2][o] = A(0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[0][o] += m[0][o][i] * c[i];
        out[1][o] += m[1][o][i] * c[i];
        out[2][o] += m[2][o][i] * x[i];
      }
    }
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      gates[g] = A(0);
#pragma unroll
      for (int i = 0; i < 4; ++i) gates[g] += by_c[g][i] * c[i] + by_m[g][i] * x[i];
      if (!real) gates[g] = A(0);
    }
    const A sum = warp_sums(gates, lane);
    if (lane % 4 == 0 && warp < warps) partial[(r * warps + warp) * kGates + lane / 4] = sum;
    if (!real) continue;
    store_four(q + r * e + n * 4, out[0]);
    store_four(k + r * e + n * 4, out[1]);
    store_four(v + r * e + n * 4, out[2]);
  }
}

template <class A>
__global__ void gates_kernel(A* gates, const A* partial, int64_t total, int warps) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= total) return;
  A sum = A(0);
  for (int w = 0; w < warps; ++w) sum += partial[(at / kGates * warps + w) * kGates + at % kGates];
  gates[at] = sum;
}

// The same walk backwards for the kMaps maps of one input, from `part` on. With E = G W and d = dgates, dx is
// sum W^T dy + E^T d, and all gradients of weights follow from S = sum dy x^T (16 values a map) and D = sum d x^T (8 x 4):
// partial (chunks, 16 kMaps + 32, blocks). dx_more may be dx itself. Bound by memory: (kMaps + 2) r e sizeof(T) bytes.
template <class T, int kMaps>
__global__ void __launch_bounds__(kThreads)
    maps_backward_kernel(T* dx, int64_t dx_stride, accum_t<T>* partial, const T* dy0, const T* dy1, const accum_t<T>* dgates, const T* dx_more,
                         int64_t more_stride, const T* x_in, int64_t x_stride, Maps<T> maps, int part, int64_t rows) {
  using A = accum_t<T>;
  const int n = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (n >= maps.blocks) return;
  A m[kMaps][4][4], by[kGates][4] = {}, sums[kMaps][4][4] = {}, gate_sums[kGates][4] = {};
#pragma unroll
  for (int j = 0; j < kMaps; ++j) {
    maps.load(m[j], part + j, n);
    maps.add_gates(by, m[j], part + j, n);
  }
  const int64_t e = int64_t{maps.blocks} * 4, first = int64_t{blockIdx.y} * kBackwardRows;
  const int64_t last = min(first + kBackwardRows, rows);
#pragma unroll 2
  for (int64_t r = first; r < last; ++r) {
    const int64_t at = r * e + n * 4;
    const Side<T, 4> in = load_four(x_in + r * x_stride + n * 4);
    Side<T, 4> up[kMaps];
    up[0] = load_four(dy0 + at);
    if constexpr (kMaps == 2) up[1] = load_four(dy1 + at);
    const Side<A, 4> low = load_four(dgates + r * kGates), high = load_four(dgates + r * kGates + 4);
    A x[4], out[4] = {};
    if (dx_more != nullptr) {
      const Side<T, 4> more = load_four(dx_more + r * more_stride + n * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = static_cast<A>(more.at[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = static_cast<A>(in.at[i]);
#pragma unroll
    for (int j = 0; j < kMaps; ++j)
#pragma unroll
      for (int o = 0; o < 4; ++o) {
        const A d = static_cast<A>(up[j].at[o]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          out[i] += m[j][o][i] * d;
          sums[j][o][i] += d * x[i];
        }
      }
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      const A d = g < 4 ? low.at[g % 4] : high.at[g % 4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[i] += by[g][i] * d;
        gate_sums[g][i] += d * x[i];
      }
    }
    store_four(dx + r * dx_stride + n * 4, out);
  }
  A* to = partial + int64_t{blockIdx.y} * (16 * kMaps + 32) * maps.blocks + n;
#pragma unroll
  for (int j = 0; j < kMaps; ++j)
#pragma unroll
    for (int i = 0; i < 16; ++i) to[int64_t{j * 16 + i} * maps.blocks] = sums[j][i / 4][i % 4];
#pragma unroll
  for (int i = 0; i < 32; ++i) to[int64_t{16 * kMaps + i} * maps.blocks] = gate_sums[i / 4][i % 4];
}

// totals (64 + 48, blocks): S of q and k, D of x_c, S of v, D of x_m.
template <class A>
__global__ void totals_kernel(A* totals, const A* of_c, const A* of_m, int64_t chunks, int blocks) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, count = int64_t{112} * blocks;
  if (at >= count) return;
  const bool c = at < int64_t{64} * blocks;
  const A* from = c ? of_c + at : of_m + (at - int64_t{64} * blocks);
  const int64_t stride = (c ? int64_t{64} : int64_t{48}) * blocks;
  A sum = A(0);
#pragma unroll 8
  for (int64_t q = 0; q < chunks; ++q) sum += from[q * stride];
  totals[at] = sum;
}

// One thread for each row of a block of a map: dW = S + G^T D, dG = D W^T.
template <class T>
__global__ void weights_kernel(accum_t<T>* dq, accum_t<T>* dk, accum_t<T>* dv, accum_t<T>* dg, const accum_t<T>* totals,
                               Maps<T> maps, MlstmMapsAdds adds) {
  using A = accum_t<T>;
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= int64_t{12} * maps.blocks) return;
  const int part = static_cast<int>(at / (4 * maps.blocks)), row = static_cast<int>(at % (4 * maps.blocks));
  const int n = row / 4, o = row % 4;
  const auto total = [&](int field) { return totals[int64_t{field} * maps.blocks + n]; };
  const int s_at = part == 2 ? 64 : 16 * part, d_at = part == 2 ? 80 : 32;
  A* dw = part == 0 ? dq : part == 1 ? dk : dv;
  const bool add = part == 0 ? adds.q : part == 1 ? adds.k : adds.v;
  for (int i = 0; i < 4; ++i) {
    A sum = total(s_at + o * 4 + i);
    for (int g = 0; g < kGates; ++g) sum += static_cast<A>(maps.gates_of(g, part, n)[o]) * total(d_at + g * 4 + i);
    A& to = dw[int64_t{row} * 4 + i];
    to = add ? to + sum : sum;
  }
  for (int g = 0; g < kGates; ++g) {
    A sum = A(0);
    for (int i = 0; i < 4; ++i) sum += static_cast<A>(maps.w[part][int64_t{row} * 4 + i]) * total(d_at + g * 4 + i);
    A& to = dg[(int64_t{g} * 3 + part) * 4 * maps.blocks + row];
    to = adds.g ? to + sum : sum;
  }
}

template <class T>
Maps<T> maps_of(const MlstmMapsWeights& w) {
  return {{{w.w_q.data<T>(), w.w_k.data<T>(), w.w_v.data<T>()}, w.g.data<T>(), static_cast<int>(w.w_q.size(0))}};
}

// Whether tensor cores take these rows: pointers and strides in whole 16 bytes.
template <class T>
MapsRows<T> rows_of(const Tensor& t) {
  return {t.data<T>(), t.stride(0)};
}
bool on_tensor_cores(const MlstmMapsWeights& w, std::initializer_list<const Tensor*> rows) {
  if (w.w_q.dtype() != DType::bf16 || !mlstm_maps_mma_serve(w.w_q.size(0) * 4)) return false;
  for (const Tensor* t : rows)
    if (t->defined() && (!aligned16(t->raw_data()) || t->stride(0) % 8 != 0)) return false;
  return true;
}

// V neighbouring elements a thread. Bound by memory: 5 r e sizeof(T) bytes.
template <class T, int V>
__global__ void join_kernel(T* out, const T* a, const T* b, const T* z, int64_t pieces, int64_t e) {
  using A = accum_t<T>;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= pieces) return;
  const int64_t at = i * V, to = at + at / e * e;  // rows of e become rows of 2 e
  A sum[V], more[V];
  load_values(sum, a + at);
  load_values(more, b + at);
#pragma unroll
  for (int k = 0; k < V; ++k) sum[k] += more[k];
  store_values(out + to, sum);
  Packed<T, V> gate;
  gate.load(z + at);
  gate.store(out + to + e);
}

constexpr int kWarps = 4, kFour = 4;  // a warp takes one head of a row; a lane 4 channels of every 128

template <class A>
__device__ __forceinline__ A sigmoid_of(A x) {
  return A(1) / (A(1) + exp(-x));
}
__device__ __forceinline__ float sigmoid_of(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// What a warp reads of one head of a row.
template <class T, class H, int kSteps>
struct HeadRow {
  Side<H, 4> h[kSteps];
  Side<T, 4> x[kSteps], gate[kSteps], up[kSteps];

  template <bool kBackward>
  __device__ __forceinline__ void load(int lane, int p, const H* from_h, const T* from_x, const T* from_gate, const T* from_up) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int j = (k * 32 + lane) * kFour;
      if (j >= p) continue;
      h[k] = load_four(from_h + j);
      x[k] = load_four(from_x + j);
      gate[k] = load_four(from_gate + j);
      if constexpr (kBackward) up[k] = load_four(from_up + j);
    }
  }
};

// Bound by memory: r c sizeof(H) + 3 r c sizeof(T) bytes.
template <class T, class H, int kSteps>
__global__ void __launch_bounds__(32 * kWarps)
    output_forward_kernel(T* __restrict__ y, accum_t<T>* __restrict__ mean, accum_t<T>* __restrict__ rstd,
                          const H* __restrict__ h, const accum_t<T>* __restrict__ w, const T* __restrict__ skip,
                          const T* __restrict__ x_c, const T* __restrict__ z, int64_t z_stride, int64_t n, int heads, int p,
                          accum_t<T> eps) {
  using A = accum_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (i >= n) return;
  const int64_t r = i / heads, c0 = i % heads * p, at = i * p;
  HeadRow<T, H, kSteps> in;
  in.template load<false>(lane, p, h + at, x_c + at, z + r * z_stride + c0, nullptr);
  A v[kSteps][4], first[1] = {A(0)}, s[2] = {A(0), A(0)};
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    if ((k * 32 + lane) * kFour >= p) continue;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      v[k][q] = static_cast<A>(in.h[k].at[q]);
      first[0] += v[k][q];
    }
  }
  group_sum<32>(first);
  first[0] /= static_cast<A>(p);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    if ((k * 32 + lane) * kFour >= p) continue;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const A d = v[k][q] - first[0];
      s[0] += d;
      s[1] += d * d;
    }
  }
  group_sum<32>(s);
  const A shift = s[0] / static_cast<A>(p), square = s[1] / static_cast<A>(p) - shift * shift, mu = first[0] + shift;
  const A scale = A(1) / sqrt((square > A(0) ? square : A(0)) + eps);
  if (lane == 0) {
    mean[i] = mu;
    rstd[i] = scale;
  }
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int j = (k * 32 + lane) * kFour;
    if (j >= p) continue;
    const Side<A, 4> weight = load_four(w + c0 + j);
    const Side<T, 4> by = load_four(skip + c0 + j);
    A out[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const A zv = static_cast<A>(in.gate[k].at[q]);
      const A u = (v[k][q] - mu) * scale * weight.at[q] + static_cast<A>(by.at[q]) * static_cast<A>(in.x[k].at[q]);
      out[q] = u * zv * sigmoid_of(zv);
    }
    store_four(y + at + j, out);
  }
}

// Grid (chunks of rows, heads over warps). A warp walks down its head's rows with the sums of dw and dskip in registers
// and the next row on its way: partial (2, chunks, heads p). Bound by memory: r c sizeof(H) + 6 r c sizeof(T) bytes.
template <class T, class H, int kSteps>
__global__ void __launch_bounds__(32 * kWarps, kSteps <= 3 && sizeof(T) == 2 ? 3 : 1)
    output_backward_kernel(T* __restrict__ dh, accum_t<T>* __restrict__ dots, T* __restrict__ dx_c, T* __restrict__ dz,
                           int64_t dz_stride, accum_t<T>* __restrict__ partial, const T* __restrict__ dy,
                           const H* __restrict__ h, const accum_t<T>* __restrict__ w, const T* __restrict__ skip,
                           const T* __restrict__ x_c, const T* __restrict__ z, int64_t z_stride,
                           const accum_t<T>* __restrict__ mean, const accum_t<T>* __restrict__ rstd, int64_t rows, int heads,
                           int p, accum_t<T> eps) {
  using A = accum_t<T>;
  constexpr bool kAhead = kSteps <= 4;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int head = static_cast<int>(blockIdx.y) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (head >= heads) return;
  const int64_t c = int64_t{heads} * p, c0 = int64_t{head} * p;
  Side<A, 4> weight[kSteps], dw[kSteps] = {}, dskip[kSteps] = {};
  Side<T, 4> by[kSteps];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int j = (k * 32 + lane) * kFour;
    if (j >= p) continue;
    weight[k] = load_four(w + c0 + j);
    by[k] = load_four(skip + c0 + j);
  }
  HeadRow<T, H, kSteps> next;
  A next_mean = A(0), next_rstd = A(0);
  const auto load = [&](int64_t r) {
    const int64_t at = (r * heads + head) * p;
    next.template load<true>(lane, p, h + at, x_c + at, z + r * z_stride + c0, dy + at);
    next_mean = mean[r * heads + head];
    next_rstd = rstd[r * heads + head];
  };
  if (kAhead) load(blockIdx.x);
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const int64_t i = r * heads + head, at = i * p;
    if (!kAhead) load(r);
    const HeadRow<T, H, kSteps> in = next;
    const A mu = next_mean, scale = next_rstd;
    if (kAhead && r + gridDim.x < rows) load(r + gridDim.x);
    A xhat[kSteps][4], g[kSteps][4], s[2] = {A(0), A(0)};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int j = (k * 32 + lane) * kFour;
      if (j >= p) continue;
      A dx_out[4], dz_out[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const A zv = static_cast<A>(in.gate[k].at[q]), d = static_cast<A>(in.up[k].at[q]), xv = static_cast<A>(in.x[k].at[q]);
        const A b = static_cast<A>(by[k].at[q]), sigmoid = sigmoid_of(zv);
        xhat[k][q] = (static_cast<A>(in.h[k].at[q]) - mu) * scale;
        const A u = xhat[k][q] * weight[k].at[q] + b * xv, ds = d * sigmoid, du = ds * zv;
        dz_out[q] = ds * u * (A(1) + zv * (A(1) - sigmoid));
        dx_out[q] = du * b;
        dskip[k].at[q] += du * xv;
        dw[k].at[q] += du * xhat[k][q];
        g[k][q] = du * weight[k].at[q];
        s[0] += g[k][q];
        s[1] += g[k][q] * xhat[k][q];
      }
      store_four(dz + r * dz_stride + c0 + j, dz_out);
      store_four(dx_c + at + j, dx_out);
    }
    group_sum<32>(s);
    const A mean_g = s[0] / static_cast<A>(p), mean_gx = s[1] / static_cast<A>(p);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int j = (k * 32 + lane) * kFour;
      if (j >= p) continue;
      A out[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) out[q] = scale * (g[k][q] - mean_g - xhat[k][q] * mean_gx);
      store_four(dh + at + j, out);
    }
    if (lane == 0) dots[i] = s[1] * eps * scale * scale;
  }
  A* to = partial + blockIdx.x * c + c0;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int j = (k * 32 + lane) * kFour;
    if (j >= p) continue;
    *reinterpret_cast<Side<A, 4>*>(to + j) = dw[k];
    *reinterpret_cast<Side<A, 4>*>(to + int64_t{gridDim.x} * c + j) = dskip[k];
  }
}

// f<steps>(): a lane's groups of 4 channels of a head of p <= 1024.
template <class F>
void with_steps(int64_t p, F&& f) {
  if (p <= 128) return f.template operator()<1>();
  if (p <= 256) return f.template operator()<2>();
  if (p <= 384) return f.template operator()<3>();
  if (p <= 512) return f.template operator()<4>();
  f.template operator()<8>();
}

// f<T, H>(): of x_c and of h, which is bf16 only beside bf16.
template <class F>
void visit_output(const Tensor& x_c, const Tensor& h, F&& f) {
  visit_float(x_c.dtype(), [&]<class T>() {
    if constexpr (std::is_same_v<T, bf16>)
      if (h.dtype() == DType::bf16) return f.template operator()<T, bf16>();
    f.template operator()<T, accum_t<T>>();
  });
}

}  // namespace

void mlstm_join(Tensor& out, const Tensor& a, const Tensor& b, const Tensor& z) {
  const int64_t e = out.size(1) / 2, n = a.numel();
  visit_float(out.dtype(), [&]<class T>() {
    const auto with = [&]<int V>() {
      launch(join_kernel<T, V>, {.grid = ceil_div(n / V, 256), .stream = current_stream(out.device())}, out.data<T>(),
             a.data<T>(), b.data<T>(), z.data<T>(), n / V, e);
    };
    constexpr int kWide = 16 / sizeof(T);
    if (e % kWide == 0 && aligned16(out.raw_data(), a.raw_data(), b.raw_data(), z.raw_data()))
      with.template operator()<kWide>();
    else
      with.template operator()<1>();
  });
}

void mlstm_maps_forward(MlstmMaps& out, const Tensor& x_c, const Tensor& x_m, const MlstmMapsWeights& w) {
  const int64_t rows = x_c.size(0), blocks = w.w_q.size(0);
  const Stream stream = current_stream(x_c.device());
  visit_float(x_c.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const bool mma = on_tensor_cores(w, {&x_c, &x_m, &out.q, &out.k, &out.v});
    const int64_t parts = mma ? mlstm_maps_groups(4 * blocks) : ceil_div(blocks, 32);
    const Tensor partial = empty({rows, parts, kGates}, dtype_of<A>, x_c.device());
    if constexpr (std::is_same_v<T, bf16>)
      if (mma)
        mlstm_maps_forward_mma({out.q.data<T>(), out.k.data<T>(), out.v.data<T>(), partial.data<A>(), x_c.data<T>(),
                                rows_of<const T>(x_m), {}}, maps_of<T>(w), rows, stream);
    if (!mma)
      launch(maps_forward_kernel<T>,
             {.grid = ceil_div(blocks, kThreads), .grid_y = ceil_div(rows, kForwardRows), .block = kThreads, .stream = stream},
             out.q.data<T>(), out.k.data<T>(), out.v.data<T>(), partial.data<A>(), x_c.data<T>(), x_m.data<T>(),
             x_m.stride(0), maps_of<T>(w), rows, parts);
    launch(gates_kernel<A>, {.grid = ceil_div(rows * kGates, 256), .stream = stream}, out.gates.data<A>(),
           partial.data<A>(), rows * kGates, parts);
  });
}

void mlstm_conv_maps_forward(MlstmMaps& out, Tensor& x_c, const Tensor& x_m, int64_t l, const Tensor& conv_weight,
                             const Tensor& conv_bias, const MlstmMapsWeights& w) {
  const int64_t rows = x_m.size(0), parts = mlstm_maps_groups(x_m.size(1));
  const Stream stream = current_stream(x_m.device());
  const Tensor partial = empty({rows, parts, kGates}, DType::f32, x_m.device());
  mlstm_maps_forward_mma({out.q.data<bf16>(), out.k.data<bf16>(), out.v.data<bf16>(), partial.data<float>(), nullptr,
                          rows_of<const bf16>(x_m),
                          {x_c.data<bf16>(), conv_weight.raw_data(), conv_bias.defined() ? conv_bias.raw_data() : nullptr,
                           conv_weight.dtype() == DType::f32, l}},
                         maps_of<bf16>(w), rows, stream);
  launch(gates_kernel<float>, {.grid = ceil_div(rows * kGates, 256), .stream = stream}, out.gates.data<float>(),
         partial.data<float>(), rows * kGates, parts);
}

void mlstm_maps_backward(Tensor& dx_c, Tensor& dx_m, MlstmMapsWeights& dw, MlstmMapsAdds adds,
                         const MlstmMapsUpstream& up, const Tensor& x_c, const Tensor& x_m, const MlstmMapsWeights& w,
                         const std::function<void()>& between) {
  const int64_t rows = x_c.size(0), blocks = w.w_q.size(0);
  const Device device = x_c.device();
  const Stream stream = current_stream(device);
  visit_float(x_c.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Maps<T> maps = maps_of<T>(w);
    const bool mma = on_tensor_cores(w, {&dx_c, &dx_m, &x_c, &x_m, &up.dq, &up.dk, &up.dv, &up.dx_more});
    const int64_t chunks = mma ? mlstm_maps_chunks(rows, 4 * blocks) : ceil_div(rows, kBackwardRows);
    const Tensor of_c = empty({chunks, 64, blocks}, dtype_of<A>, device), of_m = empty({chunks, 48, blocks}, dtype_of<A>, device);
    const Tensor totals = empty({112, blocks}, dtype_of<A>, device);
    const auto walk = [&](auto kernel, Tensor& dx, const Tensor& more, const Tensor& x, const Tensor& dy0, const T* dy1,
                          const Tensor& partial, int part) {
      if constexpr (std::is_same_v<T, bf16>)
        if (mma)
          return mlstm_maps_backward_mma({rows_of<T>(dx), more.defined() ? rows_of<const T>(more) : MapsRows<const T>{},
                                          rows_of<const T>(x), {dy0.data<T>(), dy1}, up.dgates.data<A>(), partial.data<A>(), part},
                                         maps, rows, stream);
      launch(kernel, {.grid = ceil_div(blocks, kThreads), .grid_y = chunks, .block = kThreads, .stream = stream},
             dx.data<T>(), dx.stride(0), partial.data<A>(), dy0.data<T>(), dy1, up.dgates.data<A>(),
             more.defined() ? more.data<T>() : nullptr, more.defined() ? more.stride(0) : 0, x.data<T>(), x.stride(0), maps,
             part, rows);
    };
    walk(maps_backward_kernel<T, 2>, dx_c, up.dx_more, x_c, up.dq, up.dk.data<T>(), of_c, 0);
    if (between) between();
    walk(maps_backward_kernel<T, 1>, dx_m, between ? dx_m : Tensor(), x_m, up.dv, nullptr, of_m, 2);
    launch(totals_kernel<A>, {.grid = ceil_div(112 * blocks, 256), .stream = stream}, totals.data<A>(), of_c.data<A>(),
           of_m.data<A>(), chunks, blocks);
    launch(weights_kernel<T>, {.grid = ceil_div(12 * blocks, 128), .block = 128, .stream = stream}, dw.w_q.data<A>(),
           dw.w_k.data<A>(), dw.w_v.data<A>(), dw.g.data<A>(), totals.data<A>(), maps, adds);
  });
}

void mlstm_output_forward(MlstmOutput& out, const Tensor& h, const Tensor& w, const Tensor& skip, const Tensor& x_c,
                          const Tensor& z, double eps) {
  const int64_t p = h.size(-1), heads = h.size(-2), n = h.numel() / p;
  visit_output(x_c, h, [&]<class T, class H>() {
    using A = accum_t<T>;
    with_steps(p, [&]<int kSteps>() {
      launch(output_forward_kernel<T, H, kSteps>,
             {.grid = ceil_div(n, kWarps), .block = 32 * kWarps, .stream = current_stream(h.device())}, out.y.data<T>(),
             out.mean.data<A>(), out.rstd.data<A>(), h.data<H>(), w.data<A>(), skip.data<T>(), x_c.data<T>(), z.data<T>(),
             z.stride(0), n, heads, p, eps);
    });
  });
}

void mlstm_output_backward(MlstmOutputGrad& grad, bool add_dw, bool add_dskip, const Tensor& dy, const Tensor& h,
                           const Tensor& w, const Tensor& skip, const Tensor& x_c, const Tensor& z, const Tensor& mean,
                           const Tensor& rstd, double eps) {
  const int64_t p = h.size(-1), heads = h.size(-2), c = heads * p, rows = x_c.size(0), groups = ceil_div(heads, kWarps);
  // A number that depends on the shape alone, so that every GPU gives the same bits: three blocks of a multiprocessor.
  const int64_t chunks = std::min<int64_t>(rows, std::max<int64_t>(1, 396 / groups));
  const Stream stream = current_stream(h.device());
  visit_output(x_c, h, [&]<class T, class H>() {
    using A = accum_t<T>;
    const Tensor partial = empty({2, chunks, c}, dtype_of<A>, h.device());
    with_steps(p, [&]<int kSteps>() {
      launch(output_backward_kernel<T, H, kSteps>, {.grid = chunks, .grid_y = groups, .block = 32 * kWarps, .stream = stream},
             grad.dh.data<T>(), grad.dots.data<A>(), grad.dx_c.data<T>(), grad.dz.data<T>(), grad.dz.stride(0),
             partial.data<A>(), dy.data<T>(), h.data<H>(), w.data<A>(), skip.data<T>(), x_c.data<T>(), z.data<T>(),
             z.stride(0), mean.data<A>(), rstd.data<A>(), rows, heads, p, eps);
    });
    launch(sum_partials_kernel<A>, {.grid = ceil_div(c, 32), .grid_y = 2, .block = 512, .stream = stream}, grad.dw.data<A>(), add_dw,
           grad.dskip.data<A>(), add_dskip, partial.data<A>(), partial.data<A>() + chunks * c, chunks, c);
  });
}

}  // namespace krait::kernels::cuda
