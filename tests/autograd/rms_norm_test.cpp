#include "autograd/rms_norm.h"

#include <cmath>

#include "tests/testing/op_case.h"

using namespace krait;

namespace {

constexpr double kEps = 1e-3;  // large enough for finite differences at constant zero rows

// y = x (mean x^2 + eps)^(-1/2) w over fp64 CPU rows.
Tensor norm_of(const Tensor& x, const Tensor& w) {
  const int64_t c = x.size(-1), r = x.numel() / c;
  Tensor y = empty_like(x);
  for (int64_t i = 0; i < r; ++i) {
    const double* row = x.data<double>() + i * c;
    double squares = 0;
    for (int64_t j = 0; j < c; ++j) squares += row[j] * row[j];
    for (int64_t j = 0; j < c; ++j)
      y.data<double>()[i * c + j] = row[j] / std::sqrt(squares / static_cast<double>(c) + kEps) * w.data<double>()[j];
  }
  return y;
}

Tensor sum_of(const Tensor& a, const Tensor& b) {
  Tensor s = empty_like(a);
  for (int64_t i = 0; i < a.numel(); ++i) s.data<double>()[i] = a.data<double>()[i] + b.data<double>()[i];
  return s;
}

const OpCase kPlain{.name = "rms_norm",
                    .run = [](const Vars& in) { return rms_norm(in[0], in[1], kEps); },
                    .reference = [](const Vars& in) { return Variable(norm_of(in[0].data(), in[1].data())); },
                    .shapes = {{{3, 5, 33}, {33}}, {{40, 768}, {768}}, {{2, 4099}, {4099}}, {{0, 8}, {8}},
                               {{5, 2048}, {2048}}, {{3, 8192}, {8192}}, {{8}, {8}}},
                    .inputs = {Normal{}, Normal{.mean = 100}, Constant{0}, Constant{3}},
                    .fills = {{1, Normal{1, 0.2}}}};

// A single value with an offset would have a gradient of eps / x^2, all cancellation.
const OpCase kSingle{.name = "rms_norm of one value",
                     .run = kPlain.run,
                     .reference = kPlain.reference,
                     .shapes = {{{1, 1}, {1}}},
                     .inputs = {Normal{}, Constant{0}},
                     .fills = {{1, Normal{1, 0.2}}}};

const OpCase kFused{.name = "add_rms_norm",
                    .run =
                        [](const Vars& in) {
                          const AddNorm out = add_rms_norm(in[0], in[1], in[2], kEps);
                          return Vars{out.residual, out.y};
                        },
                    .reference =
                        [](const Vars& in) {
                          const Tensor s = sum_of(in[0].data(), in[1].data());
                          return Vars{Variable(s), Variable(norm_of(s, in[2].data()))};
                        },
                    .shapes = {{{3, 5, 33}, {3, 5, 33}, {33}}, {{40, 768}, {40, 768}, {768}},
                               {{2, 4099}, {2, 4099}, {4099}}, {{0, 8}, {0, 8}, {8}}, {{3, 4096}, {3, 4096}, {4096}}},
                    .inputs = {Normal{}, Normal{.mean = 100}, Constant{0}},
                    .fills = {{2, Normal{1, 0.2}}}};

struct Run { std::vector<Tensor> outputs, grads; };

// bf16 x, fp32 weight; the residual stream in `stream`.
Run run_mixed(DType stream, Device device, int64_t r, int64_t c) {
  Variable x(random_tensor({r, c}, Normal{}, 1, DType::bf16).to(device), true);
  Variable residual(random_tensor({r, c}, Normal{}, 2, stream).to(device), true);
  Variable w(random_tensor({c}, Normal{1, 0.2}, 3, DType::f32).to(device), true);
  const AddNorm out = add_rms_norm(x, residual, w, kEps);
  const Vars outputs{out.residual, out.y};
  backward(outputs, {random_tensor({r, c}, Normal{}, 4, stream).to(device),
                     random_tensor({r, c}, Normal{}, 5, DType::bf16).to(device)});
  return {{out.residual.data(), out.y.data()}, {x.grad(), residual.grad(), w.grad()}};
}

void check_mixed(Device device) {
  for (const auto& [r, c] : {std::pair<int64_t, int64_t>{70, 96}, {9, 33}, {300, 768}, {5, 4096}}) {
    for (const DType stream : {DType::bf16, DType::f32}) {
      const Run run = run_mixed(stream, device, r, c);
      INFO(r << " x " << c << " " << name_of(stream));
      CHECK(run.outputs[0].dtype() == stream);
      CHECK(run.outputs[1].dtype() == DType::bf16);
      CHECK(run.grads[0].dtype() == DType::bf16);
      CHECK(run.grads[1].dtype() == stream);
      CHECK(run.grads[2].dtype() == DType::f32);
      const Tensor x = random_tensor({r, c}, Normal{}, 1, DType::bf16).to(DType::f64);
      const Tensor residual = random_tensor({r, c}, Normal{}, 2, stream).to(DType::f64);
      const Tensor w = random_tensor({c}, Normal{1, 0.2}, 3, DType::f32).to(DType::f64);
      CHECK(relative_error(run.outputs[0], sum_of(x, residual)) < (stream == DType::f32 ? 1e-6 : 1e-2));
      CHECK(relative_error(run.outputs[1], norm_of(sum_of(x, residual), w)) < 1e-2);
      const Run exact = [&] {
        Variable xv(x, true), rv(residual, true), wv(w, true);
        const AddNorm out = add_rms_norm(xv, rv, wv, kEps);
        backward(Vars{out.residual, out.y}, {random_tensor({r, c}, Normal{}, 4, stream).to(DType::f64),
                                             random_tensor({r, c}, Normal{}, 5, DType::bf16).to(DType::f64)});
        return Run{{}, {xv.grad(), rv.grad(), wv.grad()}};
      }();
      for (size_t i = 0; i < 3; ++i) CHECK(relative_error(run.grads[i], exact.grads[i]) < 2e-2);
      if (stream == DType::f32) CHECK(relative_error(run.grads[1], exact.grads[1]) < 1e-5);
    }
  }
}

void check_buffers_and_bits(Device device) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const int64_t c : {33, 768, 2048}) {
      Variable x(random_tensor({301, c}, Normal{}, 1, dtype).to(device), true);
      Variable w(random_tensor({c}, Normal{1, 0.2}, 2, DType::f32).to(device), true);
      const Tensor dy = random_tensor({301, c}, Normal{}, 3, dtype).to(device);
      backward(rms_norm(x, w, kEps), dy);
      const std::vector<float> first = w.grad().to_vector<float>(), dx = x.grad().to_vector<float>();
      w.set_grad(ones({c}, DType::f32, device));
      x.clear_grad();
      backward(rms_norm(x, w, kEps), dy);
      CHECK(x.grad().to_vector<float>() == dx);
      const std::vector<float> again = w.grad().to_vector<float>();
      for (size_t j = 0; j < first.size(); ++j) CHECK(again[j] == 1.0F + first[j]);
    }
  }
}

}  // namespace

