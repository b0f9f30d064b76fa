// AdamW, SGD and Lion on flat buffers: against plain loops, groups, clipping, skipping, the bf16 copy, CUDA twins.
#include "kernels/flat_update.h"

#include <cmath>
#include <limits>

#include "core/parallel.h"
#include "kernels/adamw.h"
#include "kernels/grad_norm.h"
#include "kernels/lion.h"
#include "kernels/set_scalars.h"
#include "kernels/sgd.h"
#include "tests/testing/tensors.h"

using namespace krait;
using namespace krait::kernels;

namespace {

enum class Kind { adamw, sgd, momentum, nesterov, lion };
constexpr Kind kKinds[] = {Kind::adamw, Kind::sgd, Kind::momentum, Kind::nesterov, Kind::lion};
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Setup {
  int64_t n = 0;
  std::vector<SegmentSpec> specs;
  FlatUpdate u;
  Tensor m, v;
  OptimizerSegments segments;
};

// Three groups, the middle one without decay and slower; odd lengths; the last one longer than a chunk.
std::vector<SegmentSpec> groups(int64_t last) {
  return {{0, 33, 1, 0.1}, {64, 64, 0.25, 0}, {128, 1, 0.25, 0}, {192, last, 1, 0.3}};
}

Setup make(std::vector<SegmentSpec> specs, int64_t n, DType param, DType grad, Device device, uint64_t seed = 1) {
  Setup s{n, std::move(specs), {}, {}, {}, {}};
  const auto random = [&](uint64_t k, DType dtype) {
    return random_tensor({n}, Normal{}, seed * 10 + k, DType::f64).to(dtype).to(device).clone();
  };
  s.u = {.param = random(0, param), .grad = random(1, grad), .compute = {}, .hyper = zeros({3}, DType::f64, device),
         .clip = {}};
  set_scalars(s.u.hyper, std::array{0.01, 1 / (1 - std::pow(0.9, 3)), 1 / (1 - std::pow(0.95, 3))});
  s.m = random(2, param);
  s.v = random(3, param);
  for (Tensor v = s.v.cpu(); const double x : v.to_vector<double>()) REQUIRE(std::isfinite(x));
  std::vector<double> squares = s.v.to_vector<double>();
  for (double& x : squares) x *= x;
  s.v = from_vector(squares).to(param).to(device).clone();
  s.segments = make_optimizer_segments(s.specs, n, device);
  return s;
}

void run(Kind kind, const Setup& s) {
  switch (kind) {
    case Kind::adamw: return adamw_(s.u, s.m, s.v, s.segments, {0.9, 0.95, 1e-8});
    case Kind::sgd: return sgd_(s.u, {}, s.segments, {});
    case Kind::momentum: return sgd_(s.u, s.m, s.segments, {0.9, false});
    case Kind::nesterov: return sgd_(s.u, s.m, s.segments, {0.9, true});
    case Kind::lion: return lion_(s.u, s.m, s.segments, {0.9, 0.99});
  }
}

struct Expected {
  std::vector<double> p, m, v;
};

// Element by element in double, with the settings looked up from the specs.
Expected reference(Kind kind, const Setup& s, double clip) {
  Expected e{s.u.param.to_vector<double>(), s.m.to_vector<double>(), s.v.to_vector<double>()};
  const std::vector<double> g = s.u.grad.to_vector<double>();
  for (size_t i = 0; i < e.p.size(); ++i) {
    const SegmentSpec* spec = &s.specs[0];
    for (const SegmentSpec& other : s.specs)
      if (other.offset <= static_cast<int64_t>(i)) spec = &other;
    const double lr = 0.01 * spec->lr_scale, wd = spec->weight_decay, gi = g[i] * clip, old_m = e.m[i];
    double direction = 0;
    if (kind == Kind::adamw) {
      e.m[i] = 0.9 * old_m + 0.1 * gi;
      e.v[i] = 0.95 * e.v[i] + 0.05 * gi * gi;
      direction = e.m[i] / (1 - std::pow(0.9, 3)) / (std::sqrt(e.v[i] / (1 - std::pow(0.95, 3))) + 1e-8);
    } else if (kind == Kind::sgd) {
      direction = gi;
    } else if (kind == Kind::lion) {
      const double c = 0.9 * old_m + 0.1 * gi;
      direction = (c > 0) - (c < 0);
      e.m[i] = 0.99 * old_m + 0.01 * gi;
    } else {
      e.m[i] = 0.9 * old_m + gi;
      direction = kind == Kind::nesterov ? gi + 0.9 * e.m[i] : e.m[i];
    }
    e.p[i] -= lr * (direction + wd * e.p[i]);
  }
  return e;
}

void check_against_loops(Device device) {
  struct Types {
    DType param, grad;
    double tolerance;
  };
  for (const Types t : {Types{DType::f64, DType::f64, 1e-13}, {DType::f32, DType::f32, 1e-6},
                        {DType::f32, DType::bf16, 1e-6}})
    for (const Kind kind : kKinds)
      for (const int64_t last : {1, 63, 4096, 12289}) {
        INFO("kind " << int(kind) << " last " << last << " " << name_of(t.param) << " " << name_of(t.grad));
        const Setup s = make(groups(last), 192 + last, t.param, t.grad, device);
        const Expected e = reference(kind, s, 1);
        run(kind, s);
        CHECK(relative_error(s.u.param.cpu(), from_vector(e.p)) <= t.tolerance);
        CHECK(relative_error(s.m.cpu(), from_vector(e.m)) <= t.tolerance);
        CHECK(relative_error(s.v.cpu(), from_vector(e.v)) <= t.tolerance);
      }
}

void check_clip_copy_and_zero(Device device) {
  for (const DType grad : {DType::f32, DType::bf16}) {
    Setup s = make(groups(5001), 192 + 5001, DType::f32, grad, device);
    s.u.compute = zeros({s.n}, DType::bf16, device);
    s.u.zero_grad = true;
    const GradNorm norm = grad_norm(s.u.grad, 0.5);
    s.u.clip = norm.values;
    double sum = 0;
    for (const double g : s.u.grad.to_vector<double>()) sum += g * g;
    CHECK(norm.norm().item() == Approx(std::sqrt(sum)).epsilon(1e-12));
    CHECK(norm.clip_scale().item() == Approx(0.5 / (std::sqrt(sum) + 1e-6)).epsilon(1e-12));
    const Expected e = reference(Kind::adamw, s, norm.clip_scale().item());
    run(Kind::adamw, s);
    CHECK(relative_error(s.u.param.cpu(), from_vector(e.p)) <= 1e-6);
    CHECK(s.u.compute.to_vector<float>() == s.u.param.to(DType::bf16).to_vector<float>());
    CHECK(s.u.grad.to_vector<float>() == std::vector<float>(static_cast<size_t>(s.n), 0));
  }
}

void check_skip(Device device) {
  const Tensor skipped = zeros({1}, DType::i64, device);
  for (const double bad : {kInfinity, -kInfinity, std::nan("")})
    for (const Kind kind : kKinds) {
      Setup s = make(groups(70), 192 + 70, DType::f32, DType::f32, device);
      Tensor at = s.u.grad.slice(0, 200, 201);
      fill_(at, bad);
      s.u.compute = full({s.n}, 3, DType::bf16, device);
      s.u.zero_grad = true;
      const GradNorm norm = grad_norm(s.u.grad, 1, skipped);
      CHECK(norm.finite().item() == 0);
      CHECK(norm.clip_scale().item() == 0);
      s.u.clip = norm.values;
      const auto p = s.u.param.to_vector<float>(), m = s.m.to_vector<float>(), v = s.v.to_vector<float>();
      run(kind, s);
      CHECK(s.u.param.to_vector<float>() == p);
      CHECK(s.m.to_vector<float>() == m);
      CHECK(s.v.to_vector<float>() == v);
      CHECK(s.u.compute.to_vector<float>() == std::vector<float>(static_cast<size_t>(s.n), 3));
      CHECK(s.u.grad.to_vector<float>() == std::vector<float>(static_cast<size_t>(s.n), 0));
    }
  CHECK(skipped.item() == 15);
  grad_norm(ones({3}, DType::f32, device), 1, skipped);
  CHECK(skipped.item() == 15);
}

}  // namespace

