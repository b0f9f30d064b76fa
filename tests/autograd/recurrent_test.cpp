#include <array>
#include <cmath>
#include <functional>

#include "autograd/elementwise.h"
#include "autograd/shape.h"
#include "autograd/slstm.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

using kernels::RecurrentCell;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double log_sigmoid(double x) { return x > 0 ? -std::log1p(std::exp(-x)) : x - std::log1p(std::exp(x)); }

// One unit: the states from the input and recurrent parts of the gates.
using UnitStep = std::function<void(const double* x, const double* r, double* s)>;

UnitStep slstm_unit(bool exp_forget) {
  return [exp_forget](const double* x, const double* r, double* s) {
    const double i = x[0] + r[0], f = exp_forget ? x[1] + r[1] : log_sigmoid(x[1] + r[1]);
    const bool fresh = s[2] == 0;
    const double m = fresh ? i : std::max(f + s[3], i), fp = fresh ? 0 : std::exp(f + s[3] - m), ip = std::exp(i - m);
    s[1] = fp * s[1] + ip * std::tanh(x[2] + r[2]);
    s[2] = fp * s[2] + ip;
    s[3] = m;
    s[0] = sigmoid(x[3] + r[3]) * s[1] / s[2];
  };
}
void rnn_unit(const double* x, const double* r, double* s) { s[0] = std::tanh(x[0] + r[0]); }
void lstm_unit(const double* x, const double* r, double* s) {
  s[1] = sigmoid(x[1] + r[1]) * s[1] + sigmoid(x[0] + r[0]) * std::tanh(x[2] + r[2]);
  s[0] = sigmoid(x[3] + r[3]) * std::tanh(s[1]);
}
void gru_unit(const double* x, const double* r, double* s) {
  const double z = sigmoid(x[1] + r[1]), n = std::tanh(x[2] + sigmoid(x[0] + r[0]) * r[2]);
  s[0] = (1 - z) * n + z * s[0];
}

// x (b, l, G, h, p), w (h, G, p, p), bias (G, h, p), state (S, b, h, p) -> y (b, l, h, p) and the final state.
std::pair<Tensor, Tensor> loop(const UnitStep& unit, const Tensor& x, const Tensor& w, const Tensor& bias,
                               const Tensor& state, const Tensor& segments) {
  const int64_t b = x.size(0), l = x.size(1), G = x.size(2), h = x.size(3), p = x.size(4), S = state.size(0);
  Tensor y = empty({b, l, h, p}, DType::f64, kCpu), last = state.clone();
  double* s = last.data<double>();
  for (int64_t i = 0; i < b; ++i)
    for (int64_t t = 0; t < l; ++t)
      for (int64_t k = 0; k < h; ++k) {
        const auto at = [&](int64_t n, int64_t j) -> double& { return s[((n * b + i) * h + k) * p + j]; };
        if (segments.defined() && t > 0 &&
            segments.data<int32_t>()[i * l + t] != segments.data<int32_t>()[i * l + t - 1])
          for (int64_t n = 0; n < S; ++n)
            for (int64_t j = 0; j < p; ++j) at(n, j) = 0;
        std::vector<double> before;
        for (int64_t j = 0; j < p; ++j) before.push_back(at(0, j));
        for (int64_t j = 0; j < p; ++j) {
          double xs[4], rs[4], states[4];
          for (int64_t g = 0; g < G; ++g) {
            xs[g] = x.data<double>()[(((i * l + t) * G + g) * h + k) * p + j];
            rs[g] = bias.data<double>()[(g * h + k) * p + j];
            for (int64_t q = 0; q < p; ++q)
              rs[g] += w.data<double>()[((k * G + g) * p + j) * p + q] * before[static_cast<size_t>(q)];
          }
          for (int64_t n = 0; n < S; ++n) states[n] = at(n, j);
          unit(xs, rs, states);
          for (int64_t n = 0; n < S; ++n) at(n, j) = states[n];
          y.data<double>()[((i * l + t) * h + k) * p + j] = states[0];
        }
      }
  return {y, last};
}

// Documents of uneven length, the same in every row but shifted.
Tensor segments_of(int64_t b, int64_t l, Device device) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < b; ++i)
    for (int64_t t = 0; t < l; ++t) ids.push_back(static_cast<int32_t>((t + i) / 3));
  return from_vector(ids, {b, l}).to(device);
}

struct Form {
  bool state = false, segments = false, exp_forget = false;
};

