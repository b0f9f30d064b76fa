#include <memory>

#include "core/parallel.h"
#include "kernels/cpu/scan_block.h"

// Tasks are a batch row and a group of blocks of channels; their number follows from the shape, not from the threads.
namespace krait::kernels::cpu {

using namespace scan;

namespace {

// h = exp(delta A) h + delta B x for all states; u += C h.
template <class A>
void advance(A* __restrict h, A* __restrict u, const A* __restrict a, const A* __restrict delta,
             const A* __restrict dx, const A* __restrict b, const A* __restrict c, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const A bi = b[i], ci = c[i];
#pragma omp simd
    for (int64_t j = 0; j < kBlock; ++j) {
      const A next = vexp(delta[j] * a[i * kBlock + j]) * h[i * kBlock + j] + dx[j] * bi;
      h[i * kBlock + j] = next;
      u[j] += ci * next;
    }
  }
}

// The same out of place, keeping the decay. keep is 0 where a document begins.
template <class A>
void advance_kept(A* __restrict h, A* __restrict decay, A* __restrict u, const A* __restrict before,
                  const A* __restrict a, const A* __restrict delta, const A* __restrict dx, const A* __restrict b,
                  const A* __restrict c, A keep, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const A bi = b[i], ci = c[i];
#pragma omp simd
    for (int64_t j = 0; j < kBlock; ++j) {
      const A d = keep * vexp(delta[j] * a[i * kBlock + j]);
      const A next = d * before[i * kBlock + j] + dx[j] * bi;
      decay[i * kBlock + j] = d;
      h[i * kBlock + j] = next;
      u[j] += ci * next;
    }
  }
}

// One position of the reverse scan. r holds exp(delta_{t+1} A) lambda_{t+1} and then exp(delta_t A) lambda_t.
template <class A>
void retreat(A* __restrict r, A* __restrict da, A* __restrict lb, A* __restrict ddelta, A* __restrict db,
             A* __restrict dc, const A* __restrict h, const A* __restrict before, const A* __restrict decay,
             const A* __restrict a, const A* __restrict g, const A* __restrict delta, const A* __restrict dx,
             const A* __restrict b, const A* __restrict c, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const A bi = b[i], ci = c[i];
    A sum_b = 0, sum_c = 0;
#pragma omp simd reduction(+ : sum_b, sum_c)
    for (int64_t j = 0; j < kBlock; ++j) {
      const int64_t at = i * kBlock + j;
      const A lambda = g[j] * ci + r[at];
      const A carried = lambda * decay[at];
      const A of_exponent = carried * before[at];
      sum_b += lambda * dx[j];
      sum_c += g[j] * h[at];
      lb[j] += lambda * bi;
      ddelta[j] += of_exponent * a[at];
      da[at] += of_exponent * delta[j];
      r[at] = carried;
    }
    db[i] += sum_b;
    dc[i] += sum_c;
  }
}

template <class A>
void gate(A* __restrict u, const A* __restrict z) {
#pragma omp simd
  for (int64_t j = 0; j < kBlock; ++j) u[j] *= vsilu(z[j]);
}

// dz = dy u silu'(z), g = dy silu(z).
template <class A>
void gate_gradient(A* __restrict dz, A* __restrict g, const A* __restrict dy, const A* __restrict u,
                   const A* __restrict z) {
#pragma omp simd
  for (int64_t j = 0; j < kBlock; ++j) {
    const auto [value, slope] = vsilu_and_slope(z[j]);
    dz[j] = dy[j] * u[j] * slope;
    g[j] = dy[j] * value;
  }
}

// dx, and ddt in the place of raw.
template <class A>
void input_gradients(A* __restrict dx, A* __restrict raw, const A* __restrict ddelta, const A* __restrict lb,
                     const A* __restrict x, const A* __restrict delta, const A* __restrict g, const A* __restrict d,
                     const A* __restrict bias, bool softplus) {
#pragma omp simd
  for (int64_t j = 0; j < kBlock; ++j) {
    dx[j] = delta[j] * lb[j] + d[j] * g[j];
    const A slope = vsigmoid(raw[j] + bias[j]);
    raw[j] = (ddelta[j] + x[j] * lb[j]) * (softplus ? slope : A(1));
  }
}

