#include "layers/s4.h"

#include <cmath>

#include "autograd/elementwise.h"
#include "core/allocator.h"
#include "core/random.h"
#include "core/stream.h"
#include "layers/model.h"
#include "layers/parameter_store.h"
#include "tests/testing/tensors.h"

namespace krait::layers {

namespace {

constexpr int64_t kWidth = 6, kContext = 64;

struct Variant {
  const char* kind;
  std::function<void(ConfigNode&)> change;
};

S4Config config_of(const Variant& v, int64_t d_model = kWidth, bool language_model = false) {
  ConfigNode section = ConfigNode::map();
  section.set("d_state", ConfigNode::of(int64_t{8}));
  if (v.change) v.change(section);
  return read_s4_config(section, v.kind, d_model, 0.0, language_model);
}

auto with(const std::string& name, const std::string& value) {
  return [=](ConfigNode& s) { s.set(name, ConfigNode::scalar(value)); };
}

std::vector<Variant> causal_variants() {
  std::vector<Variant> all;
  for (const char* init : {"legs", "legt", "lagt", "fout", "lin", "random", "random_diagonal", "dplr_random"})
    all.push_back({"s4", with("init", init)});
  for (const char* init : {"legs", "lin", "inv", "real", "random"}) all.push_back({"s4d", with("init", init)});
  all.push_back({"s4", with("copies", "2")});
  all.push_back({"s4d", with("copies", "3")});
  all.push_back({"s4", with("n_ssm", "2")});
  all.push_back({"s4d", with("n_ssm", "0")});
  all.push_back({"s4d", with("discretization", "bilinear")});
  all.push_back({"s4d", with("final_act", "id")});
  all.push_back({"s4d", with("activation", "silu")});
  return all;
}

std::vector<Variant> all_variants() {
  auto all = causal_variants();
  const auto both = [](ConfigNode& s) { s.set("bidirectional", ConfigNode::of(true)); };
  all.push_back({"s4", both});
  all.push_back({"s4d", both});
  all.push_back({"s4d", [=](ConfigNode& s) {
                   both(s);
                   s.set("tie_reverse", ConfigNode::of(false));
                   s.set("copies", ConfigNode::of(int64_t{2}));
                 }});
  return all;
}

struct TestLayer {
  explicit TestLayer(const Variant& v, DType compute = DType::f64, Device device = kCpu, int64_t context = kContext,
                     int64_t d_model = kWidth)
      : layer(config_of(v, d_model), context_of(context, d_model)),
        store(layer, {.device = device, .master = compute == DType::f64 ? DType::f64 : DType::f32, .compute = compute,
                      .seed = 3}),
        name(fmt::format("{} {} {}", v.kind, config_of(v, d_model).init, compute)) {}
  static LayerContext context_of(int64_t context, int64_t d_model) {
    LayerContext c;
    c.d_model = d_model;
    c.context = context;
    return c;
  }
  Tensor forward(const Tensor& x, LayerState* state = nullptr, const Tensor& segments = {}) {
    const NoGrad guard;
    return layer.forward(Variable(x), {segments, {}}, state).data();
  }
  S4 layer;
  ParameterStore store;
  std::string name;
};

Tensor sequences(int64_t b, int64_t l, uint64_t seed, DType dtype = DType::f64, int64_t d = kWidth) {
  return random_tensor({b, l, d}, Normal{}, seed, dtype);
}

bool finite(const Tensor& t) {
  for (const double v : t.to_vector<double>())
    if (!std::isfinite(v)) return false;
  return true;
}

}  // namespace

TEST_CASE("S4: convolution = pieces with a carried state = step by step") {
  for (const Variant& v : causal_variants())
    for (const DType dtype : {DType::f64, DType::f32}) {
      TestLayer t(v, dtype);
      INFO(t.name);
      const double allowed = dtype == DType::f64 ? 1e-9 : 1e-4;
      const int64_t l = 37;
      const Tensor x = sequences(2, l, 1, dtype), whole = t.forward(x);
      for (const std::vector<int64_t>& cuts : {std::vector<int64_t>{l}, {18, 19}, {1, 35, 1}, std::vector<int64_t>(l, 1)}) {
        LayerState state = t.layer.initial_state(2, 1, dtype, kCpu);
        int64_t at = 0;
        for (const int64_t n : cuts) {
          const Tensor part = x.slice(1, at, at + n);
          const Tensor y = n == 1 ? t.layer.step(part, state) : t.forward(part, &state);
          CHECK(relative_error(y, whole.slice(1, at, at + n)) < allowed);
          at += n;
        }
        CHECK(state.length == l);
      }
    }
}

TEST_CASE("S4: longer than the model's context, the evaluated kernel goes on") {
  for (const char* kind : {"s4", "s4d"}) {
    TestLayer t({kind, {}}, DType::f64, kCpu, 20);
    INFO(t.name);
    const Tensor x = sequences(1, 131, 1);
    LayerState state = t.layer.initial_state(1, 1, DType::f64, kCpu);
    CHECK(relative_error(t.forward(x), t.forward(x, &state)) < 1e-9);
  }
  TestLayer t({"s4", {}}, DType::f64, kCpu, 20);
  CHECK(contains(error_of([&] { t.layer.forward(Variable(sequences(1, 21, 1)), {}, nullptr); }),
                 "21 positions in training, but the kernel was made for 20"));
}

TEST_CASE("S4: packed documents are the documents apart, outputs and gradients") {
  for (const Variant& v : all_variants()) {
    TestLayer together(v), apart(v);
    INFO(together.name);
    const std::vector<int64_t> lengths{6, 1, 10, 14};
    std::vector<int32_t> ids;
    for (size_t d = 0; d < lengths.size(); ++d) ids.insert(ids.end(), static_cast<size_t>(lengths[d]), static_cast<int32_t>(d));
    const int64_t l = static_cast<int64_t>(ids.size());
    const Tensor segments = from_vector(ids, {1, l}), x = sequences(1, l, 1), dy = sequences(1, l, 2);
    const Variable packed = together.layer.forward(Variable(x), {segments, {}}, nullptr);
    backward(packed, dy);
    int64_t at = 0;
    for (const int64_t n : lengths) {
      const Variable one = apart.layer.forward(Variable(x.slice(1, at, at + n)), {}, nullptr);
      CHECK(relative_error(packed.data().slice(1, at, at + n), one.data()) < 1e-10);
      backward(one, dy.slice(1, at, at + n));
      at += n;
    }
    CHECK(relative_error(together.store.grad(), apart.store.grad()) < 1e-9);
  }
}

TEST_CASE("S4: a carried state belongs to the row's first document") {
  for (const char* kind : {"s4", "s4d"}) {
    TestLayer t({kind, {}});
    INFO(t.name);
    const Tensor x = sequences(1, 12, 1);
    LayerState state = t.layer.initial_state(1, 1, DType::f64, kCpu);
    t.forward(x.slice(1, 0, 5), &state);
    const Tensor segments = from_vector(std::vector<int32_t>{4, 4, 4, 5, 5, 5, 5}, {1, 7});
    const Tensor y = t.forward(x.slice(1, 5, 12), &state, segments);
    CHECK(relative_error(y.slice(1, 0, 3), t.forward(x.slice(1, 0, 8)).slice(1, 5, 8)) < 1e-9);
    CHECK(relative_error(y.slice(1, 3, 7), t.forward(x.slice(1, 8, 12))) < 1e-9);
  }
}

TEST_CASE("S4 is causal, and bidirectional S4 is not") {
  for (const Variant& v : all_variants()) {
    TestLayer t(v);
    INFO(t.name);
    Tensor x = sequences(1, 33, 1);
    const Tensor before = t.forward(x);
    Tensor tail = x.slice(1, 20, 33);
    copy_(tail, sequences(1, 13, 2));
    const Tensor after = t.forward(x);
    const double changed = relative_error(after.slice(1, 0, 20), before.slice(1, 0, 20));
    if (config_of(v).bidirectional)
      CHECK(changed > 1e-6);
    else
      CHECK(changed < 1e-12);
  }
}

TEST_CASE("S4D trains with a carried state; its gradients are those of the convolution") {
  for (const Variant& v : {Variant{"s4d", {}}, Variant{"s4d", with("copies", "2")}, Variant{"s4", with("init", "random_diagonal")}}) {
    TestLayer a(v), b(v);
    INFO(a.name);
    const Tensor x = sequences(2, 23, 1), dy = sequences(2, 23, 2);
    const Variable xa(x, true), xb(x, true);
    backward(a.layer.forward(xa, {}, nullptr), dy);
    LayerState state = b.layer.initial_state(2, 1, DType::f64, kCpu);
    backward(b.layer.forward(xb, {}, &state), dy);
    CHECK(relative_error(a.store.grad(), b.store.grad()) < 1e-9);
    CHECK(relative_error(xa.grad(), xb.grad()) < 1e-9);
  }
  TestLayer t({"s4", {}});
  LayerState state = t.layer.initial_state(1, 1, DType::f64, kCpu);
  CHECK(contains(error_of([&] { t.layer.forward(Variable(sequences(1, 4, 1)), {}, &state); }), "data.state: reset"));
  TestLayer both({"s4d", with("bidirectional", "true")});
  CHECK(contains(error_of([&] { both.forward(sequences(1, 4, 1), &state); }), "bidirectional"));
}

TEST_CASE("S4 stays finite over 16384 positions at its default init") {
  for (const char* kind : {"s4", "s4d"})
    for (const DType dtype : {DType::f32, DType::bf16}) {
      const Variant v{kind, [](ConfigNode& s) { s.set("d_state", ConfigNode::of(int64_t{64})); }};
      TestLayer t(v, dtype, kCpu, 16384, 3);
      INFO(t.name);
      const Variable x(sequences(1, 16384, 1, dtype, 3), true), y = t.layer.forward(x, {}, nullptr);
      backward(y, sequences(1, 16384, 2, dtype, 3));
      CHECK(finite(y.data()));
      CHECK(finite(x.grad()));
      CHECK(finite(t.store.grad()));
    }
}

TEST_CASE("a bidirectional S4 classifier does not see the padding of shorter rows") {
  for (const std::string kind : {"s4", "s4d"})
    for (const bool pooled : {false, true}) {
      INFO(kind << (pooled ? ", pooled" : ", last"));
      ConfigNode section = ConfigNode::map(), mixer = ConfigNode::map(), layers = ConfigNode::list();
      mixer.set("d_state", ConfigNode::of(int64_t{8}));
      mixer.set("bidirectional", ConfigNode::of(true));
      layers.append(ConfigNode::of(kind));
      section.set("type", ConfigNode::of(std::string("classifier")));
      section.set("d_model", ConfigNode::of(kWidth));
      section.set("n_layers", ConfigNode::of(int64_t{2}));
      section.set("n_classes", ConfigNode::of(int64_t{3}));
      section.set("head", ConfigNode::of(std::string(pooled ? "pooled" : "last")));
      section.set("layers", layers);
      section.set(kind, mixer);
      const auto model = make_model(read_model_config(section), {.vocab_size = 11, .context = 20});
      ParameterStore store(*model, {.master = DType::f64, .compute = DType::f64, .seed = 4});
      ModelInput padded;
      padded.tokens = random_integers({3, 20}, {0, 11}, 1);
      padded.targets = random_integers({3}, {0, 3}, 2);
      const std::vector<int32_t> lengths{20, 7, 1};
      padded.lengths = from_vector(lengths);
      const Tensor count = full({}, 3.0, DType::f32, kCpu), all = model->predict(padded).data();
      backward(model->loss(padded, count).loss);
      const Tensor together = store.grad().clone();
      zero_(store.grad());
      for (int64_t row = 0; row < 3; ++row) {
        ModelInput alone;
        alone.tokens = padded.tokens.slice(0, row, row + 1).slice(1, 0, lengths[static_cast<size_t>(row)]).contiguous();
        alone.targets = padded.targets.slice(0, row, row + 1);
        CHECK(relative_error(all.slice(0, row, row + 1), model->predict(alone).data()) < 1e-12);
        backward(model->loss(alone, count).loss);
      }
      CHECK(relative_error(together, store.grad()) < 1e-12);
    }
}

TEST_CASE("what bidirectional S4 finds in the padding makes no difference, to the bit") {
  TestLayer t({"s4d", with("bidirectional", "true")});
  const NoGrad guard;
  const Tensor x = sequences(3, 20, 1), lengths = from_vector(std::vector<int32_t>{20, 7, 1});
  Tensor cut = x.clone();
  for (const int64_t row : {1, 2}) {
    Tensor rest = cut.select(0, row).slice(0, row == 1 ? 7 : 1, 20);
    zero_(rest);
  }
  const SequenceInfo padded{{}, {}, lengths};
  CHECK(relative_error(t.layer.forward(Variable(x), padded, nullptr).data(), t.forward(cut)) == 0);
}

TEST_CASE("a captured step of bidirectional S4 follows the lengths", "[cuda]") {
  const Device gpu = cuda_device();
  TestLayer t({"s4d", with("bidirectional", "true")}, DType::f32, gpu);
  const NoGrad guard;
  const Variable x(sequences(3, 20, 1, DType::f32).to(gpu));
  t.forward(x.data());  // tables of transforms; no lengths yet
  Tensor lengths = from_vector(std::vector<int32_t>{1, 1, 1}).to(gpu), y;
  const SequenceInfo padded{{}, {}, lengths};
  MemoryPool pool(gpu);
  CapturedGraph graph(gpu);
  {
    const MemoryPool::Scope scope(pool);
    graph.begin();
    y = t.layer.forward(x, padded, nullptr).data();
    graph.end();
  }
  for (const std::vector<int32_t>& n : {std::vector<int32_t>{20, 7, 1}, {3, 20, 19}}) {
    copy_(lengths, from_vector(n));
    graph.replay();
    CHECK(relative_error(y, t.layer.forward(x, padded, nullptr).data()) == 0);
  }
}

TEST_CASE("S4 tells the optimizer what is special, and freezes what it is told to") {
  const auto options_of = [](const Variant& v) {
    TestLayer t(v);
    std::map<std::string, ParameterOptions> all;
    for (const auto& e : t.store.entries()) all[e.name] = e.options;
    return all;
  };
  auto s4 = options_of({"s4", {}});
  CHECK(s4.size() == 9);
  for (const char* name : {"kernel.log_dt", "kernel.log_A_re", "kernel.A_im", "kernel.P", "kernel.B"}) {
    INFO(name);
    CHECK(!s4.at(name).decay);
    CHECK(s4.at(name).lr_scale == 0.1);
    CHECK(s4.at(name).keep_fp32);
    CHECK(s4.at(name).trainable);
  }
  CHECK(s4.at("kernel.C_tilde").keep_fp32);
  CHECK(s4.at("kernel.C_tilde").lr_scale == 1.0);
  CHECK(!s4.at("D").decay);
  CHECK(!s4.at("out.bias").decay);
  CHECK(s4.at("out.weight").decay);
  auto frozen = options_of({"s4", [](ConfigNode& s) {
    ConfigNode list = ConfigNode::list();
    list.append(ConfigNode::scalar("A"));
    list.append(ConfigNode::scalar("B"));
    s.set("freeze", list);
  }});
  for (const char* name : {"kernel.log_A_re", "kernel.A_im", "kernel.P", "kernel.B"}) CHECK(!frozen.at(name).trainable);
  CHECK(frozen.at("kernel.log_dt").trainable);
  auto both = options_of({"s4d", with("bidirectional", "true")});
  CHECK(both.count("kernel_rev.C") == 1);
  CHECK(both.count("kernel_rev.B") == 0);
  auto real = options_of({"s4", with("init", "random_diagonal")});
  CHECK(!real.at("kernel.A_im").trainable);
  CHECK(options_of({"s4", with("init", "random")}).count("kernel.A") == 1);
}

TEST_CASE("S4's first values: the time steps' range, a real diagonal that stays real, sets that differ") {
  TestLayer t({"s4d", [](ConfigNode& s) {
    s.set("init", ConfigNode::scalar("random"));
    s.set("n_ssm", ConfigNode::of(int64_t{2}));
  }});
  for (const double x : t.store.named_master("kernel.log_dt").to_vector<double>()) {
    CHECK(x >= std::log(0.001));
    CHECK(x <= std::log(0.1));
  }
  const Tensor A = t.store.named_master("kernel.A_im");
  CHECK(relative_error(A.select(0, 0), A.select(0, 1)) > 0.01);
  TestLayer real({"s4", with("init", "random_diagonal")});
  CHECK(real.store.named_master("kernel.log_A_re").size(1) == 8);
  backward(real.layer.forward(Variable(sequences(2, 15, 1)), {}, nullptr), sequences(2, 15, 2));
  for (const auto& [name, grad] : real.store.named_grads())
    if (name == "kernel.C" || name == "kernel.B")
      for (const double x : grad.select(2, 1).to_vector<double>()) CHECK(std::abs(x) < 1e-12);
}

TEST_CASE("S4 drops activations in training only, alike at all positions when tied") {
  for (const bool tied : {false, true}) {
    TestLayer t({"s4d", [=](ConfigNode& s) {
      s.set("dropout", ConfigNode::of(0.5));
      s.set("tie_dropout", ConfigNode::of(tied));
      s.set("final_act", ConfigNode::scalar("id"));
    }});
    const Tensor x = sequences(2, 9, 1), plain = t.forward(x);
    t.layer.set_training(true);
    current_random() = {7, from_vector<int64_t>({1}).view({}), 0};
    const Tensor once = t.forward(x);
    CHECK(relative_error(once, plain) > 1e-3);
    CHECK(relative_error(t.forward(x), once) == 0.0);
    current_random() = {};
    t.layer.set_training(false);
    CHECK(relative_error(t.forward(x), plain) == 0.0);
  }
}

TEST_CASE("S4's state has one size, and its kernels have names") {
  TestLayer t({"s4", {}});
  CHECK(t.layer.initial_state(3, 10, DType::bf16, kCpu).tensors.at("x").shape() == Shape{3, kWidth, 4, 2});
  CHECK(t.layer.initial_state(3, 1000000, DType::bf16, kCpu).tensors.at("x").dtype() == DType::f32);
  CHECK(contains(t.layer.kernel_name(1, 100, DType::f32, kCpu, false), "own FFT of 128 points"));
  TestLayer dense({"s4", with("init", "random")});
  CHECK(contains(dense.layer.kernel_name(1, 100, DType::f32, kCpu, false), "slow"));
}

TEST_CASE("S4's options say what is wrong with them") {
  const auto message = [](const Variant& v, bool lm = false) { return error_of([&] { config_of(v, kWidth, lm); }); };
  CHECK(contains(message({"s4", with("init", "legz")}), "legs"));
  CHECK(contains(message({"s4d", with("init", "dplr_random")}), "init"));
  CHECK(contains(message({"s4", with("d_state", "7")}), "expected an even number"));
  CHECK(contains(message({"s4", with("discretization", "zoh")}), "only bilinear is defined"));
  CHECK(contains(message({"s4", with("n_ssm", "4")}), "4 sets do not divide the width 6"));
  CHECK(contains(message({"s4", with("freeze", "E")}), "expected of A, B, C, D, dt"));
  CHECK(contains(message({"s4", with("dt_max", "0.0001")}), "is below dt_min"));
  CHECK(contains(message({"s4", with("bidirectional", "true")}, true), "language model"));
  CHECK(contains(message({"s4", with("d_stat", "8")}), "did you mean d_state"));
}

TEST_CASE("S4: cuda equals cpu, forward, gradients, states and documents", "[cuda]") {
  for (const Variant& v : all_variants())
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      TestLayer cpu(v, dtype), gpu(v, dtype, cuda_device());
      INFO(cpu.name);
      const double allowed = dtype == DType::f64 ? 1e-9 : dtype == DType::f32 ? 1e-4 : 5e-2;
      const Tensor x = sequences(2, 41, 1, dtype), dy = sequences(2, 41, 2, dtype);
      std::vector<int32_t> ids;
      for (int32_t i = 0; i < 82; ++i) ids.push_back(i % 41 / 9);
      const Tensor segments = from_vector(ids, {2, 41});
      for (const bool documents : {false, true}) {
        const auto run = [&](TestLayer& t, Device d) {
          const Variable in(x.to(d), true);
          const Variable y = t.layer.forward(in, {documents ? segments.to(d) : Tensor(), {}}, nullptr);
          backward(y, dy.to(d));
          return std::pair(y.data(), in.grad());
        };
        const auto a = run(cpu, kCpu), b = run(gpu, cuda_device());
        CHECK(relative_error(b.first, a.first) <= allowed);
        CHECK(relative_error(b.second, a.second) <= allowed);
      }
      CHECK(relative_error(gpu.store.grad(), cpu.store.grad()) <= allowed);
      if (config_of(v).bidirectional) continue;
      LayerState p = cpu.layer.initial_state(2, 1, dtype, kCpu), q = gpu.layer.initial_state(2, 1, dtype, cuda_device());
      CHECK(relative_error(gpu.forward(x.to(cuda_device()), &q), cpu.forward(x, &p)) <= allowed);
      const Tensor one = x.slice(1, 0, 1);
      CHECK(relative_error(gpu.layer.step(one.to(cuda_device()), q), cpu.layer.step(one, p)) <= allowed);
    }
}

}  // namespace krait::layers
