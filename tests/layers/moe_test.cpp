#include "layers/moe.h"

#include <cmath>

#include "autograd/elementwise.h"
#include "layers/model.h"
#include "tests/testing/golden.h"
#include "tests/testing/tensors.h"

namespace krait::layers {

namespace {

constexpr DType kTypes[] = {DType::f64, DType::f32, DType::bf16};

StoreOptions store_options(DType dtype, Device device = kCpu) {
  return {.device = device, .master = dtype == DType::f64 ? DType::f64 : DType::f32, .compute = dtype, .seed = 3};
}

// The auxiliary losses' upstream gradients take the place of their coefficients.
void check_golden(const GoldenCase& c, DType dtype, Device device) {
  INFO(c.name() << " " << name_of(dtype));
  LayerContext context;
  context.d_model = static_cast<int64_t>(c.number("D"));
  MlpConfig config;
  config.hidden = static_cast<int64_t>(c.number("F"));
  config.moe = {static_cast<int64_t>(c.number("E")), static_cast<int64_t>(c.number("K")),
                static_cast<int64_t>(c.number("Z")), c.number("renorm") != 0,
                c.tensor("upstream/aux_loss").item(), c.tensor("upstream/z_loss").item()};
  Moe moe(config, context);
  ParameterStore store(moe, store_options(dtype, device));
  for (auto& [name, value] : store.named_masters()) copy_(value, c.tensor("param/" + name));
  store.refresh_compute();
  moe.set_training(true);
  const auto check = [&](const std::string& path, const Tensor& value) {
    c.check_within(path, value, c.tolerance(path, dtype));
  };
  const Variable x(c.tensor("in/x").to(dtype).to(device), true);
  const MoeRoute route = moe.route(x);
  CHECK(route.routing.index.cpu().to(DType::i64).to_vector<int64_t>() == c.tensor("out/topk_idx").to_vector<int64_t>());
  check("out/topk_weight", route.weight.data());
  check("out/counts", route.routing.counts.to(DType::f32));
  const MoeLosses losses = moe.losses(x);
  check("out/aux_loss", losses.balance.data());
  check("out/z_loss", losses.router_z.data());
  const Variable y = moe.forward(x);
  check("out/y", y.data());
  backward(y, c.tensor("upstream/y").to(dtype).to(device));
  check("grad/in/x", x.grad());
  for (const auto& [name, grad] : store.named_grads()) check("grad/param/" + name, grad);
}

void check_goldens(Device device) {
  for (const DType dtype : kTypes)
    for_each_golden("transformer.h5", "moe_", [&](const GoldenCase& c) { check_golden(c, dtype, device); });
}

ModelConfig model_config(int64_t nulls = 1, const std::string& mixer = "mamba2") {
  ConfigNode section = ConfigNode::map(), mlp = ConfigNode::map(), mamba2 = ConfigNode::map();
  section.set("d_model", ConfigNode::of(int64_t{12}));
  section.set("n_layers", ConfigNode::of(int64_t{2}));
  section.set("layers", ConfigNode::of(mixer));
  section.set("init_std", ConfigNode::of(0.3));
  mamba2.set("d_state", ConfigNode::of(int64_t{4}));
  mamba2.set("head_dim", ConfigNode::of(int64_t{6}));
  section.set(mixer, mamba2);
  mlp.set("type", ConfigNode::of(std::string("moe")));
  mlp.set("hidden", ConfigNode::of(int64_t{10}));
  mlp.set("n_experts", ConfigNode::of(int64_t{4}));
  mlp.set("n_null_experts", ConfigNode::of(nulls));
  section.set("mlp", mlp);
  return read_model_config(section);
}

ModelInput random_input(int64_t b, int64_t l, Device device = kCpu) {
  ModelInput input;
  input.tokens = random_integers({b, l}, {0, 19}, 7).to(device);
  input.targets = random_integers({b, l}, {0, 19}, 8).to(device);
  return input;
}

Tensor gradient_of(bool recompute, double scale, bool training = true) {
  LanguageModel model(model_config(), {.vocab_size = 19, .context = 21});
  ParameterStore store(model, store_options(DType::f64));
  model.set_training(training);
  model.set_recompute(recompute);
  model.set_auxiliary_scale(scale);
  backward(model.loss(random_input(2, 21), {}).loss);
  return store.grad();
}

}  // namespace

TEST_CASE("the mixture of experts meets its goldens") { check_goldens(kCpu); }
TEST_CASE("the mixture of experts meets its goldens on cuda", "[cuda]") { check_goldens(cuda_device()); }

TEST_CASE("a model with a mixture of experts generates what it computes in parallel") {
  const NoGrad guard;
  LanguageModel model(model_config(), {.vocab_size = 19, .context = 21});
  ParameterStore store(model, store_options(DType::f64));
  const ModelInput input = random_input(2, 21);
  const Tensor whole = model.logits(input).data();
  DecoderState state = model.initial_state(2, 21, store.options());
  for (int64_t t = 0; t < 21; ++t)
    CHECK(relative_error(model.next_logits(input.tokens.slice(1, t, t + 1), state), whole.select(1, t)) < 1e-10);
}

TEST_CASE("the auxiliary losses act in training, scaled, and also where blocks are computed again") {
  const Tensor none = gradient_of(false, 0), one = gradient_of(false, 1), quarter = gradient_of(false, 0.25);
  CHECK(relative_error(none, one) > 1e-6);
  CHECK(relative_error(gradient_of(false, 1, false), none) == 0.0);
  CHECK(relative_error(gradient_of(true, 1), one) < 1e-12);
  const Variable expected = Variable(none) * 0.75 + Variable(one) * 0.25;
  CHECK(relative_error(quarter, expected.data()) < 1e-12);
}

TEST_CASE("the auxiliary losses of padded rows are those of the rows alone") {
  const auto run = [](const std::string& type, bool padded, int64_t filler, bool recompute) {
    ModelConfig c = model_config();
    c.type = type;
    c.n_classes = 3;
    const auto model = make_model(c, {.vocab_size = 19, .context = 21});
    ParameterStore store(*model, store_options(DType::f64));
    model->set_training(true);
    model->set_recompute(recompute);
    ModelInput input;
    const auto with_padding = [&](const Tensor& own, int64_t value) {
      const Tensor whole = full({1, 21}, static_cast<double>(value), DType::i64, kCpu);
      Tensor place = whole.slice(1, 0, 13);
      copy_(place, own);
      return padded ? whole : own;
    };
    input.tokens = with_padding(random_integers({1, 13}, {0, 19}, 7), filler);
    input.targets = type == "classifier" ? random_integers({1}, {0, 3}, 8) : with_padding(random_integers({1, 13}, {0, 19}, 8), -100);
    if (padded) input.lengths = from_vector<int32_t>({13});
    const ModelLoss loss = model->loss(input, {});
    backward(loss.loss);
    return std::pair(loss.auxiliary, store.grad());
  };
  for (const std::string type : {"classifier", "language_model"})  // the latter of a task that asks at every position
    for (const bool recompute : {false, true}) {
      INFO(type);
      const auto [auxiliary, gradient] = run(type, false, 0, recompute);
      for (const int64_t filler : {0, 5}) {
        const auto [padded_auxiliary, padded_gradient] = run(type, true, filler, recompute);
        CHECK(relative_error(padded_auxiliary, auxiliary) < 1e-12);
        CHECK(relative_error(padded_gradient, gradient) < 1e-10);
      }
    }
}

TEST_CASE("a mixture of experts counts the FLOPs of the experts a token visits") {
  const auto flops = [](int64_t nulls) {
    LanguageModel model(model_config(nulls), {.vocab_size = 19, .context = 21});
    ParameterStore store(model, store_options(DType::f32));
    return model.train_flops_per_token(21);
  };
  LanguageModel dense([] {
    ModelConfig c = model_config(0);
    c.mlp.type = "swiglu";
    c.mlp.hidden = 20;  // as many as two experts of four
    return c;
  }(), {.vocab_size = 19, .context = 21});
  const double routers = 6.0 * 2 * 4 * 12;
  CHECK(flops(0) == Approx(dense.train_flops_per_token(21) + routers));
  CHECK(flops(4) < flops(0));
}

TEST_CASE("a mixture of experts stays finite over 16384 positions in fp32 and bf16") {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    LayerContext context;
    context.d_model = 16;
    context.residual_std = 0.02;
    MlpConfig config;
    config.hidden = 24;
    Moe moe(config, context);
    ParameterStore store(moe, store_options(dtype));
    moe.set_training(true);
    const Variable x(random_tensor({1, 16384, 16}, Normal{}, 5, dtype), true);
    const Variable y = moe.forward(x);
    backward(y, random_tensor({1, 16384, 16}, Normal{}, 6, dtype));
    for (const Tensor& t : {y.data(), x.grad(), store.grad()}) {
      bool finite = true;
      for (const double v : t.to_vector<double>()) finite = finite && std::isfinite(v);
      CHECK(finite);
    }
  }
}

