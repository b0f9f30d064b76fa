#include "train/optimizer.h"

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

Optimizer::Optimizer(const OptimizerOptions& options, Tensor param, Tensor grad, Tensor compute,
                     const std::vector<kernels::SegmentSpec>& segments)
    : options_(options),
      buffers_{.param = std::move(param), .grad = std::move(grad), .compute = std::move(compute),
               .hyper = {}, .clip = {}},
      segments_(kernels::make_optimizer_segments(segments, buffers_.param.numel(), buffers_.param.device())) {
  const Device device = buffers_.param.device();
  buffers_.hyper = zeros({3}, DType::f64, device);
  skipped_ = zeros({1}, DType::i64, device);
  if (options_.type != OptimizerType::sgd || options_.momentum > 0) exp_avg_ = zeros_like(buffers_.param);
  if (options_.type == OptimizerType::adamw) exp_avg_sq_ = zeros_like(buffers_.param);
  prepare(0, 0);
}

void Optimizer::prepare(double lr, int64_t step) {
  KRAIT_CHECK(step >= 0, "optimizer: step {} is negative", step);
  const auto unbias = [&](double beta) { return 1 / (1 - std::pow(beta, static_cast<double>(step + 1))); };
  const std::array<double, 3> values{lr, unbias(options_.beta1), unbias(options_.beta2)};
  kernels::set_scalars(buffers_.hyper, values);
}

void Optimizer::update(const kernels::GradNorm& clip, bool zero_grad) {
  kernels::FlatUpdate u = buffers_;
  u.clip = clip.values;
  u.zero_grad = zero_grad;
  switch (options_.type) {
    case OptimizerType::adamw:
      return kernels::adamw_(u, exp_avg_, exp_avg_sq_, segments_, {options_.beta1, options_.beta2, options_.eps});
    case OptimizerType::sgd: return kernels::sgd_(u, exp_avg_, segments_, {options_.momentum, options_.nesterov});
    case OptimizerType::lion: return kernels::lion_(u, exp_avg_, segments_, {options_.beta1, options_.beta2});
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
