#include "layers/mamba2.h"

#include <cmath>

#include "core/config_node.h"
#include "layers/model.h"
#include "tests/testing/tensors.h"

namespace krait::layers {

namespace {

ConfigNode options_node(const std::vector<std::pair<std::string, ConfigNode>>& extra = {}) {
  ConfigNode node = ConfigNode::map();
  for (const auto& [name, value] : std::vector<std::pair<std::string, int64_t>>{
           {"d_state", 6}, {"head_dim", 4}, {"n_groups", 2}, {"chunk_size", 5}})
    node.set(name, ConfigNode::of(value));
  for (const auto& [name, value] : extra) node.set(name, value);
  return node;
}

struct Layer {
  explicit Layer(DType dtype, ConfigNode options = options_node(), int64_t d_model = 12, Device device = kCpu)
      : mixer(read_mamba2_config(options, d_model), context_of(d_model)),
        store(mixer, {.device = device, .master = dtype == DType::f64 ? DType::f64 : DType::f32, .compute = dtype, .seed = 3}) {}
  static LayerContext context_of(int64_t d_model) {
    LayerContext c;
    c.d_model = d_model;
    c.n_branches = 4;
    return c;
  }
  Mamba2 mixer;
  ParameterStore store;
};

const std::vector<ConfigNode>& variants() {
  static const std::vector<ConfigNode> all{
      options_node(),
      options_node({{"D_has_hdim", ConfigNode::of(true)}, {"norm_before_gate", ConfigNode::of(true)}}),
      options_node({{"bias", ConfigNode::of(true)}, {"conv_bias", ConfigNode::of(false)}, {"d_conv", ConfigNode::of(int64_t{2})}}),
      options_node({{"chunk_size", ConfigNode::of(int64_t{1})}, {"d_conv", ConfigNode::of(int64_t{1})}})};
  return all;
}

Tensor random_input(int64_t b, int64_t l, int64_t d, DType dtype, uint64_t seed = 5) {
  return random_tensor({b, l, d}, Normal{}, seed).to(dtype);
}

bool all_finite(const Tensor& t) {
  for (const float x : t.to(DType::f32).to_vector<float>())
    if (!std::isfinite(x)) return false;
  return true;
}

}  // namespace

TEST_CASE("mamba2: the parallel form equals pieces with carried state and single steps") {
  for (const ConfigNode& options : variants())
    for (const DType dtype : {DType::f64, DType::f32})
      for (const int64_t l : {1, 13, 23}) {
        INFO(name_of(dtype) << " " << l);
        const NoGrad guard;
        Layer layer(dtype, options);
        const Tensor x = random_input(2, l, 12, dtype);
        LayerState whole_state = layer.mixer.initial_state(2, l, dtype, kCpu);
        const Tensor whole = layer.mixer.forward(Variable(x), {}, &whole_state).data();
        const double tolerance = dtype == DType::f64 ? 1e-12 : 2e-5;
        CHECK(relative_error(layer.mixer.forward(Variable(x), {}, nullptr).data(), whole) == 0.0);
        LayerState pieces = layer.mixer.initial_state(2, 0, dtype, kCpu), steps = layer.mixer.initial_state(2, 0, dtype, kCpu);
        for (int64_t at = 0; at < l;) {
          const int64_t n = std::min<int64_t>(l - at, at == 0 ? 2 : 7);
          const Tensor part = layer.mixer.forward(Variable(x.slice(1, at, at + n)), {}, &pieces).data();
          CHECK(relative_error(part, whole.slice(1, at, at + n)) < tolerance);
          at += n;
        }
        for (int64_t t = 0; t < l; ++t)
          CHECK(relative_error(layer.mixer.step(x.slice(1, t, t + 1), steps), whole.slice(1, t, t + 1)) < tolerance);
        for (const LayerState* s : {&pieces, &steps}) {
          CHECK(s->length == l);
          for (const auto& [name, value] : whole_state.tensors)
            if (value.numel() > 0) CHECK(relative_error(s->tensors.at(name), value) < tolerance);
        }
      }
}

TEST_CASE("mamba2: documents packed into a row equal documents apart, outputs and gradients") {
  for (const ConfigNode& options : variants()) {
    const std::vector<int64_t> lengths{6, 1, 10, 3};
    std::vector<int32_t> ids;
    for (size_t d = 0; d < lengths.size(); ++d) ids.insert(ids.end(), static_cast<size_t>(lengths[d]), static_cast<int32_t>(d));
    SequenceInfo info;
    info.segments = from_vector(ids, {1, 20});
    Layer together(DType::f64, options), apart(DType::f64, options);
    const Tensor x = random_input(1, 20, 12, DType::f64), dy = random_tensor({1, 20, 12}, Normal{}, 6);
    const Variable y = together.mixer.forward(Variable(x), info, nullptr);
    backward(y, dy);
    int64_t at = 0;
    for (const int64_t n : lengths) {
      const Variable part = apart.mixer.forward(Variable(x.slice(1, at, at + n)), {}, nullptr);
      CHECK(relative_error(y.data().slice(1, at, at + n), part.data()) < 1e-12);
      backward(part, dy.slice(1, at, at + n));
      at += n;
    }
    CHECK(relative_error(together.store.grad(), apart.store.grad()) < 1e-12);
  }
}

TEST_CASE("mamba2: a state passed in belongs to the row's first document") {
  const NoGrad guard;
  Layer layer(DType::f64);
  const Tensor x = random_input(1, 20, 12, DType::f64);
  SequenceInfo info;
  std::vector<int32_t> ids(13, 0);
  std::fill(ids.begin() + 4, ids.end(), 1);
  info.segments = from_vector(ids, {1, 13});
  LayerState state = layer.mixer.initial_state(1, 0, DType::f64, kCpu);
  layer.mixer.forward(Variable(x.slice(1, 0, 7)), {}, &state);
  const Tensor packed = layer.mixer.forward(Variable(x.slice(1, 7, 20)), info, &state).data();
  CHECK(relative_error(packed.slice(1, 0, 4), layer.mixer.forward(Variable(x.slice(1, 0, 11)), {}, nullptr).data().slice(1, 7, 11)) < 1e-12);
  LayerState second = layer.mixer.initial_state(1, 0, DType::f64, kCpu);
  const Tensor alone = layer.mixer.forward(Variable(x.slice(1, 11, 20)), {}, &second).data();
  CHECK(relative_error(packed.slice(1, 4, 13), alone) < 1e-12);
  for (const auto& [name, value] : second.tensors) CHECK(relative_error(state.tensors.at(name), value) < 1e-12);
}

TEST_CASE("mamba2: no position sees a later one") {
  const NoGrad guard;
  Layer layer(DType::f64);
  const Tensor x = random_input(1, 17, 12, DType::f64);
  const Tensor before = layer.mixer.forward(Variable(x), {}, nullptr).data();
  Tensor changed = x.clone();
  Tensor tail = changed.slice(1, 9, 17);
  fill_(tail, 3.0);
  const Tensor after = layer.mixer.forward(Variable(changed), {}, nullptr).data();
  CHECK(relative_error(after.slice(1, 0, 9), before.slice(1, 0, 9)) == 0.0);
  CHECK(relative_error(after.slice(1, 9, 10), before.slice(1, 9, 10)) > 1e-3);
}

TEST_CASE("mamba2: values and gradients stay finite over 16384 positions") {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    ConfigNode options = ConfigNode::map();
    options.set("d_state", ConfigNode::of(int64_t{16}));
    options.set("head_dim", ConfigNode::of(int64_t{16}));
    Layer layer(dtype, options, 16);
    const Variable x(random_input(1, 16384, 16, dtype), true);
    const Variable y = layer.mixer.forward(x, {}, nullptr);
    backward(y, random_input(1, 16384, 16, dtype, 9));
    CHECK(all_finite(y.data()));
    CHECK(all_finite(x.grad()));
    CHECK(all_finite(layer.store.grad()));
  }
}

