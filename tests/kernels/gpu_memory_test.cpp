// What plans believe of the CUDA backend's kernels, against what those allocate.
#include "kernels/gpu_memory.h"

#include "core/allocator.h"
#include "tests/testing/tensors.h"

using namespace krait;
using namespace krait::kernels;

namespace {

SsdInput ssd_input(DType dtype, int64_t b, int64_t l, int64_t heads, int64_t p, int64_t n, Device device) {
  const DType a = accum_dtype(dtype);
  SsdInput in;
  in.x = zeros({b, l, heads, p}, dtype, device);
  in.dt = in.a = zeros({b, l, heads}, a, device);
  in.B = in.C = zeros({b, l, 1, n}, dtype, device);
  in.D = zeros({heads}, a, device);
  return in;
}

SelectiveScanInputs scan_input(DType dtype, int64_t b, int64_t l, int64_t e, int64_t n, Device device) {
  const DType a = accum_dtype(dtype);
  SelectiveScanInputs in;
  in.x = in.dt = in.z = zeros({b, l, e}, dtype, device);
  in.B = in.C = zeros({b, l, n}, dtype, device);
  in.A = full({e, n}, -1.0, a, device);
  in.D = in.dt_bias = zeros({e}, a, device);
  return in;
}

MlstmInputs mlstm_input(DType dtype, int64_t b, int64_t l, int64_t heads, int64_t d, Device device) {
  const DType a = accum_dtype(dtype);
  return {zeros({b, l, heads, d}, dtype, device), zeros({b, l, heads, d}, dtype, device),
          zeros({b, l, heads, d}, dtype, device), zeros({b, l, heads}, a, device), zeros({b, l, heads}, a, device), {}, {}};
}

constexpr double kFixed = 1 << 26;  // what does not grow with the length: parts of sums for every multiprocessor

template <class F>
void check_workspace(const char* what, int64_t predicted, F f) {
  f();  // tables and handles of a first call
  Allocator& memory = allocator(cuda_device());
  const int64_t before = memory.stats().current_bytes;
  memory.reset_peak();
  int64_t outputs = 0;
  {
    const auto kept = f();
    outputs = memory.stats().current_bytes - before;
  }
  const double found = static_cast<double>(memory.stats().peak_bytes - before - outputs);
  INFO(what << ": takes " << found << ", plans say " << predicted);
  CHECK(found < 1.1 * static_cast<double>(predicted) + kFixed);
  CHECK(found > 0.9 * static_cast<double>(predicted) - kFixed);
}

}  // namespace

TEST_CASE("Mamba-2 130M: what the backward of 64 positions takes on tensor cores, counted by hand") {
  const int64_t l = 1024, chunks = l / 64, heads = 24;
  const SsdInput in = ssd_input(DType::bf16, 1, l, heads, 64, 128, kCpu);
  const int64_t decays = heads * 4 * 64 * 4, products = 64 * 64 * 2, states = heads * 64 * 128 * 2, of_D = heads * 64 * 4;
  CHECK(gpu_memory_of_ssd_forward(in).workspace == chunks * (decays + products));
  CHECK(gpu_memory_of_ssd_backward(in).workspace == chunks * (decays + products + 2 * states + of_D));
  CHECK(gpu_memory_of_scan_forward(scan_input(DType::bf16, 2, 96, 64, 16, kCpu)).kept == 2 * 6 * 16 * 64 * 2);
  CHECK(gpu_memory_of_scan_forward(scan_input(DType::f32, 2, 96, 64, 16, kCpu)).kept == 2 * 2 * 16 * 64 * 4);
  CHECK(gpu_memory_of_mlstm_forward(mlstm_input(DType::bf16, 1, 256, 4, 64, kCpu), {.keep_states = true}).kept ==
        4 * 2 * (64 * 64 * 2 + 64 * 4 + 128 * 128 * 2));
}

TEST_CASE("plans know what the CUDA kernels take", "[cuda]") {
  const Device device = cuda_device();
  for (const DType dtype : {DType::bf16, DType::f32}) {
    const SsdInput ssd = ssd_input(dtype, 4, 8192, 24, 64, 128, device);
    const Tensor dy = zeros_like(ssd.x);
    check_workspace("ssd forward", gpu_memory_of_ssd_forward(ssd).workspace, [&] { return ssd_forward(ssd); });
    check_workspace("ssd backward", gpu_memory_of_ssd_backward(ssd).workspace, [&] { return ssd_backward(dy, {}, ssd); });
    check_workspace("ssd summary", gpu_memory_of_ssd_states(ssd).workspace, [&] { return ssd_summary(ssd); });

    const SelectiveScanInputs scan = scan_input(dtype, 32, 2048, 1536, 16, device);
    const SelectiveScanOut out = selective_scan_forward(scan, true);
    const GpuMemory forward = gpu_memory_of_scan_forward(scan);
    CHECK(out.states.numel() * size_of(out.states.dtype()) == forward.kept);
    check_workspace("scan forward", forward.workspace, [&] { return selective_scan_forward(scan, true); });
    check_workspace("scan backward", gpu_memory_of_scan_backward(scan).workspace,
                    [&] { return selective_scan_backward(scan.x, {}, scan, out.states); });

    const MlstmInputs cell = mlstm_input(dtype, 4, 4096, 4, 384, device);
    const MlstmOptions options{.keep_states = true};
    const MlstmOut kept = mlstm_forward(cell, options);
    const GpuMemory cell_forward = gpu_memory_of_mlstm_forward(cell, options);
    const auto bytes = [](const Tensor& t) { return t.defined() ? t.numel() * size_of(t.dtype()) : 0; };
    CHECK(bytes(kept.states) + bytes(kept.n_states) + bytes(kept.coefficients) == cell_forward.kept);
    check_workspace("mlstm forward", cell_forward.workspace, [&] { return mlstm_forward(cell, options); });
    const MlstmUpstream up{kept.h, {}, {}};
    check_workspace("mlstm backward", gpu_memory_of_mlstm_backward(cell, up, true).workspace,
                    [&] { return mlstm_backward(up, cell, kept, options); });
  }
}
