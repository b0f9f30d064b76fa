#pragma once
#include <cstdint>
#include <string_view>

namespace krait::train {

enum class ScheduleType { cosine, linear, constant, wsd };
enum class DecayShape { sqrt, linear };  // of WSD: 1 - sqrt(x) (Hägele et al. 2024) or 1 - x

/// Throws ConfigError with the list of names.
ScheduleType schedule_type_from_name(std::string_view name);
std::string_view name_of(ScheduleType type);
DecayShape decay_shape_from_name(std::string_view name);
std::string_view name_of(DecayShape shape);

struct ScheduleOptions {
  ScheduleType type = ScheduleType::cosine;
  double lr = 6e-4;                     // the peak
  int64_t warmup_steps = 0;             // W
  int64_t total_steps = 0;              // T
  double min_lr_ratio = 0;              // min = ratio lr; constant ignores it
  double decay_fraction = 0.2;          // WSD: of T
  DecayShape decay_shape = DecayShape::sqrt;
};

/// Learning rate of step s = 0, 1, ... With lr(x) = min + (lr - min) f(x), x clipped to 1:
///   s < W      lr (s + 1) / W, for all types
///   cosine     f = (1 + cos(pi x)) / 2, x = (s - W) / (T - W)        linear   f = 1 - x, same x
///   wsd        lr before S = T - round(decay_fraction T), then f = 1 - sqrt(x) or 1 - x, x = (s - S) / (T - S)
double learning_rate(const ScheduleOptions& o, int64_t step);

}  // namespace krait::train
