// Chunks of the state-space recurrence (kernels/ssd.h): sums of log decays, C B^T, each chunk's own state, a pass over
// the chunks' states, outputs. Five launches, none per position. bf16 with heads of up to 64 channels and states of up
// to 128 columns has its own kernels (ssd_mma.cuh).
#include "kernels/cuda/ssd_mma.cuh"

namespace krait::kernels::cuda {

namespace ssd {
namespace {

// A thread sums the log decays of one chunk and head; neighbours have neighbouring heads.
template <class A>
__global__ void sums_kernel(A* high, A* low, int32_t* run, const A* a, const int32_t* segments, Dims d) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= d.b * d.chunks * d.heads) return;
  const int64_t h = at % d.heads, c = at / d.heads % d.chunks, b = at / d.heads / d.chunks, t0 = c * d.chunk;
  const int64_t t1 = min(d.l, t0 + d.chunk);
  double s = 0;
#pragma unroll 4
  for (int64_t t = t0; t < t1; ++t) {
    const int64_t i = (b * d.l + t) * d.heads + h;
    s += static_cast<double>(a[i]);
    high[i] = static_cast<A>(s);
    low[i] = static_cast<A>(s - static_cast<double>(high[i]));
  }
  if (run == nullptr || h != 0) return;
  int32_t count = 0;
  for (int64_t t = t0; t < t1; ++t) {
    if (t > 0 && segments[b * d.l + t] != segments[b * d.l + t - 1]) ++count;
    run[b * d.l + t] = count;
  }
}

// G_ij = C_i . B_j of one tile: rows from blockIdx.y, columns from blockIdx.z.
template <class T, class A = accum_t<T>>
__global__ void __launch_bounds__(kThreads) products_kernel(A* products, Rows<const T> B, Rows<const T> C, Dims d) {
  const Unit u(d, d.g);
  const int64_t i0 = int64_t{blockIdx.y} * kTile, j0 = int64_t{blockIdx.z} * kTile;
  if (j0 > i0 || i0 >= u.q) return;
  extern __shared__ __align__(16) unsigned char shared[];
  T *c_tile = reinterpret_cast<T*>(shared), *b_tile = c_tile + kTileSize<T>;
  A s[8][4];
  clear(s);
  for (int64_t n0 = 0; n0 < d.n; n0 += kTile) {
    load_square(c_tile, C.at(u.b, u.t0 + i0, u.h) + n0, C.row, u.q - i0, d.n - n0, C.wide);
    load_square(b_tile, B.at(u.b, u.t0 + j0, u.h) + n0, B.row, u.q - j0, d.n - n0, B.wide);
    ready();
    add_products(s, c_tile, b_tile);
    __syncthreads();
  }
  const Lane at;
  A* to = products + d.products_at(u.b, u.c, u.h);
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t i = i0 + at.row(e / 2), j = j0 + at.column(n, e);
      if (i < u.q && j < u.q) to[i * d.chunk + j] = s[n][e];
    }
}

// One 64 x 64 piece (p, n) of a chunk's own state.
template <class T, bool kReverse, class A = accum_t<T>>
__global__ void __launch_bounds__(kThreads)
    own_state_kernel(A* states, Rows<const T> rows, Rows<const T> columns, Decays<A> decays, Dims d) {
  const Unit u(d, d.heads);
  const int64_t p0 = int64_t{blockIdx.y} * kTile, n0 = int64_t{blockIdx.z} * kTile, group = u.h / (d.heads / d.g);
  extern __shared__ __align__(16) unsigned char shared[];
  T *row_tile = reinterpret_cast<T*>(shared), *column_tile = row_tile + kTileSize<T>;
  __shared__ DecayTile<A> decay;
  __shared__ A weight[kTile];
  const ChunkEnd<A> end = decays.end(u.b, u.t0 + u.q - 1, u.h);
  A acc[8][4];
  clear(acc);
  for (int64_t j0 = 0; j0 < u.q; j0 += kTile) {
    load_square(row_tile, rows.at(u.b, u.t0 + j0, u.h) + p0, rows.row, u.q - j0, d.p - p0, rows.wide);
    load_square(column_tile, columns.at(u.b, u.t0 + j0, group) + n0, columns.row, u.q - j0, d.n - n0, columns.wide);
    decays.load(decay, u.b, u.t0 + j0, u.h, u.q - j0);
    ready();
    if (threadIdx.x < kTile) {
      const int j = static_cast<int>(threadIdx.x);
      weight[j] = kReverse ? decay.in(j) : end.out(decay, j) * decay.dt[j];
    }
    __syncthreads();
    A w[8][4];
    take_columns(w, row_tile, weight);
    add_weighted(acc, w, column_tile);
    __syncthreads();
  }
  const Lane at;
  A* to = states + d.state_at(u.b, u.c, u.h);
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t p = p0 + at.row(e / 2), col = n0 + at.column(n, e);
      if (p < d.p && col < d.n) to[p * d.n + col] = acc[n][e];
    }
}

