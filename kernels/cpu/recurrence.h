#pragma once
#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_bytes.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/recurrence.h"

// Recurrent layers on the CPU. A thread takes one head of some rows of the batch through the whole sequence: per step
// a small product with the head's weights (packed once, in cache) and the cell over contiguous units. A row's result
// does not depend on which rows share its product, so neither batch nor thread count shows in it.
namespace krait::kernels::cpu {

template <class A>
struct CellMath {
  [[gnu::always_inline]] static A exp(A x) { return vexp(x); }
  [[gnu::always_inline]] static A tanh(A x) { return vtanh(x); }
  [[gnu::always_inline]] static A sigmoid(A x) { return vsigmoid(x); }
  [[gnu::always_inline]] static A softplus(A x) { return vsoftplus(x); }
};

template <class A>
inline constexpr int64_t kLanesOf = kVectorBytes / static_cast<int64_t>(sizeof(A));

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/// R rows by V vectors of out (rows ldo apart) = v (R, k) w (k, V vectors; rows ldw apart).
template <int R, int V, class A>
void product_tile(A* out, int64_t ldo, const A* v, int64_t ldv, const A* w, int64_t ldw, int64_t k) {
  typedef A Vec __attribute__((vector_size(kVectorBytes), aligned(sizeof(A)), may_alias));
  Vec acc[R][V] = {};
  for (int64_t q = 0; q < k; ++q) {
    Vec row[V];
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) row[c] = *reinterpret_cast<const Vec*>(w + q * ldw + c * kLanesOf<A>);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const A s = v[i * ldv + q];
#pragma GCC unroll 4
      for (int c = 0; c < V; ++c) acc[i][c] += s * row[c];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) *reinterpret_cast<Vec*>(out + i * ldo + c * kLanesOf<A>) = acc[i][c];
}

template <int V, class A>
void product_rows(A* out, int64_t ldo, const A* v, int64_t ldv, const A* w, int64_t ldw, int64_t rows, int64_t k) {
  int64_t i = 0;
  if constexpr (V == 1)
    for (; i + 8 <= rows; i += 8) product_tile<8, V>(out + i * ldo, ldo, v + i * ldv, ldv, w, ldw, k);
  for (; i + 4 <= rows; i += 4) product_tile<4, V>(out + i * ldo, ldo, v + i * ldv, ldv, w, ldw, k);
  if (i + 2 <= rows) {
    product_tile<2, V>(out + i * ldo, ldo, v + i * ldv, ldv, w, ldw, k);
    i += 2;
  }
  if (i < rows) product_tile<1, V>(out + i * ldo, ldo, v + i * ldv, ldv, w, ldw, k);
}

/// out (rows, n) = v (rows, k) w (k, n), n whole vectors and the row distance of out and w.
template <class A>
void recurrent_product(A* out, const A* v, int64_t ldv, const A* w, int64_t rows, int64_t k, int64_t n) {
  int64_t c = 0;
  for (; c + 4 * kLanesOf<A> <= n; c += 4 * kLanesOf<A>) product_rows<4>(out + c, n, v, ldv, w + c, n, rows, k);
  for (; c < n; c += kLanesOf<A>) product_rows<1>(out + c, n, v, ldv, w + c, n, rows, k);
}

/// Rows of the batch that one thread takes together: enough pieces for all threads, else as many as share the weights
/// well.
inline int64_t rows_together(int64_t batch, int64_t heads) {
  return std::clamp<int64_t>((batch * heads + num_threads() - 1) / num_threads(), 1, std::min<int64_t>(batch, 16));
}

inline bool starts_document(const int32_t* segments, int64_t t) {
  return segments != nullptr && t > 0 && segments[t] != segments[t - 1];
}

/// One row, one head, one step. Strides: of a gate in x, bias and r; of a state; of a saved value.
template <class Cell, bool kSave, class T, class A>
void forward_row(const Cell& cell, int64_t p, const T* x, int64_t x_gate, const A* bias, const A* r, A* states,
                 int64_t state_stride, A* saved, int64_t saved_stride, T* y, T* y_prev) {
#pragma omp simd
  for (int64_t j = 0; j < p; ++j) {
    A xs[Cell::kGates], rs[Cell::kGates], s[Cell::kStates], keep[Cell::kSaved];
    for (int g = 0; g < Cell::kGates; ++g) {
      xs[g] = static_cast<A>(x[g * x_gate + j]);
      rs[g] = r[g * p + j] + bias[g * x_gate + j];
    }
    for (int k = 0; k < Cell::kStates; ++k) s[k] = states[k * state_stride + j];
    if constexpr (kSave) put(y_prev[j], s[0]);
    cell.template forward<CellMath<A>>(xs, rs, s, keep);
    for (int k = 0; k < Cell::kStates; ++k) states[k * state_stride + j] = s[k];
    if constexpr (kSave)
      for (int k = 0; k < Cell::kSaved; ++k) saved[k * saved_stride + j] = keep[k];
    put(y[j], s[0]);
  }
}

