// gated_cnn and linear_attention.
#include <algorithm>
#include <cmath>

#include "autograd/elementwise.h"
#include "layers/block.h"
#include "layers/gated_cnn.h"
#include "layers/linear_attention.h"
#include "layers/parameter_store.h"
#include "tests/layers/mixer_checks.h"
#include "tests/testing/golden.h"

namespace krait::layers {

namespace {

constexpr int64_t kWidth = 12;

struct Kind {
  std::string name;
  std::vector<std::pair<std::string, std::string>> options;
};
const std::vector<Kind> kKinds{
    {"gated_cnn", {}},
    {"gated_cnn", {{"hidden", "17"}, {"conv_ratio", "0.5"}, {"d_conv", "1"}}},
    {"gated_cnn", {{"expand", "1"}, {"d_conv", "11"}}},
    {"linear_attention", {{"n_heads", "3"}, {"chunk_size", "5"}}},
    {"linear_attention", {{"n_heads", "2"}, {"gate", "true"}, {"bias", "true"}}},
    {"linear_attention", {{"n_heads", "4"}, {"feature", "identity"}, {"chunk_size", "1"}}},
    {"linear_attention", {{"n_heads", "1"}, {"feature", "identity"}, {"gate", "true"}, {"chunk_size", "8"}}},
};

struct Layer {
  explicit Layer(const Kind& kind, DType dtype = DType::f64, Device device = kCpu, int64_t width = kWidth)
      : mixer(make(kind, width)),
        store(*mixer, {.device = device, .master = dtype == DType::f64 ? DType::f64 : DType::f32, .compute = dtype,
                       .seed = 3}) {}
  static std::shared_ptr<Mixer> make(const Kind& kind, int64_t width = kWidth) {
    ConfigNode options = ConfigNode::map();
    for (const auto& [key, value] : kind.options) options.set(key, ConfigNode::scalar(value));
    LayerContext context;
    context.d_model = width;
    context.init_std = 0.3;  // large enough that nothing is close to linear
    context.residual_std = 0.3;
    return make_mixer(kind.name, options, context);
  }
  std::shared_ptr<Mixer> mixer;
  ParameterStore store;
};

Tensor input(int64_t b, int64_t l, DType dtype = DType::f64, uint64_t seed = 5) {
  return mixer_input(b, l, kWidth, dtype, seed);
}

std::string label(const Kind& kind) {
  std::string text = kind.name;
  for (const auto& [key, value] : kind.options) text += " " + key + "=" + value;
  return text;
}

}  // namespace

TEST_CASE("baseline layers: whole sequences, pieces with a carried state and single steps agree") {
  for (const Kind& kind : kKinds)
    for (const DType dtype : {DType::f64, DType::f32}) {
      INFO(label(kind) << " " << name_of(dtype));
      Layer layer(kind, dtype);
      const NoGrad guard;
      const double tolerance = dtype == DType::f64 ? 1e-12 : 1e-5;
      const Tensor x = input(3, 23, dtype);
      LayerState end = layer.mixer->initial_state(3, 0, dtype, kCpu);
      const Tensor whole = layer.mixer->forward(Variable(x), {}, &end).data();
      CHECK(relative_error(layer.mixer->forward(Variable(x), {}, nullptr).data(), whole) == 0.0);
      LayerState pieces = layer.mixer->initial_state(3, 0, dtype, kCpu), steps = layer.mixer->initial_state(3, 0, dtype, kCpu);
      int64_t at = 0;
      for (const int64_t n : {2, 9, 1, 11}) {
        const Tensor part = layer.mixer->forward(Variable(x.slice(1, at, at + n)), {}, &pieces).data();
        CHECK(relative_error(part, whole.slice(1, at, at + n)) < tolerance);
        at += n;
      }
      for (int64_t t = 0; t < 23; ++t)
        CHECK(relative_error(layer.mixer->step(x.slice(1, t, t + 1), steps), whole.slice(1, t, t + 1)) < tolerance);
      for (const LayerState* s : {&pieces, &steps}) {
        CHECK(s->length == 23);
        for (const auto& [name, value] : end.tensors)
          if (value.numel() > 0) CHECK(relative_error(s->tensors.at(name), value) < tolerance);
      }
    }
}

TEST_CASE("baseline layers: documents packed are documents apart, outputs and gradients, from a carried state too") {
  for (const Kind& kind : kKinds) {
    INFO(label(kind));
    Layer packed(kind), apart(kind);
    check_documents(packed, apart, kWidth);
  }
}

TEST_CASE("baseline layers: what comes later does not change what came before") {
  for (const Kind& kind : kKinds) {
    INFO(label(kind));
    Layer layer(kind);
    check_causal(layer, kWidth);
  }
}

TEST_CASE("baseline layers stay finite over 16384 positions in fp32 and bf16") {
  for (const Kind& kind : {kKinds[0], kKinds[3], kKinds[4], kKinds[6]})
    for (const DType dtype : {DType::f32, DType::bf16}) {
      INFO(label(kind) << " " << name_of(dtype));
      Layer layer(kind, dtype);
      const Variable x(input(1, 16384, dtype), true);
      const Variable y = layer.mixer->forward(x, {}, nullptr);
      backward(y, input(1, 16384, dtype, 8));
      for (const Tensor& t : {y.data(), x.grad(), layer.store.grad()}) {
        bool finite = true;
        for (const double v : t.to_vector<double>()) finite = finite && std::isfinite(v);
        CHECK(finite);
      }
    }
}

namespace {

void check_gated_cnn(const GoldenCase& c, DType dtype, Device device) {
  INFO(c.name() << " " << name_of(dtype));
  const auto text = [&](const char* name) { return fmt::format("{}", c.number(name)); };
  LayerContext context;
  context.d_model = static_cast<int64_t>(c.number("M"));
  ConfigNode options = ConfigNode::map();
  options.set("hidden", ConfigNode::scalar(text("hidden")));
  options.set("conv_ratio", ConfigNode::of(c.number("conv_ch") / c.number("M")));
  options.set("d_conv", ConfigNode::scalar(text("K")));
  Block block(make_mixer("gated_cnn", options, context), nullptr, NormConfig{"layer", c.number("eps")}, context);
  ParameterStore store(block, {.device = device, .master = dtype == DType::f64 ? DType::f64 : DType::f32,
                               .compute = dtype, .seed = 1});
  for (auto& [name, value] : store.named_masters()) copy_(value, c.tensor("param/" + name));
  store.refresh_compute();
  const Variable x(c.tensor("in/x").to(dtype).to(device), true);
  const ResidualStream out = block.forward({x, {}}, {}, nullptr);
  const Variable y = out.residual + out.pending;
  c.check_within("out/y", y.data(), c.tolerance("out/y", dtype));
  backward(y, c.tensor("upstream/y").to(dtype).to(device));
  c.check_within("grad/in/x", x.grad(), c.tolerance("grad/in/x", dtype));
  for (const auto& [name, grad] : store.named_grads())
    c.check_within("grad/param/" + name, grad, c.tolerance("grad/param/" + name, dtype));
  if (x.size(1) == 1) return;  // a single position takes the step form
  LayerState state = block.mixer().initial_state(x.size(0), 0, dtype, device);
  const NoGrad guard;
  block.forward({x, {}}, {}, &state);
  c.check_within("state/conv_last", state.tensors.at("conv"), c.tolerance("state/conv_last", dtype));
}

}  // namespace

TEST_CASE("the gated CNN block meets its goldens") {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16})
    for_each_golden("baselines.h5", "gated_cnn_", [&](const GoldenCase& c) { check_gated_cnn(c, dtype, kCpu); });
}

