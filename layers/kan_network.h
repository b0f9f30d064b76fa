#pragma once
#include "layers/kan.h"
#include "layers/model.h"

namespace krait::layers {

/// A Kolmogorov-Arnold network: KAN layers of widths [features, hidden..., outputs] on inputs (b, features) or
/// (b, 1, features). Classifier: cross-entropy; regressor: mean squared error. The loss adds
///   lambda sum over layers (l1 |Phi|_1 + entropy S)                      (Liu et al. 2024, eq. 2.17 - 2.20)
/// which loss_sum, what evaluations report, leaves out.
///
/// Between steps (model.h: before_step, resize_due, resize):
/// - grid update: at steps 0, interval, ... < until the knots of every layer are laid by the samples it sees and its
///   splines are fitted to their old values there. Shapes stay.
/// - pruning: before prune.step the edges that prune() would drop are masked in place; shapes stay.
/// - grid extension: where the schedule names another grid, resize() gives the network on the new knots, fitted to
///   the old curves at the samples.
class KanNetwork final : public Model {
 public:
  KanNetwork(const ModelConfig& config, const ModelShape& shape, const CrossEntropyOptions& loss = {});
  ModelLoss loss(const ModelInput& input, const Tensor& target_count) override;
  /// (b, outputs): class logits or predictions.
  Variable predict(const ModelInput& input) override { return forward(input, nullptr); }

  bool adapts() const override { return true; }
  bool adapts_at(int64_t step) const override { return resize_due(step) || grids_due(step) || pruning_due(step); }
  std::string before_step(int64_t step, const ModelInput& samples, ParameterStore& store) override;
  bool resize_due(int64_t step) const override { return options_.grid_at(step) != options_.grid; }
  Resized resize(int64_t step, const ModelInput& samples, const ParameterStore& store) override;

  /// Lays the grids of all layers by the samples (spec/kan.md, section 4), in place, and fits the splines anew.
  void update_grids(const ModelInput& samples, ParameterStore& store);
  /// The network with grids of this many intervals, with the same curves as far as the samples tell.
  Resized with_grid(int64_t intervals, const ModelInput& samples, const ParameterStore& store) const;

  /// What is left when weak edges and nodes go. A hidden node stays if its largest incoming and its largest outgoing
  /// |phi| over the samples both pass prune.node, an edge if its |phi| passes prune.edge; the new network has the
  /// hidden widths of the nodes that stay and masks for the edges between them.
  struct Pruned {
    Resized network;
    std::vector<std::vector<int64_t>> nodes;  // kept, of every width from the inputs to the outputs
    std::vector<Tensor> masks;                // (out, in) of every layer of this network: 1 where the edge stays
  };
  Pruned prune(const ModelInput& samples, const ParameterStore& store) const;
  /// The same edges masked, with all nodes left where they are; says what stays. Needs masks (masked or prune.step).
  std::string mask_weak(const ModelInput& samples, ParameterStore& store) const;

  double extra_flops_per_token(int64_t) const override { return 0; }
  double train_flops_per_token(int64_t context) const override;
  std::string kind_without_stream() const override { return "kan"; }
  std::vector<std::string> kernel_lines(int64_t batch, int64_t context, DType dtype, Device device,
                                        bool has_segments) const override;
  const std::vector<std::shared_ptr<KanLayer>>& layers() const { return layers_; }

 private:
  struct Kept {
    std::vector<std::vector<int64_t>> nodes;  // as in Pruned
    std::vector<Tensor> masks;
  };
  bool grids_due(int64_t step) const {
    const auto& u = options_.grid_update;
    return u.interval > 0 && step < u.until && step % u.interval == 0;
  }
  bool pruning_due(int64_t step) const { return step > 0 && step == options_.prune.step; }
  Kept strong_part(const ModelInput& samples) const;
  /// With `penalty`, also lambda (l1 |Phi|_1 + entropy S), a scalar; left undefined when lambda is 0.
  Variable forward(const ModelInput& input, Variable* penalty) const;
  Variable rows_of(const ModelInput& input) const;
  /// What every layer sees: (b, width).
  std::vector<Tensor> layer_inputs(const ModelInput& samples) const;
  ModelConfig config_;
  KanNetworkConfig options_;
  CrossEntropyOptions loss_options_;
  bool regressor_;
  std::vector<std::shared_ptr<KanLayer>> layers_;
};

}  // namespace krait::layers