template <class Cell, class T>
void recurrence_forward(RecurrenceForward& f, const Cell& cell) {
  using A = accum_t<T>;
  constexpr int64_t G = Cell::kGates, S = Cell::kStates, K = Cell::kSaved;
  const int64_t b = f.x.size(0), l = f.x.size(1), h = f.x.size(3), p = f.x.size(4), c = h * p;
  const int64_t n = round_up(G * p, kLanesOf<A>);
  // W^T of each head: (p', gates x p), gates side by side.
  const Tensor packed = zeros({h, p, n}, dtype_of<A>, kCpu);
  A* weights = packed.data<A>();
  const T* w = f.w.data<T>();
  parallel_for(0, h, std::max<int64_t>(1, 65536 / (G * p * p)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t row = 0; row < G * p; ++row)
        for (int64_t q = 0; q < p; ++q) weights[(i * p + q) * n + row] = static_cast<A>(w[(i * G * p + row) * p + q]);
  });

  const T* x = f.x.data<T>();
  const A* bias = f.bias.data<A>();
  const A* state0 = f.state0.defined() ? f.state0.data<A>() : nullptr;
  const int32_t* segments = f.segments.defined() ? f.segments.data<int32_t>() : nullptr;
  T* y = f.out.y.data<T>();
  A* state = f.out.state.data<A>();
  A* saved = f.out.saved.defined() ? f.out.saved.data<A>() : nullptr;
  T* y_prev = saved ? f.out.y_prev.data<T>() : nullptr;
  const int64_t together = rows_together(b, h), blocks = (b + together - 1) / together;
  parallel_for(0, h * blocks, 1, [&](int64_t first, int64_t last) {
    const Tensor scratch = empty({together * (n + S * p)}, dtype_of<A>, kCpu);
    A *r = scratch.data<A>(), *states = r + together * n;  // (rows, n); (S, rows, p)
    const int64_t stride = together * p;
    for (int64_t item = first; item < last; ++item) {
      const int64_t head = item % h, b0 = item / h * together, rows = std::min(together, b - b0);
      for (int64_t k = 0; k < S; ++k)
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < p; ++j)
            states[k * stride + i * p + j] = state0 ? state0[((k * b + b0 + i) * h + head) * p + j] : A(0);
      for (int64_t t = 0; t < l; ++t) {
        recurrent_product(r, states, p, weights + head * p * n, rows, p, n);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t at = (b0 + i) * l + t;
          if (starts_document(segments ? segments + (b0 + i) * l : nullptr, t)) {
            std::fill(r + i * n, r + (i + 1) * n, A(0));
            for (int64_t k = 0; k < S; ++k) std::fill_n(states + k * stride + i * p, p, A(0));
          }
          const T* x_row = x + at * G * c + head * p;
          if (saved)
            forward_row<Cell, true>(cell, p, x_row, c, bias + head * p, r + i * n, states + i * p, stride,
                                    saved + at * K * c + head * p, c, y + at * c + head * p, y_prev + at * c + head * p);
          else
            forward_row<Cell, false>(cell, p, x_row, c, bias + head * p, r + i * n, states + i * p, stride,
                                     static_cast<A*>(nullptr), c, y + at * c + head * p, static_cast<T*>(nullptr));
        }
      }
      for (int64_t k = 0; k < S; ++k)
        for (int64_t i = 0; i < rows; ++i)
          std::copy_n(states + k * stride + i * p, p, state + ((k * b + b0 + i) * h + head) * p);
    }
  });
}

