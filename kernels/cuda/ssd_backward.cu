// Gradients of the chunked state-space recurrence (kernels/ssd.h). Chunk states and their gradients are made again and
// passed along the chunks; then one launch each for dx, dC and dB, whose blocks own their rows and walk over the heads
// of a group in order, and one that puts da together. Every sum has a fixed order.
#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/ssd_mma.cuh"
#include "kernels/reduce.h"

namespace krait::kernels::cuda {

namespace ssd {
namespace {

// dx, ddt, the part of dD of one tile of positions j (blockIdx.y) of a head, and
// from_out_j = e^{s_q - s_j} dt_j x_j . dh_out B_j.
template <class T, class A = accum_t<T>>
__global__ void __launch_bounds__(kThreads)
    dx_kernel(Rows<T> dx, A* ddt, A* from_out, A* partial_D, Rows<const T> dy, Rows<const T> x, Rows<const T> B,
              const A* products, const A* dstates, const A* D, Decays<A> decays, Dims d) {
  const Unit u(d, d.heads);
  const int64_t j0 = int64_t{blockIdx.y} * kTile, group = u.h / (d.heads / d.g);
  A* dD = partial_D == nullptr ? nullptr
                               : partial_D + (((u.b * d.chunks + u.c) * d.tiles + blockIdx.y) * d.heads + u.h) * d.p;
  if (j0 >= u.q) {
    if (dD != nullptr)
      for (int64_t p = threadIdx.x; p < d.p; p += kThreads) dD[p] = 0;
    return;
  }
  extern __shared__ __align__(16) unsigned char shared[];
  T *rows = reinterpret_cast<T*>(shared), *others = rows + kTileSize<T>;
  __shared__ DecayTile<A> decay_j, decay_i;
  __shared__ A column[4][kTile];
  const Lane at;
  const int64_t last = (u.q - 1) / kTile * kTile;
  const ChunkEnd<A> end = decays.end(u.b, u.t0 + u.q - 1, u.h);
  const A* g = products + d.products_at(u.b, u.c, group);
  decays.load(decay_j, u.b, u.t0 + j0, u.h, u.q - j0);
  A through[2] = {0, 0}, step[2] = {0, 0};
  for (int64_t p0 = 0; p0 < d.p; p0 += kTile) {
    A acc[8][4];
    clear(acc);
    const A* dstate = dstates + d.state_at(u.b, u.c, u.h) + p0 * d.n;
    for (int64_t n0 = 0; n0 < d.n; n0 += kTile) {  // dh_out B_j
      load_square(rows, B.at(u.b, u.t0 + j0, group) + n0, B.row, u.q - j0, d.n - n0, B.wide);
      load_square(others, dstate + n0, d.n, d.p - p0, d.n - n0);
      ready();
      add_products(acc, rows, others);
      __syncthreads();
    }
    load_square(others, x.at(u.b, u.t0 + j0, u.h) + p0, x.row, u.q - j0, d.p - p0, x.wide);
    ready();
    const A out[2] = {end.out(decay_j, at.row(0)), end.out(decay_j, at.row(1))};
    scale_rows(acc, out);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        through[e / 2] += acc[n][e] * static_cast<A>(others[at.row(e / 2) * kPitch<T> + at.column(n, e)]);
    for (int64_t i0 = last; i0 >= j0; i0 -= kTile) {  // + sum_i M_ij (C_i . B_j) dy_i
      load_square(rows, dy.at(u.b, u.t0 + i0, u.h) + p0, dy.row, u.q - i0, d.p - p0, dy.wide);
      decays.load(decay_i, u.b, u.t0 + i0, u.h, u.q - i0);
      ready();
      A w[8][4];
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int j = at.row(e / 2), i = at.column(n, e);
          const A m = DecayTile<A>::mask(decay_i, i, decay_j, j, i0 + i >= j0 + j);
          w[n][e] = m != A(0) ? m * g[(i0 + i) * d.chunk + j0 + j] : A(0);
        }
      add_weighted(acc, w, rows);
      if (i0 > j0) __syncthreads();
    }
    // rows holds dy_j, others x_j.
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      A column_part[2] = {0, 0};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = at.row(e / 2), c = at.column(n, e);
        const A xv = static_cast<A>(others[r * kPitch<T> + c]), up = static_cast<A>(rows[r * kPitch<T> + c]);
        step[e / 2] += acc[n][e] * xv;
        column_part[e % 2] += up * xv;
        if (j0 + r < u.q && p0 + c < d.p) {
          const A skip = D != nullptr ? D[u.h * d.p + p0 + c] * up : A(0);
          dx.at(u.b, u.t0 + j0 + r, u.h)[p0 + c] = static_cast<T>(decay_j.dt[r] * acc[n][e] + skip);
        }
      }
      if (dD == nullptr) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const A sum = column_sum(column_part[e]);
        if (at.g == 0) column[threadIdx.x / 32][at.column(n, e)] = sum;
      }
    }
    __syncthreads();
    const int c = static_cast<int>(threadIdx.x);
    if (dD != nullptr && c < kTile && p0 + c < d.p) dD[p0 + c] = column[0][c] + column[1][c] + column[2][c] + column[3][c];
    __syncthreads();
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = at.row(half);
    const A all = row_sum(step[half]), carried = row_sum(through[half]);
    if (at.t != 0 || j0 + r >= u.q) continue;
    const int64_t to = decays.at(u.b, u.t0 + j0 + r, u.h);
    from_out[to] = carried * decay_j.dt[r];
    if (ddt != nullptr) ddt[to] = all;
  }
}