namespace {

// Nine layers of Mamba-2 and one of attention, narrow.
ModelConfig hybrid() {
  ConfigNode section = ConfigNode::map(), layers = ConfigNode::list(), mlp = ConfigNode::map(), attention = ConfigNode::map();
  section.set("d_model", ConfigNode::of(int64_t{12}));
  section.set("n_layers", ConfigNode::of(int64_t{10}));
  for (int i = 0; i < 10; ++i) layers.append(ConfigNode::of(std::string(i == 5 ? "attention" : "mamba2")));
  section.set("layers", layers);
  attention.set("n_heads", ConfigNode::of(int64_t{3}));
  section.set("attention", attention);
  section.set("mamba2", options_node());
  mlp.set("type", ConfigNode::of(std::string("none")));
  section.set("mlp", mlp);
  return read_model_config(section);
}

}  // namespace

TEST_CASE("a hybrid of mamba2 and attention carries its state: pieces and single tokens give the whole") {
  const NoGrad guard;
  LanguageModel model(hybrid(), {.vocab_size = 19, .context = 21});
  ParameterStore store(model, {.master = DType::f64, .compute = DType::f64, .seed = 4});
  ModelInput input;
  input.tokens = random_integers({2, 21}, {0, 19}, 7);
  const Tensor whole = model.logits(input).data();
  for (const std::vector<int64_t>& cuts : {std::vector<int64_t>{4, 9, 1, 7}, std::vector<int64_t>(21, 1)}) {
    DecoderState state = model.initial_state(2, 21, store.options());
    int64_t at = 0;
    for (const int64_t n : cuts) {
      const Tensor last = model.next_logits(input.tokens.slice(1, at, at + n), state);
      at += n;
      CHECK(relative_error(last, whole.select(1, at - 1)) < 1e-10);
    }
  }
}

