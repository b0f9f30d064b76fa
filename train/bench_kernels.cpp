#include "train/bench_kernels.h"

#include <algorithm>
#include <cmath>

#include "kernels/elementwise.h"
#include "kernels/matmul.h"
#include "kernels/reduce.h"

namespace krait::train::bench {

namespace {

double tolerance_of(const KernelBench& b) {
  if (b.tolerance > 0) return b.tolerance;
  if (b.dtype == DType::bf16) return 2e-2;
  return b.unit == Unit::tf32 ? 3e-3 : 1e-4;
}

/// |a - reference| / |reference| in the 2-norm; infinite for anything not finite.
double distance(const Tensor& a, const Tensor& reference) {
  const std::vector<double> x = a.cpu().to_vector<double>(), y = reference.to_vector<double>();
  double difference = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    difference += (x[i] - y[i]) * (x[i] - y[i]);
    norm += y[i] * y[i];
  }
  const double d = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
  return std::isfinite(d) ? d : INFINITY;
}

/// TF32 where the row's ceiling is that of TF32 products.
class ProductPrecision {
 public:
  explicit ProductPrecision(const KernelBench& b) : before_(kernels::tf32()) { kernels::set_tf32(b.unit == Unit::tf32); }
  ~ProductPrecision() { kernels::set_tf32(before_); }

 private:
  bool before_;
};

/// What the timed run itself made: finite and not zero.
std::string look_at(const std::vector<Tensor>& results) {
  for (size_t i = 0; i < results.size(); ++i) {
    const Tensor& t = results[i];
    if (!t.defined() || t.numel() == 0 || !is_floating(t.dtype())) continue;
    const double sum = kernels::sum(kernels::abs(t.contiguous())).item();
    if (!std::isfinite(sum)) return fmt::format("result {} of the timed run is not finite", i);
    if (sum == 0) return fmt::format("result {} of the timed run is zero", i);
  }
  return "";
}

}  // namespace

double product(std::initializer_list<int64_t> factors) {
  double p = 1;
  for (const int64_t f : factors) p *= static_cast<double>(f);
  return p;
}

KernelBench on_cpu(KernelBench k, const Sizes& sizes) {
  k.cuda.clear();
  k.cpu = {{sizes}};
  if (k.dtype == DType::bf16)
    k.work = [half = k.work](const Sizes& s, bool backward) {
      const Work w = half(s, backward);
      return Work{2 * w.bytes, w.flops};
    };
  k.dtype = DType::f32;
  if (k.unit != Unit::none) k.unit = Unit::fp32;
  k.tolerance = 0;
  return k;
}

std::vector<KernelBench> kernel_benches() {
  std::vector<KernelBench> all;
  for (const auto& part : {ssm_benches(), recurrent_benches(), convolution_benches(), transformer_benches(), pointwise_benches()})
    all.insert(all.end(), part.begin(), part.end());
  return all;
}

std::string row_name(const KernelBench& b, const KernelBench::Case& c, bool backward) {
  std::string dtype(b.dtype == DType::bf16 ? "bf16" : b.unit == Unit::tf32 ? "tf32" : "fp32");
  const char* direction = !b.backward_row ? "" : backward ? (b.forward_row ? " fwd+bwd" : " bwd") : " fwd";
  return fmt::format("{} {} {}{}", b.op, c.sizes.str(), dtype, direction);
}

Check check_kernel(const KernelBench& b, Device device, bool backward) {
  const ProductPrecision precision(b);
  Inputs reference_inputs(kCpu, DType::f64, b.dtype), inputs(device, b.dtype, b.dtype);
  const std::vector<Tensor> expected = b.make(reference_inputs, b.check, backward)();
  const std::vector<Tensor> found = b.make(inputs, b.check, backward)();
  Check c;
  c.against = fmt::format("cpu fp64 at {}", b.check.str());
  c.tolerance = tolerance_of(b);
  c.ok = expected.size() == found.size();
  for (size_t i = 0; c.ok && i < expected.size(); ++i) {
    if (!expected[i].defined()) continue;
    c.ok = found[i].defined() && found[i].shape() == expected[i].shape();
    if (c.ok) c.error = std::max(c.error, distance(found[i], expected[i]));
  }
  c.ok = c.ok && c.error <= c.tolerance;
  return c;
}

namespace {

// The copy ceiling is that of large copies. A short kernel also pays for its start and its end, and so does a copy.
void add_copy(Row& row, Device device, double seconds) {
  const auto floats = static_cast<int64_t>(row.work.bytes / 8);
  if (floats == 0 || floats > int64_t{1} << 27) return;
  const Tensor from = full({floats}, 1.5, DType::f32, device);
  Tensor to = empty_like(from);
  row.values["percent_of_a_copy"] = 100 * measure(device, [&] { copy_(to, from); }, {.seconds = seconds / 4}).median_ms / row.time.median_ms;
}

}  // namespace

Row run_kernel(const KernelBench& b, const KernelBench::Case& c, Device device, bool backward, double seconds) {
  Row row;
  row.name = row_name(b, c, backward);
  row.unit = b.unit;
  row.work = b.work(c.sizes, backward);
  row.goal_ms = backward ? c.goal_backward : c.goal_forward;
  try {
    row.check = check_kernel(b, device, backward);
    const ProductPrecision precision(b);
    Inputs inputs(device, b.dtype, b.dtype);
    const Run run = b.make(inputs, c.sizes, backward);
    if (const std::string bad = look_at(run()); !bad.empty()) {
      row.check.ok = false;
      row.check.against += "; " + bad;
    }
    row.time = measure(device, [&] { run(); }, {.seconds = seconds});
    if (device.is_cuda() && b.unit == Unit::none) add_copy(row, device, seconds);
  } catch (const Error& e) {
    row.problem = e.what();
  }
  return row;
}

}  // namespace krait::train::bench
