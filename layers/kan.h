#pragma once
#include "autograd/kan.h"
#include "layers/kan_config.h"
#include "layers/mlp.h"
#include "layers/registry.h"

namespace krait::layers {

/// Kolmogorov-Arnold layer (Liu et al. 2024, eq. 2.5, 2.10): a learned function on every edge,
///   y_o = sum_i [ base_weight_oi silu(x_i) + spline_scaler_oi sum_g spline_weight_oig B_g(x_i) ]
/// over B-splines on the knots `grid` (i, G + 2k + 1). The knots are a parameter that no gradient moves: they follow
/// the data (grid update) or are refined (grid extension), see layers/kan_network.h, and checkpoints hold them.
/// A masked layer multiplies base_weight and spline_scaler by `mask`, so that pruned edges stay 0 and get no gradient.
class KanLayer final : public Module {
 public:
  /// `gain` scales the initial base weights and splines.
  /// `split` as for a linear layer: by outputs, or by inputs, with their grids, and the sum of the members' y.
  KanLayer(const KanOptions& options, int64_t in, int64_t out, double gain = 1.0, bool masked = false,
           const LinearSplit& split = {});
  Variable forward(const Variable& x) const;  // (..., in) to (..., out)
  /// |phi|, the mean over all rows of x: (out, in).
  Variable edges(const Variable& x) const { return kan_edges(x, edge_functions()); }
  /// Mean |spline_weight| of every edge: (out, in). Needs no inputs.
  Variable weight_norms() const;
  int64_t inputs() const { return spline_weight_.shape()[1]; }
  int64_t outputs() const { return spline_weight_.shape()[0]; }
  DType dtype() const { return spline_weight_.variable().dtype(); }  // that forward() expects
  /// FLOPs per row: the k+1 bases that are not zero, and the base branch.
  double forward_flops() const;

 private:
  KanVariables edge_functions() const;
  LinearSplit split_;
  int64_t order_;
  Parameter base_weight_, spline_weight_, spline_scaler_, grid_, mask_;
};

/// l1 |Phi|_1 + entropy S of one layer's edge norms, with p = |phi| / |Phi|_1 and S = -sum p ln p (eq. 2.19, 2.20).
Variable kan_penalty(const Variable& edges, double l1, double entropy);

/// KAN as the feed-forward part of a block: two KAN layers, d -> hidden -> d. What a norm or a layer puts out does
/// not keep to the grid's range, and beyond it splines are zero: both layers see mid + half tanh(x), which fills the
/// range. Nothing follows the data here: the grids stay as they are.
class KanMlp final : public FeedForward {
 public:
  KanMlp(const KanOptions& options, bool squash, int64_t hidden, const LayerContext& context);
  Variable forward(const Variable& x) override;

 private:
  Variable squashed(const Variable& x) const;
  bool squash_;
  double middle_, half_;
  std::shared_ptr<KanLayer> fc_, proj_;
};

/// The options of model.kan. A KAN is a network of its own, not a mixer: make() throws.
LayerKind kan_kind();

}  // namespace krait::layers
