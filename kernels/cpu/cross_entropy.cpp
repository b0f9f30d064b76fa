#include "kernels/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/flat_update.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_math.h"

namespace krait::kernels::cpu {

namespace {

// Hands f the row that the loss sees, in the precision of sums, and as a type whether it is capped: s itself where it
// can, else what `scratch` then holds: s widened, or with a cap c tanh(s / c).
template <class T, class A, class F>
void with_row(const T* s, std::vector<A>& scratch, int64_t valid, double cap, F&& f) {
  const A* wide;
  if constexpr (std::is_same_v<T, A>) {
    wide = s;
  } else {
    scratch.resize(static_cast<size_t>(valid));
    widen(scratch.data(), s, valid);
    wide = scratch.data();
  }
  if (cap == 0.0) return f(wide, std::false_type{});
  scratch.resize(static_cast<size_t>(valid));
  const A c = A(cap), inverse = A(1 / cap);
  A* capped = scratch.data();
#pragma omp simd
  for (int64_t j = 0; j < valid; ++j) capped[j] = c * vtanh(wide[j] * inverse);
  f(static_cast<const A*>(capped), std::true_type{});
}

template <class A>
struct Softmax {
  A top, sum, total;  // max s, sum exp(s - top), sum s (where asked for)
};
template <class A>
Softmax<A> softmax_of(const A* s, int64_t valid, bool with_total) {
  A top = std::numeric_limits<A>::lowest(), sum = A(0), total = A(0);
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < valid; ++j) top = s[j] > top ? s[j] : top;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < valid; ++j) sum += vexp(s[j] - top);
  if (with_total) {
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < valid; ++j) total += s[j];
  }
  return {top, sum, total};
}

// ds_j = factor [p_j (1 + 2 z lse) - (1 - eps) (j = y) - eps / V] over one row, times the cap's slope
// 1 - (s_j / c)^2 where there is one; padding gets 0. ds may be s. y counts from the first column here.
template <bool kCapped, class T, class A>
void gradient_row(T* ds, const A* s, int64_t v, VocabularyColumns columns, int64_t y, A lse, A factor,
                  const CrossEntropyOptions& o) {
  const int64_t valid = columns.valid;
  [[maybe_unused]] const A inverse = kCapped ? A(1 / o.logit_cap) : A(0);
  const A of_p = factor * (A(1) + A(2 * o.z_loss) * lse);
  const A smooth = factor * A(o.label_smoothing / static_cast<double>(columns.whole));
  const bool here = y >= 0 && y < valid;
  A at_y = A(0);
  if (here) {
    at_y = of_p * vexp(s[y] - lse) - factor * A(1 - o.label_smoothing) - smooth;
    if constexpr (kCapped) at_y *= A(1) - s[y] * inverse * (s[y] * inverse);
  }
#pragma omp simd
  for (int64_t j = 0; j < valid; ++j) {
    A d = of_p * vexp(s[j] - lse) - smooth;
    if constexpr (kCapped) d *= A(1) - s[j] * inverse * (s[j] * inverse);
    put(ds[j], d);
  }
  if (here) put(ds[y], at_y);
  std::fill(ds + valid, ds + v, T(A(0)));
}

int64_t grain(int64_t v) { return 1 + 4096 / v; }

// The dtypes of logits and targets, as types.
template <class F>
void visit(const Tensor& logits, const Tensor& targets, F&& f) {
  visit_float(logits.dtype(), [&]<class T>() {
    visit_index(targets.dtype(), [&]<class I>() { f.template operator()<T, I>(); });
  });
}

template <class A>
A gradient_factor(double scale, const Tensor& count) {
  return static_cast<A>(scale / std::max(1.0, static_cast<double>(count.data<float>()[0])));
}

}  // namespace

void cross_entropy_rows(Tensor& rows, Tensor& nll, Tensor& lse_out, Tensor& dlogits, const Tensor& logits,
                        const Tensor& targets, const Tensor& count, double scale, int64_t valid,
                        const CrossEntropyOptions& o) {
  const int64_t v = logits.size(1);
  visit(logits, targets, [&]<class T, class I>() {
    using A = accum_t<T>;
    const A factor = gradient_factor<A>(scale, count), eps = A(o.label_smoothing);
    const T* all = logits.data<T>();
    T* gradients = dlogits.defined() ? dlogits.data<T>() : nullptr;
    const I* target = targets.data<I>();
    A *loss = rows.data<A>(), *plain = nll.data<A>(), *lses = lse_out.data<A>();
    parallel_for(0, logits.size(0), grain(v), [&](int64_t first, int64_t last) {
      std::vector<A> scratch;
      for (int64_t i = first; i < last; ++i)
        with_row(all + i * v, scratch, valid, o.logit_cap, [&](const A* s, auto is_capped) {
          const auto [top, sum, total] = softmax_of(s, valid, eps != A(0));
          const A lse = top + std::log(sum);
          lses[i] = lse;
          const auto y = static_cast<int64_t>(target[i]);
          if (y == o.ignore_index) {
            loss[i] = plain[i] = A(0);
            if (gradients) std::fill_n(gradients + i * v, v, T(A(0)));
            return;
          }
          plain[i] = lse - s[y];
          loss[i] = (A(1) - eps) * plain[i] + A(o.z_loss) * lse * lse;
          if (eps != A(0)) loss[i] += eps * (lse - total / static_cast<A>(valid));
          if (gradients) gradient_row<is_capped()>(gradients + i * v, s, v, {0, valid, valid}, y, lse, factor, o);
        });
    });
  });
}

