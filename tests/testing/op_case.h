#pragma once
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "autograd/variable.h"
#include "tests/testing/tensors.h"

namespace krait::testing {

/// What an operation returns: one variable or several.
struct Outputs {
  Vars values;
  Outputs(Variable v) : values{std::move(v)} {}  // NOLINT: either form
  Outputs(Vars v) : values(std::move(v)) {}      // NOLINT
};
using OpFunction = std::function<Outputs(const Vars&)>;

/// One operation and all the ways it is held to its mathematics.
struct OpCase {
  std::string name;
  OpFunction run;
  /// The same mathematics from small operations, or plain loops over fp64 CPU data wrapped in Variables.
  OpFunction reference;
  /// Each entry is one set of input shapes. Include 1s, odd sizes, empty, longer than a tile.
  std::vector<std::vector<Shape>> shapes;
  /// How floating inputs are filled; every entry is tried: ordinary, offset, degenerate.
  std::vector<Fill> inputs = {Normal{}};
  /// err = max|a - ref| / max(max|ref|, 1e-6) allowed per dtype, for outputs; gradients get twice that.
  std::map<DType, double> tolerance = {{DType::f32, 1e-5}, {DType::bf16, 2e-2}};
  /// Inputs that are int64 with these ranges instead of floating (tokens, positions).
  std::map<size_t, IntegerRange> integers = {};
  /// Floating inputs that get no gradient (masks, tables).
  std::vector<size_t> constants = {};
  /// Inputs filled differently from `inputs` (e.g. positive ones).
  std::map<size_t, Fill> fills = {};
  /// Step and relative tolerance of the finite differences.
  double grad_step = 1e-5, grad_tolerance = 1e-6;
  /// Inputs are also given as non-contiguous views with an offset unless false.
  bool strided = true;
};

/// Outputs of `run` in every dtype of `tolerance` against `reference` in fp64 on the same (rounded) inputs; its
/// gradients against those of `run` in fp64; strided inputs against contiguous ones.
void check_reference(const OpCase& c);
/// Random-direction finite differences in fp64 on CPU, for every differentiable input.
void check_grad(const OpCase& c);
/// CUDA against CPU, outputs and gradients, same inputs, in every dtype of `tolerance` and fp64.
/// Tag such cases [cuda]: they are reported as skipped on a machine without a GPU.
void check_twin(const OpCase& c);

}  // namespace krait::testing
