#pragma once
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "core/option_reader.h"

namespace krait::layers {

/// Options of every KAN layer (Liu et al. 2024).
struct KanOptions {
  int64_t grid = 5;   // intervals G of the spline grid
  int64_t order = 3;  // degree k of the splines
  std::array<double, 2> range{-1, 1};
  std::string init = "krait";  // krait | paper | pykan | efficient: see spec/kan.md, section 3
  bool base = true;            // the branch base_weight silu(x)
};

/// Options of the section `model.kan`: a whole network of KAN layers.
struct KanNetworkConfig : KanOptions {
  std::vector<int64_t> widths;  // of the hidden layers; inputs and outputs come from the data and n_classes
  bool masked = false;          // a 0/1 mask on the edges (written by pruning; prune.step makes one)
  double grid_eps = 0.02;       // of updated grids: this share uniform, the rest follows the samples
  struct {
    double lambda = 0, l1 = 1, entropy = 1;  // loss += lambda sum over layers (l1 |Phi|_1 + entropy S(Phi))
    std::string reg = "activations";         // what |phi| is: activations: mean |phi(x)| | weights: mean |coefficient|
  } regularization;
  struct {
    int64_t interval = 5, until = 50;  // grids follow the batch at steps 0, interval, ... < until; interval 0: never
  } grid_update;
  std::vector<std::pair<int64_t, int64_t>> grid_schedule;  // (step, grid): from that step on
  struct {
    int64_t step = 0;                 // before this step weak edges and nodes are masked for good; 0: never
    double node = 1e-2, edge = 3e-2;  // what pruning keeps has a larger |phi|
  } prune;

  /// Grid that the schedule asks for at a step; `grid` where it says nothing.
  int64_t grid_at(int64_t step) const;
};

/// Reads the options of KanOptions from a reader that may know others too.
void read_kan_options(OptionReader& options, KanOptions& c);
/// Throws ConfigError with the place of the option at fault; completes the section.
KanNetworkConfig read_kan_network_config(ConfigNode& section);

}  // namespace krait::layers
