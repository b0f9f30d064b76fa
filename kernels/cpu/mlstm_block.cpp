#include "kernels/mlstm_block.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "kernels/accumulate.h"
#include "kernels/causal_conv1d.h"
#include "kernels/cpu/chunk_sums.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_math.h"

namespace krait::kernels::cpu {

namespace {

constexpr int64_t kChunk = 256;  // rows whose part of a weight's gradient is made in one go

template <class A> struct QuadOf { typedef A type __attribute__((vector_size(4 * sizeof(A)))); };
template <class A> using Quad = typename QuadOf<A>::type;

// By reference: four doubles are more than a vector register of SSE, and have no agreed way to be passed by value.
template <class A, class T>
[[gnu::always_inline]] inline void load_quad(Quad<A>& v, const T* p) {
  v = Quad<A>{static_cast<A>(p[0]), static_cast<A>(p[1]), static_cast<A>(p[2]), static_cast<A>(p[3])};
}
template <class A, class T>
[[gnu::always_inline]] inline void store_quad(T* p, const Quad<A>& v) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<T>(v[i]);
}

// The blocks (4 outputs, 4 inputs) of a map, widened, and transposed.
template <class A>
struct Blocks {
  std::vector<A> rows, columns;
  explicit Blocks(const Tensor& w) {
    visit_float(w.dtype(), [&]<class T>() {
      const T* from = w.data<T>();
      rows.assign(from, from + w.numel());
    });
    columns.resize(rows.size());
    for (size_t n = 0; n < rows.size(); n += 16)
      for (size_t o = 0; o < 4; ++o)
        for (size_t i = 0; i < 4; ++i) columns[n + i * 4 + o] = rows[n + o * 4 + i];
  }
};

template <class T, class A>
void map_row(T* __restrict y, const T* __restrict x, const Blocks<A>& blocks, int64_t e) {
  const A* w = blocks.columns.data();
  for (int64_t n = 0; n < e; n += 4) {
    Quad<A> sum{}, column;
    for (int64_t i = 0; i < 4; ++i) {
      load_quad<A>(column, w + n * 4 + i * 4);
      sum += column * static_cast<A>(x[n + i]);
    }
    store_quad<A>(y + n, sum);
  }
}

// dx += W^T t and dw += t x^T.
template <class T, class A>
void map_row_backward(A* __restrict dx, A* __restrict dw, const A* __restrict t, const T* __restrict x,
                      const Blocks<A>& blocks, int64_t e) {
  const A* w = blocks.rows.data();
  for (int64_t n = 0; n < e; n += 4) {
    Quad<A> inputs, sum, row, gradient;
    load_quad<A>(inputs, x + n);
    load_quad<A>(sum, dx + n);
    for (int64_t o = 0; o < 4; ++o) {
      const int64_t at = (n + o) * 4;
      load_quad<A>(row, w + at);
      load_quad<A>(gradient, dw + at);
      sum += row * t[n + o];
      gradient += inputs * t[n + o];
      store_quad<A>(dw + at, gradient);
    }
    store_quad<A>(dx + n, sum);
  }
}

template <class T, class A>
void widen(A* __restrict to, const T* __restrict from, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i]);
}

}  // namespace

void mlstm_join(Tensor& out, const Tensor& a, const Tensor& b, const Tensor& z) {
  const int64_t e = out.size(1) / 2;
  visit_float(out.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    parallel_for(0, out.size(0), 1 + 8192 / e, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        T* to = out.data<T>() + r * 2 * e;
        const T *x = a.data<T>() + r * e, *y = b.data<T>() + r * e;
#pragma omp simd
        for (int64_t c = 0; c < e; ++c) to[c] = static_cast<T>(static_cast<A>(x[c]) + static_cast<A>(y[c]));
        std::copy_n(z.data<T>() + r * e, e, to + e);
      }
    });
  });
}

void mlstm_maps_forward(MlstmMaps& out, const Tensor& x_c, const Tensor& x_m, const MlstmMapsWeights& w) {
  const int64_t e = x_c.size(1), gates = w.g.size(0);
  visit_float(x_c.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Blocks<A> of_q(w.w_q), of_k(w.w_k), of_v(w.w_v);
    T *q = out.q.data<T>(), *k = out.k.data<T>(), *v = out.v.data<T>();
    A* sums = out.gates.data<A>();
    const T *x = x_c.data<T>(), *x_v = x_m.data<T>(), *gate = w.g.data<T>();
    const int64_t x_row = x_c.stride(0), x_v_row = x_m.stride(0);
    parallel_for(0, x_c.size(0), 1 + 4096 / e, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        T* to[3] = {q + r * e, k + r * e, v + r * e};
        map_row(to[0], x + r * x_row, of_q, e);
        map_row(to[1], x + r * x_row, of_k, e);
        map_row(to[2], x_v + r * x_v_row, of_v, e);
        for (int64_t g = 0; g < gates; ++g) {
          A sum = A(0);
          for (int64_t part = 0; part < 3; ++part) {
            const T* weight = gate + (g * 3 + part) * e;
            const T* y = to[part];
            A own = A(0);
#pragma omp simd reduction(+ : own)
            for (int64_t c = 0; c < e; ++c) own += static_cast<A>(weight[c]) * static_cast<A>(y[c]);
            sum += own;
          }
          sums[r * gates + g] = sum;
        }
      }
    });
  });
}

