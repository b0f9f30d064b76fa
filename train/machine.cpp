#include "train/machine.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/option_reader.h"
#include "train/yaml.h"

namespace krait::train {
namespace {

// Rates of the H100 and layer_ns of attention, mlp, head, Mamba, Mamba-2 and xLSTM: fitted to the whole steps in README on
// one H100; link and bandwidth of the H200, and sequence_ns of attention, Mamba and Mamba-2: to GPT-2's, Mamba's and
// Mamba-2's steps on one and two of them. The rest are the data sheets' shares; the cpu is one core of a server, roughly.
constexpr const char* kTable = R"(# krait plan --show-hardware > mine.yaml; edit; krait plan CONFIG --hardware mine.yaml --machine NAME
machines:
  h100-sxm:
    matmul_tflops: {bf16: 700, tf32: 375, fp32: 50, fp64: 50}
    memory_gb: 79
    bandwidth_gb_s: 3030
    attention_tflops: 400
    gpus_per_node: 8
    link_gb_s: 180
    link_latency_us: 12
    network_gb_s: 45
    network_latency_us: 25
  h200:
    matmul_tflops: {bf16: 700, tf32: 375, fp32: 50, fp64: 50}
    memory_gb: 139
    bandwidth_gb_s: 2900
    attention_tflops: 400
    gpus_per_node: 8
    link_gb_s: 180
    link_latency_us: 12
    network_gb_s: 45
    network_latency_us: 25
  a100:
    matmul_tflops: {bf16: 250, tf32: 120, fp32: 17, fp64: 17}
    memory_gb: 79
    bandwidth_gb_s: 1750
    attention_tflops: 150
    gpus_per_node: 8
    link_gb_s: 230
    link_latency_us: 15
    network_gb_s: 22
    network_latency_us: 25
  cpu:
    matmul_tflops: {bf16: 0.02, tf32: 0.1, fp32: 0.1, fp64: 0.05}
    memory_gb: 8
    bandwidth_gb_s: 10
    attention_tflops: 0.03
    gpus_per_node: 8
    link_gb_s: 3
    link_latency_us: 5
    network_gb_s: 1
    network_latency_us: 50
layer_bandwidth_gb_s: 3030
layer_ns: {attention: 12, mlp: 16, head: 10, mamba: 70, mamba2: 58, mlstm: 105, slstm: 260, s4: 150, s4d: 150,
           linear_attention: 150, gated_cnn: 40, rnn: 900, lstm: 900, gru: 900, kan: 200}
sequence_ns: {attention: 25, mamba: 68, mamba2: 36, mlstm: 60, s4: 60, s4d: 60, linear_attention: 60}
)";

std::map<std::string, double> read_rates(ConfigNode& section) {
  std::map<std::string, double> rates;
  OptionReader options(section);
  for (const auto& entry : section.entries()) {
    double value = 0;
    options.read(entry.first, value, at_least(0));
    rates[entry.first] = value;
  }
  options.finish();
  return rates;
}

Machine read_machine(const std::string& name, ConfigNode& section) {
  Machine m;
  m.name = name;
  OptionReader options(section);
  m.matmul_tflops = read_rates(options.section("matmul_tflops"));
  const auto positive = [&](const char* key, double& value) {
    options.require(key);
    options.read(key, value, at_least(1e-9));
  };
  positive("memory_gb", m.memory_gb);
  positive("bandwidth_gb_s", m.bandwidth_gb_s);
  positive("attention_tflops", m.attention_tflops);
  options.read("gpus_per_node", m.gpus_per_node, at_least(1));
  positive("link_gb_s", m.link_gb_s);
  positive("network_gb_s", m.network_gb_s);
  options.read("link_latency_us", m.link_latency_us, at_least(0));
  options.read("network_latency_us", m.network_latency_us, at_least(0));
  options.finish();
  return m;
}

}  // namespace

const std::string& machine_table() {
  static const std::string table = kTable;
  return table;
}

Machine find_machine(const std::string& name, const std::string& file) {
  ConfigNode tree = file.empty() ? parse_yaml(machine_table(), "the built-in hardware table") : read_yaml_file(file);
  OptionReader options(tree);
  ConfigNode& machines = options.section("machines");
  std::vector<std::string> names;
  for (const auto& entry : machines.entries()) names.push_back(entry.first);
  ConfigNode* found = machines.find(name);
  if (!found)
    options.fail("machines", fmt::format("there is no machine '{}'; known: {}", name, fmt::join(names, ", ")),
                 "one of them, or --hardware FILE (see krait plan --show-hardware)");
  Machine m = read_machine(name, *found);
  options.read("layer_bandwidth_gb_s", m.layer_bandwidth_gb_s, at_least(1e-9));
  m.layer_ns = read_rates(options.section("layer_ns"));
  m.sequence_ns = read_rates(options.section("sequence_ns"));
  options.finish();
  return m;
}

Machine this_machine(Device device, int on_host) {
  const DeviceInfo info = device_info(device);
  const double gib = static_cast<double>(info.total_bytes) / (1024.0 * 1024 * 1024);
  if (device.is_cpu()) {
    Machine m = find_machine("cpu", "");
    m.memory_gb = gib / on_host;
    m.gpus_per_node = on_host;
    return m;
  }
  for (const auto& [part, name] : {std::pair{"H100", "h100-sxm"}, {"H200", "h200"}, {"A100", "a100"}})
    if (info.name.find(part) != std::string::npos) {
      Machine m = find_machine(name, "");
      m.memory_gb = gib;
      return m;
    }
  Machine m = find_machine("a100", "");
  m.name = fmt::format("{} (with the rates of an a100)", info.name);
  m.memory_gb = gib;
  return m;
}

}  // namespace krait::train
