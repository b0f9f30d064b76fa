// Gates and their gradients, the step form, and which kernels serve the products.
#include "kernels/cuda/mlstm_common.cuh"
#include "kernels/cuda/mlstm_step_cluster.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kMaxWarps = kWgmmaChunk / 32;  // of a block with a thread a position

__device__ inline float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }
__device__ inline double softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }

// b, c, the running maximum of c (into u) and the document's beginning of each position of a chunk; and what the
// chunk makes of m: max(m + alpha, beta). One thread a position; scans of warps, then over the warps before.
template <class A>
__global__ void local_gates_kernel(MlstmGates<A> gates, A* b_out, A* alpha, A* beta, const A* i, const A* f,
                                   const int32_t* segments, MlstmShape shape) {
  __shared__ A sums[kMaxWarps], tops[kMaxWarps];
  __shared__ int begins[kMaxWarps];
  const int64_t unit = blockIdx.x / shape.chunks, x = blockIdx.x % shape.chunks, t0 = x * shape.chunk;
  const int64_t b = unit / shape.heads, h = unit % shape.heads;
  const int t = threadIdx.x, n = static_cast<int>(min(int64_t{shape.chunk}, shape.l - t0)), lane = t % 32, warp = t / 32;
  const int64_t at = (b * shape.l + t0 + t) * shape.heads + h;
  int first = -1;
  A sum = 0, input = 0;
  if (t < n) {
    sum = -softplus(-f[at]);
    input = i[at];
    const int32_t* ids = segments ? segments + b * shape.l + t0 + t : nullptr;
    if (ids && t0 + t > 0 && ids[0] != ids[-1]) first = t;
  }
  for (int offset = 1; offset < 32; offset *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, first, offset);
    if (lane >= offset) first = max(first, before);
  }
  if (lane == 31) begins[warp] = first;
  __syncthreads();
  for (int w = 0; w < warp; ++w) first = max(first, begins[w]);
  const int low = max(first, 0);  // where the sums begin
  for (int offset = 1; offset < 32; offset *= 2) {
    const A before = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset && t - offset >= low) sum += before;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  for (int w = warp - 1; w >= 0 && low < 32 * (w + 1); --w) sum += sums[w];
  const A c = input - sum;
  A top = c;
  for (int offset = 1; offset < 32; offset *= 2) {
    const A before = __shfl_up_sync(0xffffffffu, top, offset);
    if (lane >= offset && t - offset >= low && before > top) top = before;
  }
  if (lane == 31) tops[warp] = top;
  __syncthreads();
  for (int w = warp - 1; w >= 0 && low < 32 * (w + 1); --w) top = tops[w] > top ? tops[w] : top;
  if (first >= 0 && top < A{0}) top = A{0};  // m of the zero state counts
  if (t >= n) return;
  const int64_t row = unit * shape.l + t0 + t;
  gates.c[row] = c;
  gates.u[row] = top;
  gates.first[row] = first;
  b_out[row] = sum;
  if (t == n - 1) {
    alpha[blockIdx.x] = first >= 0 ? -static_cast<A>(INFINITY) : sum;
    beta[blockIdx.x] = sum + top;
  }
}

// m before every chunk, and m after the last: x -> max(x + alpha, beta) composed over the chunks, 32 at a time.
template <class A>
__global__ void scan_m_kernel(A* m_before, A* m_last, const A* alpha, const A* beta, const A* m_first, int64_t chunks) {
  const int64_t unit = blockIdx.x;
  const int lane = threadIdx.x;
  A m = m_first ? m_first[unit] : A{0};
  for (int64_t x0 = 0; x0 < chunks; x0 += 32) {
    const int64_t x = x0 + lane;
    A a = x < chunks ? alpha[unit * chunks + x] : A{0}, b = x < chunks ? beta[unit * chunks + x] : -static_cast<A>(INFINITY);
    for (int offset = 1; offset < 32; offset *= 2) {
      const A a1 = __shfl_up_sync(0xffffffffu, a, offset), b1 = __shfl_up_sync(0xffffffffu, b, offset);
      if (lane >= offset) {
        b = b1 + a > b ? b1 + a : b;
        a = a1 + a;
      }
    }
    const A behind = m + a > b ? m + a : b;
    const A previous = __shfl_up_sync(0xffffffffu, behind, 1);
    if (x < chunks) m_before[unit * chunks + x] = lane == 0 ? m : previous;
    m = __shfl_sync(0xffffffffu, behind, 31);
  }
  if (lane == 0 && m_last) m_last[unit] = m;
}