TEST_CASE("a model with a mixture of experts: cuda equals cpu", "[cuda]") {
  const auto run = [](DType dtype, Device device) {
    LanguageModel model(model_config(), {.vocab_size = 19, .context = 21});
    ParameterStore store(model, store_options(dtype, device));
    model.set_training(true);
    const ModelInput input = random_input(2, 21, device);
    const Tensor logits = model.logits(input).data();
    backward(model.loss(input, {}).loss);
    return std::pair(logits, store.grad());
  };
  // In bf16 a rounding may send a token to another expert: layer and operation are compared there instead.
  for (const DType dtype : {DType::f64, DType::f32}) {
    const auto [a, da] = run(dtype, kCpu);
    const auto [b, db] = run(dtype, cuda_device());
    const double tolerance = dtype == DType::f64 ? 1e-10 : 2e-4;
    CHECK(relative_error(b, a) < tolerance);
    CHECK(relative_error(db, da) < tolerance);
  }
}

TEST_CASE("options of a mixture of experts that do not fit say what would") {
  const auto refuse = [](const std::vector<std::pair<std::string, std::string>>& options) {
    ConfigNode node = ConfigNode::map();
    node.set("type", ConfigNode::of(std::string("moe")));
    for (const auto& [key, value] : options) node.set(key, ConfigNode::scalar(value));
    return error_of([&] { read_mlp_config(node, 64); });
  };
  CHECK(contains(refuse({{"n_experts", "4"}, {"top_k", "5"}}), "5 experts per token, but there are 4 (n_experts 4 + n_null_experts 0)"));
  CHECK(contains(refuse({{"n_expert", "4"}}), "did you mean n_experts?"));
  CHECK(contains(refuse({{"bias", "true"}}), "experts have no bias"));
  ConfigNode node = ConfigNode::map();
  node.set("type", ConfigNode::of(std::string("moe")));
  CHECK(read_mlp_config(node, 96).hidden == 256);
}

}  // namespace krait::layers
