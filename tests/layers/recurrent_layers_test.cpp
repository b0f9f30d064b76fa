#include <algorithm>
#include <cmath>

#include "autograd/elementwise.h"
#include "layers/parameter_store.h"
#include "layers/registry.h"
#include "layers/slstm.h"
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
    {"slstm", {{"n_heads", "3"}, {"recurrent_init", "standard"}}},
    {"slstm", {{"n_heads", "2"}, {"conv", "0"}, {"forget_gate", "exp"}, {"recurrent_init", "standard"}}},
    {"rnn", {}},
    {"lstm", {{"hidden", "7"}, {"forget_bias", "1"}}},
    {"gru", {}},
};

struct Layer {
  explicit Layer(const Kind& kind, DType dtype = DType::f64, Device device = kCpu, int64_t width = kWidth)
      : mixer(make(kind, width)),
        store(*mixer, {.device = device, .master = dtype == DType::f64 ? DType::f64 : DType::f32, .compute = dtype,
                       .seed = 3}) {}
  static std::shared_ptr<Mixer> make(const Kind& kind, int64_t width) {
    ConfigNode options = ConfigNode::map();
    for (const auto& [key, value] : kind.options) options.set(key, ConfigNode::scalar(value));
    LayerContext context;
    context.d_model = width;
    context.n_layers = 3;
    context.layer_index = 1;
    context.residual_std = 0.3;
    return make_mixer(kind.name, options, context);
  }
  std::shared_ptr<Mixer> mixer;
  ParameterStore store;
};

Tensor input(int64_t b, int64_t l, DType dtype = DType::f64, int64_t width = kWidth, uint64_t seed = 5) {
  return mixer_input(b, l, width, dtype, seed);
}

}  // namespace

TEST_CASE("recurrent layers: whole sequences, two halves with a carried state and single steps agree") {
  for (const Kind& kind : kKinds)
    for (const DType dtype : {DType::f64, DType::f32}) {
      INFO(kind.name << " " << name_of(dtype));
      Layer layer(kind, dtype);
      const NoGrad guard;
      const double tolerance = dtype == DType::f64 ? 1e-12 : 1e-5;
      const Tensor x = input(3, 23, dtype);
      const Tensor whole = layer.mixer->forward(Variable(x), {}, nullptr).data();
      LayerState state = layer.mixer->initial_state(3, 64, dtype, kCpu);
      const Tensor a = layer.mixer->forward(Variable(x.slice(1, 0, 9)), {}, &state).data();
      const Tensor b = layer.mixer->forward(Variable(x.slice(1, 9, 23)), {}, &state).data();
      CHECK(state.length == 23);
      CHECK(relative_error(a, whole.slice(1, 0, 9)) < tolerance);
      CHECK(relative_error(b, whole.slice(1, 9, 23)) < tolerance);
      LayerState steps = layer.mixer->initial_state(3, 64, dtype, kCpu);
      for (int64_t t = 0; t < 23; ++t)
        CHECK(relative_error(layer.mixer->step(x.slice(1, t, t + 1), steps), whole.slice(1, t, t + 1)) < 10 * tolerance);
      for (const auto& [name, value] : state.tensors) CHECK(relative_error(steps.tensors.at(name), value) < tolerance);
    }
}

TEST_CASE("recurrent layers: documents packed are documents apart, outputs and gradients, from a carried state too") {
  for (const Kind& kind : kKinds) {
    INFO(kind.name);
    Layer packed(kind), apart(kind);
    check_documents(packed, apart, kWidth);
  }
}

TEST_CASE("recurrent layers: what comes later does not change what came before") {
  for (const Kind& kind : kKinds) {
    INFO(kind.name);
    Layer layer(kind);
    check_causal(layer, kWidth);
  }
}

TEST_CASE("recurrent layers stay finite over 16384 positions in fp32 and bf16") {
  for (const Kind& kind : kKinds)
    for (const DType dtype : {DType::f32, DType::bf16}) {
      INFO(kind.name << " " << name_of(dtype));
      Layer layer(kind, dtype);
      const Variable x(input(1, 16384, dtype), true);
      const Variable y = layer.mixer->forward(x, {}, nullptr);
      backward(y, input(1, 16384, dtype, kWidth, 8));
      for (const Tensor& t : {y.data(), x.grad(), layer.store.grad()}) {
        double worst = 0;
        for (const double v : t.to_vector<double>()) worst = std::isfinite(v) ? std::max(worst, std::abs(v)) : HUGE_VAL;
        CHECK(worst < 1e6);
      }
    }
}