// Of the final state c and n are relative to e^m, which carries no gradient: what can be differentiated is y and c/n.
// The first state comes as (y, c, n) and m, with n > 0: a row that is running.
OpCase slstm_case(Form form, bool differentiable = false) {
  const auto forget = form.exp_forget ? SlstmForget::exp : SlstmForget::sigmoid;
  const auto shown = [=](const Variable& y, const Variable& state) -> Vars {
    if (!differentiable) return {y, state.detach()};
    return {y, select(state, 0, 0), select(state, 0, 1) / select(state, 0, 2)};
  };
  OpCase c{.name = "slstm",
           .run =
               [=](const Vars& in) {
                 const Tensor ids = form.segments ? segments_of(in[0].size(0), in[0].size(1), in[0].device()) : Tensor();
                 Variable state = form.state ? concat({in[3], in[4]}, 0) : Variable();
                 if (form.state && state.dtype() == DType::bf16) state = cast(state, DType::f32);
                 const auto out = slstm(in[0], in[1], in[2], state, ids, forget);
                 return Outputs(shown(out.y, out.state));
               },
           .reference =
               [=](const Vars& in) {
                 const Tensor& x = in[0].data();
                 const Tensor state = form.state ? concat({in[3].detach(), in[4]}, 0).data()
                                                 : zeros({4, x.size(0), x.size(3), x.size(4)}, f64, kCpu);
                 const Tensor ids = form.segments ? segments_of(x.size(0), x.size(1), kCpu) : Tensor();
                 const auto [y, last] =
                     loop(slstm_unit(form.exp_forget), x, in[1].data(), in[2].data(), state, ids);
                 return Outputs(shown(Variable(y), Variable(last)));
               },
           .shapes = {},
           .tolerance = {{DType::f32, 2e-5}, {DType::bf16, 3e-2}},
           .constants = {4},
           .fills = {{1, Normal{0, 0.3}}, {2, Normal{}}, {3, Uniform{0.5, 1.5}}},
           .grad_tolerance = 2e-6};
  for (const auto& [b, l, h, p] : std::vector<std::array<int64_t, 4>>{
           {1, 1, 1, 1}, {2, 7, 2, 4}, {3, 11, 1, 5}, {5, 6, 3, 17}, {1, 9, 2, 33}, {19, 5, 1, 16}, {2, 6, 1, 72}, {2, 0, 2, 4}}) {
    if (differentiable && l == 0) continue;
    std::vector<Shape> s{{b, l, 4, h, p}, {h, 4, p, p}, {4, h, p}};
    if (form.state) {
      s.push_back({3, b, h, p});
      s.push_back({1, b, h, p});
    }
    c.shapes.push_back(s);
  }
  return c;
}

OpCase recurrent_case(RecurrentCell cell, bool with_state, bool with_segments) {
  const int64_t gates = kernels::gates_of(cell), states = kernels::states_of(cell);
  OpCase c{.name = std::string(kernels::name_of(cell)),
           .run =
               [=](const Vars& in) {
                 const Tensor ids = with_segments ? segments_of(in[0].size(0), in[0].size(1), in[0].device()) : Tensor();
                 Variable state = with_state ? in[5] : Variable();
                 if (with_state && state.dtype() == DType::bf16) state = cast(state, DType::f32);
                 const auto out = recurrent(cell, in[0], in[1], in[2], in[3], in[4], state, ids);
                 return Vars{out.y, out.state};
               },
           .reference =
               [=](const Vars& in) {
                 const Tensor &x = in[0].data(), &w = in[1].data();
                 const int64_t b = x.size(0), l = x.size(1), p = in[2].size(1);
                 Tensor pre = empty({b, l, gates, 1, p}, f64, kCpu);
                 for (int64_t i = 0; i < b * l; ++i)
                   for (int64_t g = 0; g < gates * p; ++g) {
                     double sum = in[3].data().data<double>()[g];
                     for (int64_t k = 0; k < x.size(2); ++k)
                       sum += w.data<double>()[g * x.size(2) + k] * x.data<double>()[i * x.size(2) + k];
                     pre.data<double>()[i * gates * p + g] = sum;
                   }
                 const UnitStep unit = cell == RecurrentCell::rnn    ? UnitStep(rnn_unit)
                                       : cell == RecurrentCell::lstm ? UnitStep(lstm_unit)
                                                                     : UnitStep(gru_unit);
                 const Tensor state = with_state ? in[5].data() : zeros({states, b, 1, p}, f64, kCpu);
                 const auto [y, last] =
                     loop(unit, pre, in[2].data().view({1, gates, p, p}), in[4].data().view({gates, 1, p}), state,
                          with_segments ? segments_of(b, l, kCpu) : Tensor());
                 return Vars{Variable(y.view({b, l, p})), Variable(last)};
               },
           .shapes = {},
           .tolerance = {{DType::f32, 2e-5}, {DType::bf16, 4e-2}},
           .fills = {{1, Normal{0, 0.5}}, {2, Normal{0, 0.3}}},
           .grad_tolerance = 2e-6};
  for (const auto& [b, l, in, p] : std::vector<std::array<int64_t, 4>>{
           {1, 1, 1, 1}, {2, 7, 3, 4}, {3, 13, 5, 17}, {18, 5, 4, 40}, {2, 0, 3, 4}}) {
    std::vector<Shape> s{{b, l, in}, {gates * p, in}, {gates * p, p}, {gates * p}, {gates * p}};
    if (with_state) s.push_back({states, b, 1, p});
    c.shapes.push_back(s);
  }
  return c;
}