TEST_CASE("mamba2: initial values") {
  ConfigNode options = ConfigNode::map();
  options.set("head_dim", ConfigNode::of(int64_t{2}));
  Layer layer(DType::f64, options, 64);
  const auto values = [&](const std::string& name) { return layer.store.named_master(name).to_vector<double>(); };
  for (const double b : values("dt_bias")) {
    const double dt = std::log1p(std::exp(b));
    CHECK((dt >= 0.001 - 1e-9 && dt <= 0.1 + 1e-9));
  }
  for (const double a : values("A_log")) CHECK((a >= 0 && a <= std::log(16.0)));
  for (const double d : values("D")) CHECK(d == 1);
  double largest = 0;
  for (const double w : values("out_proj.weight")) largest = std::max(largest, std::abs(w));
  CHECK(largest == Approx(1 / std::sqrt(128.0) / 2).epsilon(0.01));  // four residual branches
  for (const auto& e : layer.store.entries()) {
    const bool matrix = e.name == "in_proj.weight" || e.name == "out_proj.weight" || e.name == "conv1d.weight";
    CHECK(e.options.decay == matrix);
  }
}

TEST_CASE("mamba2: options that do not fit say what would") {
  const auto refuse = [](int64_t d_model, const std::vector<std::pair<std::string, ConfigNode>>& given) {
    ConfigNode node = ConfigNode::map();
    for (const auto& [name, value] : given) node.set(name, value);
    return error_of([&] { read_mamba2_config(node, d_model); });
  };
  const auto number = [](int64_t n) { return ConfigNode::of(n); };
  const std::string message = refuse(768, {{"head_dim", number(100)}});
  CHECK(contains(message, "100 does not divide the inner width 1536 (d_model 768 x expand 2)"));
  CHECK(contains(message, "try 64, 96 or 128"));
  CHECK(contains(refuse(768, {{"n_groups", number(5)}}), "5 groups do not divide the 24 heads (inner width 1536 / head_dim 64)"));
  CHECK(contains(refuse(768, {{"d_sate", number(5)}}), "did you mean d_state?"));
  CHECK(contains(refuse(768, {{"chunk_size", number(0)}}), "chunk_size"));
  CHECK(contains(refuse(768, {{"dt_max", ConfigNode::of(1e-5)}}), "below dt_min"));
  ConfigNode narrow = ConfigNode::map();
  CHECK(read_mamba2_config(narrow, 16).head_dim == 32);
}

TEST_CASE("mamba2: cuda equals cpu, outputs, states and gradients", "[cuda]") {
  for (const ConfigNode& options : variants())
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      INFO(name_of(dtype));
      Layer cpu(dtype, options), gpu(dtype, options, 12, cuda_device());
      const Tensor x = random_input(2, 23, 12, dtype), dy = random_input(2, 23, 12, dtype, 8);
      const Variable a(x, true), b(x.to(cuda_device()), true);
      LayerState on_cpu = cpu.mixer.initial_state(2, 0, dtype, kCpu), on_gpu = gpu.mixer.initial_state(2, 0, dtype, cuda_device());
      const Variable y = cpu.mixer.forward(a, {}, &on_cpu), z = gpu.mixer.forward(b, {}, &on_gpu);
      backward(y, dy);
      backward(z, dy.to(cuda_device()));
      const double tolerance = dtype == DType::f64 ? 1e-10 : dtype == DType::f32 ? 1e-4 : 5e-2;
      CHECK(relative_error(z.data(), y.data()) < tolerance);
      CHECK(relative_error(b.grad(), a.grad()) < tolerance);
      CHECK(relative_error(gpu.store.grad(), cpu.store.grad()) < tolerance);
      for (const auto& [name, value] : on_cpu.tensors)
        if (value.numel() > 0) CHECK(relative_error(on_gpu.tensors.at(name), value) < tolerance);
      CHECK(relative_error(gpu.mixer.step(b.data().slice(1, 0, 1), on_gpu), cpu.mixer.step(x.slice(1, 0, 1), on_cpu)) < tolerance);
    }
}

}  // namespace krait::layers
