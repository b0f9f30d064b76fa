#include <cmath>

#include "autograd/elementwise.h"
#include "autograd/reduce.h"
#include "kernels/kan_fit.h"
#include "layers/kan_network.h"
#include "tests/testing/golden.h"
#include "tests/testing/tensors.h"

namespace krait::layers {

namespace {

ConfigNode list_of(const std::vector<int64_t>& values) {
  ConfigNode list = ConfigNode::list();
  for (const int64_t v : values) list.append(ConfigNode::of(v));
  return list;
}

struct Options {
  std::vector<int64_t> widths{5};
  std::string type = "regressor";
  int64_t outputs = 1, grid = 5, order = 3;
  std::string init = "krait", reg = "activations";
  double lambda = 0;
  std::vector<std::pair<int64_t, int64_t>> schedule = {};
  int64_t prune_step = 0;
};

ModelConfig config_of(const Options& o) {
  ConfigNode kan = ConfigNode::map();
  kan.set("widths", list_of(o.widths));
  kan.set("grid", ConfigNode::of(o.grid));
  kan.set("order", ConfigNode::of(o.order));
  kan.set("init", ConfigNode::of(o.init));
  ConfigNode regularization = ConfigNode::map();
  regularization.set("lambda", ConfigNode::of(o.lambda));
  regularization.set("reg", ConfigNode::of(o.reg));
  kan.set("regularization", regularization);
  if (o.prune_step > 0) {
    ConfigNode prune = ConfigNode::map();
    prune.set("step", ConfigNode::of(o.prune_step));
    kan.set("prune", prune);
  }
  if (!o.schedule.empty()) {
    ConfigNode schedule = ConfigNode::list();
    for (const auto& [step, grid] : o.schedule) schedule.append(list_of({step, grid}));
    kan.set("grid_schedule", schedule);
  }
  ConfigNode section = ConfigNode::map();
  section.set("type", ConfigNode::of(o.type));
  ConfigNode layers = ConfigNode::list();
  layers.append(ConfigNode::of(std::string("kan")));
  section.set("layers", layers);
  section.set("kan", kan);
  section.set("n_classes", ConfigNode::of(o.outputs));
  return read_model_config(section);
}

struct TestNetwork {
  explicit TestNetwork(const ModelConfig& config, int64_t features = 2, DType dtype = DType::f64, Device device = kCpu,
                       uint64_t seed = 3)
      : model(config, {.input_features = features}),
        store(model, {.device = device, .master = dtype == DType::f64 ? DType::f64 : DType::f32, .compute = dtype,
                      .seed = seed}) {}
  KanNetwork model;
  ParameterStore store;
};

// Samples of exp(sin(pi x0) + x1^2), the paper's first example, on [-1, 1]^2.
ModelInput paper_samples(int64_t n, uint64_t seed) {
  ModelInput in;
  in.inputs = random_tensor({n, 2}, Uniform{-1, 1}, seed);
  in.targets = empty({n, 1}, DType::f64, kCpu);
  for (int64_t b = 0; b < n; ++b) {
    const double* x = in.inputs.data<double>() + 2 * b;
    in.targets.data<double>()[b] = std::exp(std::sin(M_PI * x[0]) + x[1] * x[1]);
  }
  return in;
}

double rmse(TestNetwork& net, const ModelInput& in) {
  const NoGrad guard;
  return std::sqrt(net.model.loss(in, {}).loss.data().item());
}

// Adam on everything that is trained (Kingma & Ba 2015).
void train(TestNetwork& net, const ModelInput& in, int64_t steps, double lr, bool update_grids) {
  const int64_t n = net.store.numel();
  std::vector<double> m(static_cast<size_t>(n)), v(static_cast<size_t>(n));
  for (int64_t t = 0; t < steps; ++t) {
    if (update_grids) net.model.before_step(t, in, net.store);
    zero_(net.store.grad());
    backward(net.model.loss(in, {}).loss);
    const double rate = lr * 0.5 * (1 + std::cos(M_PI * static_cast<double>(t) / static_cast<double>(steps)));
    for (int64_t i = 0; i < n; ++i) {
      const double g = net.store.grad().data<double>()[i];
      auto &mi = m[static_cast<size_t>(i)], &vi = v[static_cast<size_t>(i)];
      mi = 0.9 * mi + 0.1 * g;
      vi = 0.99 * vi + 0.01 * g * g;
      const double now = static_cast<double>(t + 1);
      net.store.master().data<double>()[i] -=
          rate * (mi / (1 - std::pow(0.9, now))) / (std::sqrt(vi / (1 - std::pow(0.99, now))) + 1e-10);
    }
  }
}

}  // namespace

TEST_CASE("the KAN network meets its golden: predictions, loss, every gradient") {
  for_each_golden("kan.h5", "kan_net_2_5_1", [](const GoldenCase& golden) {
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      INFO(name_of(dtype));
      TestNetwork net(config_of({}), 2, dtype);
      for (auto& [name, value] : net.store.named_masters())
        copy_(value, golden.tensor((name.ends_with("grid") ? "in/" : "param/") + name));
      net.store.refresh_compute();
      ModelInput in;
      in.inputs = golden.tensor("in/x");
      in.targets = golden.tensor("in/target");
      golden.check_within("out/y", net.model.predict(in).data(), golden.tolerance("out/y", dtype));
      const ModelLoss loss = net.model.loss(in, {});
      golden.check_within("out/loss", loss.loss.data(), golden.tolerance("out/loss", dtype));
      backward(loss.loss);
      for (const auto& [name, grad] : net.store.named_grads())
        if (!name.ends_with("grid"))
          golden.check_within("grad/param/" + name, grad, golden.tolerance("grad/param/" + name, dtype));
    }
  });
}