void cross_entropy_gradient(Tensor& dlogits, const Tensor& dloss, const Tensor& logits, const Tensor& targets,
                            const Tensor& lse, const Tensor& count, VocabularyColumns columns,
                            const CrossEntropyOptions& o) {
  const int64_t v = logits.size(1);
  visit(logits, targets, [&]<class T, class I>() {
    using A = accum_t<T>;
    const A factor = gradient_factor<A>(static_cast<double>(dloss.data<A>()[0]), count);
    parallel_for(0, logits.size(0), grain(v), [&](int64_t first, int64_t last) {
      std::vector<A> scratch;
      for (int64_t i = first; i < last; ++i) {
        const auto y = static_cast<int64_t>(targets.data<I>()[i]);
        T* ds = dlogits.data<T>() + i * v;
        if (y == o.ignore_index) {
          std::fill_n(ds, v, T(A(0)));
          continue;
        }
        with_row(logits.data<T>() + i * v, scratch, columns.valid, o.logit_cap, [&](const A* s, auto is_capped) {
          gradient_row<is_capped()>(ds, s, v, columns, y - columns.first, lse.data<A>()[i], factor, o);
        });
      }
    });
  });
}

void cross_entropy_partial(Tensor& top, Tensor& sums, const Tensor& logits, const Tensor& targets,
                           VocabularyColumns columns, const CrossEntropyOptions& o) {
  const int64_t t = logits.size(0), v = logits.size(1);
  visit(logits, targets, [&]<class T, class I>() {
    using A = accum_t<T>;
    A *tops = top.data<A>(), *sum = sums.data<A>(), *at_target = sum + t, *total = at_target + t;
    parallel_for(0, t, grain(v), [&](int64_t first, int64_t last) {
      std::vector<A> scratch;
      for (int64_t i = first; i < last; ++i)
        with_row(logits.data<T>() + i * v, scratch, columns.valid, o.logit_cap, [&](const A* s, auto) {
          const Softmax<A> all = softmax_of(s, columns.valid, o.label_smoothing != 0.0);
          const int64_t y = static_cast<int64_t>(targets.data<I>()[i]) - columns.first;
          tops[i] = all.top;
          sum[i] = all.sum;
          at_target[i] = y >= 0 && y < columns.valid ? s[y] : A(0);
          total[i] = all.total;
        });
    });
  });
}

void cross_entropy_rescale(Tensor& sums, const Tensor& from, const Tensor& to) {
  visit_float(sums.dtype(), [&]<class A>() {
    if constexpr (!std::is_same_v<A, bf16>) {  // sums are never bf16
      A* sum = sums.data<A>();
      for (int64_t i = 0; i < from.numel(); ++i) sum[i] *= std::exp(from.data<A>()[i] - to.data<A>()[i]);
    }
  });
}

void cross_entropy_finish(Tensor& rows, Tensor& nll, Tensor& lse_out, const Tensor& top, const Tensor& sums,
                          const Tensor& targets, int64_t valid, const CrossEntropyOptions& o) {
  const int64_t t = rows.numel();
  visit(rows, targets, [&]<class T, class I>() {
    using A = accum_t<T>;
    const A *sum = sums.data<A>(), *at_target = sum + t, *total = at_target + t, eps = A(o.label_smoothing);
    for (int64_t i = 0; i < t; ++i) {
      const A lse = top.data<A>()[i] + std::log(sum[i]);
      lse_out.data<A>()[i] = lse;
      A plain = A(0), loss = A(0);
      if (static_cast<int64_t>(targets.data<I>()[i]) != o.ignore_index) {
        plain = lse - at_target[i];
        loss = (A(1) - eps) * plain + A(o.z_loss) * lse * lse;
        if (eps != A(0)) loss += eps * (lse - total[i] / static_cast<A>(valid));
      }
      nll.data<A>()[i] = plain;
      rows.data<A>()[i] = loss;
    }
  });
}

void cross_entropy_reduce(Tensor& out, const Tensor& rows, const Tensor& count, double scale) {
  visit_float(rows.dtype(), [&]<class A>() {
    double sum = 0.0;
    for (int64_t i = 0; i < rows.numel(); ++i) sum += static_cast<double>(rows.data<A>()[i]);
    const double n = count.defined() ? std::max(1.0, static_cast<double>(count.data<float>()[0])) : 1.0;
    out.data<A>()[0] = static_cast<A>(scale * sum / n);
  });
}

void cross_entropy_count(Tensor& count, const Tensor& targets, int64_t valid, int64_t ignore_index) {
  visit_index(targets.dtype(), [&]<class I>() {
    int64_t kept = 0;
    for (int64_t i = 0; i < targets.numel(); ++i) {
      const auto y = static_cast<int64_t>(targets.data<I>()[i]);
      if (y == ignore_index) continue;
      KRAIT_CHECK(y >= 0 && y < valid, "cross_entropy: target {} is {}, expected 0 to {} or ignore_index {}", i, y,
                  valid - 1, ignore_index);
      ++kept;
    }
    count.data<float>()[0] = static_cast<float>(kept);
  });
}

void scale_by(Tensor& t, const Tensor& factor, bool must_be_one) {
  const double f = factor.item();
  if (f == 1.0) return;
  KRAIT_CHECK(!must_be_one,
              "linear_cross_entropy: the weight's gradient is summed in place during the forward, so the gradient of "
              "the loss must be 1, found {}; pass the factor as loss_scale",
              f);
  visit_float(t.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    T* p = t.data<T>();
    parallel_for(0, t.numel(), 16384, [&](int64_t first, int64_t last) {
#pragma omp simd
      for (int64_t i = first; i < last; ++i) p[i] = static_cast<T>(static_cast<A>(p[i]) * static_cast<A>(f));
    });
  });
}

}  // namespace krait::kernels::cpu