// dB (kB) or dC of one tile of positions (blockIdx.y), summed over the heads of a group; NP pieces of 64 columns at once.
//   dC_i = sum_h e^{s_i} dy_i h_in + sum_j Gamma_ij B_j       own dy, other x, mixed B, states h_in
//   dB_j = sum_h e^{s_q - s_j} dt_j x_j dh_out + sum_i Gamma_ij C_i   own x, other dy, mixed C, states dh_out
// With dC also, for da: from_in_i = e^{s_i} dy_i . h_in C_i; of W_ij = Gamma_ij (C_i . B_j) for the i of this tile, the
// sums over i for j in earlier tiles (column_sums) and sum_{i >= r > j} W_ij for r in this tile (da).
template <class T, bool kB, int NP, class A = accum_t<T>>
__global__ void __launch_bounds__(kThreads)
    group_kernel(Rows<T> result, A* da, A* column_sums, A* from_in, Rows<const T> own, Rows<const T> other,
                 Rows<const T> mixed, Rows<const T> C, const A* products, const A* states, Decays<A> decays, Dims d) {
  const Unit u(d, d.g);
  const int64_t r0 = int64_t{blockIdx.y} * kTile, last = (u.q - 1) / kTile * kTile, heads = d.heads / d.g;
  if (r0 >= u.q) return;
  extern __shared__ __align__(16) unsigned char shared[];
  A* square = reinterpret_cast<A*>(shared);  // W of the diagonal tile, or column sums of four warps; dC only
  T *own_tile = reinterpret_cast<T*>(square + (kB ? 0 : kTile * (kTile + 1))), *other_tile = own_tile + kTileSize<T>;
  __shared__ DecayTile<A> decay_r, decay_c;
  __shared__ A row_total[kTile];
  const Lane at;
  const int tid = static_cast<int>(threadIdx.x);
  const bool whole = d.p <= kTile;  // own_tile stays for all of a head
  const A* g = products + d.products_at(u.b, u.c, u.h);

  for (int64_t n_base = 0; n_base < d.n; n_base += NP * kTile) {
    A acc[NP][8][4];
#pragma unroll
    for (int k = 0; k < NP; ++k) clear(acc[k]);
    for (int64_t h = u.h * heads; h < (u.h + 1) * heads; ++h) {
      decays.load(decay_r, u.b, u.t0 + r0, h, u.q - r0);
      const ChunkEnd<A> end = decays.end(u.b, u.t0 + u.q - 1, h);
      const A* state = states + d.state_at(u.b, u.c, h);
      A carried[2] = {0, 0}, row_part[2] = {0, 0};
      for (int64_t p0 = 0; p0 < d.p; p0 += kTile) {  // through the state before, or after, the chunk
        load_square(own_tile, own.at(u.b, u.t0 + r0, h) + p0, own.row, u.q - r0, d.p - p0, own.wide);
#pragma unroll
        for (int k = 0; k < NP; ++k) {
          const int64_t n0 = n_base + k * kTile;
          if (n0 >= d.n) continue;
          load_square(other_tile, state + p0 * d.n + n0, d.n, d.p - p0, d.n - n0);
          ready();
          A factor[2], w[8][4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int r = at.row(half);
            factor[half] = kB ? end.out(decay_r, r) * decay_r.dt[r] : decay_r.in(r);
          }
          take_rows(w, own_tile, factor);
          if constexpr (kB) {
            add_weighted(acc[k], w, other_tile);
          } else {
            A part[8][4];
            clear(part);
            add_weighted(part, w, other_tile);
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                acc[k][n][e] += part[n][e];
                const int64_t i = r0 + at.row(e / 2), col = n0 + at.column(n, e);
                if (i < u.q && col < d.n)
                  carried[e / 2] += part[n][e] * static_cast<A>(C.at(u.b, u.t0 + i, u.h)[col]);
              }
          }
          __syncthreads();
        }
      }
      for (int64_t c0 = kB ? r0 : 0; c0 <= (kB ? last : r0); c0 += kTile) {  // inside the chunk
        A gamma[8][4];
        clear(gamma);
        decays.load(decay_c, u.b, u.t0 + c0, h, u.q - c0);
        for (int64_t p0 = 0; p0 < d.p; p0 += kTile) {
          if (!whole) load_square(own_tile, own.at(u.b, u.t0 + r0, h) + p0, own.row, u.q - r0, d.p - p0, own.wide);
          load_square(other_tile, other.at(u.b, u.t0 + c0, h) + p0, other.row, u.q - c0, d.p - p0, other.wide);
          ready();
          add_products(gamma, own_tile, other_tile);
          __syncthreads();
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          A column_part[2] = {0, 0};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int r = at.row(e / 2), c = at.column(n, e);
            const A m = kB ? DecayTile<A>::mask(decay_c, c, decay_r, r, c0 + c >= r0 + r)
                           : DecayTile<A>::mask(decay_r, r, decay_c, c, r0 + r >= c0 + c);
            gamma[n][e] *= m * (kB ? decay_r.dt[r] : decay_c.dt[c]);
            if constexpr (!kB) {
              const A w = m != A(0) && n_base == 0 ? gamma[n][e] * g[(r0 + r) * d.chunk + c0 + c] : A(0);
              if (c0 < r0) {
                row_part[e / 2] += w;
                column_part[e % 2] += w;
              } else {
                square[r * (kTile + 1) + c] = w;
              }
            }
          }
          if constexpr (!kB) {
            if (c0 < r0) {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const A sum = column_sum(column_part[e]);
                if (at.g == 0) square[tid / 32 * kTile + at.column(n, e)] = sum;
              }
            }
          }
        }
#pragma unroll
        for (int k = 0; k < NP; ++k) {
          const int64_t n0 = n_base + k * kTile;
          if (n0 >= d.n) continue;
          load_square(other_tile, mixed.at(u.b, u.t0 + c0, u.h) + n0, mixed.row, u.q - c0, d.n - n0, mixed.wide);
          ready();
          add_weighted(acc[k], gamma, other_tile);
          __syncthreads();
        }
        if (!kB && n_base == 0 && c0 < r0 && tid < kTile)
          column_sums[(((u.b * d.chunks + u.c) * d.heads + h) * d.tiles + blockIdx.y) * d.chunk + c0 + tid] =
              square[tid] + square[kTile + tid] + square[2 * kTile + tid] + square[3 * kTile + tid];
      }
      if constexpr (!kB) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = at.row(half);
          const A total = row_sum(row_part[half]), through = row_sum(carried[half]);
          if (at.t != 0) continue;
          row_total[r] = total;
          if (r0 + r >= u.q) continue;
          A& to = from_in[decays.at(u.b, u.t0 + r0 + r, h)];
          to = n_base == 0 ? through : to + through;
        }
        if (n_base == 0) {
          __syncthreads();
          if (tid < kTile) {  // row tid: sums over j < r
            A sum = row_total[tid];
            for (int r = 0; r < kTile; ++r) {
              A& w = square[tid * (kTile + 1) + r];
              const A before = sum;
              sum += w;
              w = before;
            }
          }
          __syncthreads();
          if (tid < kTile && r0 + tid < u.q) {
            A sum = 0;
            for (int i = tid; i < kTile; ++i) sum += square[i * (kTile + 1) + tid];
            da[decays.at(u.b, u.t0 + r0 + tid, h)] = sum;
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < NP; ++k)
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t r = r0 + at.row(e / 2), c = n_base + k * kTile + at.column(n, e);
          if (r < u.q && c < d.n) result.at(u.b, u.t0 + r, u.h)[c] = static_cast<T>(acc[k][n][e]);
        }
  }
}