TEST_CASE("the penalty of a KAN network is L1 plus entropy of its edges, and its gradient is right") {
  for (const std::string reg : {"activations", "weights"}) {
    INFO(reg);
    Options o;
    o.lambda = 0.7, o.reg = reg, o.init = "pykan";
    Options none = o;
    none.lambda = 0;
    TestNetwork with(config_of(o)), without(config_of(none));
    const ModelInput in = paper_samples(40, 1);
    const ModelLoss a = with.model.loss(in, {}), b = without.model.loss(in, {});
    CHECK(a.loss_sum.item() == b.loss_sum.item());
    double expected = 0;
    Variable h(in.inputs);
    for (const auto& layer : with.model.layers()) {
      const Variable norms = reg == "weights" ? layer->weight_norms() : layer->edges(h);
      const auto edges = norms.data().to_vector<double>();
      double total = 0;
      for (const double e : edges) total += e;
      expected += total;
      for (const double e : edges) expected -= e / total * std::log(e / total);
      h = layer->forward(h);
    }
    CHECK(a.loss.data().item() - b.loss.data().item() == Approx(0.7 * expected).epsilon(1e-9));
    backward(a.loss);
    Tensor w = with.store.named_master("layers.0.spline_weight");
    double* p = w.data<double>() + 11;
    const double old = *p, step = 1e-7;
    Tensor grad;
    for (const auto& [name, g] : with.store.named_grads())
      if (name == "layers.0.spline_weight") grad = g;
    *p = old + step;
    const double up = with.model.loss(in, {}).loss.data().item();
    *p = old - step;
    const double down = with.model.loss(in, {}).loss.data().item();
    CHECK(grad.to_vector<double>()[11] == Approx((up - down) / (2 * step)).epsilon(1e-4).margin(1e-7));
  }
}

TEST_CASE("a micro-batch adds its share of loss and penalty") {
  Options o;
  o.lambda = 0.1, o.reg = "weights";
  TestNetwork net(config_of(o));
  const ModelInput all = paper_samples(30, 4);
  const double whole = net.model.loss(all, {}).loss.data().item();
  const Tensor count = full({}, 30, DType::f32, kCpu);
  double parts = 0;
  for (const auto& [from, to] : {std::pair<int64_t, int64_t>{0, 11}, {11, 30}}) {
    ModelInput part;
    part.inputs = all.inputs.slice(0, from, to).unsqueeze(1);
    part.targets = all.targets.slice(0, from, to);
    parts += net.model.loss(part, count).loss.data().item();
  }
  CHECK(parts == Approx(whole).epsilon(1e-12));
}

