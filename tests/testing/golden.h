#pragma once
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/tensor.h"
#include "tests/testing/catch.h"

namespace krait::testing {

/// One group of a golden file: reference numbers in float64 made by independent code.
class GoldenCase {
 public:
  GoldenCase(std::string file, std::string name) : file_(std::move(file)), name_(std::move(name)) {}
  const std::string& name() const { return name_; }
  bool has(const std::string& path) const;               // "in/x", "grad/param/w"
  Tensor tensor(const std::string& path) const;          // float64 or int64, CPU
  std::vector<std::string> list(const std::string& group) const;  // data sets of "param", "grad/in", ...
  /// A setting of the case (group attribute), as a number or a string.
  std::optional<double> find_number(const std::string& attribute) const;
  double number(const std::string& attribute) const;     // throws when absent
  std::string text(const std::string& attribute) const;
  /// Tolerance attribute of a data set for the dtype: tol_f32, tol_bf16, or 1e-10 for float64.
  double tolerance(const std::string& path, DType dtype) const;
  /// CHECKs `value` against the data set within its tolerance; counts as one assertion that names case and set.
  void check(const std::string& path, const Tensor& value) const;
  /// The same with a tolerance of the test's own.
  void check_within(const std::string& path, const Tensor& value, double tolerance) const;

 private:
  std::string file_, name_;
};

/// Directory of the golden files: KRAIT_GOLDEN_DIR, or tests/golden of the source tree.
std::string golden_dir();
/// Walks over every case of golden_dir()/file whose name starts with the prefix; fails when there is none.
void for_each_golden(const std::string& file, const std::string& prefix,
                     const std::function<void(const GoldenCase&)>& body);

}  // namespace krait::testing

namespace krait {
using namespace testing;
}
