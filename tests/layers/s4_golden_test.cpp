#include "autograd/elementwise.h"
#include "layers/block.h"
#include "layers/parameter_store.h"
#include "layers/s4.h"
#include "tests/testing/golden.h"
#include "tests/testing/tensors.h"

namespace krait::layers {

namespace {

void check_block(const GoldenCase& golden, DType dtype, Device device) {
  INFO(golden.name() << " " << name_of(dtype));
  S4Config c;
  c.d_state = static_cast<int64_t>(golden.number("N"));
  c.n_ssm = static_cast<int64_t>(golden.number("H"));
  c.bidirectional = golden.number("bidirectional") != 0;
  c.tie_reverse = false;
  if (golden.text("kind") == "s4d") {
    c.form = "diagonal";
    c.init = "lin";
    c.discretization = "zoh";
  }
  LayerContext context;
  context.d_model = c.n_ssm;
  context.context = static_cast<int64_t>(golden.number("L"));
  Block block(std::make_shared<S4>(c, context), nullptr, {"layer", golden.number("eps")}, context);
  ParameterStore store(block, {.device = device, .master = dtype == DType::f64 ? DType::f64 : DType::f32,
                               .compute = dtype, .seed = 1});
  for (auto& [name, value] : store.named_masters()) copy_(value, golden.tensor("param/" + name));
  store.refresh_compute();
  CHECK(store.named_masters().size() == golden.list("param").size());
  const Variable x(golden.tensor("in/x").to(dtype).to(device), true);
  const ResidualStream out = block.forward({x, {}}, {}, nullptr);
  const Variable y = out.residual + out.pending;
  golden.check_within("out/y", y.data(), golden.tolerance("out/y", dtype));
  backward(y, golden.tensor("upstream/y").to(dtype).to(device));
  golden.check_within("grad/in/x", x.grad(), golden.tolerance("grad/in/x", dtype));
  for (const auto& [name, grad] : store.named_grads())
    golden.check_within("grad/param/" + name, grad, golden.tolerance("grad/param/" + name, dtype));
}

void check_all(Device device) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16})
    for_each_golden("s4.h5", "s4_block_", [&](const GoldenCase& golden) { check_block(golden, dtype, device); });
}

}  // namespace

TEST_CASE("S4 and S4D blocks meet their goldens in fp64, fp32 and bf16") { check_all(kCpu); }
TEST_CASE("S4 and S4D blocks meet their goldens on cuda", "[cuda]") { check_all(cuda_device()); }

}  // namespace krait::layers