TEST_CASE("initial values follow the chosen scheme") {
  const auto std_of = [](const Tensor& t) {
    double sum = 0;
    for (const double x : t.to_vector<double>()) sum += x * x;
    return std::sqrt(sum / static_cast<double>(t.numel()));
  };
  const auto network = [](const std::string& init) {
    Options o;
    o.widths = {100}, o.outputs = 80, o.init = init;
    return std::make_unique<TestNetwork>(config_of(o), 60, DType::f64);
  };
  const auto values = [&](TestNetwork& n, const std::string& name) { return std_of(n.store.named_master("layers.0." + name)); };
  const auto krait = network("krait"), paper = network("paper"), pykan = network("pykan"), efficient = network("efficient");
  for (auto* n : {krait.get(), paper.get()}) {
    CHECK(values(*n, "base_weight") == Approx(std::sqrt(2.0 / 160)).epsilon(0.05));
    CHECK(values(*n, "spline_scaler") == 1.0);
  }
  CHECK(values(*paper, "spline_weight") == Approx(0.1).epsilon(0.05));
  CHECK(values(*pykan, "spline_scaler") == Approx(1 / std::sqrt(60.0)));
  CHECK(values(*pykan, "base_weight") == Approx(1 / std::sqrt(3 * 60.0)).epsilon(0.05));
  CHECK(values(*efficient, "spline_scaler") == Approx(1 / std::sqrt(3 * 60.0)).epsilon(0.05));
  CHECK(values(*pykan, "spline_weight") / values(*krait, "spline_weight") == Approx(3).epsilon(0.05));
  CHECK(values(*krait, "spline_weight") > 0.002);
  CHECK(values(*krait, "spline_weight") < 0.05);
}

TEST_CASE("a grid update lays the knots by the samples and keeps the function there") {
  Options o;
  o.widths = {4, 3}, o.init = "paper";
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    TestNetwork net(config_of(o), 2, dtype);
    const ModelInput in = paper_samples(300, 7);
    const Tensor before = net.model.predict(in).data();
    const auto knots_after = [&](int64_t step) {
      net.model.before_step(step, in, net.store);
      return net.store.named_master("layers.0.grid").to_vector<double>();
    };
    const auto first = net.store.named_master("layers.0.grid").to_vector<double>();
    CHECK(knots_after(3) == first);
    CHECK(knots_after(50) == first);
    CHECK(knots_after(5) != first);
    // Splines of another knot vector can only come near the old curve.
    CHECK(relative_error(net.model.predict(in).data(), before) < 0.15);
    const Tensor grid = net.store.named_master("layers.1.grid");
    CHECK(net.store.grad().to_vector<double>() == std::vector<double>(static_cast<size_t>(net.store.numel()), 0.0));
    const auto knots = grid.to_vector<double>();
    for (size_t j = 1; j < 12; ++j) CHECK(knots[j] > knots[j - 1]);
    CHECK(knots[0] != Approx(-2.2));
    // Once laid, the same samples lay them again where they are.
    const Tensor again = net.model.predict(in).data();
    net.model.update_grids(in, net.store);
    CHECK(relative_error(net.model.predict(in).data(), again) < (dtype == DType::f64 ? 1e-5 : dtype == DType::f32 ? 1e-3 : 0.05));
  }
}

TEST_CASE("a network on a finer grid computes the same function, and the schedule says when") {
  Options o;
  o.grid = 4, o.init = "paper", o.schedule = {{0, 4}, {100, 12}};
  TestNetwork net(config_of(o));
  CHECK(!net.model.resize_due(99));
  CHECK(net.model.resize_due(100));
  const ModelInput in = paper_samples(500, 8);
  const Resized r = net.model.resize(100, in, net.store);
  TestNetwork fine(r.config, 2, DType::f64, kCpu, 99);
  set_masters(fine.store, r.parameters);
  CHECK(fine.store.named_master("layers.0.spline_weight").shape() == Shape{5, 2, 15});
  CHECK(!fine.model.resize_due(100));
  CHECK(relative_error(fine.model.predict(in).data(), net.model.predict(in).data()) < 1e-5);  // limited by lambda
  CHECK(r.reset == std::vector<std::string>{"layers.0.spline_weight", "layers.1.spline_weight"});
  // A checkpoint after 101 steps is loaded into this:
  CHECK(config_at_step(config_of(o), 100).section.find("kan")->find("grid")->text() == "12");
  CHECK(config_at_step(config_of(o), 99).section.find("kan")->find("grid")->text() == "4");
}

