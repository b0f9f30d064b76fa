#pragma once
#include <functional>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "autograd/variable.h"
#include "tests/testing/catch.h"

namespace krait::testing {

struct Normal { double mean = 0, std = 1; };
struct Uniform { double low = 0, high = 1; };
struct Constant { double value = 0; };
using Fill = std::variant<Normal, Uniform, Constant>;
struct IntegerRange { int64_t low = 0, high = 1; };  // [low, high)

/// What an operation returns: one variable or several.
struct Outputs {
  Vars values;
  Outputs(Variable v) : values{std::move(v)} {}  // NOLINT: either form
  Outputs(Vars v) : values(std::move(v)) {}      // NOLINT
};
using OpFunction = std::function<Outputs(const Vars&)>;

inline constexpr DType f32 = DType::f32, f64 = DType::f64, bf16_type = DType::bf16;

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

/// max|a - ref| / max(max|ref|, 1e-6); infinite when finiteness differs.
double relative_error(const Tensor& a, const Tensor& reference);
Tensor random_tensor(const Shape& shape, const Fill& fill, uint64_t seed, DType dtype = DType::f64);
Tensor random_integers(const Shape& shape, IntegerRange range, uint64_t seed);
/// The same values behind other strides and a storage offset.
Tensor strided_copy_of(const Tensor& t);

}  // namespace krait::testing

namespace krait {
using namespace testing;  // test files say OpCase, Normal, check_grad
}
