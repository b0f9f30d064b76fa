#include <cmath>
#include <ctime>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <thread>
#include <unistd.h>

#include "core/allocator.h"
#include "core/device_timer.h"
#include "train/bench_models.h"
#include "train/bench_run.h"
#include "train/child_process.h"
#include "train/files.h"
#include "train/progress.h"
#include "train/step.h"

namespace krait::train::bench {

namespace {

/// Since the start of this process.
double process_seconds() {
  const std::string stat = read_file("/proc/self/stat");
  size_t at = stat.rfind(')');  // the program's name may hold anything
  for (int field = 2; field < 22 && at != std::string::npos; ++field) at = stat.find(' ', at + 1);
  KRAIT_CHECK(at != std::string::npos, "/proc/self/stat has no start time");
  const double start = std::stod(stat.substr(at + 1)) / static_cast<double>(sysconf(_SC_CLK_TCK));
  timespec now{};
  clock_gettime(CLOCK_BOOTTIME, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec) - start;
}

Unit unit_of(const Config& config, Device device) {
  if (device.is_cpu()) return Unit::fp32;
  return config.runtime.precision == "bf16" ? Unit::bf16 : config.runtime.tf32 ? Unit::tf32 : Unit::fp32;
}

/// Steps as `krait train` runs them, in this process.
Row measure_model(const BenchModel& model, Device device, double seconds) {
  Row row;
  row.name = model.name;
  row.goal_ms = model.goal_ms;
  const Config config = bench_config(model, device);
  Session session = bench_session(config);
  row.unit = unit_of(config, device);
  TrainStep step(session);
  std::vector<std::vector<data::Batch>> batches;  // a few, so that nothing is learnt by heart while it is timed
  for (int64_t i = 0; i < 4; ++i) batches.push_back({random_batch(config, i)});

  int64_t next = 0;
  const auto one = [&] {
    step.run(batches[static_cast<size_t>(next) % batches.size()], next);
    ++next;
  };
  one();
  const double first_loss = step.report().loss;
  const double first = process_seconds();
  one();  // captures the graphs
  one();
  synchronize(device);
  const auto laps = [&](int64_t n) {
    DeviceTimer timer(device, n);
    for (int64_t i = 0; i < n; ++i) {
      timer.begin(i);
      one();
      timer.end(i);
    }
    return timer.milliseconds();
  };
  const double guess = summarize(laps(1)).median_ms;
  const int64_t allocations = allocator(device).stats().system_allocations;
  row.time = summarize(laps(std::clamp<int64_t>(static_cast<int64_t>(1e3 * seconds / std::max(guess, 0.01)), 5, 2000)));
  row.time.method = step.captured() ? "events around whole steps, captured graphs" : device.is_cpu() ? "clock" : "events around whole steps";
  const StepReport last = step.report();
  row.check = {"the loss is finite and falls", last.loss, first_loss, std::isfinite(last.loss) && !last.skipped && last.loss <= first_loss * 1.02};

  const MemoryStats memory = allocator(device).stats();
  const auto tokens = static_cast<double>(model.batch * (config.data.task ? 1 : model.context));
  row.work.flops = session.model->train_flops_per_token(config.data.context) * static_cast<double>(model.batch * model.context);
  row.values[config.data.task ? "samples_per_s" : "tokens_per_s"] = 1e3 * tokens / row.time.median_ms;
  row.values["peak_bytes"] = static_cast<double>(memory.peak_bytes);
  row.values["reserved_bytes"] = static_cast<double>(memory.reserved_bytes);
  row.values["first_step_s"] = first;
  row.values["parameters"] = static_cast<double>(session.parameters->parameter_count());
  row.values["allocations_while_timed"] = static_cast<double>(memory.system_allocations - allocations);
  return row;
}

/// What a process started with --only left.
Row row_from_json(const nlohmann::json& j, const BenchModel& model) {
  Row row;
  row.name = model.name;
  row.goal_ms = model.goal_ms;
  if (j.contains("problem")) {
    row.problem = j["problem"];
    return row;
  }
  row.time = {j.at("median_ms"), j.at("p10_ms"), j.at("p90_ms"), j.at("laps"), j.at("extra_bytes"), j.at("method")};
  row.work.flops = j.at("flops");
  for (const auto& [name, value] : j.items())
    if (name.ends_with("_per_s") || name.ends_with("_bytes") || name == "first_step_s" || name == "parameters" ||
        name == "allocations_while_timed")
      if (name != "extra_bytes") row.values[name] = value;
  const auto& check = j.at("check");
  row.check = {check.at("against"), check.at("error"), check.at("tolerance"), check.at("ok")};
  return row;
}

/// A process of its own: its start counts, and nobody else's memory does.
Row measure_apart(const BenchModel& model, Device device, const BenchCommand& command) {
  const std::string base =
      (std::filesystem::temp_directory_path() / fmt::format("krait-bench-{}-{}", getpid(), model.base)).string();
  const std::string json = base + ".json", log = base + ".log";
  std::vector<std::string> arguments{own_program(), "bench", "train", "--only", model.name, "--json", json,
                                     "--device", device.is_cpu() ? "cpu" : "cuda"};
  if (command.seconds > 0) arguments.insert(arguments.end(), {"--time", fmt::format("{}", command.seconds)});
  ChildProcess child(arguments, {}, log);
  int status = 0;
  while (child.running(status)) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  Row row;
  row.name = model.name;
  if (std::filesystem::exists(json)) {
    row = row_from_json(nlohmann::json::parse(read_file(json)).at("rows").at(0), model);
  } else {
    const std::string text = std::filesystem::exists(log) ? read_file(log) : "";
    row.problem = fmt::format("exit status {}: {}", status, text.substr(0, text.find_last_not_of('\n') + 1));
  }
  std::error_code ignored;
  std::filesystem::remove(json, ignored);
  std::filesystem::remove(log, ignored);
  return row;
}

}  // namespace

int bench_train(const BenchCommand& command) {
  const Device device = bench_device(command);
  std::vector<std::string> names;
  std::vector<BenchModel> models;
  for (const BenchModel& m : bench_models()) {
    if (m.cuda == device.is_cpu()) continue;
    names.push_back(m.name);
    models.push_back(m);
  }
  const std::vector<size_t> chosen = select_rows(names, command);
  if (command.list) return 0;
  Output out(command, "train", device);
  if (!command.only.empty()) {
    Row row;
    row.name = names[chosen.front()];
    try {
      row = measure_model(models[chosen.front()], device, command.seconds > 0 ? command.seconds : 2.0);
    } catch (const Error& e) {
      row.problem = e.what();
    }
    out.add(row);
    return out.finish();
  }
  out.measure_ceilings();
  for (const size_t i : chosen) {
    Row row = measure_apart(models[i], device, command);
    if (const double rate = out.report().ceilings.rate(row.unit = row.work.flops > 0 ? unit_of(bench_config(models[i], device), device) : Unit::none); rate > 0)
      row.values["mfu"] = row.work.flops / (1e-3 * row.time.median_ms * rate);
    out.add(row);
  }
  return out.finish();
}

}  // namespace krait::train::bench