// u, inter, w, decay, and m of every position.
template <class A>
__global__ void finish_gates_kernel(MlstmGates<A> gates, A* m, const A* b, const A* m_before, MlstmShape shape) {
  __shared__ A u_last;
  __shared__ int first_last;
  const int64_t unit = blockIdx.x / shape.chunks, t0 = blockIdx.x % shape.chunks * shape.chunk;
  const int t = threadIdx.x, n = static_cast<int>(min(int64_t{shape.chunk}, shape.l - t0));
  const int64_t row = unit * shape.l + t0 + t;
  const A before = m_before[blockIdx.x];
  if (t < n) {
    const int first = gates.first[row];
    A u = gates.u[row];
    if (first < 0 && before > u) u = before;
    const A inter = first >= 0 ? A{0} : exp_of(before - u);
    gates.u[row] = u;
    gates.inter[row] = inter;
    if (m) m[row] = b[row] + u;
    if (t == n - 1) {
      gates.decay[blockIdx.x] = inter;
      u_last = u;
      first_last = first;
    }
  }
  __syncthreads();
  if (t < n) gates.w[row] = t >= first_last ? exp_of(gates.c[row] - u_last) : A{0};
}

// 1 / den, dr and the weights of the state's gradient of a position (row).
template <class A>
__device__ void weigh(const MlstmGates<A>& gates, int64_t row, A dot, A r, A m, A scale, A eps, bool full) {
  const A inverse = A{1} / mlstm_denominator(r, m, eps);
  const A magnitude = r < 0 ? -r : r, floor_ = exp_of(-(m > A{-80} ? m : A{-80}));
  const A dr = full && magnitude >= floor_ ? -dot * inverse * (r < 0 ? A{-1} : A{1}) : A{0};
  gates.inverse[row] = inverse;
  gates.dr[row] = dr;
  gates.wc[row] = scale * gates.inter[row] * inverse;
  gates.wn[row] = scale * gates.inter[row] * dr;
}

// From dh, which it rounds to the dtype of the products: one warp a position.
template <class T>
__global__ void upstream_kernel(MlstmGates<accum_t<T>> gates, T* rounded, const accum_t<T>* dh,
                                const accum_t<T>* h, const accum_t<T>* m,
                                const accum_t<T>* r, MlstmShape shape, accum_t<T> scale, accum_t<T> eps, bool full) {
  using A = accum_t<T>;
  const int64_t row = int64_t{blockIdx.x} * 8 + threadIdx.x / 32;  // (unit, l)
  if (row >= shape.units * shape.l) return;
  const int64_t unit = row / shape.l, t = row % shape.l, b = unit / shape.heads, head = unit % shape.heads;
  const int64_t at = ((b * shape.l + t) * shape.heads + head) * shape.dv;
  A dot = 0;
  for (int e = threadIdx.x % 32; e < shape.dv; e += 32) {
    dot += dh[at + e] * h[at + e];
    if (rounded) rounded[at + e] = static_cast<T>(dh[at + e]);
  }
  for (int w = 16; w > 0; w /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, w);
  if (threadIdx.x % 32 == 0) weigh(gates, row, dot, r[row], m[row], scale, eps, full);
}
// From dh . h: one thread a position.
template <class A>
__global__ void weigh_kernel(MlstmGates<A> gates, const A* dots, const A* m, const A* r, MlstmShape shape, A scale, A eps,
                             bool full) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= shape.units * shape.l) return;
  const int64_t unit = row / shape.l, t = row % shape.l, b = unit / shape.heads, head = unit % shape.heads;
  weigh(gates, row, dots[(b * shape.l + t) * shape.heads + head], r[row], m[row], scale, eps, full);
}

