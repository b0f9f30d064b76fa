#include "kernels/s4_scan.h"

#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/put.h"

namespace krait::kernels::cpu {

namespace {

// (n, 2) as two rows: re[0..n), im[0..n).
template <class A>
void split_complex(A* __restrict to, const A* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = from[2 * i];
    to[n + i] = from[2 * i + 1];
  }
}
template <class A>
void join_complex(A* __restrict to, const A* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[2 * i] = from[i];
    to[2 * i + 1] = from[n + i];
  }
}

bool begins(const int32_t* segments, int64_t t) { return segments && t > 0 && segments[t] != segments[t - 1]; }

/// One channel's matrices as rows of real and imaginary parts.
template <class A>
struct Channel {
  int64_t n, r;
  std::vector<A> a, b, c, m, q, dot;

  Channel(const S4System& s, int64_t h) : n(s.A.size(1)), r(s.M.defined() ? s.M.size(1) : 0) {
    const auto size = static_cast<size_t>(2 * n);
    a.resize(size), b.resize(size), c.resize(size);
    m.resize(size * static_cast<size_t>(r)), q = m, dot.resize(static_cast<size_t>(r));
    split_complex(a.data(), s.A.data<A>() + h * 2 * n, n);
    split_complex(b.data(), s.B.data<A>() + h * 2 * n, n);
    split_complex(c.data(), s.C.data<A>() + h * 2 * n, n);
    for (int64_t k = 0; k < r; ++k) {
      split_complex(m.data() + k * 2 * n, s.M.data<A>() + (h * r + k) * 2 * n, n);
      split_complex(q.data() + k * 2 * n, s.Q.data<A>() + (h * r + k) * 2 * n, n);
    }
  }

  // x = A x - M (2 Re Q x) + B u
  void advance(A* __restrict x, A u) {
    for (int64_t k = 0; k < r; ++k) {
      const A *qr = q.data() + k * 2 * n, *qi = qr + n;
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += qr[i] * x[i] - qi[i] * x[n + i];
      dot[static_cast<size_t>(k)] = 2 * sum;
    }
    const A *ar = a.data(), *ai = ar + n, *br = b.data(), *bi = br + n;
    A* xi = x + n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A re = ar[i] * x[i] - ai[i] * xi[i] + br[i] * u;
      xi[i] = ar[i] * xi[i] + ai[i] * x[i] + bi[i] * u;
      x[i] = re;
    }
    for (int64_t k = 0; k < r; ++k) {
      const A s = dot[static_cast<size_t>(k)];
      const A* mk = m.data() + k * 2 * n;
#pragma omp simd
      for (int64_t i = 0; i < 2 * n; ++i) x[i] -= mk[i] * s;
    }
  }
  // 2 Re C x
  A output(const A* __restrict x) const {
    const A *cr = c.data(), *ci = cr + n;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += cr[i] * x[i] - ci[i] * x[n + i];
    return 2 * sum;
  }
};

constexpr int64_t kTile = 16;   // channels that share the cache lines of u
constexpr int64_t kPiece = 32;  // positions between kept states

}  // namespace

void s4_scan_forward(Tensor& y, Tensor& last, const Tensor& u, const S4System& s, const Tensor& x0,
                     const Tensor& segments) {
  const int64_t b = u.size(0), l = u.size(1), h = u.size(2), n = s.A.size(1), tiles = (h + kTile - 1) / kTile;
  visit_float(u.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const A* d = s.D.defined() ? s.D.data<A>() : nullptr;
    parallel_for(0, b * tiles, 1, [&](int64_t first, int64_t end) {
      for (int64_t item = first; item < end; ++item) {
        const int64_t row = item / tiles, h0 = item % tiles * kTile, h1 = std::min(h, h0 + kTile);
        const int32_t* segment = segments.defined() ? segments.data<int32_t>() + row * l : nullptr;
        std::vector<Channel<A>> channels;
        std::vector<A> states(static_cast<size_t>((h1 - h0) * 2 * n));
        for (int64_t c = h0; c < h1; ++c) {
          channels.emplace_back(s, c);
          split_complex(states.data() + (c - h0) * 2 * n, x0.data<A>() + (row * h + c) * 2 * n, n);
        }
        for (int64_t t = 0; t < l; ++t) {
          if (begins(segment, t)) std::fill(states.begin(), states.end(), A(0));
          const T* ut = u.data<T>() + (row * l + t) * h;
          T* yt = y.data<T>() + (row * l + t) * h;
          for (int64_t c = h0; c < h1; ++c) {
            Channel<A>& channel = channels[static_cast<size_t>(c - h0)];
            A* x = states.data() + (c - h0) * 2 * n;
            channel.advance(x, static_cast<A>(ut[c]));
            put(yt[c], channel.output(x) + (d ? d[c] * static_cast<A>(ut[c]) : A(0)));
          }
        }
        for (int64_t c = h0; c < h1; ++c)
          join_complex(last.data<A>() + (row * h + c) * 2 * n, states.data() + (c - h0) * 2 * n, n);
      }
    });
  });
}

