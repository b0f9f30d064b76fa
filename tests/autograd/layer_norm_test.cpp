#include "autograd/layer_norm.h"

#include <cmath>

#include "tests/testing/op_case.h"

using namespace krait;

namespace {

constexpr double kEps = 1e-3;  // large enough for finite differences at constant rows

Tensor norm_of(const Tensor& x, const Tensor& w, const Tensor& b, double offset = 0) {
  const int64_t c = x.size(-1), r = x.numel() / c;
  const double n = static_cast<double>(c);
  Tensor y = empty_like(x);
  for (int64_t i = 0; i < r; ++i) {
    const double* row = x.data<double>() + i * c;
    double mean = 0, variance = 0;
    for (int64_t j = 0; j < c; ++j) mean += row[j] / n;
    for (int64_t j = 0; j < c; ++j) variance += (row[j] - mean) * (row[j] - mean) / n;
    for (int64_t j = 0; j < c; ++j)
      y.data<double>()[i * c + j] = (row[j] - mean) / std::sqrt(variance + kEps) * (w.data<double>()[j] + offset) +
                                    (b.defined() ? b.data<double>()[j] : 0.0);
  }
  return y;
}

Tensor sum_of(const Tensor& a, const Tensor& b) {
  Tensor s = empty_like(a);
  for (int64_t i = 0; i < a.numel(); ++i) s.data<double>()[i] = a.data<double>()[i] + b.data<double>()[i];
  return s;
}

// Constant rows have xhat = 0 exactly in fp64; offset 100 leaves fp32 about 1e-6 of the deviations.
const OpCase kPlain{
    .name = "layer_norm",
    .run = [](const Vars& in) { return layer_norm(in[0], in[1], in[2], kEps); },
    .reference = [](const Vars& in) { return Variable(norm_of(in[0].data(), in[1].data(), in[2].data())); },
    .shapes = {{{1, 1}, {1}, {1}}, {{3, 5, 33}, {33}, {33}}, {{40, 768}, {768}, {768}}, {{2, 4099}, {4099}, {4099}},
               {{0, 8}, {8}, {8}}, {{5, 2048}, {2048}, {2048}}, {{3, 8192}, {8192}, {8192}}, {{8}, {8}, {8}}},
    .inputs = {Normal{}, Normal{.mean = 100}, Constant{0}, Constant{3}},
    .tolerance = {{DType::f32, 2e-5}, {DType::bf16, 2e-2}},
    .fills = {{1, Normal{1, 0.2}}, {2, Normal{}}}};

const OpCase kNoBias{.name = "layer_norm without bias",
                     .run = [](const Vars& in) { return layer_norm(in[0], in[1], Variable(), kEps); },
                     .reference = [](const Vars& in) { return Variable(norm_of(in[0].data(), in[1].data(), {})); },
                     .shapes = {{{7, 33}, {33}}, {{40, 768}, {768}}, {{3, 2048}, {2048}}},
                     .fills = {{1, Normal{1, 0.2}}}};

const OpCase kOffset{.name = "layer_norm with 1 + w",
                     .run = [](const Vars& in) { return layer_norm(in[0], in[1], Variable(), kEps, 1.0); },
                     .reference = [](const Vars& in) { return Variable(norm_of(in[0].data(), in[1].data(), {}, 1)); },
                     .shapes = {{{1, 1}, {1}}, {{7, 33}, {33}}, {{40, 768}, {768}}, {{300, 768}, {768}}, {{3, 2048}, {2048}},
                                {{2, 8192}, {8192}}, {{2, 8200}, {8200}}},
                     .tolerance = {{DType::f32, 2e-5}, {DType::bf16, 2e-2}},
                     .fills = {{1, Normal{0, 0.2}}}};

const OpCase kFusedOffset{.name = "add_layer_norm with 1 + w",
                          .run =
                              [](const Vars& in) {
                                const AddNorm out = add_layer_norm(in[0], in[1], in[2], in[3], kEps, 1.0);
                                return Vars{out.residual, out.y};
                              },
                          .reference =
                              [](const Vars& in) {
                                const Tensor s = sum_of(in[0].data(), in[1].data());
                                return Vars{Variable(s), Variable(norm_of(s, in[2].data(), in[3].data(), 1))};
                              },
                          .shapes = {{{3, 5, 33}, {3, 5, 33}, {33}, {33}}, {{40, 768}, {40, 768}, {768}, {768}}},
                          .fills = {{2, Normal{0, 0.2}}, {3, Normal{}}}};

const OpCase kFused{.name = "add_layer_norm",
                    .run =
                        [](const Vars& in) {
                          const AddNorm out = add_layer_norm(in[0], in[1], in[2], in[3], kEps);
                          return Vars{out.residual, out.y};
                        },
                    .reference =
                        [](const Vars& in) {
                          const Tensor s = sum_of(in[0].data(), in[1].data());
                          return Vars{Variable(s), Variable(norm_of(s, in[2].data(), in[3].data()))};
                        },
                    .shapes = {{{1, 1}, {1, 1}, {1}, {1}},
                               {{3, 5, 33}, {3, 5, 33}, {33}, {33}},
                               {{40, 768}, {40, 768}, {768}, {768}},
                               {{2, 4099}, {2, 4099}, {4099}, {4099}},
                               {{0, 8}, {0, 8}, {8}, {8}},
                               {{3, 4096}, {3, 4096}, {4096}, {4096}}},
                    .inputs = {Normal{}, Constant{0}},
                    .fills = {{2, Normal{1, 0.2}}, {3, Normal{}}}};

void check_mixed(Device device) {
  for (const auto& [r, c] : {std::pair<int64_t, int64_t>{9, 33}, {300, 768}, {5, 4096}}) {
    const auto run = [&, r = r, c = c](DType x_dtype, DType wide, Device where) {
      const auto make = [&](const Shape& s, Fill fill, uint64_t seed, DType rounding, DType dtype) {
        return Variable(random_tensor(s, fill, seed, rounding).to(dtype).to(where), true);
      };
      Variable x = make({r, c}, Normal{}, 1, DType::bf16, x_dtype), res = make({r, c}, Normal{}, 2, DType::f32, wide);
      Variable w = make({c}, Normal{1, 0.2}, 3, DType::f32, wide), b = make({c}, Normal{}, 4, DType::f32, wide);
      const AddNorm out = add_layer_norm(x, res, w, b, kEps);
      backward(Vars{out.residual, out.y}, {random_tensor({r, c}, Normal{}, 5, DType::f32).to(wide).to(where),
                                           random_tensor({r, c}, Normal{}, 6, DType::bf16).to(x_dtype).to(where)});
      return std::vector<Tensor>{out.residual.data(), res.grad(), out.y.data(), x.grad(), w.grad(), b.grad()};
    };
    const auto mixed = run(DType::bf16, DType::f32, device), exact = run(DType::f64, DType::f64, kCpu);
    INFO(r << " x " << c);
    for (size_t i = 0; i < mixed.size(); ++i) {
      CHECK(mixed[i].dtype() == (i == 2 || i == 3 ? DType::bf16 : DType::f32));
      CHECK(relative_error(mixed[i], exact[i]) < (i < 2 ? 1e-5 : 2e-2));
    }
  }
}

void check_buffers_and_bits(Device device) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const int64_t c : {33, 768, 2048}) {
      Variable x(random_tensor({301, c}, Normal{}, 1, dtype).to(device), true);
      Variable w(random_tensor({c}, Normal{1, 0.2}, 2, DType::f32).to(device), true);
      Variable b(random_tensor({c}, Normal{}, 4, DType::f32).to(device), true);
      const Tensor dy = random_tensor({301, c}, Normal{}, 3, dtype).to(device);
      backward(layer_norm(x, w, b, kEps), dy);
      const auto dw = w.grad().to_vector<float>(), db = b.grad().to_vector<float>();
      const auto dx = x.grad().to_vector<float>();
      w.set_grad(ones({c}, DType::f32, device));
      b.set_grad(ones({c}, DType::f32, device));
      x.clear_grad();
      backward(layer_norm(x, w, b, kEps), dy);
      CHECK(x.grad().to_vector<float>() == dx);
      const auto dw_again = w.grad().to_vector<float>(), db_again = b.grad().to_vector<float>();
      for (size_t j = 0; j < dw.size(); ++j) {
        CHECK(dw_again[j] == 1.0F + dw[j]);
        CHECK(db_again[j] == 1.0F + db[j]);
      }
    }
  }
}

}  // namespace

