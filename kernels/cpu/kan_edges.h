#pragma once
#include <vector>

#include "kernels/cpu/kan_basis.h"
#include "kernels/cpu/vector_bytes.h"

namespace krait::kernels::cpu {

/// Vectors over the outputs of a layer.
template <class A>
struct OutputLanes {
  static constexpr int64_t n = kVectorBytes / sizeof(A);
  typedef A Vec __attribute__((vector_size(kVectorBytes)));
  typedef A Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(A))));
  static Vec load(const A* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static void store(A* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }
};

template <class A>
A lane_sum(const typename OutputLanes<A>::Vec& v) {
  A sum = 0;
  for (int64_t q = 0; q < OutputLanes<A>::n; ++q) sum += v[q];
  return sum;
}

/// Weights of the edges out of each input with the outputs innermost, padded with zeros to whole vectors: rows
/// [input][r][output], where r = g + k holds scaler times coefficient g, the last row the base weight and all other
/// rows zeros. So the bases that are live in interval s always multiply rows s ... s + k, at the ends too.
template <class A>
class EdgeRows {
 public:
  EdgeRows(int64_t inputs, int64_t outputs, int64_t bases, int64_t order)
      : inputs_(inputs), outputs_(outputs), bases_(bases), order_(order),
        width_((outputs + OutputLanes<A>::n - 1) / OutputLanes<A>::n * OutputLanes<A>::n),
        rows_(bases + 2 * order + 1) {}

  int64_t width() const { return width_; }
  int64_t rows() const { return rows_; }
  int64_t size() const { return rows_ * width_; }  // of one input
  int64_t base_row() const { return rows_ - 1; }

  /// The rows of input i.
  void pack(A* to, const KanParameters& p, int64_t i) const {
    std::fill(to, to + size(), A(0));
    const A *spline = p.spline.data<A>(), *scaler = values(p.scaler), *base = values(p.base);
    for (int64_t o = 0; o < outputs_; ++o) {
      const int64_t edge = o * inputs_ + i;
      const A scale = scaler ? scaler[edge] : A(1);
      for (int64_t g = 0; g < bases_; ++g) to[(g + order_) * width_ + o] = scale * spline[edge * bases_ + g];
      if (base) to[base_row() * width_ + o] = base[edge];
    }
  }

  /// From the gradient of these rows, as if they were parameters, to those of the parameters of input i.
  void unpack_gradient(KanGrad& grad, const A* from, const KanParameters& p, int64_t i) const {
    const A *spline = p.spline.data<A>(), *scaler = values(p.scaler);
    A *dspline = grad.spline.data<A>(), *dscaler = values(grad.scaler), *dbase = values(grad.base);
    for (int64_t o = 0; o < outputs_; ++o) {
      const int64_t edge = o * inputs_ + i;
      const A scale = scaler ? scaler[edge] : A(1);
      A dscale = 0;
      for (int64_t g = 0; g < bases_; ++g) {
        const A d = from[(g + order_) * width_ + o];
        dspline[edge * bases_ + g] = scale * d;
        dscale += spline[edge * bases_ + g] * d;
      }
      if (dscaler) dscaler[edge] = dscale;
      if (dbase) dbase[edge] = from[base_row() * width_ + o];
    }
  }

 private:
  static A* values(const Tensor& t) { return t.defined() ? t.data<A>() : nullptr; }
  int64_t inputs_, outputs_, bases_, order_, width_, rows_;
};

/// Items of a loop that are worth a thread of their own when one takes this many multiplications.
inline int64_t kan_grain(int64_t work) { return std::max<int64_t>(1, (int64_t{1} << 18) / std::max<int64_t>(work, 1)); }

/// The tensors of a call in the dtype of sums.
template <class A>
KanParameters in_sums(const KanParameters& p) {
  const auto wide = [](const Tensor& t) { return t.defined() ? t.to(dtype_of<A>) : t; };
  return {wide(p.base), wide(p.spline), wide(p.scaler), p.grid, p.order};
}

}  // namespace krait::kernels::cpu
