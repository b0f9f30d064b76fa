#include "kernels/causal_conv1d.h"

#include <algorithm>
#include <memory>

#include "core/parallel.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_math.h"

// Rows of up to kBlock channels are the unit of work, so that a tile of rows stays in the first cache; taps come in
// fours, the last ones padded with a row of zeros.
namespace krait::kernels::cpu {

namespace {

constexpr int64_t kBlock = 256, kRows = 32, kGrain = 16384;

template <class A, class B>
void add_taps(A* __restrict p, const B* __restrict s0, const B* __restrict s1, const B* __restrict s2,
              const B* __restrict s3, const A* __restrict w0, const A* __restrict w1, const A* __restrict w2,
              const A* __restrict w3, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    p[i] += (w0[i] * static_cast<A>(s0[i]) + w1[i] * static_cast<A>(s1[i])) +
            (w2[i] * static_cast<A>(s2[i]) + w3[i] * static_cast<A>(s3[i]));
}

template <class A, class B>
void add_row(A* __restrict p, const B* __restrict s, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) p[i] += static_cast<A>(s[i]);
}

template <class A, class B>
void add_product(A* __restrict p, const A* __restrict g, const B* __restrict s, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) p[i] += g[i] * static_cast<A>(s[i]);
}

template <class T, class A>
void put_row(T* __restrict to, const A* __restrict p, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) put(to[i], p[i]);
}

template <class T, class A>
void put_silu(T* __restrict to, const A* __restrict p, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) put(to[i], vsilu(p[i]));
}

// g = dy silu'(p), into p.
template <class T, class A>
void silu_gradient(A* __restrict p, const T* __restrict dy, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A x = p[i] < A(-110) ? A(-110) : p[i];
    const A s = vsigmoid(x);
    p[i] = static_cast<A>(dy[i]) * s * (A(1) + x * (A(1) - s));
  }
}

// Where the rows of one batch row are, and which of them a position sees.
template <class T>
struct Sequence {
  const T *x, *initial;     // initial may be null
  const int32_t* segments;  // may be null
  int64_t l, c, k, stride;

  bool together(int64_t s, int64_t t) const {
    return segments == nullptr || segments[std::max<int64_t>(s, 0)] == segments[t];
  }
  // Input s as position t sees it: null where that counts as 0.
  const T* input(int64_t s, int64_t t) const {
    if (!together(s, t)) return nullptr;
    if (s >= 0) return x + s * stride;
    return initial == nullptr ? nullptr : initial + (s + k - 1) * c;
  }
};

// Weights as (taps, c), taps rounded up to four with zeros.
template <class A>
struct Taps {
  Taps(const Tensor& weight) : k(weight.size(1)), c(weight.size(0)), padded((k + 3) / 4 * 4) {
    rows = zeros({padded, c}, dtype_of<A>, kCpu);
    const A* w = weight.data<A>();
    A* to = rows.data<A>();
    for (int64_t i = 0; i < c; ++i)
      for (int64_t j = 0; j < k; ++j) to[j * c + i] = w[i * k + j];
  }
  // p += sum_j w[j] source(j) over n channels from `at`.
  template <class B, class F>
  void add(A* p, const B* zero, int64_t at, int64_t n, F source) const {
    const A* w = rows.data<A>() + at;
    for (int64_t j = 0; j < padded; j += 4) {
      const B* s[4];
      for (int64_t i = 0; i < 4; ++i) {
        s[i] = j + i < k ? source(j + i) : nullptr;
        if (s[i] == nullptr) s[i] = zero;
      }
      add_taps(p, s[0], s[1], s[2], s[3], w + j * c, w + (j + 1) * c, w + (j + 2) * c, w + (j + 3) * c, n);
    }
  }
  int64_t k, c, padded;
  Tensor rows;
};

template <class T>
Sequence<T> sequence_of(const CausalConv1dInputs& in, int64_t row) {
  const int64_t l = in.x.size(1), c = in.x.size(2), k = in.weight.size(1);
  return {in.x.data<T>() + row * in.x.stride(0),
          in.initial.defined() && k > 1 ? in.initial.data<T>() + row * (k - 1) * c : nullptr,
          in.segments.defined() ? in.segments.data<int32_t>() + row * l : nullptr,
          l, c, k, in.x.stride(1)};
}

// p of position t, channels [at, at + n).
template <class T, class A>
void filter_row(A* p, const Sequence<T>& in, const Taps<A>& taps, const A* bias, const T* zero, int64_t t, int64_t at,
                int64_t n) {
  if (bias != nullptr)
    std::copy(bias + at, bias + at + n, p);
  else
    std::fill(p, p + n, A(0));
  taps.add(p, zero, at, n, [&](int64_t j) -> const T* {
    const T* row = in.input(t - in.k + 1 + j, t);
    return row == nullptr ? nullptr : row + at;
  });
}

}  // namespace

