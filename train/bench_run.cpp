#include "train/bench_run.h"

#include "core/allocator.h"
#include "core/config_node.h"
#include "core/device_timer.h"
#include "core/parallel.h"
#include "train/bench_kernels.h"
#include "train/files.h"
#include "train/progress.h"

namespace krait::train::bench {

Output::Output(const BenchCommand& command, std::string kind, Device device) : command_(command) {
  report_.kind = std::move(kind);
  report_.device = device;
  if (!command_.only.empty()) return;
  const DeviceInfo info = device_info(device);
  if (device.is_cpu()) {
    note(fmt::format("device: {}, {} threads", info.name, num_threads()));
  } else {
    const CudaVersions v = cuda_versions();
    note(fmt::format("device: {}, {} multiprocessors, {}, CUDA {}, driver {}", info.name, info.multiprocessors,
                     human_bytes(info.total_bytes), v.runtime, v.driver));
  }
}

void Output::note(const std::string& line) {
  fmt::print("{}\n", line);
  std::fflush(stdout);
}

void Output::measure_ceilings() {
  report_.ceilings = bench::measure_ceilings(report_.device, report_.device.is_cpu() ? 0.3 : 0.15);
  allocator(report_.device).release_cached();
  std::string line = fmt::format("ceilings: copy {:.0f} GB/s", report_.ceilings.copy / 1e9);
  for (const auto& [name, rate] : report_.ceilings.product)
    line += rate > 1e13 ? fmt::format(", {} {:.0f} TFLOP/s", name, rate / 1e12) : fmt::format(", {} {:.0f} GFLOP/s", name, rate / 1e9);
  note(line);
  note(table_head(report_.kind));
}

void Output::add(const Row& row) {
  report_.rows.push_back(row);
  if (command_.only.empty()) note(table_line(row, report_.ceilings));
}

int Output::finish() {
  if (!command_.json.empty()) write_file_atomic(command_.json, to_json(report_));
  int64_t wrong = 0;
  for (const Row& r : report_.rows) wrong += !r.check.ok || (!r.problem.empty() && report_.kind != "lengths");
  std::vector<std::string> slower;
  if (!command_.baseline.empty()) {
    slower = regressions(report_, baseline_from_json(read_file(command_.baseline), command_.baseline), command_.margin);
    note(fmt::format("{} of {} rows slower than {}{}", slower.size(), report_.rows.size(), command_.baseline,
                     slower.empty() ? "" : ":"));
    for (const std::string& line : slower) note("  " + line);
  }
  if (wrong > 0 && command_.only.empty()) note(fmt::format("{} of {} rows failed or are wrong", wrong, report_.rows.size()));
  return slower.empty() && wrong == 0 ? 0 : 1;
}

Device bench_device(const BenchCommand& command) {
  if (command.device == "cpu" || (command.device == "auto" && cuda_device_count() == 0)) return kCpu;
  if (cuda_device_count() == 0)
    throw ConfigError(fmt::format("--device cuda: {}", built_with_cuda() ? "no CUDA device found" : "this build has no CUDA"));
  return cuda_device();
}

std::vector<size_t> select_rows(const std::vector<std::string>& names, const BenchCommand& command) {
  std::vector<size_t> chosen;
  for (size_t i = 0; i < names.size(); ++i)
    if (command.only.empty() ? matches(names[i], command.filter) : names[i] == command.only) chosen.push_back(i);
  if (chosen.empty()) {
    std::string some;
    for (const std::string& name : names) {
      const std::string op = name.substr(0, name.find(' '));
      if (some.find(op) == std::string::npos) some += (some.empty() ? "" : ", ") + op;
    }
    throw ConfigError(fmt::format("--filter {}: no row has these words\n       rows: {}; --list prints them whole, --device those of another device",
                                  command.only.empty() ? command.filter : command.only, some));
  }
  if (command.list)
    for (const size_t i : chosen) fmt::print("{}\n", names[i]);
  return chosen;
}

int bench_kernels(const BenchCommand& command) {
  const Device device = bench_device(command);
  struct Item {
    const KernelBench* bench;
    const KernelBench::Case* size;
    bool backward;
  };
  const std::vector<KernelBench> all = kernel_benches();
  std::vector<Item> items;
  std::vector<std::string> names;
  for (const KernelBench& b : all)
    for (const KernelBench::Case& c : device.is_cpu() ? b.cpu : b.cuda)
      for (const bool backward : {false, true})
        if (backward ? b.backward_row : b.forward_row) {
          items.push_back({&b, &c, backward});
          names.push_back(row_name(b, c, backward));
        }
  const std::vector<size_t> chosen = select_rows(names, command);
  if (command.list) return 0;
  Output out(command, "kernels", device);
  out.measure_ceilings();
  for (const size_t i : chosen) {
    out.add(run_kernel(*items[i].bench, *items[i].size, device, items[i].backward,
                       command.seconds > 0 ? command.seconds : 0.25));
    allocator(device).release_cached();
  }
  return out.finish();
}

}  // namespace krait::train::bench

namespace krait::train {

int run_bench(const BenchCommand& command) {
  if (!command.baseline.empty())  // before anything is measured
    bench::baseline_from_json(read_file(command.baseline), command.baseline);
  if (command.what == "kernels") return bench::bench_kernels(command);
  if (command.what == "train") return bench::bench_train(command);
  return command.what == "decode" ? bench::bench_decode(command) : bench::bench_lengths(command);
}

}  // namespace krait::train
