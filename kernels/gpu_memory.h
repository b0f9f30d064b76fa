#pragma once
#include "kernels/mlstm.h"
#include "kernels/selective_scan.h"
#include "kernels/ssd.h"

namespace krait {
namespace kernels {

/// What calls of the CUDA backend take in device memory beside their inputs and outputs, in bytes: `workspace` while they
/// run, `kept` of what they keep for their backward. For plans, also in builds without CUDA. Of the kernels that an 80 GB
/// class GPU runs for these sizes; what does not grow with the length is left out.
/// tests/kernels/gpu_memory_test.cpp holds them to what the kernels allocate.
struct GpuMemory { int64_t workspace = 0, kept = 0; };

GpuMemory gpu_memory_of_ssd_forward(const SsdInput& in);
GpuMemory gpu_memory_of_ssd_backward(const SsdInput& in);
/// ssd_summary and ssd_initial_gradient.
GpuMemory gpu_memory_of_ssd_states(const SsdInput& in);

GpuMemory gpu_memory_of_scan_forward(const SelectiveScanInputs& in);
GpuMemory gpu_memory_of_scan_backward(const SelectiveScanInputs& in);

GpuMemory gpu_memory_of_mlstm_forward(const MlstmInputs& in, const MlstmOptions& options);
GpuMemory gpu_memory_of_mlstm_backward(const MlstmInputs& in, const MlstmUpstream& upstream, bool states_kept);

}  // namespace kernels
}  // namespace krait
