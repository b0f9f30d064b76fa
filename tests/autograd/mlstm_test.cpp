#include "autograd/mlstm.h"

#include <cmath>

#include "autograd/elementwise.h"
#include "autograd/linear.h"
#include "autograd/reduce.h"
#include "autograd/shape.h"
#include "tests/testing/op_case.h"

namespace krait {
namespace {

// Documents of 5, 9, 1, 40, 75, ... positions; the second row's begin elsewhere.
Tensor documents(int64_t b, int64_t l) {
  std::vector<int32_t> ids;
  for (int64_t ib = 0; ib < b; ++ib)
    for (int64_t t = 0; t < l; ++t) {
      const int64_t at = t + 3 * ib;
      ids.push_back(at < 5 ? 0 : at < 14 ? 1 : at < 15 ? 2 : at < 55 ? 3 : at < 130 ? 4 : 5);
    }
  return from_vector(ids, {b, l});
}

struct Reference {
  Tensor h, c, n, m;
};

// The recurrence as the paper writes it, in loops over fp64.
Reference recurrence(const Vars& in, const Tensor& segments) {
  const Tensor &qt = in[0].data(), &vt = in[2].data();
  const int64_t b = qt.size(0), l = qt.size(1), heads = qt.size(2), dq = qt.size(3), dv = vt.size(3);
  const auto q = qt.to_vector<double>(), k = in[1].data().to_vector<double>(), v = vt.to_vector<double>();
  const auto i = in[3].data().to_vector<double>(), f = in[4].data().to_vector<double>();
  const auto ids = segments.defined() ? segments.to_vector<int64_t>() : std::vector<int64_t>{};
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  std::vector<double> c(size(b * heads * dq * dv), 0.0), n(size(b * heads * dq), 0.0), m(size(b * heads), 0.0), h(v.size());
  if (in.size() > 5) {
    c = in[5].data().to_vector<double>();
    n = in[6].data().to_vector<double>();
    m = in[7].data().to_vector<double>();
  }
  const double scale = 1 / std::sqrt(static_cast<double>(dq));
  for (int64_t ib = 0; ib < b; ++ib)
    for (int64_t ih = 0; ih < heads; ++ih) {
      const int64_t unit = ib * heads + ih;
      double& mu = m[size(unit)];
      for (int64_t t = 0; t < l; ++t) {
        if (!ids.empty() && t > 0 && ids[size(ib * l + t)] != ids[size(ib * l + t - 1)]) {
          mu = 0;
          for (int64_t x = 0; x < dq; ++x) {
            n[size(unit * dq + x)] = 0;
            for (int64_t y = 0; y < dv; ++y) c[size((unit * dq + x) * dv + y)] = 0;
          }
        }
        const int64_t at = (ib * l + t) * heads + ih;
        const double lf = -std::log1p(std::exp(-f[size(at)])), top = std::max(lf + mu, i[size(at)]);
        const double keep = std::exp(lf + mu - top), take = std::exp(i[size(at)] - top);
        mu = top;
        double r = 0;
        std::vector<double> sum(size(dv), 0.0);
        for (int64_t x = 0; x < dq; ++x) {
          double& nx = n[size(unit * dq + x)];
          nx = keep * nx + take * k[size(at * dq + x)];
          r += nx * q[size(at * dq + x)] * scale;
          for (int64_t y = 0; y < dv; ++y) {
            double& cxy = c[size((unit * dq + x) * dv + y)];
            cxy = keep * cxy + take * k[size(at * dq + x)] * v[size(at * dv + y)];
            sum[size(y)] += cxy * q[size(at * dq + x)] * scale;
          }
        }
        const double den = std::max(std::abs(r), std::exp(-mu)) + 1e-6;
        for (int64_t y = 0; y < dv; ++y) h[size(at * dv + y)] = sum[size(y)] / den;
      }
    }
  return {from_vector(h, vt.shape()), from_vector(c, {b, heads, dq, dv}), from_vector(n, {b, heads, dq}),
          from_vector(m, {b, heads})};
}

MlstmResult run(const Vars& in, const Tensor& segments, const MlstmOptions& options = {}) {
  const DType a = accum_dtype(in[0].dtype());
  MlstmMemory initial;
  if (in.size() > 5) initial = {cast(in[5], a), cast(in[6], a), in[7].data().to(a)};
  return mlstm(in[0], in[1], in[2], cast(in[3], a), cast(in[4], a), initial, segments, options);
}

std::vector<Shape> shapes(int64_t b, int64_t l, int64_t heads, int64_t dq, int64_t dv, bool state = false) {
  std::vector<Shape> s{{b, l, heads, dq}, {b, l, heads, dq}, {b, l, heads, dv}, {b, l, heads}, {b, l, heads}};
  if (state) s.insert(s.end(), {{b, heads, dq, dv}, {b, heads, dq}, {b, heads}});
  return s;
}

OpCase make_case(const std::string& name, bool with_documents, std::vector<std::vector<Shape>> all, double chunk = 64) {
  const auto segments = [with_documents](const Vars& in) {
    return with_documents ? documents(in[0].size(0), in[0].size(1)).to(in[0].device()) : Tensor{};
  };
  OpCase c;
  c.name = "mlstm " + name;
  c.run = [segments, chunk](const Vars& in) {
    const MlstmResult r = run(in, segments(in), {.chunk = static_cast<int64_t>(chunk)});
    const Variable m = exp(Variable(r.last.m));  // the memory itself does not depend on its stabiliser
    return Vars{r.h, r.last.c * unsqueeze(unsqueeze(m, -1), -1), r.last.n * unsqueeze(m, -1)};
  };
  c.reference = [segments](const Vars& in) {
    const Reference r = recurrence(in, segments(in));
    const Variable m = exp(Variable(r.m));
    return Vars{Variable(r.h), Variable(r.c) * unsqueeze(unsqueeze(m, -1), -1), Variable(r.n) * unsqueeze(m, -1)};
  };
  c.shapes = std::move(all);
  c.fills = {{4, Normal{.mean = 3}}};
  c.constants = {7};
  c.tolerance = {{f32, 5e-5}, {bf16_type, 3e-2}};
  c.grad_tolerance = 3e-6;  // 1 / den is steep
  return c;
}

std::vector<OpCase> cases() {
  return {make_case("from zero", false,
                    {shapes(1, 1, 1, 1, 1), shapes(2, 7, 2, 4, 6), shapes(1, 63, 1, 8, 3), shapes(1, 65, 2, 5, 17),
                     shapes(2, 131, 3, 16, 16), shapes(0, 3, 2, 4, 4), shapes(2, 0, 2, 4, 4), shapes(1, 70, 1, 33, 40)}),
          make_case("from a state", false,
                    {shapes(2, 1, 2, 4, 4, true), shapes(1, 37, 2, 4, 8, true), shapes(1, 129, 1, 7, 5, true)}),
          make_case("in documents", true,
                    {shapes(2, 140, 2, 6, 4), shapes(1, 64, 1, 4, 4, true), shapes(2, 15, 1, 3, 3, true)}),
          make_case("in short chunks", true, {shapes(2, 37, 2, 4, 5, true), shapes(1, 3, 2, 4, 2)}, 5)};
}

TEST_CASE("mlstm: the chunkwise form is the recurrence") {
  for (const OpCase& c : cases()) check_reference(c);
}
TEST_CASE("mlstm passes gradcheck, states and documents included") {
  for (const OpCase& c : cases()) check_grad(c);
}
TEST_CASE("mlstm: cuda equals cpu", "[cuda]") {
  for (OpCase c : cases()) {
    if (c.name.ends_with("from zero")) {
      c.shapes.push_back(shapes(1, 200, 2, 32, 32));
      c.shapes.push_back(shapes(2, 130, 2, 64, 64));
      c.shapes.push_back(shapes(1, 150, 1, 64, 128));
      c.shapes.push_back(shapes(1, 100, 1, 256, 512));
      c.shapes.push_back(shapes(1, 290, 2, 192, 192));
      c.shapes.push_back(shapes(1, 530, 1, 192, 384));
    }
    if (c.name.ends_with("from a state")) c.shapes.push_back(shapes(1, 300, 2, 384, 192, true));
    if (c.name.ends_with("in documents")) {
      c.shapes.push_back(shapes(2, 140, 2, 32, 64, true));
      c.shapes.push_back(shapes(2, 400, 1, 192, 192, true));
    }
    check_twin(c);
  }
}

std::vector<Tensor> random_inputs(int64_t b, int64_t l, int64_t heads, int64_t dq, int64_t dv, double i_mean, double i_std,
                                  double f_mean, double f_std, DType dtype = DType::f64) {
  const DType a = accum_dtype(dtype);
  return {random_tensor({b, l, heads, dq}, Normal{}, 1).to(dtype), random_tensor({b, l, heads, dq}, Normal{}, 2).to(dtype),
          random_tensor({b, l, heads, dv}, Normal{}, 3).to(dtype),
          random_tensor({b, l, heads}, Normal{.mean = i_mean, .std = i_std}, 4).to(a),
          random_tensor({b, l, heads}, Normal{.mean = f_mean, .std = f_std}, 5).to(a)};
}

Vars variables(const std::vector<Tensor>& tensors, bool grad = false) {
  Vars v;
  for (const Tensor& t : tensors) v.emplace_back(t, grad);
  return v;
}

// The parallel form without any stabiliser, from small operations: exp of the summed log gates.
Variable plain_parallel(const Vars& in) {
  const int64_t l = in[0].size(1), dq = in[0].size(3);
  const auto heads_first = [](const Variable& x) { return transpose(x, 1, 2); };
  std::vector<double> ones_below(static_cast<size_t>(l * l));
  for (int64_t t = 0; t < l; ++t)
    for (int64_t j = 0; j <= t; ++j) ones_below[static_cast<size_t>(t * l + j)] = 1;
  const Variable lower(from_vector(ones_below, {l, l}));
  const Variable b = matmul(lower, unsqueeze(heads_first(logsigmoid(in[4])), -1));  // (b, h, l, 1)
  const Variable weight = exp((b - transpose(b, 2, 3)) * lower + unsqueeze(heads_first(in[3]), 2)) * lower;
  const Variable w = weight * matmul(heads_first(in[0]), heads_first(in[1]), false, true) * (1 / std::sqrt(static_cast<double>(dq)));
  const Variable den = maximum(abs(sum(w, -1, keepdim)), Variable(ones({1}, DType::f64, kCpu)));
  return transpose(matmul(w, heads_first(in[2])) / den, 1, 2);
}

TEST_CASE("mlstm: the stabiliser changes neither outputs nor gradients where the plain form is finite") {
  for (const double i_mean : {-8.0, 0.0, 6.0}) {
    INFO("input gates around " << i_mean);
    const auto tensors = random_inputs(2, 75, 2, 8, 6, i_mean, 2, 2, 2);
    const Vars a = variables(tensors, true), b = variables(tensors, true);
    const Variable stable = run(a, {}, {.eps = 0, .chunk = 16}).h, plain = plain_parallel(b);
    CHECK(relative_error(stable.data(), plain.data()) < 1e-10);
    const Tensor seed = random_tensor(stable.shape(), Normal{}, 9);
    backward(stable, seed);
    backward(plain, seed);
    for (size_t i = 0; i < a.size(); ++i) CHECK(relative_error(a[i].grad(), b[i].grad()) < 1e-9);
  }
}

TEST_CASE("mlstm: chunk lengths do not show, nor does cutting the sequence") {
  const auto in = variables(random_inputs(2, 133, 2, 6, 5, 0, 1, 3, 1));
  const MlstmResult whole = run(in, {});
  const Reference reference = recurrence(in, {});
  CHECK(relative_error(whole.last.m, reference.m) < 1e-12);
  for (const int64_t chunk : {1, 2, 17, 64, 133, 1000}) {
    const MlstmResult r = run(in, {}, {.chunk = chunk});
    CHECK(relative_error(r.h.data(), whole.h.data()) < 1e-11);
    CHECK(relative_error(r.last.c.data(), whole.last.c.data()) < 1e-11);
    CHECK(relative_error(r.last.m, whole.last.m) < 1e-12);
  }
  for (const int64_t cut : {1, 50, 64, 132}) {
    MlstmMemory state;
    for (const auto& [from, to] : {std::pair<int64_t, int64_t>{0, cut}, {cut, 133}}) {
      const auto part = [&, from = from, to = to](const Variable& x) { return slice(x, 1, from, to); };
      const MlstmResult r = mlstm(part(in[0]), part(in[1]), part(in[2]), part(in[3]), part(in[4]), state);
      CHECK(relative_error(r.h.data(), whole.h.data().slice(1, from, to)) < 1e-11);
      state = r.last;
    }
    CHECK(relative_error(state.c.data(), whole.last.c.data()) < 1e-11);
    CHECK(relative_error(state.n.data(), whole.last.n.data()) < 1e-11);
    CHECK(relative_error(state.m, whole.last.m) < 1e-12);
  }
}

void check_steps(Device device) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    INFO(name_of(dtype));
    auto tensors = random_inputs(2, 21, 3, 33, 20, 0, 1, 3, 1, dtype);
    for (Tensor& t : tensors) t = t.to(device);
    const DType a = accum_dtype(dtype);
    const MlstmResult whole = run(variables(tensors), {});
    kernels::MlstmState state{zeros({2, 3, 33, 20}, a, device), zeros({2, 3, 33}, a, device), zeros({2, 3}, a, device)};
    const double tolerance = dtype == DType::f64 ? 1e-11 : dtype == DType::f32 ? 2e-5 : 2e-2;
    for (int64_t t = 0; t < 21; ++t) {
      const auto at = [&](size_t i) { return tensors[i].select(1, t); };
      const Tensor h = kernels::mlstm_step(at(0), at(1), at(2), at(3), at(4), state);
      CHECK(relative_error(h, whole.h.data().select(1, t)) < tolerance);
    }
    CHECK(relative_error(state.c, whole.last.c.data()) < tolerance);
    CHECK(relative_error(state.n, whole.last.n.data()) < tolerance);
    CHECK(relative_error(state.m, whole.last.m) < tolerance);
  }
}
TEST_CASE("mlstm: steps give the chunkwise form and its state") { check_steps(kCpu); }
TEST_CASE("cuda: mlstm steps give the chunkwise form and its state", "[cuda]") { check_steps(cuda_device()); }