void mlstm_conv_maps_forward(MlstmMaps& out, Tensor& x_c, const Tensor& x_m, int64_t l, const Tensor& conv_weight,
                             const Tensor& conv_bias, const MlstmMapsWeights& w) {
  const int64_t e = x_m.size(1);
  const Shape sequences{x_m.size(0) / l, l, e};
  const DType a = accum_dtype(x_m.dtype());
  Tensor y = x_c.view(sequences), last = empty(sequences.with(1, conv_weight.size(1) - 1), x_m.dtype(), kCpu);
  causal_conv1d_forward(y, last, {x_m.reshape(sequences), conv_weight.to(a), conv_bias.defined() ? conv_bias.to(a) : Tensor(), {}, {}, true});
  mlstm_maps_forward(out, x_c, x_m, w);
}

void mlstm_maps_backward(Tensor& dx_c, Tensor& dx_m, MlstmMapsWeights& dw, MlstmMapsAdds adds,
                         const MlstmMapsUpstream& up, const Tensor& x_c, const Tensor& x_m, const MlstmMapsWeights& w,
                         const std::function<void()>& between) {
  const int64_t rows = x_c.size(0), e = x_c.size(1), gates = w.g.size(0), chunks = (rows + kChunk - 1) / kChunk;
  const int64_t size = 12 * e + gates * 3 * e;  // dWq, dWk, dWv, dG of a chunk
  visit_float(x_c.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tensor partial = zeros({chunks, size}, dtype_of<A>, kCpu);
    const Blocks<A> blocks[3] = {Blocks<A>(w.w_q), Blocks<A>(w.w_k), Blocks<A>(w.w_v)};
    const T* upstream[3] = {up.dq.data<T>(), up.dk.data<T>(), up.dv.data<T>()};
    const T *inputs[2] = {x_c.data<T>(), x_m.data<T>()}, *gate = w.g.data<T>();
    const T* more = up.dx_more.defined() ? up.dx_more.data<T>() : nullptr;
    const int64_t input_row[2] = {x_c.stride(0), x_m.stride(0)};
    const A* dgates = up.dgates.data<A>();
    A* partial_all = partial.data<A>();
    const Tensor own = between ? empty(dx_m.shape(), dx_m.dtype(), kCpu) : dx_m;
    T* results[2] = {dx_c.data<T>(), own.data<T>()};
    const int64_t result_row[2] = {dx_c.stride(0), own.stride(0)};
    parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      std::vector<A> t(static_cast<size_t>(e)), dx(static_cast<size_t>(2 * e));
      std::vector<T> y(static_cast<size_t>(e));
      for (int64_t r = first * kChunk; r < std::min(rows, last * kChunk); ++r) {
        A* sums = partial_all + r / kChunk * size;
        const A* d = dgates + r * gates;
        std::fill(dx.begin(), dx.end(), A(0));
        if (more != nullptr) widen(dx.data(), more + r * e, e);
        for (int64_t part = 0; part < 3; ++part) {
          const T* x = inputs[part / 2] + r * input_row[part / 2];
          map_row(y.data(), x, blocks[part], e);
          widen(t.data(), upstream[part] + r * e, e);
          for (int64_t g = 0; g < gates; ++g) {
            const T* by = gate + (g * 3 + part) * e;
            A* dg = sums + 12 * e + (g * 3 + part) * e;
            A* to = t.data();
            const T* from = y.data();
            const A dgate = d[g];
#pragma omp simd
            for (int64_t c = 0; c < e; ++c) {
              to[c] += dgate * static_cast<A>(by[c]);
              dg[c] += dgate * static_cast<A>(from[c]);
            }
          }
          map_row_backward(dx.data() + part / 2 * e, sums + part * 4 * e, t.data(), x, blocks[part], e);
        }
        for (int64_t half = 0; half < 2; ++half) {
          T* to = results[half] + r * result_row[half];
          const A* from = dx.data() + half * e;
#pragma omp simd
          for (int64_t c = 0; c < e; ++c) put(to[c], from[c]);
        }
      }
    });
    if (between) {
      between();
      kernels::accumulate(dx_m, own);
    }
    const A* sums = partial.data<A>();
    add_in_order(dw.w_q, adds.q, sums, chunks, size);
    add_in_order(dw.w_k, adds.k, sums + 4 * e, chunks, size);
    add_in_order(dw.w_v, adds.v, sums + 8 * e, chunks, size);
    add_in_order(dw.g, adds.g, sums + 12 * e, chunks, size);
  });
}

