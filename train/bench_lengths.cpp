#include "core/allocator.h"
#include "core/random.h"
#include "layers/parameter_store.h"
#include "layers/registry.h"
#include "train/bench_run.h"
#include "train/progress.h"

namespace krait::train::bench {

namespace {

constexpr const char* kKinds[] = {"attention", "mamba", "mamba2", "mlstm", "slstm", "s4", "s4d", "linear_attention", "lstm", "gated_cnn"};

std::string length_text(int64_t l) { return l >= 1024 ? fmt::format("{}k", l / 1024) : fmt::format("{}", l); }

/// Forward and backward of one layer over one sequence.
Row measure_length(const std::string& name, const std::string& kind, int64_t length, int64_t d_model, Device device, DType dtype, double seconds) {
  Row row;
  row.name = name;
  layers::LayerContext context;
  context.d_model = d_model;
  context.n_branches = 1;
  context.context = length;
  context.residual_std = 0.02;
  const std::shared_ptr<layers::Mixer> mixer = layers::make_mixer(kind, ConfigNode::map(), context);
  layers::ParameterStore store(*mixer, {.device = device, .compute = dtype, .seed = 1});
  mixer->set_training(true);
  Tensor values = empty({1, length, d_model}, DType::f32, kCpu);
  fill_normal_(values, 0, 1, 3);
  Variable x(values.to(dtype).to(device), true);
  const Tensor dy = x.data();
  Allocator& memory = allocator(device);
  memory.reset_peak();
  const auto once = [&] {
    backward({mixer->forward(x, {}, nullptr)}, {dy});
    x.clear_grad();
  };
  row.time = measure(device, once, {.seconds = seconds, .min_laps = 2, .max_laps = 50, .cold = false});
  row.values["ns_per_token"] = 1e6 * row.time.median_ms / static_cast<double>(length);
  row.values["peak_bytes"] = static_cast<double>(memory.stats().peak_bytes);
  return row;
}

}  // namespace

int bench_lengths(const BenchCommand& command) {
  const Device device = bench_device(command);
  const int64_t d_model = device.is_cpu() ? 64 : 768;
  const DType dtype = device.is_cpu() ? DType::f32 : DType::bf16;
  const double patience_ms = device.is_cpu() ? 1500 : 3000;  // of one run: longer lengths of the kind are left out
  std::vector<std::string> names;
  std::vector<std::pair<std::string, int64_t>> what;
  for (const char* kind : kKinds)
    for (int64_t l = 512; l <= 512 * 1024; l *= 2) {
      names.push_back(fmt::format("{} d{} L{} {}", kind, d_model, length_text(l), dtype == DType::bf16 ? "bf16" : "fp32"));
      what.emplace_back(kind, l);
    }
  const std::vector<size_t> chosen = select_rows(names, command);
  if (command.list) return 0;
  Output out(command, "lengths", device);
  out.note(table_head("lengths: one layer, one sequence, fwd+bwd"));
  std::map<std::string, std::map<int64_t, double>> times;
  std::map<std::string, std::string> stopped;  // kinds that ran out of time or memory, and why
  for (const size_t i : chosen) {
    const auto& [kind, length] = what[i];
    Row row;
    row.name = names[i];
    if (stopped.contains(kind)) {
      row.problem = stopped[kind];
    } else {
      try {
        row = measure_length(names[i], kind, length, d_model, device, dtype, command.seconds > 0 ? command.seconds : 0.1);
        times[kind][length] = row.time.median_ms;
        if (2 * row.time.median_ms > patience_ms) stopped[kind] = "left out: too long for this device";
      } catch (const Error& e) {
        row.problem = e.what();
        stopped[kind] = "left out: the length before failed";
      }
      allocator(device).release_cached();
    }
    out.add(row);
  }
  for (const auto& [kind, by_length] : times) {
    if (kind == "attention" || !times.contains("attention")) continue;
    std::string crossover = "not up to the longest measured";
    for (const auto& [length, ms] : by_length) {
      const auto it = times["attention"].find(length);
      if (it == times["attention"].end() || ms > it->second) continue;
      crossover = "from L = " + length_text(length) + " on";
      break;
    }
    out.note(fmt::format("{}: faster than attention {}", kind, crossover));
  }
  return out.finish();
}

}  // namespace krait::train::bench