/// back (p): what came through the product from t + 1. gates (G p): dr in the type of sums, for the next product.
template <class Cell, class T, class A>
void backward_row(const Cell& cell, int64_t p, const A* saved, int64_t stride, const T* dy, const A* back, A* carry,
                  int64_t carry_stride, T* dx, T* dr, A* gates) {
#pragma omp simd
  for (int64_t j = 0; j < p; ++j) {
    A keep[Cell::kSaved], c[Cell::kStates], gx[Cell::kGates], gr[Cell::kGates];
    for (int k = 0; k < Cell::kSaved; ++k) keep[k] = saved[k * stride + j];
    for (int k = 0; k < Cell::kStates; ++k) c[k] = carry[k * carry_stride + j];
    cell.template backward<CellMath<A>>(keep, (dy ? static_cast<A>(dy[j]) : A(0)) + back[j], c, gx, gr);
    for (int k = 0; k < Cell::kStates; ++k) carry[k * carry_stride + j] = c[k];
    for (int g = 0; g < Cell::kGates; ++g) {
      put(dx[g * stride + j], gx[g]);
      if constexpr (Cell::kSplits) put(dr[g * stride + j], gr[g]);
      gates[g * p + j] = Cell::kSplits ? gr[g] : gx[g];
    }
  }
}

template <class Cell, class T>
void recurrence_backward(RecurrenceBackward& f, const Cell& cell) {
  using A = accum_t<T>;
  constexpr int64_t G = Cell::kGates, S = Cell::kStates, K = Cell::kSaved;
  const int64_t b = f.dx.size(0), l = f.dx.size(1), h = f.dx.size(3), p = f.dx.size(4), c = h * p;
  const int64_t n = round_up(p, kLanesOf<A>);
  const Tensor packed = zeros({h, G * p, n}, dtype_of<A>, kCpu);  // W of each head, rows padded
  A* weights = packed.data<A>();
  const T* w = f.w.data<T>();
  parallel_for(0, h * G * p, std::max<int64_t>(1, 65536 / p), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t q = 0; q < p; ++q) weights[i * n + q] = static_cast<A>(w[i * p + q]);
  });

  const T* dy = f.dy.defined() ? f.dy.data<T>() : nullptr;
  const A* dstate = f.dstate.defined() ? f.dstate.data<A>() : nullptr;
  const A* saved = f.saved.data<A>();
  const int32_t* segments = f.segments.defined() ? f.segments.data<int32_t>() : nullptr;
  T* dx = f.dx.data<T>();
  T* dr = f.dr.defined() ? f.dr.data<T>() : nullptr;
  A* dstate0 = f.dstate0.defined() ? f.dstate0.data<A>() : nullptr;
  const int64_t together = rows_together(b, h), blocks = (b + together - 1) / together;
  parallel_for(0, h * blocks, 1, [&](int64_t first, int64_t last) {
    const Tensor scratch = empty({together * (n + (S + G) * p)}, dtype_of<A>, kCpu);
    // (rows, n); (S, rows, p); (rows, G p)
    A *back = scratch.data<A>(), *carry = back + together * n, *gates = carry + together * S * p;
    const int64_t stride = together * p;
    for (int64_t item = first; item < last; ++item) {
      const int64_t head = item % h, b0 = item / h * together, rows = std::min(together, b - b0);
      for (int64_t k = 0; k < S; ++k)
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < p; ++j)
            carry[k * stride + i * p + j] = dstate ? dstate[((k * b + b0 + i) * h + head) * p + j] : A(0);
      std::fill_n(back, rows * n, A(0));
      for (int64_t t = l - 1; t >= 0; --t) {
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t at = (b0 + i) * l + t, from = at * G * c + head * p;
          backward_row(cell, p, saved + at * K * c + head * p, c, dy ? dy + at * c + head * p : nullptr, back + i * n,
                       carry + i * p, stride, dx + from, Cell::kSplits ? dr + from : nullptr, gates + i * G * p);
        }
        if (t == 0 && !dstate0) break;
        recurrent_product(back, gates, G * p, weights + head * G * p * n, rows, G * p, n);
        for (int64_t i = 0; i < rows; ++i) {
          if (!starts_document(segments ? segments + (b0 + i) * l : nullptr, t)) continue;
          std::fill_n(back + i * n, n, A(0));
          for (int64_t k = 0; k < S; ++k) std::fill_n(carry + k * stride + i * p, p, A(0));
        }
      }
      if (!dstate0) continue;
      for (int64_t k = 0; k < S; ++k)
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < p; ++j)
            dstate0[((k * b + b0 + i) * h + head) * p + j] =
                carry[k * stride + i * p + j] + (k == 0 ? back[i * n + j] : A(0));
    }
  });
}

}  // namespace krait::kernels::cpu