TEST_CASE("a [2,5,1] KAN learns exp(sin(pi x) + y^2), and extending its grid lowers the error") {
  Options o;
  o.grid = 3;
  TestNetwork net(config_of(o));
  const ModelInput in = paper_samples(400, 10), held_out = paper_samples(400, 11);
  train(net, in, 600, 0.05, true);
  const double coarse = rmse(net, in), coarse_held_out = rmse(net, held_out);
  INFO("train " << coarse << " held out " << coarse_held_out);
  CHECK(coarse < 0.03);
  CHECK(coarse_held_out < 0.03);
  const Resized r = net.model.with_grid(10, in, net.store);
  TestNetwork fine(r.config);
  set_masters(fine.store, r.parameters);
  CHECK(rmse(fine, in) < 2 * coarse);
  train(fine, in, 600, 0.01, false);
  INFO("extended: train " << rmse(fine, in) << " held out " << rmse(fine, held_out));
  CHECK(rmse(fine, in) < 0.5 * coarse);
  CHECK(rmse(fine, held_out) < 0.7 * coarse_held_out);
}

TEST_CASE("pruning drops weak nodes by slicing and masks weak edges for good") {
  Options o;
  o.widths = {4}, o.init = "paper", o.prune_step = 70;
  TestNetwork net(config_of(o));
  const auto at = [&](TestNetwork& n, const std::string& name) { return n.store.named_master(name); };
  const auto silence = [&](const std::string& layer, int64_t out, int64_t in) {
    for (const std::string name : {"base_weight", "spline_scaler"}) {
      Tensor t = at(net, layer + name).slice(0, out, out + 1).slice(1, in, in + 1);
      fill_(t, 0.0);
    }
  };
  silence("layers.1.", 0, 2);  // node 2 leads nowhere
  silence("layers.0.", 1, 0);  // a dead edge
  const ModelInput in = paper_samples(100, 12);
  const auto pruned = net.model.prune(in, net.store);
  CHECK(pruned.nodes[1] == std::vector<int64_t>{0, 1, 3});
  CHECK(pruned.masks[0].to_vector<double>()[2] == 0);
  TestNetwork small(pruned.network.config);
  set_masters(small.store, pruned.network.parameters);
  CHECK(at(small, "layers.0.spline_weight").shape() == Shape{3, 2, 8});
  CHECK(at(small, "layers.0.grid").shape() == Shape{2, 12});
  CHECK(at(small, "layers.1.grid").shape() == Shape{3, 12});
  CHECK(relative_error(small.model.predict(in).data(), net.model.predict(in).data()) < 1e-9);
  backward(small.model.loss(in, {}).loss);
  for (const auto& [name, grad] : small.store.named_grads()) {
    if (name != "layers.0.spline_weight" && name != "layers.0.base_weight" && name != "layers.0.spline_scaler") continue;
    const auto g = grad.to_vector<double>();
    const size_t each = name == "layers.0.spline_weight" ? 8 : 1;
    for (size_t j = 0; j < each; ++j) CHECK(g[2 * each + j] == 0);  // edge (1, 0)
    CHECK(g[0] != 0);
  }
  CHECK(net.model.before_step(69, in, net.store).empty());
  const Tensor whole = net.model.predict(in).data();
  CHECK(net.model.before_step(70, in, net.store) == "pruned: 8 of 12 edges and 3 of 4 hidden nodes stay");
  CHECK(relative_error(net.model.predict(in).data(), whole) < 1e-9);
  backward(net.model.loss(in, {}).loss);
  for (const auto& [name, grad] : net.store.named_grads())
    if (name == "layers.1.base_weight") CHECK(grad.to_vector<double>()[2] == 0);  // node 2 is gone
  fill_(net.store.master(), 0.0);
  for (const char* name : {"layers.0.grid", "layers.1.grid"}) {
    Tensor grid = at(net, name);
    copy_(grid, kernels::uniform_knots(grid.size(0), 5, 3, -1, 1));
  }
  CHECK(contains(error_of([&] { net.model.prune(in, net.store); }), "pruning would leave no node in hidden layer 1"));
}

