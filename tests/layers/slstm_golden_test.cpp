#include "autograd/elementwise.h"
#include "layers/block.h"
#include "layers/parameter_store.h"
#include "layers/slstm.h"
#include "tests/testing/golden.h"
#include "tests/testing/tensors.h"

namespace krait::layers {

TEST_CASE("the sLSTM block meets its goldens in fp64, fp32 and bf16: output, states, every gradient") {
  for_each_golden("xlstm.h5", "slstm_block_", [](const GoldenCase& golden) {
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      INFO(golden.name() << " " << name_of(dtype));
      LayerContext context;
      context.d_model = static_cast<int64_t>(golden.number("M"));
      context.norm_eps = golden.number("eps_norm");
      SlstmConfig config;
      config.n_heads = static_cast<int64_t>(golden.number("NH"));
      config.hidden = static_cast<int64_t>(golden.number("F"));
      Block block(std::make_shared<Slstm>(config, context), nullptr, NormConfig{"layer_1p", context.norm_eps}, context);
      ParameterStore store(block, {.master = dtype == DType::f64 ? DType::f64 : DType::f32, .compute = dtype});
      CHECK(store.named_masters().size() == golden.list("param").size());
      for (auto& [name, value] : store.named_masters()) copy_(value, golden.tensor("param/" + name));
      store.refresh_compute();

      const Variable x(golden.tensor("in/x").to(dtype), true);
      const ResidualStream out = block.forward({x, {}}, {}, nullptr);
      const Variable y = out.residual + out.pending;
      golden.check_within("out/y", y.data(), golden.tolerance("out/y", dtype));
      backward(y, golden.tensor("upstream/y").to(dtype));
      golden.check_within("grad/in/x", x.grad(), golden.tolerance("grad/in/x", dtype));
      // The norm of a head of two channels is little more than the sign of their difference: its gradient is what eps
      // leaves, and bf16 rounds the difference.
      const bool sign = dtype == DType::bf16 && context.d_model == 2 * config.n_heads;
      for (const auto& [name, grad] : store.named_grads())
        golden.check_within("grad/param/" + name, grad, golden.tolerance("grad/param/" + name, dtype) * (sign ? 7 : 1));

      const NoGrad guard;
      LayerState state = block.mixer().initial_state(x.size(0), 64, dtype, kCpu);
      block.forward({x.detach(), {}}, {}, &state);
      const Tensor& cell = state.tensors.at("cell");
      const std::string names[] = {"y_last", "c_last", "n_last", "m_last"};
      for (int64_t k = 0; k < 4; ++k)
        golden.check_within("state/" + names[k], cell.select(1, k), golden.tolerance("state/" + names[k], dtype));
      golden.check_within("state/conv_last", state.tensors.at("conv"), golden.tolerance("state/conv_last", dtype));
    }
  });
}

}  // namespace krait::layers