TEST_CASE("layer_norm matches plain loops") { check_reference(kPlain); }
TEST_CASE("layer_norm passes gradcheck") { check_grad(kPlain); }
TEST_CASE("layer_norm: cuda equals cpu", "[cuda]") { check_twin(kPlain); }
TEST_CASE("layer_norm without bias matches plain loops") { check_reference(kNoBias); }
TEST_CASE("layer_norm without bias passes gradcheck") { check_grad(kNoBias); }
TEST_CASE("layer_norm without bias: cuda equals cpu", "[cuda]") { check_twin(kNoBias); }
TEST_CASE("layer_norm with 1 + w matches plain loops") { check_reference(kOffset); }
TEST_CASE("layer_norm with 1 + w passes gradcheck") { check_grad(kOffset); }
TEST_CASE("layer_norm with 1 + w: cuda equals cpu", "[cuda]") { check_twin(kOffset); }
TEST_CASE("add_layer_norm with 1 + w matches plain loops") { check_reference(kFusedOffset); }
TEST_CASE("add_layer_norm with 1 + w passes gradcheck") { check_grad(kFusedOffset); }
TEST_CASE("add_layer_norm with 1 + w: cuda equals cpu", "[cuda]") { check_twin(kFusedOffset); }
TEST_CASE("add_layer_norm matches plain loops") { check_reference(kFused); }
TEST_CASE("add_layer_norm passes gradcheck") { check_grad(kFused); }
TEST_CASE("add_layer_norm: cuda equals cpu", "[cuda]") { check_twin(kFused); }