TEST_CASE("a KAN classifier begins at chance and refuses inputs of another width") {
  Options o;
  o.type = "classifier", o.outputs = 3;
  TestNetwork net(config_of(o), 4);
  ModelInput in;
  in.inputs = random_tensor({6, 1, 4}, Normal{}, 1);
  in.targets = random_integers({6}, {0, 3}, 2);
  const ModelLoss loss = net.model.loss(in, {});
  backward(loss.loss);
  CHECK(loss.loss.data().item() == Approx(std::log(3.0)).epsilon(0.5));
  in.inputs = random_tensor({6, 5}, Normal{}, 1);
  CHECK(contains(error_of([&] { net.model.predict(in); }), "expected (batch, 4) or (batch, 1, 4)"));
  CHECK(contains(error_of([&] { KanNetwork(config_of(o), {.vocab_size = 9}); }), "the data have tokens"));
  CHECK(contains(error_of([&] { net.model.set_recompute(true); }), "use recompute: none"));
  CHECK(net.model.train_flops_per_token(1) > 0);
}

namespace {

ModelConfig read(const std::string& type, const std::string& layer, const std::function<void(ConfigNode&)>& edit) {
  ConfigNode section = ConfigNode::map();
  section.set("type", ConfigNode::of(type));
  ConfigNode layers = ConfigNode::list();
  layers.append(ConfigNode::of(layer));
  section.set("layers", layers);
  edit(section);
  return read_model_config(section);
}

}  // namespace

TEST_CASE("the options of a KAN are checked where they stand") {
  const auto kan = [](const std::function<void(ConfigNode&)>& edit) {
    return error_of([&] {
      read("regressor", "kan", [&](ConfigNode& s) {
        ConfigNode k = ConfigNode::map();
        edit(k);
        s.set("kan", k);
        s.set("n_classes", ConfigNode::of(int64_t{1}));
      });
    });
  };
  CHECK(contains(kan([](ConfigNode& k) { k.set("order", ConfigNode::of(int64_t{16})); }), "expected an integer in [0, 15]"));
  CHECK(contains(kan([](ConfigNode& k) { k.set("widths", list_of({3, 0})); }), "expected a width >= 1"));
  CHECK(contains(kan([](ConfigNode& k) { k.set("grid_schedule", list_of({3})); }), "such as [[0, 3], [1000, 5]]"));
  CHECK(contains(kan([](ConfigNode& k) { k.set("init", ConfigNode::of(std::string("pyken"))); }), "pykan"));
  CHECK(contains(kan([](ConfigNode& k) {
                   ConfigNode s = ConfigNode::list();
                   s.append(list_of({10, 3}));
                   s.append(list_of({10, 5}));
                   k.set("grid_schedule", s);
                 }),
                 "step 10 does not come after step 10"));
  CHECK(contains(error_of([] { read("language_model", "kan", [](ConfigNode&) {}); }), "type is language_model"));
  CHECK(contains(error_of([] { KanNetwork(read("regressor", "kan", [](ConfigNode&) {}), {.input_features = 2}); }),
                 "model.n_classes is not set"));
  CHECK(contains(error_of([] {
                   read("classifier", "kan", [](ConfigNode& s) {
                     ConfigNode both = ConfigNode::list();
                     both.append(ConfigNode::of(std::string("kan")));
                     both.append(ConfigNode::of(std::string("attention")));
                     s.set("layers", both);
                     s.set("d_model", ConfigNode::of(int64_t{64}));
                     s.set("n_layers", ConfigNode::of(int64_t{2}));
                   });
                 }),
                 "kan is a network of its own"));
  // The resolved section reads to the same config.
  const ModelConfig once = config_of({.schedule = {{0, 5}, {10, 10}}});
  ConfigNode section = once.section;
  CHECK(read_model_config(section).section.find("kan")->find("grid_schedule")->items().size() == 2);
}