TEST_CASE("rms_norm matches plain loops") { check_reference(kPlain), check_reference(kSingle); }
TEST_CASE("rms_norm passes gradcheck") { check_grad(kPlain), check_grad(kSingle); }
TEST_CASE("rms_norm: cuda equals cpu", "[cuda]") { check_twin(kPlain), check_twin(kSingle); }
TEST_CASE("add_rms_norm matches plain loops") { check_reference(kFused); }
TEST_CASE("add_rms_norm passes gradcheck") { check_grad(kFused); }
TEST_CASE("add_rms_norm: cuda equals cpu", "[cuda]") { check_twin(kFused); }

TEST_CASE("add_rms_norm keeps a bf16 or fp32 residual stream under bf16 inputs") { check_mixed(kCpu); }
TEST_CASE("add_rms_norm keeps a bf16 or fp32 residual stream under bf16 inputs, on cuda", "[cuda]") {
  check_mixed(cuda_device());
}

TEST_CASE("rms_norm adds dw to a gradient buffer and repeats bit for bit") { check_buffers_and_bits(kCpu); }
TEST_CASE("rms_norm adds dw to a gradient buffer and repeats bit for bit, on cuda", "[cuda]") {
  check_buffers_and_bits(cuda_device());
}

TEST_CASE("add_rms_norm passes the residual's gradient through when the norm is not used") {
  Variable x(random_tensor({2, 3}, Normal{}, 1, DType::bf16), true);
  Variable residual(random_tensor({2, 3}, Normal{}, 2, DType::f32), true);
  Variable w(ones({3}, DType::f32, kCpu), true);
  const Tensor dr = random_tensor({2, 3}, Normal{}, 3, DType::f32);
  backward(add_rms_norm(x, residual, w, kEps).residual, dr);
  CHECK(residual.grad().to_vector<float>() == dr.to_vector<float>());
  CHECK(x.grad().dtype() == DType::bf16);
  CHECK(!w.grad().defined());
}

TEST_CASE("rms_norm names both shapes when refusing") {
  const auto t = [](const Shape& s, DType d = DType::f32) { return Variable(zeros(s, d, kCpu)); };
  CHECK(contains(error_of([&] { rms_norm(t({2, 3}), t({4}), kEps); }),
                 "rms_norm: weight is (4,), expected (3,) to match x (2, 3)"));
  CHECK(contains(error_of([&] { rms_norm(t({2, 0}), t({0}), kEps); }), "x is empty or a scalar"));
  CHECK(contains(error_of([&] { rms_norm(t({2, 3}), t({3}, DType::f64), kEps); }), "rms_norm: weight is"));
  CHECK(contains(error_of([&] { add_rms_norm(t({2, 3}), t({3, 2}), t({3}), kEps); }), "add_rms_norm: residual is"));
  CHECK(contains(error_of([&] { add_rms_norm(t({2, 3}), t({2, 3}, DType::bf16), t({3}), kEps); }),
                 "residual is bfloat16, x is float32"));
}