TEST_CASE("add_layer_norm keeps an fp32 residual stream under bf16 inputs") { check_mixed(kCpu); }
TEST_CASE("add_layer_norm keeps an fp32 residual stream under bf16 inputs, on cuda", "[cuda]") {
  check_mixed(cuda_device());
}

TEST_CASE("layer_norm adds dw and db to gradient buffers and repeats bit for bit") { check_buffers_and_bits(kCpu); }
TEST_CASE("layer_norm adds dw and db to gradient buffers and repeats bit for bit, on cuda", "[cuda]") {
  check_buffers_and_bits(cuda_device());
}

TEST_CASE("layer_norm of an fp32 row that is constant but large is its bias") {
  const Variable x(full({2, 33}, 12345.678, DType::f32, kCpu)), w(ones({33}, DType::f32, kCpu));
  const Variable b(full({33}, 0.25, DType::f32, kCpu));
  for (const float y : layer_norm(x, w, b, 1e-5).data().to_vector<float>()) CHECK(y == Approx(0.25).margin(1e-6));
}

TEST_CASE("layer_norm names both shapes when refusing") {
  const auto t = [](const Shape& s, DType d = DType::f32) { return Variable(zeros(s, d, kCpu)); };
  CHECK(contains(error_of([&] { layer_norm(t({2, 3}), t({4}), t({3}), kEps); }),
                 "layer_norm: weight is (4,), expected (3,) to match x (2, 3)"));
  CHECK(contains(error_of([&] { layer_norm(t({2, 3}), t({3}), t({1}), kEps); }),
                 "layer_norm: bias is (1,), expected (3,) to match x (2, 3)"));
  CHECK(contains(error_of([&] { add_layer_norm(t({2, 3}), t({2, 3}, DType::f64), t({3}), t({3}), kEps); }),
                 "residual is float64, x is float32"));
}
