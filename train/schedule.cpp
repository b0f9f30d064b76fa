#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"

namespace krait::train {

ScheduleType schedule_type_from_name(std::string_view name) {
  for (const ScheduleType t : {ScheduleType::cosine, ScheduleType::linear, ScheduleType::constant, ScheduleType::wsd})
    if (name == name_of(t)) return t;
  throw ConfigError(fmt::format("'{}' is no learning-rate schedule; known: cosine, linear, constant, wsd", name));
}

std::string_view name_of(ScheduleType type) {
  switch (type) {
    case ScheduleType::cosine: return "cosine";
    case ScheduleType::linear: return "linear";
    case ScheduleType::constant: return "constant";
    case ScheduleType::wsd: return "wsd";
  }
  return "?";
}

DecayShape decay_shape_from_name(std::string_view name) {
  if (name == "sqrt") return DecayShape::sqrt;
  if (name == "linear") return DecayShape::linear;
  throw ConfigError(fmt::format("'{}' is no decay shape; known: sqrt, linear", name));
}

std::string_view name_of(DecayShape shape) { return shape == DecayShape::sqrt ? "sqrt" : "linear"; }

double learning_rate(const ScheduleOptions& o, int64_t step) {
  const auto part = [&](int64_t begin) {
    const auto length = static_cast<double>(std::max<int64_t>(1, o.total_steps - begin));
    return std::min(1.0, static_cast<double>(step - begin) / length);
  };
  const double low = o.lr * o.min_lr_ratio;
  const auto between = [&](double f) { return low + (o.lr - low) * f; };

  if (step < o.warmup_steps) return o.lr * static_cast<double>(step + 1) / static_cast<double>(o.warmup_steps);
  switch (o.type) {
    case ScheduleType::constant: return o.lr;
    case ScheduleType::cosine: return between(0.5 * (1 + std::cos(std::numbers::pi * part(o.warmup_steps))));
    case ScheduleType::linear: return between(1 - part(o.warmup_steps));
    case ScheduleType::wsd: break;
  }
  const auto decay_steps = static_cast<int64_t>(std::nearbyint(o.decay_fraction * static_cast<double>(o.total_steps)));
  const int64_t start = o.total_steps - decay_steps;
  if (step < start) return o.lr;
  const double x = part(start);
  return between(1 - (o.decay_shape == DecayShape::sqrt ? std::sqrt(x) : x));
}

}  // namespace krait::train