// The value of lanes before this one, and of all.
template <class A>
struct WarpPrefix {
  A before, total;
  __device__ explicit WarpPrefix(A value) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    A sum = value;
    for (int offset = 1; offset < 32; offset *= 2) {
      const A other = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane >= offset) sum += other;
    }
    const A previous = __shfl_up_sync(0xffffffffu, sum, 1);
    before = lane > 0 ? previous : A(0);
    total = __shfl_sync(0xffffffffu, sum, 31);
  }
};

// da_r += sums over later tiles of i and over j < r, + sum_{i >= r} from_in_i + sum_{j < r} from_out_j + e^{s_q} <dh_out, h_in>.
template <class A>
__global__ void da_kernel(A* da, const A* column_sums, const A* from_in, const A* from_out, const A* states,
                          const A* dstates, Decays<A> decays, Dims d) {
  const Unit u(d, d.heads);
  __shared__ A parts[32];
  const A total = decays.end(u.b, u.t0 + u.q - 1, u.h).total();
  A dot = 0;
  const A *state = states + d.state_at(u.b, u.c, u.h), *dstate = dstates + d.state_at(u.b, u.c, u.h);
  if (total != A(0))
    for (int64_t k = threadIdx.x; k < d.p * d.n; k += blockDim.x) dot += state[k] * dstate[k];
  dot = block_reduce(dot, parts, [](A a, A b) { return a + b; });
  if (threadIdx.x >= 32) return;
  const int64_t lane = threadIdx.x;
  const auto at = [&](int64_t r) { return decays.at(u.b, u.t0 + r, u.h); };
  for (int64_t tile = 1; tile * kTile < u.q; ++tile) {
    const A* sums = column_sums + (((u.b * d.chunks + u.c) * d.heads + u.h) * d.tiles + tile) * d.chunk;
    A carry = 0;
    for (int64_t r = lane; r < tile * kTile; r += 32) {
      const WarpPrefix<A> prefix(sums[r]);
      da[at(r)] += carry + prefix.before;
      carry += prefix.total;
    }
  }
  A carry = total * dot;
  for (int64_t base = 0; base < u.q; base += 32) {
    const int64_t r = base + lane;
    const WarpPrefix<A> prefix(r < u.q ? from_out[at(r)] : A(0));
    if (r < u.q) da[at(r)] += carry + prefix.before;
    carry += prefix.total;
  }
  carry = 0;
  for (int64_t base = (u.q - 1) / 32 * 32; base >= 0; base -= 32) {  // lane k takes position base + 31 - k
    const int64_t r = base + 31 - lane;
    const A own = r < u.q ? from_in[at(r)] : A(0);
    const WarpPrefix<A> suffix(own);
    if (r < u.q) da[at(r)] += carry + suffix.before + own;
    carry += suffix.total;
  }
}

}  // namespace
}  // namespace ssd

