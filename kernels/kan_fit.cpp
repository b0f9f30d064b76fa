#include "kernels/kan_fit.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/kan_basis.h"

extern "C" void dpbsv_(const char* uplo, const int* n, const int* bandwidth, const int* rhs, double* ab,
                       const int* ldab, double* b, const int* ldb, int* info);

namespace krait::kernels {

namespace {

Tensor host(const Tensor& t) { return t.cpu().to(DType::f64).contiguous(); }

// The normal equations of one input and `outputs` curves.
class NormalEquations {
 public:
  NormalEquations(int64_t bases, int64_t order, int64_t outputs, double lambda)
      : n_(bases), k_(order), outputs_(outputs), band_(static_cast<size_t>(bases * (order + 1)), 0.0),
        rhs_(static_cast<size_t>(bases * outputs), 0.0) {
    for (int64_t j = 0; j < n_; ++j) band_[static_cast<size_t>(j * (k_ + 1))] = lambda;
  }
  // One sample: basis first + j has value[j * stride]; y of every output.
  void add(int64_t first, const double* value, int64_t stride, const double* y) {
    for (int64_t a = 0; a <= k_; ++a) {
      const int64_t g = first + a;
      if (g < 0 || g >= n_) continue;
      const double v = value[a * stride];
      for (int64_t b = a; b <= k_ && first + b < n_; ++b)  // lower triangle, column g
        band_[static_cast<size_t>(g * (k_ + 1) + b - a)] += v * value[b * stride];
      for (int64_t o = 0; o < outputs_; ++o) rhs_[static_cast<size_t>(o * n_ + g)] += v * y[o];
    }
  }
  // Coefficients [output][basis].
  const std::vector<double>& solve() {
    const int n = static_cast<int>(n_), k = static_cast<int>(std::min(k_, n_ - 1)), rhs = static_cast<int>(outputs_);
    const int ld = static_cast<int>(k_ + 1);
    int info = 0;
    dpbsv_("L", &n, &k, &rhs, band_.data(), &ld, rhs_.data(), &n, &info);
    KRAIT_CHECK(info == 0, "spline fit: the normal equations are not positive definite (row {}); are there NaN samples?",
                info);
    return rhs_;
  }

 private:
  int64_t n_, k_, outputs_;
  std::vector<double> band_, rhs_;
};

void check_knots(const char* op, const Tensor& x, const Tensor& knots, int64_t order) {
  KRAIT_CHECK(x.ndim() == 2 && knots.ndim() == 2 && knots.size(0) == x.size(1) && knots.size(1) >= 2 * order + 2,
              "{}: samples are {}, knots {} of order {}", op, x.shape(), knots.shape(), order);
  KRAIT_CHECK(order >= 0 && order <= kMaxSplineOrder, "{}: spline order {}, expected 0 to {}", op, order,
              kMaxSplineOrder);
}

// Fits per input; curve(i, b0, y) gives y[lane][output] for the block of samples from b0 on.
template <class Curve>
Tensor fit(const Tensor& x, int64_t outputs, const Tensor& knots_in, int64_t order, double lambda, Curve curve) {
  const int64_t s = x.size(0), inputs = x.size(1), n = knots_in.size(1) - order - 1;
  const cpu::KnotRows<double> knots(knots_in, order);
  Tensor out = empty({outputs, inputs, n}, DType::f64, kCpu);
  parallel_for(0, inputs, std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, s * outputs * (order + 1))), [&](int64_t first, int64_t last) {
    cpu::EdgeBasis<double> basis(order);
    std::vector<double> y(static_cast<size_t>(cpu::kKanRows * outputs));
    for (int64_t i = first; i < last; ++i) {
      NormalEquations equations(n, order, outputs, lambda);
      for (int64_t b0 = 0; b0 < s; b0 += cpu::kKanRows) {
        curve(i, b0, y.data());
        basis.compute(x.data<double>(), s, inputs, b0, i, knots[i], false);
        for (int64_t b = 0; b < std::min(cpu::kKanRows, s - b0); ++b)
          equations.add(basis.interval[static_cast<size_t>(b)] - order, basis.value.data() + b, cpu::kKanRows,
                        y.data() + b * outputs);
      }
      const std::vector<double>& c = equations.solve();
      for (int64_t o = 0; o < outputs; ++o)
        std::copy_n(c.data() + o * n, n, out.data<double>() + (o * inputs + i) * n);
    }
  });
  return out;
}

}  // namespace

Tensor uniform_knots(int64_t inputs, int64_t intervals, int64_t order, double low, double high) {
  const int64_t count = intervals + 2 * order + 1;
  Tensor t = empty({inputs, count}, DType::f64, kCpu);
  for (int64_t i = 0; i < inputs; ++i)
    for (int64_t j = 0; j < count; ++j)
      t.data<double>()[i * count + j] =
          low + (high - low) / static_cast<double>(intervals) * static_cast<double>(j - order);
  return t;
}