TEST_CASE("adamw, sgd and lion match plain loops, with groups of their own settings") { check_against_loops(kCpu); }
TEST_CASE("adamw, sgd and lion match plain loops on a GPU", "[cuda]") { check_against_loops(cuda_device()); }

TEST_CASE("one update clips, writes the bf16 copy and zeroes the gradients") { check_clip_copy_and_zero(kCpu); }
TEST_CASE("one update clips, writes the bf16 copy and zeroes the gradients on a GPU", "[cuda]") {
  check_clip_copy_and_zero(cuda_device());
}

TEST_CASE("a gradient that is not finite changes nothing and is counted") { check_skip(kCpu); }
TEST_CASE("a gradient that is not finite changes nothing and is counted on a GPU", "[cuda]") {
  check_skip(cuda_device());
}

TEST_CASE("padding between parameters stays zero") {
  for (const Kind kind : kKinds) {
    Setup s = make({{0, 3, 1, 0.1}, {128, 2, 1, 0.2}}, 192, DType::f32, DType::f32, kCpu);
    for (Tensor* t : {&s.u.param, &s.u.grad, &s.m, &s.v}) {
      Tensor padding = t->slice(0, 3, 128), tail = t->slice(0, 130, 192);
      zero_(padding);
      zero_(tail);
    }
    run(kind, s);
    for (const int64_t i : {3, 64, 127, 130, 191}) CHECK(s.u.param.slice(0, i, i + 1).item() == 0);
    CHECK(s.u.param.slice(0, 2, 3).item() != 0);
  }
}

