#include "layers/mamba.h"

#include <cmath>

#include "autograd/elementwise.h"
#include "core/allocator.h"
#include "layers/parameter_store.h"
#include "tests/testing/tensors.h"

namespace krait::layers {

namespace {

constexpr int64_t kWidth = 12;

MambaConfig config_with(const std::function<void(ConfigNode&)>& change, int64_t d_model = kWidth) {
  ConfigNode section = ConfigNode::map();
  change(section);
  return read_mamba_config(section, d_model);
}

MambaConfig small() {
  return config_with([](ConfigNode& s) { s.set("d_state", ConfigNode::of(int64_t{5})); });
}

struct TestMixer {
  explicit TestMixer(DType compute = DType::f64, Device device = kCpu, const MambaConfig& config = small(),
                     int64_t d_model = kWidth)
      : mixer(config, context_of(d_model)),
        store(mixer, {.device = device, .master = compute == DType::f64 ? DType::f64 : DType::f32,
                      .compute = compute, .seed = 3}),
        dtype(compute) {}
  static LayerContext context_of(int64_t d_model) {
    LayerContext c;
    c.d_model = d_model;
    c.n_branches = 4;
    return c;
  }
  Tensor forward(const Tensor& x, LayerState* state = nullptr) {
    const NoGrad guard;
    return mixer.forward(Variable(x), {}, state).data();
  }
  LayerState start(int64_t b) { return mixer.initial_state(b, 1, dtype, kCpu); }
  Mamba mixer;
  ParameterStore store;
  DType dtype;
};

bool finite(const Tensor& t) {
  for (const double v : t.to_vector<double>())
    if (!std::isfinite(v)) return false;
  return true;
}

void check_config_error(const std::function<void(ConfigNode&)>& change, const std::string& expected) {
  CHECK(contains(error_of([&] { config_with(change); }), expected));
}

}  // namespace

TEST_CASE("Mamba in pieces with a carried state and step by step is Mamba on the whole sequence") {
  for (const DType dtype : {DType::f64, DType::f32}) {
    TestMixer m(dtype);
    const int64_t b = 2, l = 131;
    const Tensor x = random_tensor({b, l, kWidth}, Normal{}, 1, dtype);
    LayerState whole_state = m.start(b);
    const Tensor whole = m.forward(x, &whole_state);
    const double allowed = dtype == DType::f64 ? 1e-12 : 1e-5;
    CHECK(relative_error(whole, m.forward(x)) == 0);
    for (const std::vector<int64_t>& cuts : {std::vector<int64_t>{65, 66}, {1, 2, 61, 67}, std::vector<int64_t>(l, 1)}) {
      LayerState state = m.start(b);
      int64_t at = 0;
      for (const int64_t n : cuts) {
        const Tensor part = x.slice(1, at, at + n);
        const Tensor y = n == 1 ? m.mixer.step(part, state) : m.forward(part, &state);
        CHECK(relative_error(y, whole.slice(1, at, at + n)) < (n == 1 ? 20 : 1) * allowed);
        at += n;
      }
      CHECK(state.length == l);
      for (const auto& [name, value] : whole_state.tensors) CHECK(relative_error(state.tensors[name], value) < allowed);
    }
  }
}

TEST_CASE("documents packed into one row of Mamba are the documents apart, in outputs and gradients") {
  const std::vector<int64_t> lengths{70, 1, 2, 58};
  const int64_t l = 131;
  TestMixer together, apart;
  const Tensor x = random_tensor({1, l, kWidth}, Normal{}, 1), dy = random_tensor({1, l, kWidth}, Normal{}, 2);
  SequenceInfo info;
  std::vector<int32_t> segments;
  for (size_t d = 0; d < lengths.size(); ++d) segments.insert(segments.end(), static_cast<size_t>(lengths[d]), static_cast<int32_t>(d));
  info.segments = from_vector(segments, {1, l});
  const Variable packed_x(x, true);
  // The state passed in belongs to the first document, the one that comes out to the last.
  LayerState state = together.start(1), first = apart.start(1), last;
  for (auto& [name, value] : state.tensors) value = first.tensors[name] = random_tensor(value.shape(), Normal{}, 5);
  const Variable y = together.mixer.forward(packed_x, info, &state);
  backward(y, dy);
  int64_t at = 0;
  for (size_t d = 0; d < lengths.size(); ++d) {
    const int64_t end = at + lengths[d];
    const Variable piece(x.slice(1, at, end).contiguous(), true);
    last = d == 0 ? first : apart.start(1);
    const Variable own = apart.mixer.forward(piece, {}, &last);
    backward(own, dy.slice(1, at, end).contiguous());
    CHECK(relative_error(y.data().slice(1, at, end), own.data()) < 1e-12);
    CHECK(relative_error(packed_x.grad().slice(1, at, end), piece.grad()) < 1e-11);
    at = end;
  }
  CHECK(relative_error(together.store.grad(), apart.store.grad()) < 1e-11);
  for (const auto& [name, value] : last.tensors) CHECK(relative_error(state.tensors[name], value) < 1e-12);
}

TEST_CASE("Mamba's past does not see its future") {
  TestMixer m;
  const Tensor x = random_tensor({1, 90, kWidth}, Normal{}, 1);
  const Tensor before = m.forward(x);
  for (const int64_t t : {0, 63, 64, 89}) {
    Tensor changed = x.clone();
    Tensor tail = changed.slice(1, t, 90);
    copy_(tail, random_tensor(tail.shape(), Normal{0, 100}, 2));
    const Tensor after = m.forward(changed);
    if (t > 0) CHECK(relative_error(after.slice(1, 0, t), before.slice(1, 0, t)) == 0);
    CHECK(relative_error(after.slice(1, t, t + 1), before.slice(1, t, t + 1)) > 1e-3);
  }
}

TEST_CASE("Mamba stays finite over 16384 positions in fp32 and bf16, forward and backward") {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    TestMixer m(dtype);
    const Variable x(random_tensor({1, 16384, kWidth}, Normal{}, 1, dtype), true);
    const Variable y = m.mixer.forward(x, {}, nullptr);
    backward(y, random_tensor(y.shape(), Normal{}, 2, dtype));
    CHECK(finite(y.data()));
    CHECK(finite(x.grad()));
    CHECK(finite(m.store.grad()));
  }
}