// di and df from q . dq and k . dk: one thread a position, its sum over the rest of its document in the chunk.
template <class A>
__global__ void gate_gradients_kernel(A* di, A* df, const A* f, MlstmGates<A> gates, const A* q_dots, const A* k_dots,
                                      int64_t dot_tiles, const A* flow, int64_t flow_tiles, MlstmShape shape,
                                      bool from_zero) {
  __shared__ A sums[kMaxWarps];
  __shared__ int first_of[kMaxWarps + 1];
  const int64_t unit = blockIdx.x / shape.chunks, t0 = blockIdx.x % shape.chunks * shape.chunk;
  const int64_t b = unit / shape.heads, h = unit % shape.heads, row = unit * shape.l + t0 + threadIdx.x;
  const int t = threadIdx.x, n = static_cast<int>(min(int64_t{shape.chunk}, shape.l - t0)), lane = t % 32, warp = t / 32;
  A dk = 0, sum = 0, behind = 0;
  int first = -2;  // of no document
  if (t < n) {
    A dq = 0;
    for (int64_t x = 0; x < dot_tiles; ++x) {
      dq += q_dots[row * dot_tiles + x];
      dk += k_dots[row * dot_tiles + x];
    }
    sum = dq - dk;
    first = gates.first[row];
  }
  for (int64_t x = lane; x < flow_tiles; x += 32) behind += flow[blockIdx.x * flow_tiles + x];
  for (int w = 16; w > 0; w /= 2) behind += __shfl_xor_sync(0xffffffffu, behind, w);
  for (int offset = 1; offset < 32; offset *= 2) {
    const A after = __shfl_down_sync(0xffffffffu, sum, offset);
    const int other = __shfl_down_sync(0xffffffffu, first, offset);
    if (lane + offset < 32 && other == first) sum += after;
  }
  if (lane == 0) {
    sums[warp] = sum;
    first_of[warp] = first;
  }
  if (t == n - 1) first_of[kMaxWarps] = first;
  __syncthreads();
  if (t >= n) return;
  for (int w = warp + 1; w < static_cast<int>(blockDim.x) / 32 && first_of[w] == first; ++w) sum += sums[w];
  if (first_of[kMaxWarps] == first) sum += behind;
  if (first == t || (from_zero && t0 + t == 0)) sum = 0;
  const int64_t at = (b * shape.l + t0 + t) * shape.heads + h;
  di[at] = dk;
  df[at] = sum / (A{1} + exp_of(f[at]));
}

// C and h of 64 columns of a unit; n and m as they were.
template <class T>
__global__ void step_kernel(accum_t<T>* h, accum_t<T>* c, const accum_t<T>* n, const accum_t<T>* m, const T* q, const T* k,
                            const T* v, const accum_t<T>* i, const accum_t<T>* f, int dq, int dv, int64_t tiles,
                            accum_t<T> scale, accum_t<T> eps) {
  using A = accum_t<T>;
  const int64_t unit = blockIdx.x / tiles;
  const int e = static_cast<int>(blockIdx.x % tiles) * 64 + threadIdx.x;
  if (e >= dv) return;
  const A lf = -softplus(-f[unit]), old = lf + m[unit], top = old > i[unit] ? old : i[unit];
  const A keep = exp_of(old - top), take = exp_of(i[unit] - top), ve = static_cast<A>(v[unit * dv + e]);
  A r = 0, sum = 0;
  for (int x = 0; x < dq; ++x) {
    const A kx = take * static_cast<A>(k[unit * dq + x]), qx = scale * static_cast<A>(q[unit * dq + x]);
    A& cell = c[(unit * dq + x) * dv + e];
    const A next = keep * cell + kx * ve;
    cell = next;
    sum += qx * next;
    r += qx * (keep * n[unit * dq + x] + kx);
  }
  h[unit * dv + e] = sum / mlstm_denominator(r, top, eps);
}