bool is_finite(const Tensor& t) {
  for (const double x : t.to_vector<double>())
    if (!std::isfinite(x)) return false;
  return true;
}

void check_extremes(Device device) {
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const auto& [i, f] : {std::pair{150.0, 100.0}, {-150.0, 100.0}, {-150.0, -100.0}, {100.0, -100.0}, {0.0, 100.0}}) {
      INFO(name_of(dtype) << " gates around " << i << " and " << f);
      auto tensors = random_inputs(1, 140, 2, 8, 8, i, 30, f, 30, dtype);
      for (Tensor& t : tensors) t = t.to(device);
      const Vars in = variables(tensors, true);
      const MlstmResult r = run(in, {});
      backward(r.h, random_tensor(r.h.shape(), Normal{}, 9, accum_dtype(dtype)).to(device));
      for (const Tensor& t : {r.h.data(), r.last.c.data(), r.last.n.data(), r.last.m}) CHECK(is_finite(t));
      for (const Variable& v : in) CHECK(is_finite(v.grad()));
    }
}
TEST_CASE("mlstm stays finite with extreme gates") { check_extremes(kCpu); }
TEST_CASE("cuda: mlstm stays finite with extreme gates", "[cuda]") { check_extremes(cuda_device()); }

TEST_CASE("mlstm: a document's gradients stay inside it") {
  const Tensor ids = documents(1, 60);
  const auto tensors = random_inputs(1, 60, 1, 4, 4, 0, 1, 3, 1);
  const Vars in = variables(tensors, true);
  const MlstmResult r = run(in, ids, {.chunk = 16});
  Tensor seed = zeros(r.h.shape(), DType::f64, kCpu), part = seed.slice(1, 5, 14);
  copy_(part, random_tensor(part.shape(), Normal{}, 9));
  backward(r.h, seed);
  for (const Variable& v : in) {
    for (const auto& [from, to] : {std::pair<int64_t, int64_t>{0, 5}, {14, 60}}) {
      const Tensor outside = v.grad().slice(1, from, to);
      CHECK(relative_error(outside, zeros(outside.shape(), DType::f64, kCpu)) == 0.0);
    }
  }
  CHECK(in[4].grad().select(1, 5).item() == 0.0);  // nothing to forget at a document's first position
}

TEST_CASE("mlstm names what does not fit") {
  const auto good = random_inputs(1, 3, 2, 4, 6, 0, 1, 3, 1);
  auto bad = good;
  bad[1] = random_tensor({1, 3, 2, 5}, Normal{}, 1);
  CHECK(contains(error_of([&] { run(variables(bad), {}); }), "mlstm: q (1, 3, 2, 4), k (1, 3, 2, 5), v (1, 3, 2, 6)"));
  bad = good;
  bad[3] = random_tensor({1, 2, 3}, Normal{}, 1);
  CHECK(contains(error_of([&] { run(variables(bad), {}); }), "mlstm: a gate is"));
  CHECK(contains(error_of([&] { run(variables(good), zeros({1, 4}, DType::i32, kCpu)); }), "mlstm: segments are (1, 4)"));
  CHECK(contains(error_of([&] { run(variables(good), {}, {.chunk = 0}); }), "mlstm: chunks of 0 positions"));
}

}  // namespace
}  // namespace krait