template <class A>
void add_product(A* __restrict to, const A* __restrict a, const A* __restrict b) {
#pragma omp simd
  for (int64_t j = 0; j < kBlock; ++j) to[j] += a[j] * b[j];
}

template <class A>
void add_all(A* __restrict to, const A* __restrict from, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) to[j] += from[j];
}

// Groups of blocks that a batch row is cut into: enough tasks for a machine, few enough partial sums of dB and dC.
int64_t groups_of(int64_t b, int64_t e) { return std::clamp<int64_t>(16 / std::max<int64_t>(b, 1), 1, blocks_of(e)); }

}  // namespace

void make_scan_states(Tensor& states, const SelectiveScanInputs& in) {
  const int64_t b = in.x.size(0), l = in.x.size(1), e = in.x.size(2), n = in.A.size(1);
  states = empty({b, (l + kQ - 1) / kQ, n, e}, accum_dtype(in.x.dtype()), in.x.device());
}

void selective_scan_forward(Tensor& y_out, Tensor& final_out, Tensor& states_out, const SelectiveScanInputs& in) {
  const int64_t b = in.x.size(0), l = in.x.size(1), e = in.x.size(2), n = in.A.size(1);
  const int64_t blocks = blocks_of(e), chunks = (l + kQ - 1) / kQ;
  visit_float(in.x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    parallel_for(0, b * blocks, 1, [&](int64_t first, int64_t last) {
      const std::unique_ptr<A[]> scratch(new A[static_cast<size_t>(2 * n * (kBlock + 1))]);
      A *a = scratch.get(), *h = a + n * kBlock, *bt = h + n * kBlock, *ct = bt + n;
      Row<A> x, raw, delta, dx, u, z;
      for (int64_t task = first; task < last; ++task) {
        const int64_t row = task / blocks;
        const Channels<T> s(in, row, task % blocks);
        load_block(a, in.A.data<A>() + s.at * n, n, s.count);
        if (in.h0.defined())
          load_block(h, in.h0.data<A>() + (row * e + s.at) * n, n, s.count);
        else
          std::fill(h, h + n * kBlock, A(0));
        for (int64_t t = 0; t < l; ++t) {
          if (states_out.defined() && t % kQ == 0)
            for (int64_t i = 0; i < n; ++i)
              store_row(states_out.data<A>() + ((row * chunks + t / kQ) * n + i) * e + s.at, h + i * kBlock, s.count);
          if (s.begins(t)) std::fill(h, h + n * kBlock, A(0));
          load_row(x, s.x + t * s.x_row, s.count);
          load_row(raw, s.dt + t * s.dt_row, s.count);
          load_states(bt, s.b + t * s.b_row, n);
          load_states(ct, s.c + t * s.c_row, n);
          discretise(delta, dx, raw, s.bias, x, s.softplus, s.count);
          for (int64_t j = 0; j < kBlock; ++j) u[j] = s.d[j] * x[j];
          advance(h, u, a, delta, dx, bt, ct, n);
          if (s.z != nullptr) {
            load_row(z, s.z + t * s.z_row, s.count);
            gate(u, z);
          }
          store_row(y_out.data<T>() + (row * l + t) * e + s.at, u, s.count);
        }
        store_block(final_out.data<A>() + (row * e + s.at) * n, h, n, s.count);
      }
    });
  });
}