const Form kForms[] = {{}, {.state = true}, {.segments = true}, {.state = true, .segments = true}, {.exp_forget = true}};
constexpr RecurrentCell kCells[] = {RecurrentCell::rnn, RecurrentCell::lstm, RecurrentCell::gru};

template <class F>
void for_each_recurrent(F f) {
  for (const RecurrentCell cell : kCells)
    for (const bool state : {false, true})
      for (const bool segments : {false, true}) f(recurrent_case(cell, state, segments));
}

const OpCase kGates{.name = "slstm_gates",
                    .run = [](const Vars& in) { return slstm_gates(in[0], in[1], in[2], in[3], in[4], in[5]); },
                    .reference =
                        [](const Vars& in) {
                          const int64_t n = in[0].size(0) * in[0].size(1), h = in[2].size(0), p = in[2].size(1);
                          Tensor y = zeros({in[0].size(0), in[0].size(1), 4, h, p}, f64, kCpu);
                          for (int64_t i = 0; i < n; ++i)
                            for (int64_t g = 0; g < 4; ++g)
                              for (int64_t k = 0; k < h * p; ++k)
                                for (int64_t q = 0; q < p; ++q)
                                  y.data<double>()[(i * 4 + g) * h * p + k] +=
                                      in[static_cast<size_t>(2 + g)].data().data<double>()[k * p + q] *
                                      in[static_cast<size_t>(g / 2)].data().data<double>()[(i * h + k / p) * p + q];
                          return Variable(y);
                        },
                    .shapes = {{{2, 5, 12}, {2, 5, 12}, {3, 4, 4}, {3, 4, 4}, {3, 4, 4}, {3, 4, 4}},
                               {{1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}},
                               {{2, 0, 4}, {2, 0, 4}, {2, 2, 2}, {2, 2, 2}, {2, 2, 2}, {2, 2, 2}}}};

}  // namespace

TEST_CASE("slstm matches plain loops") { for (const Form& f : kForms) check_reference(slstm_case(f)); }
TEST_CASE("slstm passes gradcheck") { for (const Form& f : kForms) check_grad(slstm_case(f, true)); }
TEST_CASE("slstm: cuda equals cpu", "[cuda]") {
  for (const Form& f : kForms) {
    check_twin(slstm_case(f));
    check_twin(slstm_case(f, true));
  }
}

TEST_CASE("rnn, lstm and gru match plain loops") { for_each_recurrent(check_reference); }
TEST_CASE("rnn, lstm and gru pass gradcheck") { for_each_recurrent(check_grad); }
TEST_CASE("rnn, lstm and gru: cuda equals cpu", "[cuda]") { for_each_recurrent(check_twin); }

// Heads that one multiprocessor cannot hold are split over several, which exchange their outputs at every step; a
// vector that does not fit shared memory comes in pieces.
TEST_CASE("large heads: cuda equals cpu", "[cuda]") {
  OpCase wide = slstm_case({.state = true, .segments = true});
  wide.fills[1] = Normal{0, 0.05};
  wide.shapes.clear();
  for (const auto& [b, l, h, p] : std::vector<std::array<int64_t, 4>>{{3, 5, 2, 300}, {37, 4, 1, 200}, {150, 3, 4, 96}})
    wide.shapes.push_back({{b, l, 4, h, p}, {h, 4, p, p}, {4, h, p}, {3, b, h, p}, {1, b, h, p}});
  check_twin(wide);
  for (const RecurrentCell cell : kCells) {
    OpCase c = recurrent_case(cell, true, true);
    const int64_t gates = kernels::gates_of(cell), states = kernels::states_of(cell);
    c.fills[2] = Normal{0, 0.02};
    c.strided = false;
    c.shapes.clear();
    for (const auto& [b, l, p] : std::vector<std::array<int64_t, 3>>{{3, 4, 515}, {20, 3, 1100}})
      c.shapes.push_back({{b, l, 5}, {gates * p, 5}, {gates * p, p}, {gates * p}, {gates * p}, {states, b, 1, p}});
    check_twin(c);
  }
}

