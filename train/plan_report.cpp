#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "train/plan.h"
#include "train/progress.h"

namespace krait::train {
namespace {

// Small models have small numbers, and none of them is nothing.
std::string amount(double bytes) {
  constexpr double kGiB = 1024.0 * 1024 * 1024;
  return bytes < kGiB / 10 ? human_bytes(std::llround(bytes)) : fmt::format("{:.2f} GiB", bytes / kGiB);
}
std::string duration(double seconds) {
  return seconds < 1e-4 ? fmt::format("{:.2g} us", seconds * 1e6) : fmt::format("{:.2f} ms", seconds * 1e3);
}

std::string count(double n) {
  for (const auto& [scale, suffix] : {std::pair{1e12, "T"}, {1e9, "G"}, {1e6, "M"}, {1e3, "k"}})
    if (n >= scale) return fmt::format("{:.1f} {}", n / scale, suffix);
  return fmt::format("{:.0f}", n);
}

}  // namespace

std::string plan_text(const Plan& p, const Config& config, const Machine& machine) {
  std::string out = fmt::format("{}: {} x {}, data {} x sequence {} x tensor {}, ZeRO {}\n", config.name, p.ranks,
                                machine.name, p.data, p.sequence, p.tensor, p.zero);
  const auto line = [&](const std::string& what, const std::string& value) { out += fmt::format("  {:<42}{}\n", what, value); };
  line("parameters", fmt::format("{}, {} on each rank", count(static_cast<double>(p.parameters)),
                                 count(static_cast<double>(p.parameters_per_rank))));
  line("model FLOPs per token", count(p.flops_per_token));
  line("step", fmt::format("{} tokens, {} micro-batch{} of {} sequences on each data rank", p.tokens_per_step,
                           p.micro_batches, p.micro_batches == 1 ? "" : "es", config.train.micro_batch_size));
  out += "memory of a rank\n";
  for (const auto& [what, bytes] : {std::pair<const char*, double>{"weights", p.memory.weights},
                                    {"gradients", p.memory.gradients},
                                    {"optimizer", p.memory.optimizer},
                                    {"activations", p.memory.activations},
                                    {"workspace", p.memory.workspace},
                                    {"total", p.memory.total()}})
    line(what, amount(bytes));
  if (!p.traffic.empty()) out += "sent by a rank in a step\n";
  for (const PlannedTraffic& t : p.traffic)
    line(fmt::format("{} ({})", t.what, t.group), fmt::format("{} in {:.0f} calls, {}, {} of it exposed", amount(t.bytes),
                                                             t.calls, duration(t.seconds),
                                                             duration(t.exposed_seconds)));
  out += "predicted\n";
  line("computation", duration(p.compute_seconds));
  line("step", duration(p.step_seconds));
  line("tokens/s", fmt::format("{}, {} on each GPU", count(p.tokens_per_s),
                               count(p.tokens_per_s / static_cast<double>(p.ranks))));
  line("of the matrix rate", fmt::format("{:.1f} %", 100 * p.mfu));
  line("efficiency", fmt::format("{:.1f} % of one GPU's tokens/s, on each", 100 * p.efficiency));
  for (const std::string& w : p.warnings) out += "warning: " + w + "\n";
  return out;
}

std::string plan_json(const Plan& p, const Machine& machine) {
  nlohmann::ordered_json traffic = nlohmann::ordered_json::array();
  for (const PlannedTraffic& t : p.traffic)
    traffic.push_back({{"what", t.what}, {"group", t.group}, {"calls", t.calls}, {"bytes", t.bytes},
                       {"seconds", t.seconds}, {"exposed_seconds", t.exposed_seconds}});
  const nlohmann::ordered_json j{
      {"machine", machine.name},
      {"ranks", p.ranks},
      {"mesh", {{"data", p.data}, {"sequence", p.sequence}, {"tensor", p.tensor}, {"zero", p.zero}}},
      {"micro_batches", p.micro_batches},
      {"tokens_per_step", p.tokens_per_step},
      {"parameters", p.parameters},
      {"parameters_per_rank", p.parameters_per_rank},
      {"flops_per_token", p.flops_per_token},
      {"memory_bytes",
       {{"weights", p.memory.weights},
        {"gradients", p.memory.gradients},
        {"optimizer", p.memory.optimizer},
        {"activations", p.memory.activations},
        {"workspace", p.memory.workspace},
        {"total", p.memory.total()}}},
      {"communication", traffic},
      {"compute_seconds", p.compute_seconds},
      {"step_seconds", p.step_seconds},
      {"tokens_per_s", p.tokens_per_s},
      {"mfu", p.mfu},
      {"efficiency", p.efficiency},
      {"warnings", p.warnings}};
  return j.dump(2) + "\n";
}

}  // namespace krait::train