namespace {

// Scratch of one task of the backward: a chunk's states and decays, and what the positions need again.
template <class A>
struct Work {
  explicit Work(int64_t n)
      : memory(new A[static_cast<size_t>((2 * kQ + 5) * n * kBlock + 4 * kQ * kBlock + 2 * kQ * n)]) {
    h = memory.get() + n * kBlock;  // one state in front: before the chunk
    decay = h + kQ * n * kBlock;
    a = decay + kQ * n * kBlock;
    r = a + n * kBlock;
    da = r + n * kBlock;
    da_chunk = da + n * kBlock;
    delta = da_chunk + n * kBlock;
    dx = delta + kQ * kBlock;
    x = dx + kQ * kBlock;
    g = x + kQ * kBlock;
    b = g + kQ * kBlock;
    c = b + kQ * n;
  }
  std::unique_ptr<A[]> memory;
  A *h, *decay, *a, *r, *da, *da_chunk, *delta, *dx, *x, *g, *b, *c;
  Row<A> dd = {}, dbias = {};
};

// Chunk [t0, t1) forward: states, decays, g, and dz, which needs u.
template <class T, class A>
void replay_chunk(Work<A>& w, T* dz_out, const Channels<T>& s, const T* dy_in, int64_t dy_row, const A* states,
                  int64_t t0, int64_t t1) {
  const int64_t n = s.n, size = n * kBlock;
  for (int64_t i = 0; i < n; ++i) load_row(w.h - size + i * kBlock, states + i * s.e, s.count);
  Row<A> raw, u, z, dy, dz;
  for (int64_t t = t0; t < t1; ++t) {
    const int64_t q = t - t0;
    A *x = w.x + q * kBlock, *delta = w.delta + q * kBlock, *dx = w.dx + q * kBlock, *g = w.g + q * kBlock;
    load_row(x, s.x + t * s.x_row, s.count);
    load_row(raw, s.dt + t * s.dt_row, s.count);
    load_states(w.b + q * n, s.b + t * s.b_row, n);
    load_states(w.c + q * n, s.c + t * s.c_row, n);
    discretise(delta, dx, raw, s.bias, x, s.softplus, s.count);
    for (int64_t j = 0; j < kBlock; ++j) u[j] = s.d[j] * x[j];
    advance_kept(w.h + q * size, w.decay + q * size, u, w.h + (q - 1) * size, w.a, delta, dx, w.b + q * n, w.c + q * n,
                 s.begins(t) ? A(0) : A(1), n);
    load_row(dy, dy_in + t * dy_row, s.count);
    if (s.z == nullptr) {
      std::copy(dy, dy + kBlock, g);
      continue;
    }
    load_row(z, s.z + t * s.z_row, s.count);
    gate_gradient(dz, g, dy, u, z);
    store_row(dz_out + t * s.e, dz, s.count);
  }
}

// Chunk [t0, t1) backward. dbc (l, 2n) is added to.
template <class T, class A>
void reverse_chunk(Work<A>& w, T* dx_out, T* ddt_out, A* dbc, const Channels<T>& s, int64_t t0, int64_t t1) {
  const int64_t n = s.n, size = n * kBlock;
  Row<A> dd = {}, dbias = {};  // sums of a chunk before sums of all: rounding errors stay small
  std::fill(w.da_chunk, w.da_chunk + size, A(0));
  for (int64_t t = t1 - 1; t >= t0; --t) {
    const int64_t q = t - t0;
    const A *x = w.x + q * kBlock, *delta = w.delta + q * kBlock, *g = w.g + q * kBlock;
    Row<A> lb = {}, ddelta = {}, raw, dx;
    retreat(w.r, w.da_chunk, lb, ddelta, dbc + t * 2 * n, dbc + (t * 2 + 1) * n, w.h + q * size, w.h + (q - 1) * size,
            w.decay + q * size, w.a, g, delta, w.dx + q * kBlock, w.b + q * n, w.c + q * n, n);
    load_row(raw, s.dt + t * s.dt_row, s.count);
    input_gradients(dx, raw, ddelta, lb, x, delta, g, s.d, s.bias, s.softplus);
    add_all(dbias, raw, kBlock);
    add_product(dd, g, x);
    store_row(dx_out + t * s.e, dx, s.count);
    store_row(ddt_out + t * s.e, raw, s.count);
  }
  add_all(w.da, w.da_chunk, size);
  add_all(w.dd, dd, kBlock);
  add_all(w.dbias, dbias, kBlock);
}

// to = sum over `parts` slabs of `count`, in order.
template <class A>
void sum_parts(A* to, const A* from, int64_t parts, int64_t count) {
  std::copy(from, from + count, to);
  for (int64_t p = 1; p < parts; ++p) add_all(to, from + p * count, count);
}

// dB and dC from the groups' sums (groups, b l, 2, n).
template <class T, class A>
void split_sums(T* db, T* dc, const A* partial, int64_t groups, int64_t positions, int64_t n) {
  parallel_for(0, positions, std::max<int64_t>(1, 16384 / (groups * n)), [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p)
      for (int64_t i = 0; i < n; ++i) {
        A sum_b = 0, sum_c = 0;
        for (int64_t k = 0; k < groups; ++k) {
          const A* from = partial + (k * positions + p) * 2 * n;
          sum_b += from[i];
          sum_c += from[n + i];
        }
        put(db[p * n + i], sum_b);
        put(dc[p * n + i], sum_c);
      }
  });
}

}  // namespace