TEST_CASE("the gated CNN block meets its goldens on cuda", "[cuda]") {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16})
    for_each_golden("baselines.h5", "gated_cnn_", [&](const GoldenCase& c) { check_gated_cnn(c, dtype, cuda_device()); });
}

TEST_CASE("baseline layers: cuda equals cpu, outputs, states and gradients", "[cuda]") {
  for (const Kind& kind : kKinds)
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      INFO(label(kind) << " " << name_of(dtype));
      Layer cpu(kind, dtype), gpu(kind, dtype, cuda_device());
      const Tensor x = input(2, 23, dtype), dy = input(2, 23, dtype, 8);
      const Variable a(x, true), b(x.to(cuda_device()), true);
      LayerState on_cpu = cpu.mixer->initial_state(2, 0, dtype, kCpu), on_gpu = gpu.mixer->initial_state(2, 0, dtype, cuda_device());
      const Variable y = cpu.mixer->forward(a, {}, &on_cpu), z = gpu.mixer->forward(b, {}, &on_gpu);
      backward(y, dy);
      backward(z, dy.to(cuda_device()));
      const double tolerance = dtype == DType::f64 ? 1e-10 : dtype == DType::f32 ? 1e-4 : 5e-2;
      CHECK(relative_error(z.data(), y.data()) < tolerance);
      CHECK(relative_error(b.grad(), a.grad()) < tolerance);
      CHECK(relative_error(gpu.store.grad(), cpu.store.grad()) < tolerance);
      for (const auto& [name, value] : on_cpu.tensors)
        if (value.numel() > 0) CHECK(relative_error(on_gpu.tensors.at(name), value) < tolerance);
      CHECK(relative_error(gpu.mixer->step(b.data().slice(1, 0, 1), on_gpu), cpu.mixer->step(x.slice(1, 0, 1), on_cpu)) < tolerance);
    }
}

TEST_CASE("baseline layers: single steps on cuda are the whole sequence", "[cuda]") {
  const Device gpu = cuda_device();
  for (const Kind& kind : kKinds)
    for (const int64_t width : {int64_t{12}, int64_t{60}, int64_t{96}, int64_t{384}})
      for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
        INFO(label(kind) << " " << name_of(dtype) << " width " << width);
        Kind fitting = kind;
        for (auto& [key, value] : fitting.options)
          if (key == "hidden") value = std::to_string(width + 5);
        Layer layer(fitting, dtype, gpu, width);
        check_steps(layer, mixer_input(3, 11, width, dtype).to(gpu), dtype == DType::f64 ? 1e-10 : dtype == DType::f32 ? 1e-4 : 5e-2);
      }
}

TEST_CASE("baseline layers: options that do not fit say what would") {
  const auto refuse = [](const std::string& kind, const std::vector<std::pair<std::string, std::string>>& options) {
    return error_of([&] { Layer::make({kind, options}); });
  };
  CHECK(contains(refuse("gated_cnn", {{"expand", "2"}, {"hidden", "24"}}), "both set the inner width"));
  CHECK(contains(refuse("gated_cnn", {{"conv_ratio", "3"}}), "gives 36 convolved channels, expected 1 to the inner width 32"));
  CHECK(contains(refuse("gated_cnn", {{"dconv", "3"}}), "did you mean d_conv?"));
  CHECK(contains(refuse("linear_attention", {{"n_heads", "5"}}), "5 heads do not divide the width 12 (d_model)"));
  CHECK(contains(refuse("linear_attention", {}), "does not split into heads of 64 channels"));
  CHECK(contains(refuse("linear_attention", {{"n_heads", "3"}, {"feature", "elu"}}), "elu1"));
}

}  // namespace krait::layers
