#pragma once
#include <variant>
#include <vector>

#include "kernels/cuda/few_map.h"
#include "kernels/cuda/few_rows.h"
#include "kernels/cuda/rows_linear.h"
#include "kernels/linear.h"
#include "kernels/mamba2_step.h"
#include "kernels/mamba_step.h"

namespace krait::kernels::cuda {

/// Layers of Mamba and Mamba-2 in a decoding step of few rows, as the two kernels of few_rows.h: a norm waits for its map,
/// the map for the convolution behind it, the state for the next map, and that map's parts for the norm behind it. Each of
/// the four operations is true when it took the call; false before anything changed.
class FewSteps {
 public:
  explicit FewSteps(Device device) : device_(device) {}

  bool norm(Tensor& y, Tensor& sum, Tensor& rstd, const Tensor& x, const Tensor& residual, const Tensor& w, double eps);
  bool linear(Tensor& y, const Gemm& g, const Tensor& bias, Epilogue epilogue);
  bool mamba_step(Tensor& y, Tensor& conv, Tensor& h, const Tensor& xz, const MambaStepWeights& w);
  bool mamba2_step(Tensor& y, Tensor& conv, Tensor& h, const Tensor& zxbcdt, const Mamba2StepWeights& w);

  /// sample_next (kernels/sample.h) of temperature 0, behind the wide map that makes the logits.
  bool draw(Tensor& made, Tensor& last, Tensor& position, Tensor& step, const Tensor& logits);

  /// A map for a kernel of its own, its result and what it reads.
  struct Map {
    RowsLinear alone;
    Tensor y, x;
  };
  /// The map that waits, if one does, behind its norm.
  bool take_map(Map& map);
  /// Launches what else waits, with kernels that need nothing behind them. What a norm made, if one waited.
  Tensor flush();

 private:
  struct Norm {
    FewInput in;
    int rows, k;
    Tensor y;
  };
  struct NormedMap {
    FewLinear work;
    Map map;
  };
  struct Scan {
    FewScan work;
    Tensor y;
  };
  struct State {
    FewState work;
    Tensor y, weighted;
    float eps;
  };
  struct Parts {
    FewInput in;
    int rows, k;
    Tensor y;
    RowScale gated;  // without squares: none
    Tensor gated_y, weighted;
  };

  struct Head {
    FewMap work;
    Tensor y;
  };

  bool head(Tensor& y, const Gemm& g, const Tensor& bias);
  void start(FewLinear& work, const void* conv);
  void add_parts(Parts parts, Tensor& y, const Gemm& g, const Tensor& part);
  void scale_gated(const Parts& parts);

  Device device_;
  std::variant<std::monostate, Norm, NormedMap, Scan, State, Parts, Head> waiting_;
  std::vector<Tensor> held_;         // whose memory nobody else may take before the launch
  std::vector<const void*> states_;  // of convolutions that moved on since a kernel waited for all before it
};

}  // namespace krait::kernels::cuda