// Afterwards, since every block above reads them.
template <class T>
__global__ void step_state_kernel(accum_t<T>* n, accum_t<T>* m, const T* k, const accum_t<T>* i, const accum_t<T>* f,
                                  int dq) {
  using A = accum_t<T>;
  const int64_t unit = blockIdx.x;
  const A lf = -softplus(-f[unit]), old = lf + m[unit], top = old > i[unit] ? old : i[unit];
  const A keep = exp_of(old - top), take = exp_of(i[unit] - top);
  __syncthreads();
  for (int x = threadIdx.x; x < dq; x += blockDim.x)
    n[unit * dq + x] = keep * n[unit * dq + x] + take * static_cast<A>(k[unit * dq + x]);
  if (threadIdx.x == 0) m[unit] = top;
}

// The gates of a call, with their memory.
template <class A>
struct GateArrays {
  Tensor values, chunks, first;
  MlstmGates<A> gates{};

  GateArrays(const MlstmInputs& in, const MlstmShape& s, A* m, A* m_last) {
    const Device device = in.q.device();
    const Stream stream = current_stream(device);
    const int64_t n = s.units * s.l, nc = s.units * s.chunks;
    values = empty({9, n}, dtype_of<A>, device);
    chunks = empty({4, nc}, dtype_of<A>, device);
    first = empty({n}, DType::i32, device);
    A* p = values.data<A>();
    A* per_chunk = chunks.data<A>();
    A* b = p + 4 * n;
    gates.c = p;
    gates.u = p + n;
    gates.inter = p + 2 * n;
    gates.w = p + 3 * n;
    gates.inverse = p + 5 * n;
    gates.dr = p + 6 * n;
    gates.wc = p + 7 * n;
    gates.wn = p + 8 * n;
    gates.decay = per_chunk;
    gates.first = first.data<int32_t>();
    A *m_before = per_chunk + nc, *alpha = per_chunk + 2 * nc, *beta = per_chunk + 3 * nc;
    launch(local_gates_kernel<A>, {.grid = nc, .block = s.chunk, .stream = stream}, gates, b, alpha, beta,
           in.i.data<A>(), in.f.data<A>(), in.segments.defined() ? in.segments.data<int32_t>() : nullptr, s);
    launch(scan_m_kernel<A>, {.grid = s.units, .block = 32, .stream = stream}, m_before, m_last, alpha, beta,
           in.initial.m.defined() ? in.initial.m.data<A>() : nullptr, s.chunks);
    launch(finish_gates_kernel<A>, {.grid = nc, .block = s.chunk, .stream = stream}, gates, m, b, m_before, s);
  }
};

MlstmShape shape_of(const MlstmInputs& in) {
  const bool mma = mlstm_mma_serves(in.q) && mlstm_mma_serves(in.k) && mlstm_mma_serves(in.v);
  return {in, mma, mma && mlstm_wgmma_serves(in.q.device(), in.q.size(3), in.v.size(3))};
}

