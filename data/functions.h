#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace krait::data {

/// A function to be fitted. Inputs are in [-1, 1]; the function maps input i to its own variable
/// low[i] + (x + 1) / 2 (high[i] - low[i]) first.
struct FunctionSpec {
  std::string name, formula;
  std::vector<double> low, high;
  double (*f)(const double* v);
  int64_t n_inputs() const { return static_cast<int64_t>(low.size()); }
  double operator()(const double* x) const;
};

/// The sets of the KAN paper (Liu et al. 2024): five with known compositions, special functions, Feynman equations.
const std::vector<FunctionSpec>& functions();
/// Throws for a name that is not there.
const FunctionSpec& find_function(const std::string& name);

}  // namespace krait::data
