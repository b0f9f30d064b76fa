#include "layers/mlstm.h"

#include <cmath>

#include "autograd/elementwise.h"
#include "autograd/reduce.h"
#include "autograd/shape.h"
#include "layers/parameter_store.h"
#include "tests/testing/tensors.h"

namespace krait::layers {

namespace {

constexpr int64_t kWidth = 24;

LayerContext context_of(int64_t d_model = kWidth) {
  LayerContext c;
  c.d_model = d_model;
  c.n_layers = 2;
  return c;
}

std::shared_ptr<MlstmMixer> make(const std::string& kind, int64_t d_model = kWidth) {
  if (kind == "mlstm") {
    MlstmConfig c;
    c.n_heads = 2;
    c.inner = 2 * d_model;
    c.chunk_size = 16;
    return std::make_shared<Mlstm>(c, context_of(d_model));
  }
  MlstmLargeConfig c;
  c.n_heads = 2;
  c.qk_width = d_model / 2;
  c.chunk_size = 16;
  return std::make_shared<MlstmLarge>(c, context_of(d_model));
}

// A mixer whose gates and outputs depend on the input everywhere: zero matrices of the start get values.
struct Layer {
  explicit Layer(const std::string& kind, DType compute = DType::f64, Device device = kCpu, bool as_trained = true)
      : mixer(make(kind)),
        store(*mixer, {.device = device, .master = compute == DType::f64 ? DType::f64 : DType::f32, .compute = compute,
                       .seed = 5}) {
    if (!as_trained) return;
    uint64_t seed = 100;
    for (auto& [name, value] : store.named_masters())
      if (name.find("gate") != std::string::npos && name.ends_with("weight"))
        copy_(value, random_tensor(value.shape(), Normal{.std = 0.2}, ++seed));
      else if (name == "igate_preact.bias")
        fill_(value, -1.0);
    store.refresh_compute();
  }
  std::shared_ptr<MlstmMixer> mixer;
  ParameterStore store;
};

const std::string kKinds[] = {"mlstm", "mlstm_large"};

}  // namespace

TEST_CASE("mlstm layers: the whole sequence, two halves with a state, and single steps agree") {
  for (const std::string& kind : kKinds)
    for (const DType dtype : {DType::f64, DType::f32}) {
      INFO(kind << " " << name_of(dtype));
      Layer layer(kind, dtype);
      const double tolerance = dtype == DType::f64 ? 1e-11 : 3e-5;
      const int64_t l = 37;
      const Tensor x = random_tensor({2, l, kWidth}, Normal{}, 3).to(dtype);
      const NoGrad guard;
      const Tensor whole = layer.mixer->forward(Variable(x), {}, nullptr).data();
      LayerState halves = layer.mixer->initial_state(2, 0, dtype, kCpu), steps = halves;
      for (auto& [name, t] : steps.tensors) t = t.clone();
      for (const auto& [from, to] : {std::pair<int64_t, int64_t>{0, 18}, {18, l}}) {
        const Tensor y = layer.mixer->forward(Variable(x.slice(1, from, to)), {}, &halves).data();
        CHECK(relative_error(y, whole.slice(1, from, to)) < tolerance);
      }
      for (int64_t t = 0; t < l; ++t)
        CHECK(relative_error(layer.mixer->step(x.slice(1, t, t + 1), steps), whole.slice(1, t, t + 1)) < tolerance);
      CHECK(halves.length == l);
      CHECK(steps.length == l);
      for (const auto& [name, t] : halves.tensors) CHECK(relative_error(steps.tensors.at(name), t) < tolerance);
    }
}

TEST_CASE("mlstm layers: documents in one row are documents apart, values and gradients") {
  for (const std::string& kind : kKinds) {
    INFO(kind);
    Layer together(kind), apart(kind);
    const std::vector<int64_t> lengths{6, 1, 20, 10};
    const int64_t l = 37;
    const Tensor x = random_tensor({1, l, kWidth}, Normal{}, 3), seed = random_tensor({1, l, kWidth}, Normal{}, 4);
    SequenceInfo info;
    std::vector<int32_t> ids;
    for (size_t d = 0; d < lengths.size(); ++d) ids.insert(ids.end(), static_cast<size_t>(lengths[d]), static_cast<int32_t>(d));
    info.segments = from_vector(ids, {1, l});
    const Variable y = together.mixer->forward(Variable(x), info, nullptr);
    backward(y, seed);
    int64_t at = 0;
    for (const int64_t n : lengths) {
      const Variable part = apart.mixer->forward(Variable(x.slice(1, at, at + n)), {}, nullptr);
      CHECK(relative_error(part.data(), y.data().slice(1, at, at + n)) < 1e-11);
      backward(part, seed.slice(1, at, at + n).contiguous());
      at += n;
    }
    for (size_t i = 0; i < together.store.named_grads().size(); ++i) {
      INFO(together.store.named_grads()[i].name);
      CHECK(relative_error(together.store.named_grads()[i].value, apart.store.named_grads()[i].value) < 1e-9);
    }
  }
}

TEST_CASE("mlstm layers look back only") {
  for (const std::string& kind : kKinds) {
    INFO(kind);
    Layer layer(kind);
    const Tensor x = random_tensor({1, 40, kWidth}, Normal{}, 3);
    const Variable in(x, true);
    Tensor seed = zeros({1, 40, kWidth}, DType::f64, kCpu), part = seed.slice(1, 0, 21);
    fill_(part, 1.0);
    backward(layer.mixer->forward(in, {}, nullptr), seed);
    CHECK(relative_error(in.grad().slice(1, 21, 40), zeros({1, 19, kWidth}, DType::f64, kCpu)) == 0.0);
  }
}

TEST_CASE("mlstm layers stay finite over 16384 positions at their first values") {
  for (const std::string& kind : kKinds)
    for (const DType dtype : {DType::f32, DType::bf16}) {
      INFO(kind << " " << name_of(dtype));
      Layer layer(kind, dtype, kCpu, false);
      const Variable x(random_tensor({1, 16384, kWidth}, Normal{}, 3).to(dtype), true);
      const Variable y = layer.mixer->forward(x, {}, nullptr);
      backward(y, random_tensor(y.shape(), Normal{}, 4).to(dtype));
      for (const Tensor& t : {y.data(), x.grad(), layer.store.grad()}) {
        bool finite = true;
        for (const float v : t.to_vector<float>()) finite = finite && std::isfinite(v);
        CHECK(finite);
      }
    }
}

TEST_CASE("mlstm layers: first values are the paper's") {
  Layer layer("mlstm", DType::f64, kCpu, false), large("mlstm_large", DType::f64, kCpu, false);
  const auto std_of = [](const Tensor& t) {
    double sum = 0;
    for (const double x : t.to_vector<double>()) sum += x * x;
    return std::sqrt(sum / static_cast<double>(t.numel()));
  };
  const double small = std::sqrt(2.0 / (5 * kWidth)), wang = 2.0 / (2 * std::sqrt(static_cast<double>(kWidth)));
  CHECK(std_of(layer.store.named_master("proj_up.weight")) == Approx(small).epsilon(0.1));
  CHECK(std_of(layer.store.named_master("q_proj.weight")) == Approx(small).epsilon(0.2));
  CHECK(std_of(layer.store.named_master("proj_down.weight")) == Approx(wang).epsilon(0.1));
  CHECK(std_of(layer.store.named_master("igate.weight")) == 0.0);
  CHECK(layer.store.named_master("fgate.bias").to_vector<double>() == std::vector<double>{3, 6});
  CHECK(large.store.named_master("igate_preact.bias").to_vector<double>() == std::vector<double>{-10, -10});
  CHECK(std_of(large.store.named_master("ogate_preact.weight")) == 0.0);
  CHECK(std_of(large.store.named_master("q.weight")) == Approx(small).epsilon(0.1));
}

TEST_CASE("mlstm layers: options that do not fit say where and what to try") {
  const auto read = [](auto reader, const char* name, int64_t value) {
    ConfigNode section = ConfigNode::map();
    section.set(name, ConfigNode::of(value));
    return error_of([&] { reader(section, 96); });
  };
  CHECK(contains(read(read_mlstm_config, "n_heads", 5), "5 heads do not divide the inner width 192 (d_model 96)"));
  CHECK(contains(read(read_mlstm_config, "qkv_block_size", 5), "blocks of 5 do not divide the inner width 192"));
  CHECK(contains(read(read_mlstm_large_config, "n_heads", 7), "7 heads do not divide the width 96 (d_model)"));
  CHECK(contains(read(read_mlstm_large_config, "n_heads", 32), "32 heads do not divide the width 48 of q and k"));
  CHECK(contains(read(read_mlstm_config, "head", 4), "unknown key"));
  ConfigNode section = ConfigNode::map();
  CHECK(read_mlstm_config(section, 96).inner == 192);
  CHECK(section.find("inner")->text() == "192");
}

TEST_CASE("cuda: mlstm layers equal the cpu's", "[cuda]") {
  for (const std::string& kind : kKinds)
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      INFO(kind << " " << name_of(dtype));
      Layer cpu(kind, dtype), gpu(kind, dtype, cuda_device());
      const int64_t l = 150;
      const Tensor x = random_tensor({2, l, kWidth}, Normal{}, 3).to(dtype), seed = random_tensor({2, l, kWidth}, Normal{}, 4).to(dtype);
      std::vector<int32_t> ids;
      for (int64_t i = 0; i < 2 * l; ++i) ids.push_back(i % l < 70 ? 0 : i % l < 100 ? 1 : 2);
      SequenceInfo info, there;
      info.segments = from_vector(ids, {2, l});
      there.segments = info.segments.to(cuda_device());
      const Variable a(x, true), b(x.to(cuda_device()), true);
      const Variable y = cpu.mixer->forward(a, info, nullptr), z = gpu.mixer->forward(b, there, nullptr);
      backward(y, seed);
      backward(z, seed.to(cuda_device()));
      const double tolerance = dtype == DType::f64 ? 1e-9 : dtype == DType::f32 ? 2e-4 : 0.1;
      CHECK(relative_error(z.data(), y.data()) <= tolerance);
      CHECK(relative_error(b.grad(), a.grad()) <= tolerance);
      CHECK(relative_error(gpu.store.grad(), cpu.store.grad()) <= tolerance);
    }
}

}  // namespace krait::layers