void ssd_backward(SsdGrad& grad, const Tensor& dy, const Tensor& dfinal, const SsdInput& in) {
  using namespace ssd;
  if (mma64::serves(in, dy, {grad.dx, grad.dB, grad.dC})) return mma64::backward(grad, dy, dfinal, in);
  const Pass pass(in);
  const Dims& d = pass.d;
  const Device device = in.x.device();
  const Stream stream = current_stream(device);
  const DType sums = accum_dtype(in.x.dtype());
  Tensor states = pass.own_states(in.x, in.B, false), dstates = pass.own_states(dy, in.C, true);
  pass.scan(states, in.initial_state, {}, false);
  pass.scan(dstates, dfinal, grad.dinitial_state, true);

  const Tensor from_in = empty(in.a.shape(), sums, device), from_out = empty(in.a.shape(), sums, device);
  const Tensor column_sums = empty({d.b, d.chunks, d.heads, d.tiles, d.chunk}, sums, device);
  const Tensor partial_D = in.D.defined() ? empty({d.b * d.chunks * d.tiles, d.heads, d.p}, sums, device) : Tensor();
  visit_float(in.x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    constexpr int NP = kTensorCores<T> ? 2 : 1;  // registers
    constexpr int64_t kTiles = 2 * kTileSize<T> * int64_t{sizeof(T)};
    constexpr int64_t kSquare = kTile * (kTile + 1) * int64_t{sizeof(A)};
    const Rows<const T> x(in.x), B(in.B), C(in.C), up(dy);
    const A* products = pass.products.data<A>();
    launch(dx_kernel<T>,
           {.grid = d.b * d.chunks * d.heads, .grid_y = d.tiles, .block = kThreads, .shared = kTiles, .stream = stream},
           Rows<T>(grad.dx), pointer_or_null<A>(grad.ddt), from_out.data<A>(), pointer_or_null<A>(partial_D), up, x, B,
           products, dstates.data<A>(), pointer_or_null<A>(in.D), pass.decays<A>(), d);
    launch(group_kernel<T, false, NP>,
           {.grid = d.b * d.chunks * d.g, .grid_y = d.tiles, .block = kThreads, .shared = kTiles + kSquare, .stream = stream},
           Rows<T>(grad.dC), grad.da.data<A>(), column_sums.data<A>(), from_in.data<A>(), up, x, B, C, products,
           states.data<A>(), pass.decays<A>(), d);
    launch(group_kernel<T, true, NP>,
           {.grid = d.b * d.chunks * d.g, .grid_y = d.tiles, .block = kThreads, .shared = kTiles, .stream = stream},
           Rows<T>(grad.dB), static_cast<A*>(nullptr), static_cast<A*>(nullptr), static_cast<A*>(nullptr), x, up, C, C,
           products, dstates.data<A>(), pass.decays<A>(), d);
    launch(da_kernel<A>, {.grid = d.b * d.chunks * d.heads, .block = 256, .stream = stream}, grad.da.data<A>(),
           column_sums.data<A>(), from_in.data<A>(), from_out.data<A>(), states.data<A>(), dstates.data<A>(),
           pass.decays<A>(), d);
  });
  if (in.D.defined()) copy_(grad.dD, kernels::sum(partial_D, {0}));
}

}  // namespace krait::kernels::cuda
