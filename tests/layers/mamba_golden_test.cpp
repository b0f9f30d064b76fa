#include "autograd/elementwise.h"
#include "layers/block.h"
#include "layers/mamba.h"
#include "layers/model.h"
#include "tests/testing/golden.h"
#include "tests/testing/tensors.h"

namespace krait::layers {

namespace {

constexpr DType kTypes[] = {DType::f64, DType::f32, DType::bf16};

StoreOptions store_options(DType dtype, Device device) {
  return {.device = device, .master = dtype == DType::f64 ? DType::f64 : DType::f32, .compute = dtype, .seed = 1};
}

void load(ParameterStore& store, const GoldenCase& golden) {
  for (auto& [name, value] : store.named_masters()) copy_(value, golden.tensor("param/" + name));
  store.refresh_compute();
}

void check_grads(ParameterStore& store, const GoldenCase& golden, DType dtype) {
  for (const auto& [name, grad] : store.named_grads())
    golden.check_within("grad/param/" + name, grad, golden.tolerance("grad/param/" + name, dtype));
}

MambaConfig config_of(const GoldenCase& golden) {
  MambaConfig c;
  c.d_state = static_cast<int64_t>(golden.number("N"));
  c.d_inner = static_cast<int64_t>(golden.number("E"));
  c.dt_rank = static_cast<int64_t>(golden.number("R"));
  return c;
}

LayerContext context_of(const GoldenCase& golden) {
  LayerContext c;
  c.d_model = static_cast<int64_t>(golden.number("M"));
  return c;
}

void check_mixer(const GoldenCase& golden, DType dtype, Device device) {
  INFO(golden.name() << " " << name_of(dtype));
  const DType sums = accum_dtype(dtype);
  Mamba mixer(config_of(golden), context_of(golden));
  ParameterStore store(mixer, store_options(dtype, device));
  load(store, golden);
  const auto leaf = [&](const std::string& path, DType d) {
    return golden.has(path) ? Variable(golden.tensor(path).to(d).to(device), true) : Variable();
  };
  const auto upstream = [&](const std::string& path, DType d) { return golden.tensor(path).to(d).to(device); };
  const auto check = [&](const std::string& path, const Tensor& value) {
    golden.check_within(path, value, golden.tolerance(path, dtype));
  };
  const Variable x = leaf("in/x", dtype), conv0 = leaf("in/conv0", dtype), h0 = leaf("in/h0", sums);
  const Mamba::Result out = mixer.run(x, {}, conv0, h0);
  backward(Vars{out.y, out.conv, out.ssm},
           {upstream("upstream/y", dtype), upstream("upstream/conv_last", dtype), upstream("upstream/h_last", sums)});
  check("out/y", out.y.data());
  check("state/conv_last", out.conv.data());
  check("state/h_last", out.ssm.data());
  check("grad/in/x", x.grad());
  if (conv0.defined()) check("grad/in/conv0", conv0.grad());
  if (h0.defined()) check("grad/in/h0", h0.grad());
  check_grads(store, golden, dtype);

  // Step by step from the same states.
  LayerState state = mixer.initial_state(x.size(0), 1, dtype, device);
  if (conv0.defined()) state.tensors["conv"] = conv0.data();
  if (h0.defined()) state.tensors["ssm"] = h0.data();
  const Tensor whole = golden.tensor("out/y");
  for (int64_t t = 0; t < x.size(1); ++t) {
    const Tensor y = mixer.step(x.data().slice(1, t, t + 1), state);
    CHECK(relative_error(y, whole.slice(1, t, t + 1)) <= 10 * golden.tolerance("out/y", dtype));
  }
  check("state/conv_last", state.tensors["conv"]);
  check("state/h_last", state.tensors["ssm"]);
}

void check_block(const GoldenCase& golden, DType dtype, Device device) {
  INFO(golden.name() << " " << name_of(dtype));
  const LayerContext context = context_of(golden);
  Block block(std::make_shared<Mamba>(config_of(golden), context), nullptr, NormConfig{"rms", golden.number("eps")},
              context);
  ParameterStore store(block, store_options(dtype, device));
  load(store, golden);
  const Variable x(golden.tensor("in/x").to(dtype).to(device), true);
  const ResidualStream out = block.forward({x, {}}, {}, nullptr);
  const Variable y = out.residual + out.pending;
  golden.check_within("out/y", y.data(), golden.tolerance("out/y", dtype));
  backward(y, golden.tensor("upstream/y").to(dtype).to(device));
  golden.check_within("grad/in/x", x.grad(), golden.tolerance("grad/in/x", dtype));
  check_grads(store, golden, dtype);
}

void check_language_model(const GoldenCase& golden, DType dtype, Device device) {
  INFO(golden.name() << " " << name_of(dtype));
  ConfigNode mamba = ConfigNode::map();
  mamba.set("d_state", ConfigNode::of(static_cast<int64_t>(golden.number("N"))));
  ConfigNode mlp = ConfigNode::map();
  mlp.set("type", ConfigNode::of(std::string("none")));
  ConfigNode section = ConfigNode::map();
  section.set("d_model", ConfigNode::of(static_cast<int64_t>(golden.number("M"))));
  section.set("n_layers", ConfigNode::of(static_cast<int64_t>(golden.number("n_layer"))));
  section.set("layers", ConfigNode::of(std::string("mamba")));
  section.set("norm_eps", ConfigNode::of(golden.number("eps")));
  section.set("mamba", mamba);
  section.set("mlp", mlp);
  ModelShape shape;
  shape.vocab_size = static_cast<int64_t>(golden.number("V"));
  shape.context = golden.tensor("in/tokens").size(1);
  LanguageModel model(read_model_config(section), shape);
  ParameterStore store(model, store_options(dtype, device));
  load(store, golden);
  ModelInput input;
  input.tokens = golden.tensor("in/tokens").to(device);
  input.targets = golden.tensor("in/targets").to(device);
  golden.check_within("out/logits", model.logits(input).data(), golden.tolerance("out/logits", dtype));
  const ModelLoss loss = model.loss(input, {});
  golden.check_within("out/loss", loss.loss.data(), golden.tolerance("out/loss", dtype));
  backward(loss.loss);
  check_grads(store, golden, dtype);
}

void check_all(Device device) {
  for (const DType dtype : kTypes) {
    for_each_golden("mamba.h5", "mamba1_mixer_", [&](const GoldenCase& c) { check_mixer(c, dtype, device); });
    for_each_golden("mamba.h5", "mamba1_block_", [&](const GoldenCase& c) { check_block(c, dtype, device); });
    for_each_golden("mamba.h5", "mamba1_lm", [&](const GoldenCase& c) { check_language_model(c, dtype, device); });
  }
}

}  // namespace

TEST_CASE("the Mamba mixer, block and language model meet their goldens in fp64, fp32 and bf16") { check_all(kCpu); }
TEST_CASE("the Mamba mixer, block and language model meet their goldens on cuda", "[cuda]") {
  check_all(cuda_device());
}

}  // namespace krait::layers
