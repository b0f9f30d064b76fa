#include <algorithm>
#include <cmath>

#include "core/random.h"
#include "train/bench_kernels.h"

namespace krait::train::bench {

int64_t Sizes::operator[](const std::string& name) const {
  for (const auto& [key, value] : values)
    if (key == name) return value;
  throw_error(fmt::format("bench: no size is called {}", name));
}

std::string Sizes::str() const {
  std::string text;
  for (const auto& [key, value] : values) text += fmt::format("{}{}{}", text.empty() ? "" : " ", key, value);
  return text;
}

namespace {

constexpr int64_t kBlock = 1048573;  // a prime: rows of a matrix do not repeat

// `block` over and over, in a new tensor of the shape.
Tensor repeated(const Tensor& block, const Shape& shape) {
  const int64_t n = shape.numel(), size = block.numel();
  if (n == size) return block.view(shape);
  Tensor all = empty({n}, block.dtype(), block.device());
  const int64_t times = n / size;
  Tensor whole = all.slice(0, 0, times * size).view({times, size});
  copy_(whole, block.unsqueeze(0).expand({times, size}));
  if (Tensor rest = all.slice(0, times * size, n); rest.numel() > 0) copy_(rest, block.slice(0, 0, rest.numel()));
  return all.view(shape);
}

}  // namespace

Tensor Inputs::make(const Shape& shape, bool is_normal, double a, double b, bool wide) {
  Tensor block = empty({std::min(shape.numel(), kBlock)}, DType::f64, kCpu);
  const uint64_t key = random_key(7, fmt::format("{}.{}", stream_, next_++));
  if (is_normal)
    fill_normal_(block, a, b, key);
  else
    fill_uniform_(block, a, b, key);
  const Tensor rounded = block.to(wide ? accum_dtype(row_) : row_);
  return repeated(rounded.to(wide ? accum_dtype(compute_) : compute_).to(device_), shape);
}

Tensor Inputs::normal(const Shape& shape, double std, double mean) { return make(shape, true, mean, std, false); }
Tensor Inputs::uniform(const Shape& shape, double low, double high) { return make(shape, false, low, high, false); }
Tensor Inputs::wide_normal(const Shape& shape, double std, double mean) { return make(shape, true, mean, std, true); }
Tensor Inputs::wide_uniform(const Shape& shape, double low, double high) { return make(shape, false, low, high, true); }

Tensor Inputs::integers(const Shape& shape, int64_t high) {
  Tensor values = empty({std::min(shape.numel(), kBlock)}, DType::f64, kCpu);
  fill_uniform_(values, 0, static_cast<double>(high), random_key(7, fmt::format("{}.{}", stream_, next_++)));
  Tensor block = empty(values.shape(), DType::i64, kCpu);
  for (int64_t i = 0; i < block.numel(); ++i)
    block.data<int64_t>()[i] = std::min(static_cast<int64_t>(values.data<double>()[i]), high - 1);
  return repeated(block.to(device_), shape);
}

Variable Inputs::parameter(const Tensor& value) const {
  Variable v(value, true);
  v.set_grad(zeros(value.shape(), accum_dtype(value.dtype()), value.device()));
  return v;
}

Run differentiable(Vars in, Function f, bool backward) {
  if (!backward) {
    return [in = std::move(in), f = std::move(f)] {
      const NoGrad guard;
      std::vector<Tensor> out;
      for (const Variable& y : f(in)) out.push_back(y.data());
      return out;
    };
  }
  auto seeds = std::make_shared<std::vector<Tensor>>();
  return [in = std::move(in), f = std::move(f), seeds]() mutable {
    const Vars out = f(in);
    if (seeds->empty()) {
      // Rounded to bf16, which every dtype holds: the reference gets the same gradients.
      for (const Variable& y : out) {
        Inputs make(y.device(), y.dtype(), DType::bf16, fmt::format("gradients.{}", seeds->size()));
        seeds->push_back(y.data().numel() == 1 ? ones(y.shape(), y.dtype(), y.device()) : make.normal(y.shape()));
      }
    }
    krait::backward(out, *seeds);
    std::vector<Tensor> grads;
    for (Variable& v : in) {
      if (!v.requires_grad()) continue;
      grads.push_back(v.grad());
      if (!v.accumulates_in_place()) v.clear_grad();
    }
    return grads;
  };
}

}  // namespace krait::train::bench