template <class T>
void states(const MlstmStateJob<T>& job, Stream stream) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (job.shape.wgmma) return mlstm_states_wgmma(job, stream);
    if (job.shape.mma) return mlstm_states_mma(job, stream);
  }
  mlstm_states_simt(job, stream);
}
template <class T>
void coefficients(Mix what, const MlstmMixJob<T>& job, Stream stream) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (job.shape.wgmma) return mlstm_coefficients_wgmma(what, job, stream);
    if (job.shape.mma) mlstm_coefficients_mma(what, job, stream);
  }
}
template <class T>
void mix(Mix what, const MlstmMixJob<T>& job, Stream stream) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (job.shape.wgmma) return mlstm_mix_wgmma(what, job, stream);
    if (job.shape.mma) return mlstm_mix_mma(what, job, stream);
  }
  mlstm_mix_simt(what, job, stream);
}

// Where tensor cores keep them; undefined elsewhere.
template <class T>
Tensor coefficient_buffer(const MlstmShape& s, Device device) {
  return s.mma ? empty({s.units, s.chunks, s.chunk, s.chunk}, dtype_of<T>, device) : Tensor();
}
template <class A> A* optional(const Tensor& t) { return t.defined() ? const_cast<A*>(t.data<A>()) : nullptr; }

// The states before every chunk into `c` and `n`.
template <class T>
void forward_states(Tensor& c, Tensor& n, const MlstmInputs& in, const MlstmGates<accum_t<T>>& gates,
                    const MlstmShape& s, const Tensor& c_last, const Tensor& n_last) {
  using A = accum_t<T>;
  const Device device = in.q.device();
  c = empty({s.units, s.chunks, s.dq, s.dv}, dtype_of<T>, device);
  n = empty({s.units, s.chunks, s.dq}, dtype_of<A>, device);
  const MlstmStateJob<T> job{c.data<T>(), n.data<A>(), Strided<const T>(in.k), Strided<const T>(in.v),
                             gates.w, gates.w, gates.decay, optional<A>(in.initial.c), optional<A>(in.initial.n),
                             optional<A>(c_last), optional<A>(n_last), false,
                             nullptr, nullptr, nullptr, nullptr, nullptr, s, state_tiles(s), mlstm_state_tile(s)};
  states(job, current_stream(device));
}

// What of dh the backward kernels need, and dh in the dtype of the products. dots may be undefined.
template <class T>
Tensor weigh_upstream(const MlstmGates<accum_t<T>>& gates, const Tensor& dh, const Tensor& dots, const MlstmOut& out,
                      const MlstmShape& s, const MlstmOptions& options) {
  using A = accum_t<T>;
  constexpr bool kSame = std::is_same_v<T, A>;
  const A scale = static_cast<A>(1 / std::sqrt(static_cast<double>(s.dq))), eps = static_cast<A>(options.eps);
  const Stream stream = current_stream(dh.device());
  if (dots.defined()) {
    launch(weigh_kernel<A>, {.grid = ceil_div(s.units * s.l, 256), .stream = stream}, gates, dots.data<A>(),
           out.m.data<A>(), out.r.data<A>(), s, scale, eps, options.denominator_gradient);
    return dh.to(dtype_of<T>);
  }
  const Tensor rows = kSame ? dh : empty(dh.shape(), dtype_of<T>, dh.device());
  launch(upstream_kernel<T>, {.grid = ceil_div(s.units * s.l, 8), .stream = stream}, gates,
         kSame ? nullptr : rows.template data<T>(), dh.data<A>(), out.h.data<A>(), out.m.data<A>(), out.r.data<A>(), s,
         scale, eps, options.denominator_gradient);
  return rows;
}

}  // namespace