void causal_conv1d_forward(Tensor& y_out, Tensor& final_out, const CausalConv1dInputs& in) {
  const int64_t b = in.x.size(0), l = in.x.size(1), c = in.x.size(2), k = in.weight.size(1);
  const int64_t blocks = (c + kBlock - 1) / kBlock;
  visit_float(in.x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Taps<A> taps(in.weight);
    const A* bias = in.bias.defined() ? in.bias.data<A>() : nullptr;
    T *y_all = y_out.data<T>(), *final_all = final_out.numel() > 0 ? final_out.data<T>() : nullptr;
    const T zero[kBlock] = {};
    parallel_for(0, b * l, std::max<int64_t>(1, kGrain / (c * taps.padded)), [&](int64_t first, int64_t last) {
      A p[kBlock];
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = block * kBlock, n = std::min(kBlock, c - at);
        for (int64_t i = first; i < last; ++i) {
          filter_row(p, sequence_of<T>(in, i / l), taps, bias, zero, i % l, at, n);
          if (in.silu)
            put_silu(y_all + i * c + at, p, n);
          else
            put_row(y_all + i * c + at, p, n);
        }
      }
    });
    for (int64_t row = 0; row < b; ++row) {
      const Sequence<T> s = sequence_of<T>(in, row);
      for (int64_t i = 0; i < k - 1; ++i) {
        T* to = final_all + (row * (k - 1) + i) * c;
        const T* from = s.input(l - k + 1 + i, l - 1);
        if (from == nullptr)
          std::fill(to, to + c, T(0));
        else
          std::copy(from, from + c, to);
      }
    }
  });
}

void causal_conv1d_backward(Tensor& dx_out, Tensor& dinitial_out, Tensor& dweight_out, bool add_dweight,
                            Tensor& dbias_out, bool add_dbias, const Tensor& dy_in, const Tensor& dfinal_in,
                            const CausalConv1dInputs& in) {
  const int64_t b = in.x.size(0), l = in.x.size(1), c = in.x.size(2), k = in.weight.size(1);
  const int64_t blocks = (c + kBlock - 1) / kBlock, rows = std::max(kRows, 4 * k);
  // Chunks follow from the shape alone, so that dweight and dbias do not depend on the number of threads.
  const int64_t chunk = std::max(rows, (b * l + 63) / 64), chunks = (l + chunk - 1) / chunk;
  visit_float(in.x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Taps<A> taps(in.weight);
    const A* bias = in.bias.defined() ? in.bias.data<A>() : nullptr;
    const Tensor partial = zeros({b * chunks, k + 1, c}, dtype_of<A>, kCpu);  // k rows of dweight, one of dbias
    A* partial_all = partial.data<A>();
    const T zero[kBlock] = {};
    const A no_gradient[kBlock] = {};
    const int64_t work = std::min(chunk, l) * std::min(kBlock, c) * taps.padded;
    parallel_for(0, b * chunks * blocks, std::max<int64_t>(1, kGrain / work), [&](int64_t first, int64_t last) {
      const std::unique_ptr<A[]> scratch(new A[static_cast<size_t>((rows + k) * kBlock)]);
      A *g = scratch.get(), *d = g + (rows + k - 1) * kBlock;  // g of a tile and of the k - 1 positions after it
      for (int64_t item = first; item < last; ++item) {
        const int64_t row = item / (chunks * blocks), piece = item / blocks % chunks, at = item % blocks * kBlock;
        const int64_t n = std::min(kBlock, c - at), end = std::min(l, (piece + 1) * chunk);
        const Sequence<T> s = sequence_of<T>(in, row);
        const T* dy = dy_in.data<T>() + row * dy_in.stride(0) + at;
        const T* dfinal = dfinal_in.defined() && k > 1 ? dfinal_in.data<T>() + row * (k - 1) * c + at : nullptr;
        A* sums = partial_all + (row * chunks + piece) * (k + 1) * c + at;
        for (int64_t t0 = piece * chunk; t0 < end; t0 += rows) {
          const int64_t t1 = std::min(end, t0 + rows), seen = std::min(l, t1 + k - 1);
          for (int64_t t = t0; t < seen; ++t) {
            A* gt = g + (t - t0) * kBlock;
            if (in.silu) {
              filter_row(gt, s, taps, bias, zero, t, at, n);
              silu_gradient(gt, dy + t * dy_in.stride(1), n);
            } else {
              std::fill(gt, gt + n, A(0));
              add_row(gt, dy + t * dy_in.stride(1), n);
            }
            if (t >= t1) continue;
            for (int64_t j = 0; j < k; ++j)
              if (const T* x = s.input(t - k + 1 + j, t)) add_product(sums + j * c, gt, x + at, n);
            add_row(sums + k * c, gt, n);
          }
          const bool with_initial = t0 == 0 && s.initial != nullptr;
          for (int64_t i = with_initial ? 1 - k : t0; i < t1; ++i) {
            std::fill(d, d + n, A(0));
            taps.add(d, no_gradient, at, n, [&](int64_t j) -> const A* {
              const int64_t t = i + k - 1 - j;
              return t >= t0 && t < seen && s.together(i, t) ? g + (t - t0) * kBlock : nullptr;
            });
            const int64_t kept = i - (l - k + 1);  // its place in the final state
            if (dfinal != nullptr && kept >= 0 && s.together(i, l - 1)) add_row(d, dfinal + kept * c, n);
            if (i >= 0)
              put_row(dx_out.data<T>() + row * dx_out.stride(0) + i * dx_out.stride(1) + at, d, n);
            else
              put_row(dinitial_out.data<T>() + (row * (k - 1) + i + k - 1) * c + at, d, n);
          }
        }
      }
    });
    for (int64_t i = 1; i < b * chunks; ++i) add_row(partial_all, partial_all + i * (k + 1) * c, (k + 1) * c);
    A* dweight = dweight_out.data<A>();
    for (int64_t i = 0; i < c; ++i)
      for (int64_t j = 0; j < k; ++j) dweight[i * k + j] = (add_dweight ? dweight[i * k + j] : A(0)) + partial_all[j * c + i];
    if (!dbias_out.defined()) return;
    A* dbias = dbias_out.data<A>();
    for (int64_t i = 0; i < c; ++i) dbias[i] = (add_dbias ? dbias[i] : A(0)) + partial_all[k * c + i];
  });
}

}  // namespace krait::kernels::cpu