// G_t = 2 conj(C) dy_t + conj(A) G_{t+1} is the gradient of x_t; then
//   dA += conj(x_{t-1}) G_t, dB += u_t G_t, dC += 2 conj(x_t) dy_t, du_t = Re conj(B) G_t + D dy_t.
void s4_scan_backward(S4ScanGrad& grad, const Tensor& dy, const Tensor& dlast, const Tensor& u, const S4System& s,
                      const Tensor& x0, const Tensor& segments) {
  const int64_t b = u.size(0), l = u.size(1), h = u.size(2), n = s.A.size(1), pieces = (l + kPiece - 1) / kPiece;
  visit_float(u.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const A* d = s.D.defined() ? s.D.data<A>() : nullptr;
    parallel_for(0, b * h, 1, [&](int64_t first, int64_t end) {
      const auto size = static_cast<size_t>(2 * n);
      std::vector<A> kept(static_cast<size_t>(pieces) * size), x(static_cast<size_t>(kPiece + 1) * size), zero(size);
      for (int64_t item = first; item < end; ++item) {
        const int64_t row = item / h, c = item % h;
        const int32_t* segment = segments.defined() ? segments.data<int32_t>() + row * l : nullptr;
        const T *ur = u.data<T>() + row * l * h + c, *gr = dy.data<T>() + row * l * h + c;
        T* du = grad.du.data<T>() + row * l * h + c;
        Channel<A> channel(s, c);
        const A *ar = channel.a.data(), *br = channel.b.data(), *cr = channel.c.data();
        // kept[p]: the state before position p kPiece.
        split_complex(x.data(), x0.data<A>() + item * 2 * n, n);
        for (int64_t t = 0; t < l; ++t) {
          if (t % kPiece == 0) std::copy_n(x.data(), 2 * n, kept.data() + t / kPiece * 2 * n);
          if (begins(segment, t)) std::fill_n(x.data(), 2 * n, A(0));
          channel.advance(x.data(), static_cast<A>(ur[t * h]));
        }
        std::vector<A> g(size), da(size), db(size), dc(size);
        A dd = 0;
        split_complex(g.data(), dlast.data<A>() + item * 2 * n, n);
        for (int64_t p = pieces - 1; p >= 0; --p) {
          const int64_t t0 = p * kPiece, t1 = std::min(l, t0 + kPiece);
          std::copy_n(kept.data() + p * 2 * n, 2 * n, x.data());  // x[k + 1]: the state after position t0 + k
          for (int64_t t = t0; t < t1; ++t) {
            A* now = x.data() + (t - t0 + 1) * 2 * n;
            std::copy_n(begins(segment, t) ? zero.data() : now - 2 * n, 2 * n, now);
            channel.advance(now, static_cast<A>(ur[t * h]));
          }
          for (int64_t t = t1 - 1; t >= t0; --t) {
            const A ut = static_cast<A>(ur[t * h]), gy = static_cast<A>(gr[t * h]);
            const A* now = x.data() + (t - t0 + 1) * 2 * n;
            const bool reset = begins(segment, t);
            const A* before = reset ? zero.data() : now - 2 * n;
            A *gre = g.data(), *gim = gre + n, *dar = da.data(), *dbr = db.data(), *dcr = dc.data();
            const A through = reset ? A(0) : A(1);
            A sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < n; ++i) {
              const A re = gre[i] + 2 * cr[i] * gy, im = gim[i] - 2 * cr[n + i] * gy;
              dar[i] += before[i] * re + before[n + i] * im;
              dar[n + i] += before[i] * im - before[n + i] * re;
              dbr[i] += ut * re;
              dbr[n + i] += ut * im;
              dcr[i] += 2 * now[i] * gy;
              dcr[n + i] -= 2 * now[n + i] * gy;
              sum += br[i] * re + br[n + i] * im;
              gre[i] = through * (ar[i] * re + ar[n + i] * im);
              gim[i] = through * (ar[i] * im - ar[n + i] * re);
            }
            dd += gy * ut;
            put(du[t * h], sum + (d ? d[c] * gy : A(0)));
          }
        }
        join_complex(grad.dA.data<A>() + item * 2 * n, da.data(), n);
        join_complex(grad.dB.data<A>() + item * 2 * n, db.data(), n);
        join_complex(grad.dC.data<A>() + item * 2 * n, dc.data(), n);
        join_complex(grad.dx0.data<A>() + item * 2 * n, g.data(), n);
        if (d) grad.dD.data<A>()[item] = dd;
      }
    });
  });
}

void dense_scan_forward(Tensor& y, Tensor& last, const Tensor& u, const S4System& s, const Tensor& x0,
                        const Tensor& segments) {
  const int64_t b = u.size(0), l = u.size(1), h = u.size(2), n = s.A.size(1);
  visit_float(u.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const A* d = s.D.defined() ? s.D.data<A>() : nullptr;
    parallel_for(0, b * h, 1, [&](int64_t first, int64_t end) {
      std::vector<A> x(static_cast<size_t>(n)), next(static_cast<size_t>(n));
      for (int64_t item = first; item < end; ++item) {
        const int64_t row = item / h, c = item % h;
        const int32_t* segment = segments.defined() ? segments.data<int32_t>() + row * l : nullptr;
        const A *columns = s.A.data<A>() + c * n * n, *bc = s.B.data<A>() + c * n, *cc = s.C.data<A>() + c * n;
        std::copy_n(x0.data<A>() + item * n, n, x.data());
        for (int64_t t = 0; t < l; ++t) {
          if (begins(segment, t)) std::fill(x.begin(), x.end(), A(0));
          const A ut = static_cast<A>(u.data<T>()[(row * l + t) * h + c]);
          A* to = next.data();
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) to[i] = bc[i] * ut;
          for (int64_t k = 0; k < n; ++k) {
            const A xk = x[static_cast<size_t>(k)];
            const A* column = columns + k * n;
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) to[i] += column[i] * xk;
          }
          A sum = d ? d[c] * ut : A(0);
#pragma omp simd reduction(+ : sum)
          for (int64_t i = 0; i < n; ++i) sum += cc[i] * to[i];
          put(y.data<T>()[(row * l + t) * h + c], sum);
          std::swap(x, next);
        }
        std::copy_n(x.data(), n, last.data<A>() + item * n);
      }
    });
  });
}

}  // namespace krait::kernels::cpu
