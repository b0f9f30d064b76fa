#include "autograd/feed_forward.h"

#include "autograd/activation.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

Variable or_none(const Vars& in, size_t i) { return i < in.size() ? in[i] : Variable(); }

// Inputs x, w_in, w_out and, where there are five, b_in, b_out.
OpCase plain_case(Epilogue e) {
  return {.name = "feed_forward",
          .run = [e](const Vars& in) { return feed_forward(in[0], in[1], or_none(in, 3), in[2], or_none(in, 4), e); },
          .reference =
              [e](const Vars& in) { return linear(linear(in[0], in[1], or_none(in, 3), e), in[2], or_none(in, 4)); },
          .shapes = {{{1, 1}, {1, 1}, {1, 1}, {1}, {1}},
                     {{2, 3, 40}, {24, 40}, {17, 24}, {24}, {17}},
                     {{130, 17}, {33, 17}, {17, 33}},
                     {{0, 5}, {3, 5}, {5, 3}, {3}, {5}}},
          .inputs = {Normal{}, Constant{0.25}}};
}

OpCase gated_case() {
  return {.name = "swiglu_feed_forward",
          .run = [](const Vars& in) { return swiglu_feed_forward(in[0], in[1], or_none(in, 3), in[2], or_none(in, 4)); },
          .reference =
              [](const Vars& in) {
                return linear(swiglu_packed(linear(in[0], in[1], or_none(in, 3))), in[2], or_none(in, 4));
              },
          .shapes = {{{1, 1}, {2, 1}, {1, 1}, {2}, {1}},
                     {{2, 3, 40}, {48, 40}, {17, 24}, {48}, {17}},
                     {{130, 17}, {66, 17}, {17, 33}},
                     {{0, 5}, {6, 5}, {5, 3}, {6}, {5}}},
          .inputs = {Normal{}, Constant{0.25}}};
}

// Outputs and gradients of bf16 values, computed in `dtype` on `device`.
std::vector<Tensor> results(const OpCase& c, const std::vector<Shape>& shapes, DType dtype, Device device) {
  Vars in;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const double std = i == 0 ? 1.0 : i < 3 ? 0.05 : 0.5;
    in.emplace_back(random_tensor(shapes[i], Normal{0, std}, 10 + i, bf16_type).to(dtype).to(device), true);
    if (i > 0) in.back().set_grad(zeros(shapes[i], accum_dtype(dtype), device));
  }
  const Variable y = c.run(in).values[0];
  backward(y, random_tensor(y.shape(), Normal{}, 30, bf16_type).to(dtype).to(device));
  std::vector<Tensor> out{y.data().cpu().to(f64)};
  for (const Variable& v : in) out.push_back(v.grad().cpu().to(f64));
  return out;
}

}  // namespace

TEST_CASE("feed_forward is two maps with an activation between, and passes gradcheck") {
  for (const Epilogue e : {Epilogue::gelu_tanh, Epilogue::gelu_erf}) {
    check_reference(plain_case(e));
    check_grad(plain_case(e));
  }
}
TEST_CASE("swiglu_feed_forward is two maps with a gate between, and passes gradcheck") {
  check_reference(gated_case());
  check_grad(gated_case());
}
TEST_CASE("feed_forward: cuda equals cpu", "[cuda]") {
  for (const Epilogue e : {Epilogue::gelu_tanh, Epilogue::gelu_erf, Epilogue::relu}) check_twin(plain_case(e));
  check_twin(gated_case());
}

TEST_CASE("feed_forward: products that are finished on the chip equal the cpu's, run for run", "[cuda]") {
  const Device gpu = cuda_device(0);
  struct Size {
    OpCase c;
    std::vector<Shape> shapes;
  };
  // As many tiles of 256 x 256 as it takes to be served, the last rows not a whole one.
  for (const Size& s : {Size{plain_case(Epilogue::gelu_tanh), {{8385, 512}, {2048, 512}, {512, 2048}, {2048}, {512}}},
                        Size{plain_case(Epilogue::gelu_tanh), {{8448, 576}, {2048, 576}, {640, 2048}}},
                        Size{gated_case(), {{8200, 512}, {4096, 512}, {512, 2048}}}}) {
    INFO(s.c.name);
    const auto first = results(s.c, s.shapes, bf16_type, gpu), again = results(s.c, s.shapes, bf16_type, gpu);
    const auto wanted = results(s.c, s.shapes, f32, kCpu);
    for (size_t i = 0; i < first.size(); ++i) {
      INFO("output or gradient " << i);
      CHECK(relative_error(first[i], wanted[i]) < 2e-2);
      CHECK(relative_error(again[i], first[i]) == 0);
    }
  }
}

TEST_CASE("feed_forward adds gradients straight into fp32 buffers of bf16 weights") {
  const std::vector<Shape> shapes{{50, 24}, {32, 24}, {24, 32}, {32}, {24}}, gated{{50, 24}, {64, 24}, {24, 32}, {64}, {24}};
  const auto check = [](const OpCase& c, const std::vector<Shape>& s) {
    const auto narrow = results(c, s, bf16_type, kCpu), wide = results(c, s, f64, kCpu);
    for (size_t i = 0; i < narrow.size(); ++i) CHECK(relative_error(narrow[i], wide[i]) < 2e-2);
  };
  check(plain_case(Epilogue::gelu_tanh), shapes);
  check(gated_case(), gated);
}

TEST_CASE("swiglu_feed_forward names both shapes when refusing") {
  const Variable x(zeros({2, 3}, f32, kCpu)), odd(zeros({5, 3}, f32, kCpu)), out(zeros({3, 2}, f32, kCpu));
  CHECK(contains(error_of([&] { swiglu_feed_forward(x, odd, {}, out, {}); }), "x is (2, 3), weight is (5, 3)"));
}
