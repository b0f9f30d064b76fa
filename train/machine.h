#pragma once
#include <map>
#include <string>

#include "core/device.h"

namespace krait::train {

/// Rates of one kind of GPU and of the network between nodes of it, as `krait plan` uses them: what is reached, not
/// what the data sheet says.
struct Machine {
  std::string name;
  std::map<std::string, double> matmul_tflops;  // by precision: bf16, tf32, fp32, fp64
  double memory_gb = 0;                         // GiB a process can use
  double bandwidth_gb_s = 0;                    // device copy, bytes read and written
  double attention_tflops = 0;                  // fused attention, bf16, forward and backward
  int64_t gpus_per_node = 1;
  double link_gb_s = 0, link_latency_us = 0;        // one GPU to the others of its node, each way
  double network_gb_s = 0, network_latency_us = 0;  // one GPU to other nodes, each way
  /// What a layer's training step takes beside its matrix products: nanoseconds per token at width 768 in bf16, of a
  /// GPU with layer_bandwidth_gb_s; scaled by width and bandwidth. By kind; "mlp" and "head" too.
  std::map<std::string, double> layer_ns;
  /// What it takes on top where several GPUs share each sequence, in the same unit: a second walk over a recurrence's states
  /// in either pass, the exchange of attention's heads.
  std::map<std::string, double> sequence_ns;
  double layer_bandwidth_gb_s = 0;
};

/// The built-in table, as YAML with its comments: to be edited and given back with --hardware.
const std::string& machine_table();
/// The machine of that name from a file, or from the built-in table when `file` is empty. ConfigError with the known
/// names otherwise.
Machine find_machine(const std::string& name, const std::string& file);
/// What this process computes on, one of `on_host` processes of this host: rates of the built-in table (of an a100 for
/// GPUs that are not in it), memory as it is.
Machine this_machine(Device device, int on_host);

}  // namespace krait::train
