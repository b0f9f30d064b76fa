#include "kernels/mlstm_block.h"

#include "core/cuda/launch.cuh"
#include "kernels/cuda/mlstm_block.cuh"
#include "kernels/cuda/mlstm_maps.cuh"
#include "kernels/cuda/packed.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 128, kGates = kMapsGates;
constexpr int kForwardRows = 64, kBackwardRows = 128;  // of one block of threads

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

}  // namespace krait::kernels::cuda
