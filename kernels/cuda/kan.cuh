#pragma once
#include "core/cuda/launch.cuh"
#include "kernels/cuda/kan_basis.cuh"

namespace krait::kernels::cuda {

inline constexpr int kKanTile = 64;  // rows, outputs and columns of a tile

/// A KAN layer as the product of the bases of x, (rows, columns), with the weights of the edges, (columns, outputs).
/// Input i owns `per_input` columns: its G + k bases, then silu where there is a base branch.
template <class T>
struct KanView {
  using A = accum_t<T>;
  const T *base, *spline, *scaler;
  const A* grid;
  int64_t inputs, outputs;
  int bases, order, knots, per_input;

  __host__ __device__ int64_t columns() const { return inputs * per_input; }
  /// Weight of column g of input i.
  __device__ A weight(int64_t o, int64_t i, int g) const {
    const int64_t edge = o * inputs + i;
    if (g >= bases) return static_cast<A>(base[edge]);
    const A w = static_cast<A>(spline[edge * bases + g]);
    return scaler != nullptr ? w * static_cast<A>(scaler[edge]) : w;
  }
};

/// At most kKanTile columns that are worked off together: whole inputs, or a piece of one input's columns.
struct KanChunks {
  int64_t inputs;
  int per_input, together, pieces;  // inputs of a chunk; pieces of an input
  __host__ __device__ int64_t groups() const { return (inputs + together - 1) / together; }
  __host__ __device__ int64_t count() const { return groups() * pieces; }
};
struct KanChunk {
  int64_t input;           // the first
  int inputs, g0, width;  // first column of the inputs; columns
};
inline __host__ __device__ KanChunk chunk_at(const KanChunks& c, int64_t index) {
  KanChunk chunk;
  chunk.input = index / c.pieces * c.together;
  const int64_t left = c.inputs - chunk.input;
  chunk.inputs = left < c.together ? static_cast<int>(left) : c.together;
  chunk.g0 = static_cast<int>(index % c.pieces) * kKanTile;
  const int rest = c.per_input - chunk.g0;
  chunk.width = c.pieces == 1 ? chunk.inputs * c.per_input : (rest < kKanTile ? rest : kKanTile);
  return chunk;
}
template <class T>
KanChunks chunks_of(const KanView<T>& v) {
  const int fit = kKanTile / v.per_input;
  return {v.inputs, v.per_input, fit < 1 ? 1 : fit > 16 ? 16 : fit, (v.per_input + kKanTile - 1) / kKanTile};
}

template <class T>
KanView<T> view_of(const KanParameters& p) {
  const auto data = [](const Tensor& t) -> const T* { return t.defined() ? t.data<T>() : nullptr; };
  const int bases = static_cast<int>(p.spline.size(2));
  return {data(p.base), data(p.spline), data(p.scaler), p.grid.data<accum_t<T>>(), p.spline.size(1),
          p.spline.size(0), bases, static_cast<int>(p.order), static_cast<int>(p.grid.size(1)),
          bases + (p.base.defined() ? 1 : 0)};
}

/// f.template operator()<T, K>(): cubic splines have code of their own.
template <class F>
void visit_kan(DType dtype, int64_t order, F&& f) {
  visit_float(dtype, [&]<class T>() {
    if constexpr (!std::is_same_v<T, double>) {
      if (order == 3) return f.template operator()<T, 3>();
    }
    f.template operator()<T, -1>();
  });
}

/// From partial sums (splits, outputs, columns) of the gradient of the weights as KanView::weight gives them to the
/// gradients of the parameters, in a fixed order. Defined in kan.cu.
template <class T>
void finish_weight_gradient(KanGrad& grad, const Tensor& partial, const KanView<T>& v, Stream stream);

}  // namespace krait::kernels::cuda
