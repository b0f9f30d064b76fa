#include "autograd/activation.h"
#include "tests/testing/golden.h"

using namespace krait;

namespace {

void check_all(const std::string& name, Variable (*f)(const Variable&), Device device) {
  for_each_golden("transformer.h5", name, [&](const GoldenCase& c) {
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      const Variable x(c.tensor("in/x").to(dtype).to(device), true);
      const Variable y = f(x);
      backward(y, c.tensor("upstream/y").to(dtype).to(device));
      c.check("out/y", y.data());
      c.check("grad/in/x", x.grad());
    }
  });
}

void check_activations(Device device) {
  check_all("act_silu", silu, device);
  check_all("act_relu2", relu2, device);
  check_all("act_gelu_tanh", [](const Variable& x) { return gelu(x, GeluForm::tanh); }, device);
  check_all("act_gelu_erf", [](const Variable& x) { return gelu(x, GeluForm::erf); }, device);
}

}  // namespace

TEST_CASE("activations meet the goldens") { check_activations(kCpu); }
TEST_CASE("activations meet the goldens on cuda", "[cuda]") { check_activations(cuda_device()); }