void mlstm_forward(MlstmOut& out, const MlstmInputs& in, const MlstmOptions& options) {
  const MlstmShape s = shape_of(in);
  const Stream stream = current_stream(in.q.device());
  visit_float(in.q.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const GateArrays<A> arrays(in, s, out.m.data<A>(), out.last.m.data<A>());
    Tensor c, n;
    forward_states<T>(c, n, in, arrays.gates, s, out.last.c, out.last.n);
    const Tensor products = coefficient_buffer<T>(s, in.q.device());
    const bool rounds = out.h.dtype() != dtype_of<A>;
    const Tensor wide = rounds && !s.wgmma ? empty(out.h.shape(), dtype_of<A>, out.h.device()) : Tensor();
    const MlstmMixJob<T> job{wide.defined() ? wide.data<A>() : rounds ? nullptr : out.h.data<A>(),
                             rounds ? out.h.data<T>() : nullptr, Strided<const T>(in.q), Strided<const T>(in.k), Strided<const T>(in.v),
                             c.data<T>(), n.data<A>(), arrays.gates, static_cast<A>(1 / std::sqrt(static_cast<double>(s.dq))),
                             static_cast<A>(options.eps), out.m.data<A>(), out.r.data<A>(), Strided<const T>(in.q),
                             nullptr, s, mlstm_tiles(s, s.dv), optional<T>(products)};
    coefficients(Mix::read, job, stream);
    mix(Mix::read, job, stream);
    if (wide.defined()) copy_(out.h, wide);
    if (options.keep_states) {
      out.states = c;
      out.n_states = n;
      out.coefficients = products;
    }
  });
}

void mlstm_backward(MlstmGrad& grad, const MlstmUpstream& up, const MlstmInputs& in, const MlstmOut& out,
                    const MlstmOptions& options) {
  const MlstmShape s = shape_of(in);
  const Device device = in.q.device();
  const Stream stream = current_stream(device);
  visit_float(in.q.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const A scale = static_cast<A>(1 / std::sqrt(static_cast<double>(s.dq)));
    const GateArrays<A> arrays(in, s, nullptr, nullptr);
    const Tensor dh_rows = weigh_upstream<T>(arrays.gates, up.dh, up.dots, out, s, options);
    Tensor c = out.states, n = out.n_states;
    if (!c.defined()) forward_states<T>(c, n, in, arrays.gates, s, {}, {});

    Tensor dc = empty(c.shape(), c.dtype(), device), dn = empty(n.shape(), n.dtype(), device);
    Tensor flow = empty({s.units, s.chunks, flow_parts(s)}, dtype_of<A>, device);
    Tensor dots = empty({2, s.units, s.l, dot_parts(s)}, dtype_of<A>, device);
    const MlstmStateJob<T> reverse{dc.data<T>(), dn.data<A>(), Strided<const T>(in.q), Strided<const T>(dh_rows),
                                   arrays.gates.wc, arrays.gates.wn, arrays.gates.decay, optional<A>(up.dc_last),
                                   optional<A>(up.dn_last), optional<A>(grad.dc0), optional<A>(grad.dn0), true,
                                   flow.data<A>(), c.data<T>(), n.data<A>(), out.last.c.data<A>(), out.last.n.data<A>(),
                                   s, state_tiles(s), mlstm_state_tile(s)};
    states(reverse, stream);

    const Strided<const T> q(in.q), k(in.k), v(in.v), dh(dh_rows);
    A* q_dots = dots.data<A>();
    A* k_dots = q_dots + s.units * s.l * dot_parts(s);
    const A eps = 0;
    const int64_t q_tiles = mlstm_tiles(s, s.dq), v_tiles = mlstm_tiles(s, s.dv);
    const Tensor of_scores = coefficient_buffer<T>(s, device);
    const bool kept = out.coefficients.defined();
    const Tensor of_values = kept ? out.coefficients : coefficient_buffer<T>(s, device);
    const MlstmMixJob<T> dq{nullptr, grad.dq.data<T>(), dh, v, k, c.data<T>(), n.data<A>(), arrays.gates, scale, eps,
                            nullptr, nullptr, q, q_dots, s, q_tiles, optional<T>(of_scores)};
    coefficients(Mix::dq, dq, stream);
    mix(Mix::dq, dq, stream);
    mix(Mix::dk, MlstmMixJob<T>{nullptr, grad.dk.data<T>(), v, dh, q, dc.data<T>(), dn.data<A>(), arrays.gates, scale, eps,
                                nullptr, nullptr, k, k_dots, s, q_tiles, optional<T>(of_scores)}, stream);
    const MlstmMixJob<T> dv{nullptr, grad.dv.data<T>(), k, q, dh, dc.data<T>(), dn.data<A>(), arrays.gates, scale, eps,
                            nullptr, nullptr, k, nullptr, s, v_tiles, optional<T>(of_values)};
    if (!kept) coefficients(Mix::dv, dv, stream);
    mix(Mix::dv, dv, stream);
    launch(gate_gradients_kernel<A>, {.grid = s.units * s.chunks, .block = s.chunk, .stream = stream},
           grad.di.data<A>(), grad.df.data<A>(), in.f.data<A>(), arrays.gates, q_dots, k_dots, dot_parts(s),
           flow.data<A>(), flow_parts(s), s, !in.initial.c.defined());
  });
}