void mlstm_output_forward(MlstmOutput& out, const Tensor& h, const Tensor& w, const Tensor& skip, const Tensor& x_c,
                          const Tensor& z, double eps) {
  const int64_t p = h.size(-1), heads = h.size(-2), e = heads * p;
  visit_float(x_c.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    parallel_for(0, x_c.size(0) * heads, 1 + 4096 / p, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t r = i / heads, c0 = i % heads * p;
        const A* v = h.data<A>() + i * p;
        A mean = A(0), square = A(0);
#pragma omp simd reduction(+ : mean)
        for (int64_t j = 0; j < p; ++j) mean += v[j];
        mean /= static_cast<A>(p);
#pragma omp simd reduction(+ : square)
        for (int64_t j = 0; j < p; ++j) square += (v[j] - mean) * (v[j] - mean);
        const A rstd = A(1) / std::sqrt(square / static_cast<A>(p) + static_cast<A>(eps));
        out.mean.data<A>()[i] = mean;
        out.rstd.data<A>()[i] = rstd;
        const A* weight = w.data<A>() + c0;
        const T *by = skip.data<T>() + c0, *x = x_c.data<T>() + r * e + c0, *gate = z.data<T>() + r * z.stride(0) + c0;
        T* y = out.y.data<T>() + r * e + c0;
#pragma omp simd
        for (int64_t j = 0; j < p; ++j) {
          const A u = (v[j] - mean) * rstd * weight[j] + static_cast<A>(by[j]) * static_cast<A>(x[j]);
          y[j] = static_cast<T>(u * vsilu(static_cast<A>(gate[j])));
        }
      }
    });
  });
}

void mlstm_output_backward(MlstmOutputGrad& grad, bool add_dw, bool add_dskip, const Tensor& dy, const Tensor& h,
                           const Tensor& w, const Tensor& skip, const Tensor& x_c, const Tensor& z, const Tensor& mean,
                           const Tensor& rstd, double) {
  const int64_t p = h.size(-1), heads = h.size(-2), e = heads * p, rows = x_c.size(0), chunks = (rows + kChunk - 1) / kChunk;
  visit_float(x_c.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tensor partial = zeros({chunks, 2 * e}, dtype_of<A>, kCpu);
    parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      std::vector<A> buffer(static_cast<size_t>(p));
      A* g = buffer.data();
      for (int64_t i = first * kChunk * heads; i < std::min(rows, last * kChunk) * heads; ++i) {
        const int64_t r = i / heads, c0 = i % heads * p, at = r * e + c0;
        A *dw = partial.data<A>() + r / kChunk * 2 * e + c0, *dskip = dw + e;
        const A mu = mean.data<A>()[i], scale = rstd.data<A>()[i];
        const A *v = h.data<A>() + i * p, *weight = w.data<A>() + c0;
        const T *by = skip.data<T>() + c0, *x = x_c.data<T>() + at, *gate = z.data<T>() + r * z.stride(0) + c0;
        const T* up = dy.data<T>() + at;
        T *dz = grad.dz.data<T>() + r * grad.dz.stride(0) + c0, *dx = grad.dx_c.data<T>() + at;
#pragma omp simd
        for (int64_t j = 0; j < p; ++j) {
          const A xhat = (v[j] - mu) * scale, xv = static_cast<A>(x[j]), zv = static_cast<A>(gate[j]);
          const A d = static_cast<A>(up[j]), b = static_cast<A>(by[j]);
          const auto [value, slope] = vsilu_and_slope(zv);
          const A u = xhat * weight[j] + b * xv, du = d * value;
          dz[j] = static_cast<T>(d * u * slope);
          dx[j] = static_cast<T>(du * b);
          dskip[j] += du * xv;
          dw[j] += du * xhat;
          g[j] = du * weight[j];
        }
        A sum = A(0), sum_x = A(0);  // of the rounded g, so that g - mean_g is 0 for a single channel
#pragma omp simd reduction(+ : sum, sum_x)
        for (int64_t j = 0; j < p; ++j) {
          sum += g[j];
          sum_x += g[j] * (v[j] - mu) * scale;
        }
        const A mean_g = sum / static_cast<A>(p), mean_gx = sum_x / static_cast<A>(p);
        A* dh = grad.dh.data<A>() + i * p;
#pragma omp simd
        for (int64_t j = 0; j < p; ++j) dh[j] = scale * (g[j] - mean_g - (v[j] - mu) * scale * mean_gx);
      }
    });
    add_in_order(grad.dw, add_dw, partial.data<A>(), chunks, 2 * e);
    add_in_order(grad.dskip, add_dskip, partial.data<A>() + e, chunks, 2 * e);
  });
}

}  // namespace krait::kernels::cpu
