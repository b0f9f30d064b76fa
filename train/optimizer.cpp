#include "train/optimizer.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "kernels/adamw.h"
#include "kernels/lion.h"
#include "kernels/set_scalars.h"
#include "kernels/sgd.h"

namespace krait::train {

OptimizerType optimizer_type_from_name(std::string_view name) {
  for (const OptimizerType t : {OptimizerType::adamw, OptimizerType::sgd, OptimizerType::lion})
    if (name == name_of(t)) return t;
  throw ConfigError(fmt::format("'{}' is no optimizer; known: adamw, sgd, lion", name));
}

std::string_view name_of(OptimizerType type) {
  switch (type) {
    case OptimizerType::adamw: return "adamw";
    case OptimizerType::sgd: return "sgd";
    case OptimizerType::lion: return "lion";
  }
  return "?";
}

int states_per_parameter(OptimizerType type, double momentum) {
  if (type == OptimizerType::adamw) return 2;
  return type == OptimizerType::lion || momentum > 0 ? 1 : 0;
}

Optimizer::Optimizer(const OptimizerOptions& options, Tensor param, Tensor grad, Tensor compute,
                     const std::vector<kernels::SegmentSpec>& segments, int64_t first)
    : options_(options),
      buffers_{.param = std::move(param), .grad = std::move(grad), .compute = std::move(compute),
               .hyper = {}, .clip = {}} {
  const Device device = buffers_.param.device();
  const auto cut = std::find_if(segments.begin(), segments.end(), [&](const auto& s) { return s.offset >= first; });
  const auto add_part = [&](int64_t begin, int64_t end, std::vector<kernels::SegmentSpec> of) {
    for (kernels::SegmentSpec& s : of) s.offset -= begin;
    parts_.push_back({begin, end, kernels::make_optimizer_segments(of, end - begin, device)});
  };
  if (first > 0) add_part(0, first, {segments.begin(), cut});
  if (first < buffers_.param.numel()) add_part(first, buffers_.param.numel(), {cut, segments.end()});
  buffers_.hyper = zeros({3}, DType::f64, device);
  skipped_ = zeros({1}, DType::i64, device);
  const int states = states_per_parameter(options_.type, options_.momentum);
  if (states > 0) exp_avg_ = zeros_like(buffers_.param);
  if (states > 1) exp_avg_sq_ = zeros_like(buffers_.param);
  prepare(0, 0);
}

void Optimizer::prepare(double lr, int64_t step) {
  KRAIT_CHECK(step >= 0, "optimizer: step {} is negative", step);
  const auto unbias = [&](double beta) { return 1 / (1 - std::pow(beta, static_cast<double>(step + 1))); };
  const std::array<double, 3> values{lr, unbias(options_.beta1), unbias(options_.beta2)};
  kernels::set_scalars(buffers_.hyper, values);
}

void Optimizer::update(const kernels::GradNorm& clip, bool zero_grad, const std::function<void()>& between) {
  kernels::FlatUpdate u = buffers_;
  u.clip = clip.values;
  u.zero_grad = zero_grad;
  for (const Part& part : parts_) {
    update(part, u);
    if (between && part.begin == 0) between();
  }
}

void Optimizer::update(const Part& part, kernels::FlatUpdate u) {
  const auto of_part = [&](const Tensor& t) { return t.defined() ? t.slice(0, part.begin, part.end) : t; };
  for (Tensor* t : {&u.param, &u.grad, &u.compute}) *t = of_part(*t);
  const Tensor m = of_part(exp_avg_), v = of_part(exp_avg_sq_);
  switch (options_.type) {
    case OptimizerType::adamw: return kernels::adamw_(u, m, v, part.segments, {options_.beta1, options_.beta2, options_.eps});
    case OptimizerType::sgd: return kernels::sgd_(u, m, part.segments, {options_.momentum, options_.nesterov});
    case OptimizerType::lion: return kernels::lion_(u, m, part.segments, {options_.beta1, options_.beta2});
  }
}

std::vector<std::pair<std::string, Tensor>> Optimizer::state() const {
  std::vector<std::pair<std::string, Tensor>> named;
  if (exp_avg_.defined()) named.emplace_back("optimizer.exp_avg", exp_avg_);
  if (exp_avg_sq_.defined()) named.emplace_back("optimizer.exp_avg_sq", exp_avg_sq_);
  named.emplace_back("optimizer.skipped_steps", skipped_);
  return named;
}

}  // namespace krait::train