void mlstm_last_state(MlstmState& last, const MlstmInputs& in, const MlstmOptions&) {
  const MlstmShape s = shape_of(in);
  visit_float(in.q.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const GateArrays<A> arrays(in, s, nullptr, last.m.data<A>());
    Tensor c, n;
    forward_states<T>(c, n, in, arrays.gates, s, last.c, last.n);
  });
}

void mlstm_initial_gradient(MlstmInitialGradient& grad, const Tensor& dh, const MlstmInputs& in, const MlstmOut& out,
                            const MlstmOptions& options, const Tensor& dots) {
  const MlstmShape s = shape_of(in);
  const Device device = in.q.device();
  visit_float(in.q.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const GateArrays<A> arrays(in, s, nullptr, nullptr);
    const Tensor dh_rows = weigh_upstream<T>(arrays.gates, dh, dots, out, s, options);
    const Tensor dc = empty({s.units, s.chunks, s.dq, s.dv}, dtype_of<T>, device);
    const Tensor dn = empty({s.units, s.chunks, s.dq}, dtype_of<A>, device);
    const MlstmStateJob<T> reverse{dc.data<T>(), dn.data<A>(), Strided<const T>(in.q), Strided<const T>(dh_rows),
                                   arrays.gates.wc, arrays.gates.wn, arrays.gates.decay, nullptr, nullptr,
                                   grad.dc0.data<A>(), grad.dn0.data<A>(), true, nullptr, nullptr, nullptr, nullptr,
                                   nullptr, s, state_tiles(s), mlstm_state_tile(s)};
    states(reverse, current_stream(device));
  });
}

void mlstm_step(Tensor& h, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
                MlstmState& state, double eps) {
  if (mlstm_step_cluster(h, q, k, v, i, f, state, eps)) return;
  const int64_t units = q.size(0) * q.size(1), dq = q.size(2), dv = v.size(2), tiles = ceil_div(dv, 64);
  const Stream stream = current_stream(q.device());
  visit_float(q.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    launch(step_kernel<T>, {.grid = units * tiles, .block = 64, .stream = stream}, h.data<A>(), state.c.data<A>(),
           state.n.data<A>(), state.m.data<A>(), q.data<T>(), k.data<T>(), v.data<T>(), i.data<A>(), f.data<A>(), dq,
           dv, tiles, 1 / std::sqrt(static_cast<double>(dq)), eps);
    launch(step_state_kernel<T>, {.grid = units, .block = 128, .stream = stream}, state.n.data<A>(),
           state.m.data<A>(), k.data<T>(), i.data<A>(), f.data<A>(), dq);
  });
}

void mlstm_kernel_name(std::string& name, DType dtype, int64_t dq, int64_t dv) {
  const bool mma = dtype == DType::bf16 && dq % 8 == 0 && dv % 8 == 0;
  name = fmt::format("own, chunkwise, {}, {}", mma ? "bf16 tensor cores" : "CUDA cores", name_of(dtype));
}

}  // namespace krait::kernels::cuda