Tensor fit_splines(const Tensor& x_in, const Tensor& y_in, const Tensor& knots_in, int64_t order, double lambda) {
  const Tensor x = host(x_in), y = host(y_in), knots = host(knots_in);
  check_knots("fit_splines", x, knots, order);
  KRAIT_CHECK(y.ndim() == 3 && y.size(0) == x.size(0) && y.size(1) == x.size(1),
              "fit_splines: y is {}, expected (samples, inputs, outputs) to match x {}", y.shape(), x.shape());
  const int64_t s = x.size(0), inputs = x.size(1), outputs = y.size(2);
  return fit(x, outputs, knots, order, lambda, [&](int64_t i, int64_t b0, double* block) {
    for (int64_t b = 0; b < std::min(cpu::kKanRows, s - b0); ++b)
      std::copy_n(y.data<double>() + ((b0 + b) * inputs + i) * outputs, outputs, block + b * outputs);
  });
}

Tensor refit_splines(const Tensor& x_in, const Tensor& coefficients, const Tensor& from_in, const Tensor& to_in,
                     int64_t order, double lambda) {
  const Tensor x = host(x_in), c = host(coefficients), from = host(from_in), to = host(to_in);
  check_knots("refit_splines", x, from, order);
  check_knots("refit_splines", x, to, order);
  const int64_t s = x.size(0), inputs = x.size(1), outputs = c.size(0), n = from.size(1) - order - 1;
  KRAIT_CHECK(c.ndim() == 3 && c.size(1) == inputs && c.size(2) == n,
              "refit_splines: coefficients are {}, expected (out, {}, {})", c.shape(), inputs, n);
  const cpu::KnotRows<double> knots(from, order);
  return fit(x, outputs, to, order, lambda, [&](int64_t i, int64_t b0, double* block) {
    cpu::EdgeBasis<double> basis(order);
    basis.compute(x.data<double>(), s, inputs, b0, i, knots[i], false);
    for (int64_t b = 0; b < std::min(cpu::kKanRows, s - b0); ++b)
      for (int64_t o = 0; o < outputs; ++o) {
        double sum = 0;
        for (int64_t j = 0; j <= order; ++j) {
          const int64_t g = basis.interval[static_cast<size_t>(b)] - order + j;
          if (g >= 0 && g < n)
            sum += basis.value[static_cast<size_t>(j * cpu::kKanRows + b)] * c.data<double>()[(o * inputs + i) * n + g];
        }
        block[b * outputs + o] = sum;
      }
  });
}

Tensor resized_knots(const Tensor& knots_in, int64_t order, int64_t intervals) {
  const Tensor knots = host(knots_in);
  const int64_t inputs = knots.size(0), old_count = knots.size(1), old = old_count - 2 * order - 1;
  KRAIT_CHECK(old >= 1 && intervals >= 1, "resized_knots: {} intervals from knots {} of order {}", intervals,
              knots.shape(), order);
  const int64_t count = intervals + 2 * order + 1;
  Tensor out = empty({inputs, count}, DType::f64, kCpu);
  for (int64_t i = 0; i < inputs; ++i) {
    const double* inner = knots.data<double>() + i * old_count + order;
    double* to = out.data<double>() + i * count + order;
    for (int64_t j = 0; j <= intervals; ++j) {
      const double at = static_cast<double>(j) * static_cast<double>(old) / static_cast<double>(intervals);
      const int64_t q = std::min(static_cast<int64_t>(at), old - 1);
      to[j] = inner[q] + (at - static_cast<double>(q)) * (inner[q + 1] - inner[q]);
    }
    const double below = to[1] - to[0], above = to[intervals] - to[intervals - 1];
    for (int64_t j = 1; j <= order; ++j) {
      to[-j] = to[0] - static_cast<double>(j) * below;
      to[intervals + j] = to[intervals] + static_cast<double>(j) * above;
    }
  }
  return out;
}

Tensor knots_from_samples(const Tensor& x_in, int64_t intervals, int64_t order, double eps, double margin) {
  const Tensor x = host(x_in);
  KRAIT_CHECK(x.ndim() == 2 && x.size(0) > 0, "knots_from_samples: samples are {}, expected (samples, inputs)", x.shape());
  const int64_t s = x.size(0), inputs = x.size(1), count = intervals + 2 * order + 1;
  Tensor out = empty({inputs, count}, DType::f64, kCpu);
  std::vector<double> column(static_cast<size_t>(s));
  for (int64_t i = 0; i < inputs; ++i) {
    for (int64_t b = 0; b < s; ++b) {
      column[static_cast<size_t>(b)] = x.data<double>()[b * inputs + i];
      KRAIT_CHECK(std::isfinite(column[static_cast<size_t>(b)]), "knots_from_samples: sample {} of input {} is {}", b, i,
                  column[static_cast<size_t>(b)]);
    }
    std::sort(column.begin(), column.end());
    const double low = column.front(), high = column.back();
    const double step = (high - low + 2 * margin) / static_cast<double>(intervals);
    const double spacing = high > low ? 1e-6 * (high - low) : 1e-6;
    double* to = out.data<double>() + i * count + order;
    for (int64_t j = 0; j <= intervals; ++j) {
      const double uniform = low - margin + step * static_cast<double>(j);
      to[j] = eps * uniform + (1 - eps) * column[static_cast<size_t>(j * (s - 1) / intervals)];
      if (j > 0) to[j] = std::max(to[j], to[j - 1] + spacing);
    }
    for (int64_t j = 1; j <= order; ++j) {
      to[-j] = to[0] - static_cast<double>(j) * step;
      to[intervals + j] = to[intervals] + static_cast<double>(j) * step;
    }
  }
  return out;
}

}  // namespace krait::kernels
