#include "autograd/linear.h"

#include <cmath>

#include "tests/testing/op_case.h"

using namespace krait;

namespace {

double apply(Epilogue e, double x) {
  switch (e) {
    case Epilogue::none: return x;
    case Epilogue::gelu_tanh: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Epilogue::gelu_erf: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case Epilogue::relu: return x > 0 ? x : 0;
  }
  return x;
}

OpFunction plain_linear(Epilogue e) {
  return [e](const Vars& in) {
    const Tensor x = in[0].data().contiguous(), w = in[1].data().contiguous();
    const Tensor b = in.size() > 2 ? in[2].data().contiguous() : Tensor{};
    const int64_t c = x.size(-1), out = w.size(0), rows = c ? x.numel() / c : 0;
    Tensor y = empty(x.shape().drop_last().append(out), DType::f64, kCpu);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < out; ++j) {
        double s = b.defined() ? b.data<double>()[j] : 0.0;
        for (int64_t p = 0; p < c; ++p) s += x.data<double>()[i * c + p] * w.data<double>()[j * c + p];
        y.data<double>()[i * out + j] = apply(e, s);
      }
    return Variable(y);
  };
}

OpCase linear_case(Epilogue e) {
  return {.name = "linear",
          .run = [e](const Vars& in) { return linear(in[0], in[1], in.size() > 2 ? in[2] : Variable{}, e); },
          .reference = plain_linear(e),
          .shapes = {{{1, 1}, {1, 1}, {1}}, {{2, 3, 40}, {24, 40}, {24}}, {{130, 17}, {33, 17}}, {{7, 9}, {77, 9}, {77}}, {{0, 5}, {3, 5}, {3}}},
          .inputs = {Normal{}, Constant{0.25}}};
}

const OpCase kMatmul{.name = "matmul",
                     .run = [](const Vars& in) { return matmul(in[0], in[1]); },
                     .reference =
                         [](const Vars& in) {
                           return Variable(kernels::matmul(in[0].data().contiguous(), in[1].data().contiguous()));
                         },
                     .shapes = {{{1, 1}, {1, 1}}, {{5, 7}, {7, 3}}, {{3, 4, 5}, {5, 6}}, {{2, 1, 3, 4}, {5, 4, 2}}}};

}  // namespace

TEST_CASE("linear with every epilogue matches plain loops") {
  for (const Epilogue e : {Epilogue::none, Epilogue::gelu_tanh, Epilogue::gelu_erf, Epilogue::relu})
    check_reference(linear_case(e));
}
TEST_CASE("linear with every smooth epilogue passes gradcheck") {
  for (const Epilogue e : {Epilogue::none, Epilogue::gelu_tanh, Epilogue::gelu_erf}) check_grad(linear_case(e));
  OpCase relu = linear_case(Epilogue::relu);
  relu.inputs = {Constant{0.25}};  // away from the corner
  check_grad(relu);
}
TEST_CASE("linear: cuda equals cpu", "[cuda]") {
  for (const Epilogue e : {Epilogue::none, Epilogue::gelu_tanh, Epilogue::gelu_erf, Epilogue::relu})
    check_twin(linear_case(e));
}

TEST_CASE("matmul with broadcasting matches the kernel and passes gradcheck") {
  check_reference(kMatmul);
  check_grad(kMatmul);
  for (int t = 1; t < 4; ++t) {
    OpCase c = kMatmul;
    c.run = [t](const Vars& in) { return matmul(in[0], in[1], t & 1, t & 2); };
    c.shapes = {{t & 1 ? Shape{4, 3} : Shape{3, 4}, t & 2 ? Shape{2, 5, 4} : Shape{2, 4, 5}}};
    check_grad(c);
  }
}
TEST_CASE("matmul: cuda equals cpu, with gradients", "[cuda]") { check_twin(kMatmul); }

TEST_CASE("linear adds weight and bias gradients straight into fp32 buffers of bf16 weights") {
  const Tensor xt = random_tensor({50, 24}, Normal{}, 1, bf16_type), wt = random_tensor({16, 24}, Normal{}, 2, bf16_type);
  const Tensor bt = random_tensor({16}, Normal{}, 3, bf16_type), seed = random_tensor({50, 16}, Normal{}, 4, bf16_type);
  const auto run = [&](DType dtype, bool in_place) {
    const Variable x(xt.to(dtype), false);
    Variable w(wt.to(dtype), true), b(bt.to(dtype), true);
    if (in_place) {
      w.set_grad(zeros({16, 24}, f32, kCpu));
      b.set_grad(zeros({16}, f32, kCpu));
    }
    for (int i = 0; i < 2; ++i) backward(linear(x, w, b, Epilogue::relu), seed.to(dtype));
    return std::pair{w.grad(), b.grad()};
  };
  const auto [dw, db] = run(bf16_type, true);
  const auto [dw_ref, db_ref] = run(f64, false);
  CHECK(dw.dtype() == f32);
  CHECK(relative_error(dw, dw_ref) < 1e-5);
  CHECK(relative_error(db, db_ref) < 1e-5);
}

TEST_CASE("linear names both shapes when refusing") {
  const Variable x(zeros({2, 3}, f32, kCpu)), w(zeros({4, 5}, f32, kCpu)), ok(zeros({4, 3}, f32, kCpu));
  CHECK(contains(error_of([&] { linear(x, w); }), "x is (2, 3), weight is (4, 5)"));
  CHECK(contains(error_of([&] { linear(x, ok, Variable(zeros({3}, f32, kCpu))); }), "expected " + Shape{4}.str()));
  CHECK(contains(error_of([&] { linear(x, Variable(zeros({4, 3}, f64, kCpu))); }), "dtypes differ"));
}