TEST_CASE("an update does not depend on the number of threads") {
  const Setup a = make(groups(40000), 192 + 40000, DType::f32, DType::f32, kCpu);
  const Setup b = make(groups(40000), 192 + 40000, DType::f32, DType::f32, kCpu);
  run(Kind::adamw, a);
  set_num_threads(1);
  run(Kind::adamw, b);
  set_num_threads(0);
  CHECK(a.u.param.to_vector<float>() == b.u.param.to_vector<float>());
}

TEST_CASE("chunks cover the buffer once and never straddle two segments") {
  const auto check_cover = [](const std::vector<SegmentSpec>& specs, int64_t n, int64_t count, int64_t settings) {
    const OptimizerSegments s = make_optimizer_segments(specs, n, kCpu);
    const std::vector<int64_t> c = s.chunks.to_vector<int64_t>();
    const std::vector<double> set = s.settings.to_vector<double>();
    CHECK(s.chunks.size(0) == count);
    CHECK(s.settings.size(0) == settings);
    int64_t at = 0;
    for (size_t i = 0; i < c.size(); i += 3) {
      CHECK(c[i] == at);
      CHECK(c[i + 1] > c[i]);
      CHECK(c[i + 1] - c[i] <= kUpdateChunk);
      at = c[i + 1];
      for (const SegmentSpec& spec : specs)
        if (spec.offset < c[i + 1] && c[i] < spec.offset + spec.length) {
          CHECK(set[static_cast<size_t>(2 * c[i + 2])] == spec.lr_scale);
          CHECK(set[static_cast<size_t>(2 * c[i + 2] + 1)] == spec.weight_decay);
        }
    }
    CHECK(at == n);
  };
  check_cover({}, 0, 0, 0);
  check_cover({{0, 5000, 1, 0.1}}, 5000, 2, 1);
  check_cover(groups(9000), 9192, 5, 3);
  // Equal neighbours are joined: 100 parameters of 64 elements are two chunks.
  std::vector<SegmentSpec> many;
  for (int64_t i = 0; i < 100; ++i) many.push_back({64 * i, 60, 1, 0.1});
  check_cover(many, 6400, 2, 1);
  // An empty parameter of another group in between does not join what is apart.
  check_cover({{0, 64, 1, 0.1}, {64, 0, 1, 0}, {64, 64, 1, 0}, {128, 64, 1, 0.1}}, 192, 3, 3);
}

TEST_CASE("segments and buffers that do not fit are refused") {
  CHECK(contains(error_of([] { make_optimizer_segments({{0, 10}, {40, 10}}, 64, kCpu); }), "not at a multiple of 64"));
  CHECK(contains(error_of([] { make_optimizer_segments({{0, 100}, {64, 10}}, 128, kCpu); }), "segment 1 is [64, 74)"));
  CHECK(contains(error_of([] { make_optimizer_segments({{0, 100}}, 64, kCpu); }), "in a buffer of 64"));
  CHECK(contains(error_of([] { make_optimizer_segments({}, 64, kCpu); }), "without a segment"));
  Setup s = make({{0, 64}}, 64, DType::f32, DType::f32, kCpu);
  Setup other = s;
  other.u.grad = zeros({64}, DType::f64, kCpu);
  CHECK(contains(error_of([&] { run(Kind::adamw, other); }), "float64 gradients for float32 parameters"));
  other = s;
  other.u.grad = zeros({63}, DType::f32, kCpu);
  CHECK(contains(error_of([&] { run(Kind::lion, other); }), "grad is"));
  other = s;
  other.u.compute = zeros({64}, DType::f32, kCpu);
  CHECK(contains(error_of([&] { run(Kind::sgd, other); }), "expected bfloat16"));
  CHECK(contains(error_of([&] { adamw_(s.u, s.m, s.v, s.segments, {1.0, 0.9, 1e-8}); }), "betas 1, 0.9"));
  CHECK(contains(error_of([&] { sgd_(s.u, {}, s.segments, {0.9, false}); }), "needs a velocity buffer"));
}
