#pragma once
// The elementwise part of each recurrent layer, one unit at a time, for both backends. `M` holds the elementary
// functions of the backend. Arguments: x the input's part of a gate, r the recurrent part (bias included), s the
// states (y first), saved what the backward needs. backward: dy the whole gradient of y_t except carry[0], which is
// what comes back past the recurrent product; carry holds those of the other states and becomes those of t-1; dx and
// dr are the gradients of x and r (equal unless kSplits).
#include "core/dtype.h"
#include "kernels/recurrent.h"

#ifdef __CUDACC__
#define KRAIT_CELL __device__ __forceinline__
#else
#define KRAIT_CELL [[gnu::always_inline]] inline
#endif

namespace krait {
namespace kernels {

/// sLSTM (Beck et al. 2024, eqs. 8-17), gates i, f, z, o, states y, c, n, m. With a = x + r per gate:
///   lf = log sigmoid(a_f), or a_f        m' = max(lf + m, a_i), a_i where n = 0 (no past)
///   i = e^(a_i - m')     f = e^(lf + m - m'), 0 where n = 0     z = tanh(a_z)     o = sigmoid(a_o)
///   c' = f c + i z       n' = f n + i        y = o c' / n'
/// y does not depend on m, which therefore is a constant in the backward.
template <bool kExpForget>
struct SlstmCell {
  static constexpr int kGates = 4, kStates = 4, kSaved = 7;
  static constexpr bool kSplits = false;

  template <class M, class A>
  KRAIT_CELL void forward(const A (&x)[4], const A (&r)[4], A (&s)[4], A (&saved)[7]) const {
    const A ai = x[0] + r[0], af = x[1] + r[1];
    A lf = af, slope = A(1);  // slope = d lf / d a_f
    if constexpr (!kExpForget) {
      lf = -M::softplus(-af);
      slope = M::sigmoid(-af);
    }
    const A past = s[2] == A(0) ? A(-1e30) : lf + s[3];  // e^past is 0 where there is none
    const A m = past > ai ? past : ai;
    const A i = M::exp(ai - m), f = M::exp(past - m);
    const A z = M::tanh(x[2] + r[2]), o = M::sigmoid(x[3] + r[3]);
    saved[0] = i;
    saved[1] = f;
    saved[2] = z;
    saved[3] = o;
    saved[4] = slope;
    saved[5] = s[1];
    saved[6] = s[2];
    s[1] = f * s[1] + i * z;
    s[2] = f * s[2] + i;
    s[0] = o * s[1] / s[2];
    s[3] = m;
  }

  template <class M, class A>
  KRAIT_CELL void backward(const A (&saved)[7], A dy, A (&carry)[4], A (&dx)[4], A (&)[4]) const {
    const A i = saved[0], f = saved[1], z = saved[2], o = saved[3], c0 = saved[5], n0 = saved[6];
    const A n = f * n0 + i, y = o * (f * c0 + i * z) / n;
    const A q = (dy + carry[0]) / n, dc = carry[1] + q * o, dn = carry[2] - q * y;
    dx[0] = i * (z * dc + dn);
    dx[1] = f * (dc * c0 + dn * n0) * saved[4];
    dx[2] = dc * i * (A(1) - z * z);
    dx[3] = (dy + carry[0]) * y * (A(1) - o);
    carry[0] = A(0);
    carry[1] = f * dc;
    carry[2] = f * dn;
    carry[3] = A(0);
  }
};

/// Elman's network: h = tanh(x + r).
struct RnnCell {
  static constexpr int kGates = 1, kStates = 1, kSaved = 1;
  static constexpr bool kSplits = false;

