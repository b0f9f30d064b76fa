#include "autograd/cross_entropy.h"
#include "tests/testing/golden.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

void check_case(const GoldenCase& c, DType dtype, Device device) {
  const CrossEntropyOptions options{.ignore_index = static_cast<int64_t>(c.number("ignore_index")),
                                    .label_smoothing = c.find_number("label_smoothing").value_or(0.0),
                                    .z_loss = c.number("z_coef")};
  const Tensor targets = c.tensor("in/targets").to(device);
  const Variable logits(c.tensor("in/logits").to(dtype).to(device), true);
  const Variable loss = cross_entropy(logits, targets, options);
  c.check("out/loss", loss.data());
  backward(loss, c.tensor("upstream/loss").to(loss.dtype()).to(device));
  c.check("grad/in/logits", logits.grad());
  const auto out = kernels::cross_entropy_forward(logits.data(), targets, options);
  c.check("out/lse", out.lse);
  CHECK(out.count.item() == c.tensor("out/count").item());
}

void check_all(Device device) {
  for_each_golden("train.h5", "cross_entropy_", [&](const GoldenCase& c) {
    for (const DType dtype : {f64, f32, bf16_type}) check_case(c, dtype, device);
  });
}

}  // namespace

TEST_CASE("cross entropy meets the goldens in fp64, fp32 and bf16") { check_all(kCpu); }
TEST_CASE("cross entropy on cuda meets the goldens", "[cuda]") { check_all(cuda_device()); }