void selective_scan_backward(SelectiveScanGrad& grad, const Tensor& dy, const Tensor& dfinal,
                             const SelectiveScanInputs& in, const Tensor& states) {
  const bool done = selective_scan_backward_in_parts(
      grad, in, [&](Tensor& y, Tensor& last, Tensor& none) { selective_scan_forward(y, last, none, in); },
      [&](SelectiveScanGrad& whole) { selective_scan_backward(whole, dy, dfinal, in, states); });
  if (done) return;
  const int64_t b = in.x.size(0), l = in.x.size(1), e = in.x.size(2), n = in.A.size(1);
  const int64_t blocks = blocks_of(e), groups = groups_of(b, e), chunks = (l + kQ - 1) / kQ;
  visit_float(in.x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tensor of_bc = zeros({groups, b, l, 2 * n}, dtype_of<A>, kCpu);
    const Tensor of_a = empty({b, e, n}, dtype_of<A>, kCpu), of_rows = empty({b, 2, e}, dtype_of<A>, kCpu);
    parallel_for(0, b * groups, 1, [&](int64_t first, int64_t last) {
      Work<A> w(n);
      for (int64_t task = first; task < last; ++task) {
        const int64_t row = task / groups, group = task % groups;
        A* dbc = of_bc.data<A>() + (group * b + row) * l * 2 * n;
        for (int64_t block = group * blocks / groups; block < (group + 1) * blocks / groups; ++block) {
          const Channels<T> s(in, row, block);
          const int64_t state_at = (row * e + s.at) * n, row_at = row * l * e + s.at;
          load_block(w.a, in.A.data<A>() + s.at * n, n, s.count);
          if (dfinal.defined())
            load_block(w.r, dfinal.data<A>() + state_at, n, s.count);
          else
            std::fill(w.r, w.r + n * kBlock, A(0));
          std::fill(w.da, w.da + n * kBlock, A(0));
          std::fill(w.dd, w.dd + kBlock, A(0));
          std::fill(w.dbias, w.dbias + kBlock, A(0));
          for (int64_t k = chunks - 1; k >= 0; --k) {
            const int64_t t0 = k * kQ, t1 = std::min(l, t0 + kQ);
            replay_chunk<T, A>(w, s.z == nullptr ? nullptr : grad.dz.data<T>() + row_at, s,
                               dy.data<T>() + row * dy.stride(0) + s.at, dy.stride(1),
                               states.data<A>() + (row * chunks + k) * n * e + s.at, t0, t1);
            reverse_chunk<T, A>(w, grad.dx.data<T>() + row_at, grad.ddt.data<T>() + row_at, dbc, s, t0, t1);
          }
          if (grad.dh0.defined()) store_block(grad.dh0.data<A>() + state_at, w.r, n, s.count);
          store_block(of_a.data<A>() + state_at, w.da, n, s.count);
          store_row(of_rows.data<A>() + row * 2 * e + s.at, w.dd, s.count);
          store_row(of_rows.data<A>() + (row * 2 + 1) * e + s.at, w.dbias, s.count);
        }
      }
    });
    split_sums(grad.dB.data<T>(), grad.dC.data<T>(), of_bc.data<A>(), groups, b * l, n);
    sum_parts(grad.dA.data<A>(), of_a.data<A>(), b, e * n);
    Tensor rows = empty({2, e}, dtype_of<A>, kCpu);
    sum_parts(rows.data<A>(), of_rows.data<A>(), b, 2 * e);
    if (grad.dD.defined()) copy_(grad.dD, rows.select(0, 0));
    if (grad.ddt_bias.defined()) copy_(grad.ddt_bias, rows.select(0, 1));
  });
}

}  // namespace krait::kernels::cpu
