#pragma once
#include <functional>
#include <initializer_list>

#include "autograd/variable.h"
#include "train/bench.h"

namespace krait::train::bench {

/// Sizes of a row by name, in the order in which they are printed: {{"B", 8}, {"L", 1024}} is "B8 L1024".
struct Sizes {
  std::vector<std::pair<std::string, int64_t>> values;
  int64_t operator[](const std::string& name) const;
  std::string str() const;
};

/// Makes the inputs of a row, always in the same order: the same values on every device and, rounded to the row's
/// dtype, in every precision. Values repeat after about a million elements.
class Inputs {
 public:
  /// `compute`: what tensors are stored in; `row`: the row's dtype, to which values are rounded first.
  Inputs(Device device, DType compute, DType row, std::string stream = "inputs")
      : device_(device), compute_(compute), row_(row), stream_(std::move(stream)) {}

  Tensor normal(const Shape& shape, double std = 1, double mean = 0);
  Tensor uniform(const Shape& shape, double low, double high);
  /// In the dtype of sums: gates, time steps, decays.
  Tensor wide_normal(const Shape& shape, double std = 1, double mean = 0);
  Tensor wide_uniform(const Shape& shape, double low, double high);
  Tensor integers(const Shape& shape, int64_t high);  // int64 in [0, high)
  /// A parameter with a gradient buffer in the dtype of sums, as in training.
  Variable parameter(const Tensor& value) const;
  /// A leaf whose gradient is wanted.
  static Variable leaf(const Tensor& value) { return Variable(value, true); }

  Device device() const { return device_; }
  DType compute() const { return compute_; }
  DType wide() const { return accum_dtype(compute_); }

 private:
  Tensor make(const Shape& shape, bool is_normal, double a, double b, bool wide);
  Device device_;
  DType compute_, row_;
  std::string stream_;  // of the random numbers
  int64_t next_ = 0;
};

/// Does the work of a row once and returns what a check compares. Nothing of it stays behind.
using Run = std::function<std::vector<Tensor>()>;
using Function = std::function<Vars(const Vars&)>;

/// A differentiable function as a row: the forward without a tape, or forward and backward with random gradients of
/// the outputs (1 for scalars); returns the outputs, or the gradients of all leaves.
Run differentiable(Vars in, Function f, bool backward);

/// One operation and the sizes at which it is measured.
struct KernelBench {
  struct Case {
    Sizes sizes;
    double goal_forward = 0, goal_backward = 0;  // ms; 0: none
  };
  std::string op;
  DType dtype = DType::f32;
  Unit unit = Unit::none;
  Sizes check;             // small: compared with the CPU in fp64
  std::vector<Case> cuda, cpu;
  std::function<Run(Inputs&, const Sizes&, bool backward)> make;
  std::function<Work(const Sizes&, bool backward)> work;  // bytes for elements of the row's dtype
  bool forward_row = true, backward_row = true;
  double tolerance = 0;    // of the check, relative in the 2-norm; 0: that of the dtype
};

/// The same operation in fp32 at a size for a CPU.
KernelBench on_cpu(KernelBench k, const Sizes& sizes);
/// The product of sizes, for counting.
double product(std::initializer_list<int64_t> factors);

/// All of them, in the order in which they are printed.
std::vector<KernelBench> kernel_benches();
// By file.
std::vector<KernelBench> ssm_benches();
std::vector<KernelBench> recurrent_benches();
std::vector<KernelBench> convolution_benches();
std::vector<KernelBench> transformer_benches();
std::vector<KernelBench> pointwise_benches();

/// Compares with the CPU in fp64 at the check's sizes, on the same (rounded) inputs.
Check check_kernel(const KernelBench& b, Device device, bool backward);
/// Checks, then measures.
Row run_kernel(const KernelBench& b, const KernelBench::Case& c, Device device, bool backward, double seconds);
std::string row_name(const KernelBench& b, const KernelBench::Case& c, bool backward);

}  // namespace krait::train::bench