TEST_CASE("Mamba's memory grows linearly with the length") {
  TestMixer m(DType::f32);
  const auto peak = [&](int64_t l) {
    const Variable x(random_tensor({1, l, kWidth}, Normal{}, 1, DType::f32), true);
    Allocator& memory = allocator(kCpu);
    const int64_t before = memory.stats().current_bytes;
    memory.reset_peak();
    const Variable y = m.mixer.forward(x, {}, nullptr);
    backward(y, y.data());
    return static_cast<double>(memory.stats().peak_bytes - before);
  };
  const double one = peak(2048), eight = peak(8 * 2048);
  CHECK(eight < 8.2 * one);
}

TEST_CASE("Mamba begins with the paper's values") {
  TestMixer m(DType::f64, kCpu, config_with([](ConfigNode&) {}, 64), 64);
  const auto value = [&](const std::string& name) { return m.store.named_master(name).to_vector<double>(); };
  for (size_t i = 0; i < value("A_log").size(); ++i)
    REQUIRE(std::exp(value("A_log")[i]) == Approx(static_cast<double>(i % 16 + 1)));
  const auto bias = value("dt_proj.bias");
  double low = 1, high = 0;
  for (const double v : bias) {
    const double dt = std::log1p(std::exp(v));
    low = std::min(low, dt);
    high = std::max(high, dt);
  }
  CHECK(low >= 0.001 * (1 - 1e-9));
  CHECK(low < 0.002);
  CHECK(high <= 0.1 * (1 + 1e-9));
  CHECK(high > 0.05);
  double largest = 0;
  for (const double v : value("out_proj.weight")) largest = std::max(largest, std::abs(v));
  CHECK(largest == Approx(1 / std::sqrt(128.0) / 2).epsilon(0.01));  // four branches
  CHECK(m.store.named_master("x_proj.weight").shape() == Shape{4 + 2 * 16, 128});
  for (const ParameterStore::Entry& e : m.store.entries()) {
    const bool exact = e.name == "A_log" || e.name == "D" || e.name == "dt_proj.bias";
    CHECK(e.options.keep_fp32 == exact);
    CHECK(e.options.decay == (e.shape.ndim() == 2 && e.name != "A_log"));
  }
}

TEST_CASE("mamba's options say what is wrong") {
  const auto set = [](const std::string& name, const std::string& text) {
    return [=](ConfigNode& s) { s.set(name, ConfigNode::scalar(text)); };
  };
  check_config_error(set("d_state", "0"), "expected an integer in [1, 1048576]");
  check_config_error(set("expand", "576460752303423488"), "expected an integer in [1, 1048576]");
  check_config_error(set("d_sate", "8"), "did you mean d_state?");
  check_config_error(set("dt_max", "1e-5"), "1e-05 is below dt_min, 0.001");
  check_config_error(set("dt_rank", "25"), "25 is more than the inner width 24 (d_model 12 x expand 2)");
  CHECK(config_with(set("dt_rank", "auto"), 40).dt_rank == 3);
  CHECK(config_with(set("expand", "3")).d_inner == 36);
}

TEST_CASE("Mamba on cuda is Mamba on the cpu", "[cuda]") {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    for (const bool packed : {false, true}) {
      TestMixer cpu(dtype), gpu(dtype, cuda_device());
      const Tensor x = random_tensor({3, 150, kWidth}, Normal{}, 1, dtype), dy = random_tensor(x.shape(), Normal{}, 2, dtype);
      std::vector<int32_t> segments;
      for (int64_t i = 0; i < 450; ++i) segments.push_back(static_cast<int32_t>(i / 37));
      const auto run = [&](TestMixer& m, Device device) {
        SequenceInfo info;
        if (packed) info.segments = from_vector(segments, {3, 150}).to(device);
        const Variable in(x.to(device), true);
        const Variable y = m.mixer.forward(in, info, nullptr);
        backward(y, dy.to(device));
        return std::vector<Tensor>{y.data(), in.grad(), m.store.grad()};
      };
      const auto a = run(cpu, kCpu), b = run(gpu, cuda_device());
      const double allowed = dtype == DType::f64 ? 1e-9 : dtype == DType::f32 ? 5e-5 : 4e-2;
      for (size_t i = 0; i < a.size(); ++i) CHECK(relative_error(b[i], a[i]) < allowed);
    }
  }
}

}  // namespace krait::layers
