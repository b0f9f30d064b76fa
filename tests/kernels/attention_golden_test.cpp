#include "kernels/attention.h"
#include "tests/testing/catch.h"
#include "tests/testing/golden.h"
#include "tests/testing/tensors.h"

namespace krait {
namespace {

// The files hold (b, h, l, d).
Tensor read(const GoldenCase& c, const char* name, DType dtype, Device device) {
  return c.tensor(name).to(dtype).to(device).transpose(1, 2);
}

void check_case(const GoldenCase& c, DType dtype, Device device) {
  kernels::AttentionOptions options;
  options.causal = c.number("causal") != 0;
  options.window = static_cast<int64_t>(c.find_number("window").value_or(0));
  if (const auto offset = c.find_number("off")) options.q_offset = static_cast<int64_t>(*offset);
  if (c.find_number("alibi").value_or(0) != 0)
    options.alibi_slopes = kernels::alibi_slopes(static_cast<int64_t>(c.number("Hq"))).to(device);
  const Tensor q = read(c, "in/q", dtype, device), k = read(c, "in/k", dtype, device);
  const Tensor v = read(c, "in/v", dtype, device), do_ = read(c, "upstream/o", dtype, device);
  for (const bool vendor : {true, false}) {
    if (device.is_cpu() && !vendor) continue;
    options.vendor_library = vendor;
    const auto [o, lse] = kernels::attention_forward(q, k, v, options);
    c.check("out/o", o.transpose(1, 2));
    c.check_within("out/lse", lse, c.tolerance("out/lse", dtype));
    const auto [dq, dk, dv] = kernels::attention_backward(do_, q, k, v, o, lse, options);
    c.check("grad/in/q", dq.transpose(1, 2));
    c.check("grad/in/k", dk.transpose(1, 2));
    c.check("grad/in/v", dv.transpose(1, 2));
  }
}

TEST_CASE("attention meets the goldens in fp64, fp32 and bf16") {
  for_each_golden("transformer.h5", "attention_", [](const GoldenCase& c) {
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) check_case(c, dtype, kCpu);
  });
}

TEST_CASE("attention meets the goldens on cuda", "[cuda]") {
  if (cuda_device_count() == 0) return;
  for_each_golden("transformer.h5", "attention_", [](const GoldenCase& c) {
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) check_case(c, dtype, cuda_device());
  });
}

TEST_CASE("alibi slopes of 1 to 16 heads meet the golden") {
  for_each_golden("transformer.h5", "alibi_slopes", [](const GoldenCase& c) {
    const Tensor table = c.tensor("out/slopes");
    Tensor mine = zeros(table.shape(), DType::f32, kCpu);
    for (int64_t n = 1; n <= table.size(0); ++n) {
      Tensor row = mine.select(0, n - 1).slice(0, 0, n);
      copy_(row, kernels::alibi_slopes(n));
    }
    c.check("out/slopes", mine);
  });
}

}  // namespace
}  // namespace krait