TEST_CASE("recurrent layers: cuda equals cpu", "[cuda]") {
  for (const Kind& kind : kKinds)
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      INFO(kind.name << " " << name_of(dtype));
      const double tolerance = dtype == DType::f64 ? 1e-9 : dtype == DType::f32 ? 2e-5 : 4e-2;
      Layer cpu(kind, dtype), gpu(kind, dtype, cuda_device());
      const auto run = [&](Layer& layer, Device device) {
        SequenceInfo info;
        std::vector<int32_t> ids(3 * 37);
        for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i / 9);
        info.segments = from_vector(ids, {3, 37}).to(device);
        const Variable x(input(3, 37, dtype).to(device), true);
        const Variable y = layer.mixer->forward(x, info, nullptr);
        backward(y, input(3, 37, dtype, kWidth, 8).to(device));
        return std::vector<Tensor>{y.data(), x.grad(), layer.store.grad()};
      };
      const auto a = run(cpu, kCpu), b = run(gpu, cuda_device());
      for (size_t i = 0; i < a.size(); ++i) CHECK(relative_error(b[i], a[i]) < tolerance);
    }
}

TEST_CASE("recurrent layers: single steps on cuda are the whole sequence", "[cuda]") {
  const Device gpu = cuda_device();
  for (const Kind& kind : kKinds)
    for (const int64_t width : {int64_t{12}, int64_t{96}})  // 12: where no kernel for steps serves
      for (const DType dtype : {DType::f32, DType::bf16}) {
        INFO(kind.name << " " << name_of(dtype) << " width " << width);
        Layer layer(kind, dtype, gpu, width);
        check_steps(layer, input(3, 11, dtype, width).to(gpu), dtype == DType::f32 ? 1e-4 : 4e-2);
      }
}

TEST_CASE("the sLSTM forget bias is the golden's power law, and the block starts with it") {
  for_each_golden("train.h5", "slstm_forget_bias_", [](const GoldenCase& golden) {
    const auto units = static_cast<int64_t>(golden.number("DH"));
    std::vector<double> b;
    for (int64_t j = 0; j < units; ++j)
      b.push_back(slstm_forget_bias(j, units, static_cast<int64_t>(golden.number("block")),
                                    static_cast<int64_t>(golden.number("blocks"))));
    golden.check("out/b", from_vector(b));
  });
  Layer layer(kKinds[0]);
  const Tensor b = layer.store.named_master("b");
  CHECK(b.slice(0, 1, 2).to_vector<double>().front() == 5.0);
  CHECK(b.slice(0, 1, 2).to_vector<double>().back() == -7.0);
  CHECK(relative_error(b.slice(0, 2, 4), zeros({2, 3, 4}, DType::f64, kCpu)) == 0.0);
  CHECK(slstm_forget_bias(0, 1, 0, 2) == 5.0);
}

TEST_CASE("xlstm[a:b] is a period of a mLSTM and b sLSTM layers, the sLSTM at offsets 1 to b") {
  const auto layers_of = [](const std::string& entry) {
    ConfigNode section = ConfigNode::map();
    section.set("d_model", ConfigNode::of(int64_t{16}));
    section.set("n_layers", ConfigNode::of(int64_t{8}));
    section.set("layers", ConfigNode::of(entry));
    section.set("norm", ConfigNode::of(std::string("layer_1p")));
    const ModelConfig once = read_model_config(section), again = read_model_config(section);  // stays re-runnable
    CHECK(once.layers == again.layers);
    return once.layers;
  };
  CHECK(layers_of("xlstm[0:1]") == std::vector<std::string>{"slstm"});
  CHECK(contains(error_of([&] { layers_of("xlstm[7]"); }), "expected xlstm[a:b]"));
  CHECK(contains(error_of([&] { layers_of("xlstm[0:0]"); }), "expected xlstm[a:b]"));
  CHECK(contains(error_of([&] { layers_of("xlstm[1:1]x"); }), "expected xlstm[a:b]"));
  const bool has_mlstm = std::any_of(layer_kinds().begin(), layer_kinds().end(),
                                     [](const LayerKind& kind) { return kind.name == "mlstm"; });
  if (!has_mlstm) return;
  CHECK(layers_of("xlstm[1:1]") == std::vector<std::string>{"mlstm", "slstm"});
  CHECK(layers_of("xlstm[3:2]") == std::vector<std::string>{"mlstm", "slstm", "slstm", "mlstm", "mlstm"});
  CHECK(layers_of("xlstm[2:0]") == std::vector<std::string>{"mlstm", "mlstm"});
}

TEST_CASE("recurrent layers say what is wrong with their options") {
  const auto refused = [](const Kind& kind) { return error_of([&] { Layer layer(kind); }); };
  CHECK(contains(refused({"slstm", {{"n_heads", "5"}}}), "5 heads do not divide the width 12 (d_model)\n       try 3, 4 or 6"));
  CHECK(contains(refused({"slstm", {{"forget_gate", "relu"}}}), "expected one of sigmoid, exp"));
  CHECK(contains(refused({"gru", {{"forget_bias", "1"}}}), "unknown key"));
}

}  // namespace krait::layers