namespace {

ModelConfig block_config(int64_t d_model) {
  return read("language_model", "attention", [&](ConfigNode& s) {
    s.set("d_model", ConfigNode::of(d_model));
    s.set("n_layers", ConfigNode::of(int64_t{2}));
    ConfigNode attention = ConfigNode::map();
    attention.set("n_heads", ConfigNode::of(int64_t{2}));
    attention.set("window", ConfigNode::of(int64_t{16}));
    s.set("attention", attention);
    ConfigNode mlp = ConfigNode::map();
    mlp.set("type", ConfigNode::of(std::string("kan")));
    s.set("mlp", mlp);
  });
}

struct BlockModel {
  BlockModel(DType dtype, int64_t length, Device device = kCpu)
      : model(block_config(32), {.vocab_size = 19, .context = length}),
        store(model, {.device = device, .master = dtype == DType::f64 ? DType::f64 : DType::f32, .compute = dtype,
                      .seed = 5}) {}
  LanguageModel model;
  ParameterStore store;
};

ModelInput tokens(int64_t b, int64_t l) {
  ModelInput in;
  in.tokens = random_integers({b, l}, {0, 19}, 1);
  in.targets = random_integers({b, l}, {0, 19}, 2);
  return in;
}

}  // namespace

TEST_CASE("KAN as the mlp of a block: parameters like gelu's, gradients by finite differences, finite at length 16384") {
  const ModelConfig c = block_config(256);
  CHECK(c.mlp.hidden == 96);  // 2 x 256 x 96 edges of 10 numbers against 8 x 256^2
  BlockModel m(DType::f64, 9);
  const ModelInput in = tokens(2, 9);
  backward(m.model.loss(in, {}).loss);
  for (const auto& [name, grad] : m.store.named_grads()) {
    if (name != "layers.0.fc.spline_weight" && name != "layers.1.proj.base_weight" && name != "layers.0.proj.spline_scaler")
      continue;
    INFO(name);
    Tensor w = m.store.named_master(name);
    double* p = w.data<double>() + 3;
    const double old = *p, h = 1e-5;
    *p = old + h;
    const double up = m.model.loss(in, {}).loss.data().item();
    *p = old - h;
    const double down = m.model.loss(in, {}).loss.data().item();
    *p = old;
    CHECK(grad.to_vector<double>()[3] == Approx((up - down) / (2 * h)).epsilon(1e-5).margin(1e-9));
  }
  for (const DType dtype : {DType::f32, DType::bf16}) {
    BlockModel far(dtype, 16384);
    const ModelLoss loss = far.model.loss(tokens(1, 16384), {});
    backward(loss.loss);
    CHECK(std::isfinite(loss.loss.data().item()));
    CHECK(std::isfinite(sum(square(Variable(far.store.grad()))).data().item()));
  }
}

TEST_CASE("cuda: a KAN network and a KAN in a block equal the cpu's", "[cuda]") {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    INFO(name_of(dtype));
    const double tolerance = dtype == DType::f64 ? 1e-9 : dtype == DType::f32 ? 2e-4 : 0.1;
    Options o;
    o.widths = {33, 7}, o.init = "paper", o.lambda = 0.01;
    TestNetwork cpu(config_of(o), 2, dtype), gpu(config_of(o), 2, dtype, cuda_device());
    const ModelInput in = paper_samples(150, 20);
    ModelInput there = in;
    there.inputs = in.inputs.to(cuda_device());
    there.targets = in.targets.to(cuda_device());
    const ModelLoss a = cpu.model.loss(in, {}), b = gpu.model.loss(there, {});
    backward(a.loss);
    backward(b.loss);
    CHECK(relative_error(b.loss.data(), a.loss.data()) <= tolerance);
    CHECK(relative_error(gpu.store.grad(), cpu.store.grad()) <= tolerance);
    gpu.model.update_grids(there, gpu.store);

    BlockModel c(dtype, 13), d(dtype, 13, cuda_device());
    const ModelInput text = tokens(3, 13);
    ModelInput text_there = text;
    text_there.tokens = text.tokens.to(cuda_device());
    text_there.targets = text.targets.to(cuda_device());
    backward(c.model.loss(text, {}).loss);
    backward(d.model.loss(text_there, {}).loss);
    CHECK(relative_error(d.store.grad(), c.store.grad()) <= tolerance);
  }
}

}  // namespace krait::layers