// A thread carries one element of a head's state over the chunks.
template <class A>
__global__ void scan_kernel(A* states, const A* start, A* last, Decays<A> decays, Dims d, bool reverse) {
  const int64_t size = d.p * d.n, at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= d.b * d.heads * size) return;
  const int64_t element = at % size, h = at / size % d.heads, b = at / size / d.heads;
  A running = start != nullptr ? start[at] : A(0);
  for (int64_t k = 0; k < d.chunks; ++k) {
    const int64_t c = reverse ? d.chunks - 1 - k : k;
    const A decay = decays.end(b, min(d.l, (c + 1) * d.chunk) - 1, h).total();
    A& own = states[d.state_at(b, c, h) + element];
    const A before = running;
    running = decay * running + own;
    own = before;
  }
  if (last != nullptr) last[at] = running;
}

// y of one tile of positions (blockIdx.y) and 64 channels (blockIdx.z).
template <class T, class A = accum_t<T>>
__global__ void __launch_bounds__(kThreads)
    output_kernel(Rows<T> y, Rows<const T> x, Rows<const T> C, const A* products, const A* states, const A* D,
                  Decays<A> decays, Dims d) {
  const Unit u(d, d.heads);
  const int64_t i0 = int64_t{blockIdx.y} * kTile, p0 = int64_t{blockIdx.z} * kTile, group = u.h / (d.heads / d.g);
  if (i0 >= u.q) return;
  extern __shared__ __align__(16) unsigned char shared[];
  T *rows = reinterpret_cast<T*>(shared), *others = rows + kTileSize<T>;
  __shared__ DecayTile<A> decay_i, decay_j;
  const Lane at;
  A acc[8][4];
  clear(acc);
  decays.load(decay_i, u.b, u.t0 + i0, u.h, u.q - i0);
  const A* state = states + d.state_at(u.b, u.c, u.h) + p0 * d.n;
  for (int64_t n0 = 0; n0 < d.n; n0 += kTile) {  // h_in C_i
    load_square(rows, C.at(u.b, u.t0 + i0, group) + n0, C.row, u.q - i0, d.n - n0, C.wide);
    load_square(others, state + n0, d.n, d.p - p0, d.n - n0);
    ready();
    add_products(acc, rows, others);
    __syncthreads();
  }
  const A factor[2] = {decay_i.in(at.row(0)), decay_i.in(at.row(1))};
  scale_rows(acc, factor);
  const A* g = products + d.products_at(u.b, u.c, group);
  for (int64_t j0 = 0; j0 <= i0; j0 += kTile) {
    load_square(rows, x.at(u.b, u.t0 + j0, u.h) + p0, x.row, u.q - j0, d.p - p0, x.wide);
    decays.load(decay_j, u.b, u.t0 + j0, u.h, u.q - j0);
    ready();
    A w[8][4];
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = at.row(e / 2), c = at.column(n, e);
        const A m = DecayTile<A>::mask(decay_i, r, decay_j, c, i0 + r >= j0 + c);
        w[n][e] = m != A(0) ? m * decay_j.dt[c] * g[(i0 + r) * d.chunk + j0 + c] : A(0);
      }
    add_weighted(acc, w, rows);
    if (j0 < i0) __syncthreads();
  }
  // rows now holds x_i.
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = at.row(e / 2), c = at.column(n, e);
      if (i0 + r >= u.q || p0 + c >= d.p) continue;
      const A skip = D != nullptr ? D[u.h * d.p + p0 + c] * static_cast<A>(rows[r * kPitch<T> + c]) : A(0);
      y.at(u.b, u.t0 + i0 + r, u.h)[p0 + c] = static_cast<T>(acc[n][e] + skip);
    }
}

// One warp for each row (b, head, p) of the state. Bound by memory: the state in and out.
template <class T, class A = accum_t<T>>
__global__ void step_kernel(T* y, A* state, const T* x, const A* dt, const A* a, const T* B, const T* C, const A* D,
                            int64_t rows, int64_t heads, int64_t p, int64_t g, int64_t n) {
  const int64_t row = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t unit = row / p, h = unit % heads, group = unit / heads * g + h / (heads / g);
  const A value = static_cast<A>(x[row]), decay = exp_of(a[unit]), in = (dt != nullptr ? dt[unit] : A(1)) * value;
  A sum = 0;
  for (int64_t k = threadIdx.x % 32; k < n; k += 32) {
    const A s = decay * state[row * n + k] + in * static_cast<A>(B[group * n + k]);
    state[row * n + k] = s;
    sum += s * static_cast<A>(C[group * n + k]);
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) y[row] = static_cast<T>(sum + (D != nullptr ? D[h * p + row % p] * value : A(0)));
}

}  // namespace

