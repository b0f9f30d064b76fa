#include "tests/testing/op_case.h"

#include <cmath>

namespace krait::testing {

namespace {

struct Result {
  std::vector<Tensor> outputs, grads;  // grads: one per input, undefined where none
};

bool is_constant(const OpCase& c, size_t i) {
  if (c.integers.count(i)) return true;
  for (const size_t k : c.constants)
    if (k == i) return true;
  return false;
}

// The inputs of one trial in fp64 (or int64), exact in the given dtype.
std::vector<Tensor> make_inputs(const OpCase& c, const std::vector<Shape>& shapes, const Fill& fill, DType rounding,
                                uint64_t seed) {
  std::vector<Tensor> inputs;
  for (size_t i = 0; i < shapes.size(); ++i) {
    if (const auto it = c.integers.find(i); it != c.integers.end()) {
      inputs.push_back(random_integers(shapes[i], it->second, seed + i));
      continue;
    }
    const auto own = c.fills.find(i);
    inputs.push_back(
        random_tensor(shapes[i], own != c.fills.end() ? own->second : fill, seed + i).to(rounding).to(DType::f64));
  }
  return inputs;
}

Tensor upstream_of(const Tensor& output, size_t i, uint64_t seed) {
  return random_tensor(output.shape(), Normal{}, seed + 1000 + i).to(DType::bf16).to(output.dtype()).to(output.device());
}

Result evaluate(const OpCase& c, const OpFunction& f, const std::vector<Tensor>& inputs, DType dtype, Device device,
                uint64_t seed, bool strided = false) {
  Vars variables;
  for (size_t i = 0; i < inputs.size(); ++i) {
    Tensor t = inputs[i];
    if (is_floating(t.dtype())) t = t.to(dtype);
    t = t.to(device).clone();
    if (strided) t = strided_copy_of(t);
    variables.emplace_back(t, !is_constant(c, i));
  }
  const Outputs out = f(variables);
  Result r;
  Vars differentiable;
  std::vector<Tensor> seeds;
  for (size_t i = 0; i < out.values.size(); ++i) {
    r.outputs.push_back(out.values[i].data());
    if (!out.values[i].requires_grad()) continue;
    differentiable.push_back(out.values[i]);
    seeds.push_back(upstream_of(out.values[i].data(), i, seed));
  }
  if (!differentiable.empty()) backward(differentiable, seeds);
  for (const Variable& v : variables) r.grads.push_back(v.grad());
  return r;
}

std::string label(const OpCase& c, const std::vector<Shape>& shapes, size_t fill, DType dtype) {
  std::string s = fmt::format("{} {} fill {}", c.name, dtype, fill);
  for (const Shape& shape : shapes) s += " " + shape.str();
  return s;
}

void compare(const Result& a, const Result& reference, double tolerance, const std::string& what) {
  REQUIRE(a.outputs.size() == reference.outputs.size());
  for (size_t i = 0; i < a.outputs.size(); ++i) {
    INFO(what << " output " << i << " " << describe(a.outputs[i]) << " against " << describe(reference.outputs[i]));
    CHECK(relative_error(a.outputs[i], reference.outputs[i]) <= tolerance);
  }
  for (size_t i = 0; i < a.grads.size(); ++i) {
    if (!a.grads[i].defined() || !reference.grads[i].defined()) continue;
    INFO(what << " gradient of input " << i);
    CHECK(relative_error(a.grads[i], reference.grads[i]) <= 2 * tolerance);
  }
}

template <class F>
void for_each_trial(const OpCase& c, F body) {
  uint64_t seed = 1;
  for (const auto& shapes : c.shapes)
    for (size_t k = 0; k < c.inputs.size(); ++k) body(shapes, k, seed += 100);
}

}  // namespace

void check_reference(const OpCase& c) {
  REQUIRE(c.run);
  REQUIRE(c.reference);
  REQUIRE(!c.shapes.empty());
  for_each_trial(c, [&](const std::vector<Shape>& shapes, size_t k, uint64_t seed) {
    for (const auto& [dtype, tolerance] : c.tolerance) {
      const auto inputs = make_inputs(c, shapes, c.inputs[k], dtype, seed);
      const std::string what = label(c, shapes, k, dtype);
      const Result reference = evaluate(c, c.reference, inputs, DType::f64, kCpu, seed);
      const Result exact = evaluate(c, c.run, inputs, DType::f64, kCpu, seed);
      compare(exact, Result{reference.outputs, exact.grads}, 1e-9, what + " in fp64");
      const Result result = evaluate(c, c.run, inputs, dtype, kCpu, seed);
      compare(result, Result{reference.outputs, exact.grads}, tolerance, what);
      if (c.strided)
        compare(evaluate(c, c.run, inputs, dtype, kCpu, seed, true), result, tolerance, what + " strided");
    }
  });
}

void check_grad(const OpCase& c) {
  for_each_trial(c, [&](const std::vector<Shape>& shapes, size_t k, uint64_t seed) {
    const auto inputs = make_inputs(c, shapes, c.inputs[k], DType::f64, seed);
    const Result at = evaluate(c, c.run, inputs, DType::f64, kCpu, seed);
    // f(x) = sum of upstream * output, with the upstream of `evaluate`.
    std::vector<std::vector<double>> upstream;
    for (size_t i = 0; i < at.outputs.size(); ++i)
      upstream.push_back(is_floating(at.outputs[i].dtype()) ? upstream_of(at.outputs[i], i, seed).to_vector<double>()
                                                            : std::vector<double>());
    const auto objective = [&](size_t moved, const std::vector<double>& direction, double h) {
      std::vector<Tensor> shifted = inputs;
      shifted[moved] = inputs[moved].clone();
      double* p = shifted[moved].data<double>();
      for (size_t i = 0; i < direction.size(); ++i) p[i] += h * direction[i];
      const NoGrad guard;
      Vars variables;
      for (const Tensor& t : shifted) variables.emplace_back(t);
      const Outputs out = c.run(variables);
      double sum = 0;
      for (size_t i = 0; i < out.values.size(); ++i) {
        if (!is_floating(out.values[i].dtype())) continue;
        const auto y = out.values[i].data().to_vector<double>();
        for (size_t j = 0; j < y.size(); ++j) sum += y[j] * upstream[i][j];
      }
      return sum;
    };
    int64_t elements = 0;
    for (const Tensor& t : inputs) elements += t.numel();
    const uint64_t directions = elements > 20'000 ? 1 : 2;  // each moves every element
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (is_constant(c, i) || inputs[i].numel() == 0) continue;
      INFO(label(c, shapes, k, DType::f64) << " gradient of input " << i);
      REQUIRE(at.grads[i].defined());
      const auto g = at.grads[i].to_vector<double>();
      for (uint64_t trial = 0; trial < directions; ++trial) {
        auto direction = random_tensor(inputs[i].shape(), Normal{}, seed + 7 * trial + 31 * i).to_vector<double>();
        double analytic = 0, scale = 0, norm = 0;
        for (const double d : direction) norm += d * d;
        for (double& d : direction) d /= std::sqrt(norm);
        for (size_t j = 0; j < g.size(); ++j) {
          analytic += g[j] * direction[j];
          scale += g[j] * g[j];
        }
        const double h = c.grad_step;
        const double numeric = (objective(i, direction, h) - objective(i, direction, -h)) / (2 * h);
        INFO("analytic " << analytic << " numeric " << numeric);
        CHECK(std::abs(analytic - numeric) <= c.grad_tolerance * std::max({1.0, std::sqrt(scale), std::abs(numeric)}));
      }
    }
  });
}

void check_twin(const OpCase& c) {
  REQUIRE(cuda_device_count() > 0);
  const Device gpu = cuda_device();
  for_each_trial(c, [&](const std::vector<Shape>& shapes, size_t k, uint64_t seed) {
    auto tolerances = c.tolerance;
    tolerances[DType::f64] = 1e-9;
    for (const auto& [dtype, tolerance] : tolerances) {
      const auto inputs = make_inputs(c, shapes, c.inputs[k], dtype, seed);
      const std::string what = label(c, shapes, k, dtype) + " on cuda";
      const Result cpu = evaluate(c, c.run, inputs, dtype, kCpu, seed);
      compare(evaluate(c, c.run, inputs, dtype, gpu, seed), cpu, tolerance, what);
      if (c.strided) compare(evaluate(c, c.run, inputs, dtype, gpu, seed, true), cpu, tolerance, what + " strided");
    }
  });
}

}  // namespace krait::testing