  template <class M, class A>
  KRAIT_CELL void forward(const A (&x)[1], const A (&r)[1], A (&s)[1], A (&saved)[1]) const {
    s[0] = saved[0] = M::tanh(x[0] + r[0]);
  }
  template <class M, class A>
  KRAIT_CELL void backward(const A (&saved)[1], A dy, A (&carry)[1], A (&dx)[1], A (&)[1]) const {
    dx[0] = (dy + carry[0]) * (A(1) - saved[0] * saved[0]);
    carry[0] = A(0);
  }
};

/// LSTM (Hochreiter & Schmidhuber 1997; Gers et al. 2000), gates i, f, g, o, states h, c:
///   c' = sigmoid(f) c + sigmoid(i) tanh(g)        h = sigmoid(o) tanh(c')
struct LstmCell {
  static constexpr int kGates = 4, kStates = 2, kSaved = 5;
  static constexpr bool kSplits = false;

  template <class M, class A>
  KRAIT_CELL void forward(const A (&x)[4], const A (&r)[4], A (&s)[2], A (&saved)[5]) const {
    saved[0] = M::sigmoid(x[0] + r[0]);
    saved[1] = M::sigmoid(x[1] + r[1]);
    saved[2] = M::tanh(x[2] + r[2]);
    saved[3] = M::sigmoid(x[3] + r[3]);
    saved[4] = s[1];
    s[1] = saved[1] * s[1] + saved[0] * saved[2];
    s[0] = saved[3] * M::tanh(s[1]);
  }
  template <class M, class A>
  KRAIT_CELL void backward(const A (&saved)[5], A dy, A (&carry)[2], A (&dx)[4], A (&)[4]) const {
    const A i = saved[0], f = saved[1], g = saved[2], o = saved[3], c0 = saved[4];
    const A dh = dy + carry[0], tc = M::tanh(f * c0 + i * g);
    const A dc = carry[1] + dh * o * (A(1) - tc * tc);
    dx[0] = dc * g * i * (A(1) - i);
    dx[1] = dc * c0 * f * (A(1) - f);
    dx[2] = dc * i * (A(1) - g * g);
    dx[3] = dh * tc * o * (A(1) - o);
    carry[0] = A(0);
    carry[1] = dc * f;
  }
};

/// GRU (Cho et al. 2014), reset after the product, gates r, z, n, state h:
///   n = tanh(x_n + sigmoid(r) r_n)        h = (1 - sigmoid(z)) n + sigmoid(z) h
struct GruCell {
  static constexpr int kGates = 3, kStates = 1, kSaved = 5;
  static constexpr bool kSplits = true;

  template <class M, class A>
  KRAIT_CELL void forward(const A (&x)[3], const A (&r)[3], A (&s)[1], A (&saved)[5]) const {
    saved[0] = M::sigmoid(x[0] + r[0]);
    saved[1] = M::sigmoid(x[1] + r[1]);
    saved[2] = M::tanh(x[2] + saved[0] * r[2]);
    saved[3] = r[2];
    saved[4] = s[0];
    s[0] = (A(1) - saved[1]) * saved[2] + saved[1] * s[0];
  }
  template <class M, class A>
  KRAIT_CELL void backward(const A (&saved)[5], A dy, A (&carry)[1], A (&dx)[3], A (&dr)[3]) const {
    const A reset = saved[0], z = saved[1], n = saved[2], dh = dy + carry[0];
    const A dn = dh * (A(1) - z) * (A(1) - n * n);
    dx[0] = dr[0] = dn * saved[3] * reset * (A(1) - reset);
    dx[1] = dr[1] = dh * (saved[4] - n) * z * (A(1) - z);
    dx[2] = dn;
    dr[2] = dn * reset;
    carry[0] = dh * z;
  }
};

/// Calls f.operator()<Cell>() with the type that the name stands for.
template <class F>
auto visit_cell(RecurrentCell cell, F&& f) {
  switch (cell) {
    case RecurrentCell::rnn: return f.template operator()<RnnCell>();
    case RecurrentCell::lstm: return f.template operator()<LstmCell>();
    case RecurrentCell::gru: return f.template operator()<GruCell>();
  }
  throw_error("invalid recurrent cell");
}

}  // namespace kernels
}  // namespace krait