Pass::Pass(const SsdInput& in) : d(in), dt(in.dt) {
  const Device device = in.x.device();
  const Stream stream = current_stream(device);
  const DType sums = accum_dtype(in.x.dtype());
  high = empty(in.a.shape(), sums, device);
  low = empty(in.a.shape(), sums, device);
  if (in.segments.defined()) run = empty({d.b, d.l}, DType::i32, device);
  products = empty({d.b, d.chunks, d.g, d.chunk, d.chunk}, sums, device);
  visit_float(in.x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    launch(sums_kernel<A>, {.grid = ceil_div(d.b * d.chunks * d.heads, kThreads), .block = kThreads, .stream = stream},
           high.data<A>(), low.data<A>(), pointer_or_null<int32_t>(run), in.a.data<A>(), pointer_or_null<int32_t>(in.segments),
           d);
    launch(products_kernel<T>,
           {.grid = d.b * d.chunks * d.g, .grid_y = d.tiles, .grid_z = d.tiles, .block = kThreads,
            .shared = 2 * kTileSize<T> * int64_t{sizeof(T)}, .stream = stream},
           products.data<A>(), Rows<const T>(in.B), Rows<const T>(in.C), d);
  });
}

Tensor Pass::own_states(const Tensor& rows, const Tensor& columns, bool reverse) const {
  Tensor states = empty({d.b, d.chunks, d.heads, d.p, d.n}, accum_dtype(rows.dtype()), rows.device());
  visit_float(rows.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    launch(reverse ? own_state_kernel<T, true> : own_state_kernel<T, false>,
           {.grid = d.b * d.chunks * d.heads, .grid_y = ceil_div(d.p, kTile), .grid_z = ceil_div(d.n, kTile),
            .block = kThreads, .shared = 2 * kTileSize<T> * int64_t{sizeof(T)}, .stream = current_stream(rows.device())},
           states.data<A>(), Rows<const T>(rows), Rows<const T>(columns), decays<A>(), d);
  });
  return states;
}

void Pass::scan(Tensor& states, const Tensor& start, const Tensor& last, bool reverse) const {
  const auto run_scan = [&]<class A>() {
    launch(scan_kernel<A>,
           {.grid = ceil_div(d.b * d.heads * d.p * d.n, 256), .block = 256, .stream = current_stream(states.device())},
           states.data<A>(), pointer_or_null<A>(start), pointer_or_null<A>(last), decays<A>(), d, reverse);
  };
  if (states.dtype() == DType::f64)
    run_scan.operator()<double>();
  else
    run_scan.operator()<float>();
}

}  // namespace ssd

void ssd_forward(Tensor& y, Tensor& final_state, const SsdInput& in) {
  using namespace ssd;
  if (mma64::serves(in, {}, {y})) return mma64::forward(y, final_state, in);
  const Pass pass(in);
  const Dims& d = pass.d;
  Tensor states = pass.own_states(in.x, in.B, false);
  pass.scan(states, in.initial_state, final_state, false);
  visit_float(in.x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    launch(output_kernel<T>,
           {.grid = d.b * d.chunks * d.heads, .grid_y = d.tiles, .grid_z = ceil_div(d.p, kTile), .block = kThreads,
            .shared = 2 * kTileSize<T> * int64_t{sizeof(T)}, .stream = current_stream(y.device())},
           Rows<T>(y), Rows<const T>(in.x), Rows<const T>(in.C), pass.products.data<A>(), states.data<A>(),
           pointer_or_null<A>(in.D), pass.decays<A>(), d);
  });
}

void ssd_step(Tensor& y, Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& B,
              const Tensor& C, const Tensor& D) {
  using namespace ssd;
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    launch(step_kernel<T>, {.grid = ceil_div(x.numel(), 4), .block = 128, .stream = current_stream(x.device())},
           y.data<T>(), state.data<A>(), x.data<T>(), pointer_or_null<A>(dt), a.data<A>(), B.data<T>(), C.data<T>(),
           pointer_or_null<A>(D), x.numel(), x.size(1), x.size(2), B.size(1), B.size(2));
  });
}

}  // namespace krait::kernels::cuda
