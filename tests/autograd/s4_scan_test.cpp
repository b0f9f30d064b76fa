#include "autograd/s4_scan.h"

#include "autograd/shape.h"
#include "kernels/s4_scan.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

Tensor segments_of(int64_t b, int64_t l, Device device) {
  std::vector<int32_t> s;
  for (int64_t i = 0; i < b; ++i)
    for (int64_t t = 0; t < l; ++t) s.push_back(static_cast<int32_t>((t + i) / 5 + (t >= 33)));
  return from_vector(s, {b, l}).to(device);
}

// Inputs: u, A, B, C, D, x0. A is made stable by the tests' fills.
Outputs run(const Vars& in, bool documents) {
  const DType a = accum_dtype(in[0].dtype());
  const auto at = [&](size_t i) { return cast(in[i], a); };
  const auto [y, last] = s4_scan(in[0], {at(1), at(2), {}, {}}, at(3), at(4), at(5),
                                 documents ? segments_of(in[0].size(0), in[0].size(1), in[0].device()) : Tensor());
  return Vars{y, last};
}

Outputs reference(const Vars& in, bool documents) {
  const Tensor u = in[0].data();
  const int64_t b = u.size(0), l = u.size(1), h = u.size(2), n = in[1].size(1);
  const Tensor segments = segments_of(b, l, kCpu);
  Tensor y = zeros_like(u), last = in[5].data().clone();
  const auto p = [&](size_t i) { return in[i].data().data<double>(); };
  for (int64_t i = 0; i < b; ++i)
    for (int64_t c = 0; c < h; ++c) {
      double* x = last.data<double>() + (i * h + c) * 2 * n;
      for (int64_t t = 0; t < l; ++t) {
        const int32_t* s = segments.data<int32_t>() + i * l;
        if (documents && t > 0 && s[t] != s[t - 1]) std::fill_n(x, 2 * n, 0.0);
        const double ut = u.data<double>()[(i * l + t) * h + c];
        double sum = p(4)[c] * ut;
        for (int64_t j = 0; j < n; ++j) {
          const double *A = p(1) + (c * n + j) * 2, *B = p(2) + (c * n + j) * 2, *C = p(3) + (c * n + j) * 2;
          const double re = A[0] * x[2 * j] - A[1] * x[2 * j + 1] + B[0] * ut;
          x[2 * j + 1] = A[0] * x[2 * j + 1] + A[1] * x[2 * j] + B[1] * ut;
          x[2 * j] = re;
          sum += 2 * (C[0] * x[2 * j] - C[1] * x[2 * j + 1]);
        }
        y.data<double>()[(i * l + t) * h + c] = sum;
      }
    }
  return Vars{Variable(y), Variable(last)};
}

OpCase make_case(bool documents) {
  OpCase c;
  c.name = "s4_scan";
  c.run = [=](const Vars& in) { return run(in, documents); };
  c.reference = [=](const Vars& in) { return reference(in, documents); };
  const auto add = [&](int64_t b, int64_t l, int64_t h, int64_t n) {
    c.shapes.push_back({{b, l, h}, {h, n, 2}, {h, n, 2}, {h, n, 2}, {h}, {b, h, n, 2}});
  };
  add(1, 1, 1, 1);
  add(2, 7, 3, 5);
  add(3, 65, 17, 32);  // beyond two pieces
  add(1, 40, 2, 70);
  add(2, 32, 1, 33);
  add(0, 4, 2, 2);
  c.fills = {{1, Uniform{-0.6, 0.6}}};
  c.tolerance = {{DType::f32, 2e-5}, {DType::bf16, 2e-2}};
  return c;
}

}  // namespace

TEST_CASE("s4_scan is the recurrence, with states in and out and documents") {
  for (const bool documents : {false, true}) check_reference(make_case(documents));
}
TEST_CASE("s4_scan passes gradcheck") {
  for (const bool documents : {false, true}) check_grad(make_case(documents));
}
TEST_CASE("s4_scan: cuda equals cpu", "[cuda]") {
  for (const bool documents : {false, true}) check_twin(make_case(documents));
}

TEST_CASE("dense_scan and low-rank scans: cuda equals cpu", "[cuda]") {
  const Tensor segments = segments_of(3, 41, kCpu);
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    const DType a = accum_dtype(dtype);
    const auto make = [&](const Shape& shape, double scale, uint64_t seed) {
      return random_tensor(shape, Normal{.std = scale}, seed, a);
    };
    const Tensor u = random_tensor({3, 41, 5}, Normal{}, 1, dtype);
    const auto to = [](const kernels::S4System& s, Device d) {
      const auto move = [&](const Tensor& t) { return t.defined() ? t.to(d) : t; };
      return kernels::S4System{move(s.A), move(s.B), move(s.C), move(s.D), move(s.M), move(s.Q)};
    };
    const double tolerance = dtype == DType::f64 ? 1e-10 : dtype == DType::f32 ? 2e-5 : 2e-2;
    const kernels::S4System dense{make({5, 37, 37}, 0.05, 2), make({5, 37}, 1, 3), make({5, 37}, 1, 4), make({5}, 1, 5), {}, {}};
    const Tensor x0 = make({3, 5, 37}, 1, 6);
    const auto p = kernels::dense_scan_forward(u, dense, x0, segments);
    const auto q = kernels::dense_scan_forward(u.to(cuda_device()), to(dense, cuda_device()), x0.to(cuda_device()), segments.to(cuda_device()));
    CHECK(relative_error(q.y, p.y) <= tolerance);
    CHECK(relative_error(q.last, p.last) <= tolerance);
    const kernels::S4System low{make({5, 37, 2}, 0.3, 2), make({5, 37, 2}, 1, 3), make({5, 37, 2}, 1, 4), {}, make({5, 2, 37, 2}, 0.05, 7), make({5, 2, 37, 2}, 0.05, 8)};
    const Tensor z0 = make({3, 5, 37, 2}, 1, 6);
    const auto r = kernels::s4_scan_forward(u, low, z0, segments);
    const auto s = kernels::s4_scan_forward(u.to(cuda_device()), to(low, cuda_device()), z0.to(cuda_device()), segments.to(cuda_device()));
    CHECK(relative_error(s.y, r.y) <= tolerance);
    CHECK(relative_error(s.last, r.last) <= tolerance);
  }
}

TEST_CASE("s4_scan says what does not fit, and that low-rank systems have no gradient") {
  const Tensor u = zeros({1, 4, 2}, DType::f32, kCpu), A = zeros({2, 3, 2}, DType::f32, kCpu);
  const auto scan = [&](const Tensor& B) { return error_of([&] { kernels::s4_scan_forward(u, {A, B, A, {}, {}, {}}); }); };
  CHECK(contains(scan(zeros({2, 4, 2}, DType::f32, kCpu)), "s4_scan: B is"));
  const Variable low(zeros({2, 1, 3, 2}, DType::f32, kCpu)), a(A), x(u, true);
  CHECK(contains(error_of([&] { s4_scan(x, {a, a, low, low}, a); }), "low-rank system"));
}