// A cluster of blocks for each head, in bf16: rows and heads that fill it and that do not.
TEST_CASE("slstm heads of 64 to 256 units: cuda equals cpu", "[cuda]") {
  for (const Form& f : kForms)
    for (const bool differentiable : {false, true}) {
      if (!differentiable && !f.state) continue;
      OpCase c = slstm_case(f, differentiable);
      c.fills[1] = Normal{0, 0.05};
      c.strided = false;
      c.shapes.clear();
      for (const auto& [b, l, h, p] :
           std::vector<std::array<int64_t, 4>>{{9, 1, 2, 64}, {3, 21, 2, 64}, {8, 12, 1, 128}, {10, 13, 1, 192}, {2, 11, 1, 256}, {1, 14, 3, 192}}) {
        std::vector<Shape> s{{b, l, 4, h, p}, {h, 4, p, p}, {4, h, p}};
        if (f.state) {
          s.push_back({3, b, h, p});
          s.push_back({1, b, h, p});
        }
        c.shapes.push_back(s);
      }
      check_twin(c);
    }
}

TEST_CASE("slstm_gates matches plain loops") { check_reference(kGates); }
TEST_CASE("slstm_gates passes gradcheck") { check_grad(kGates); }
TEST_CASE("slstm_gates: cuda equals cpu", "[cuda]") { check_twin(kGates); }

TEST_CASE("a recurrence in two halves with the carried state is the whole, for every batch row alone too") {
  const int64_t b = 6, l = 21, h = 2, p = 9;
  const Tensor x = random_tensor({b, l, 4, h, p}, Normal{}, 1), w = random_tensor({h, 4, p, p}, Normal{0, 0.3}, 2);
  const Tensor bias = random_tensor({4, h, p}, Normal{}, 3);
  const auto run = [&](const Tensor& part, const Tensor& state) {
    return kernels::slstm_forward(part, w, bias, state, {}, SlstmForget::sigmoid, false);
  };
  const auto whole = run(x, {});
  const auto first = run(x.slice(1, 0, 8), {}), second = run(x.slice(1, 8, l), first.state);
  CHECK(relative_error(first.y, whole.y.slice(1, 0, 8)) == 0.0);
  CHECK(relative_error(second.y, whole.y.slice(1, 8, l)) == 0.0);
  CHECK(relative_error(second.state, whole.state) == 0.0);
  CHECK(relative_error(run(x.slice(0, 3, 4), {}).y, whole.y.slice(0, 3, 4)) == 0.0);
}

TEST_CASE("recurrent layers name the shapes when refusing") {
  const auto t = [](const Shape& s, DType d = DType::f32) { return zeros(s, d, kCpu); };
  const auto run = [&](const Tensor& x, const Tensor& w, const Tensor& state, const Tensor& segments) {
    return error_of([&] {
      slstm(Variable(x), Variable(w), Variable(t({4, 2, 3})), Variable(state), segments);
    });
  };
  const Tensor x = t({1, 5, 4, 2, 3}), w = t({2, 4, 3, 3});
  CHECK(contains(run(t({1, 5, 3, 2, 3}), w, {}, {}), "slstm: x is (1, 5, 3, 2, 3), expected (b, l, 4, heads, units)"));
  CHECK(contains(run(x, t({2, 3, 3, 3}), {}, {}), "slstm: the recurrent weight is (2, 3, 3, 3), expected (2, 4, 3, 3)"));
  CHECK(contains(run(x, w, t({3, 1, 2, 3}), {}), "expected float32 (4, 1, 2, 3)"));
  CHECK(contains(run(x, w, {}, t({1, 4}, DType::i32)), "expected int32 (1, 5)"));
  CHECK(contains(error_of([&] {
                   lstm(Variable(t({1, 2, 3})), Variable(t({8, 3})), Variable(t({6, 2})), Variable(t({8})), Variable(t({8})));
                 }),
                 "w_hh (6, 2)"));
}
