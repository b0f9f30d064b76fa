#include "autograd/kan.h"

#include <cmath>

#include "kernels/kan.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

// B_{j,p}(x) by the textbook recursion over all bases.
double basis(const double* t, int64_t j, int64_t p, double x) {
  if (p == 0) return t[j] <= x && x < t[j + 1] ? 1 : 0;
  const double a = t[j + p] - t[j], b = t[j + p + 1] - t[j + 1];
  return (a == 0 ? 0 : (x - t[j]) / a * basis(t, j, p - 1, x)) +
         (b == 0 ? 0 : (t[j + p + 1] - x) / b * basis(t, j + 1, p - 1, x));
}

double value(const Tensor& t, const std::vector<int64_t>& at) {
  int64_t index = 0;
  for (size_t i = 0; i < at.size(); ++i) index = index * t.size(static_cast<int64_t>(i)) + at[i];
  return t.data<double>()[index];
}

// phi_oi(x[b, i]) as (r, o, i), from in = {x, spline, base, scaler}; base and scaler may be missing.
Tensor edge_values(const Vars& in, const Tensor& grid, int64_t k) {
  const Tensor x = in[0].data().flatten_leading(), w = in[1].data();
  const int64_t r = x.size(0), outputs = w.size(0), inputs = w.size(1), n = w.size(2);
  Tensor phi = zeros({r, outputs, inputs}, DType::f64, kCpu);
  for (int64_t b = 0; b < r; ++b)
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t i = 0; i < inputs; ++i) {
        const double v = value(x, {b, i});
        double sum = 0;
        for (int64_t g = 0; g < n; ++g) sum += value(w, {o, i, g}) * basis(grid.data<double>() + i * grid.size(1), g, k, v);
        if (in.size() > 3) sum *= value(in[3].data(), {o, i});
        if (in.size() > 2) sum += value(in[2].data(), {o, i}) * v / (1 + std::exp(-v));
        phi.data<double>()[(b * outputs + o) * inputs + i] = sum;
      }
  return phi;
}

// Knots of G intervals on [-1, 1] and k beyond; moved by up to a third of a step when not uniform. Exact in fp32.
Tensor knots(int64_t inputs, int64_t intervals, int64_t k, bool uniform) {
  const int64_t count = intervals + 2 * k + 1;
  Tensor t = empty({inputs, count}, DType::f64, kCpu);
  const Tensor noise = random_tensor({inputs, count}, Uniform{-0.33, 0.33}, 99);
  const double step = 2.0 / static_cast<double>(intervals);
  for (int64_t i = 0; i < inputs; ++i)
    for (int64_t j = 0; j < count; ++j)
      t.data<double>()[i * count + j] =
          -1 + step * (static_cast<double>(j - k) + (uniform ? 0 : noise.data<double>()[i * count + j]));
  return t.to(DType::f32).to(DType::f64);
}

KanVariables variables(const Vars& in, const Tensor& grid, int64_t k) {
  KanVariables p;
  p.spline = in[1];
  if (in.size() > 2) p.base = in[2];
  if (in.size() > 3) p.scaler = in[3];
  p.grid = grid.to(in[0].device());
  p.order = k;
  return p;
}

struct Setting {
  int64_t order, intervals;
  bool uniform = true;
};

// x (rows, inputs), spline, and, with `parts` 3 or 4, base and scaler.
OpCase layer_case(const Setting& s, const std::vector<Shape>& rows, int64_t outputs, size_t parts, bool edges = false) {
  const int64_t k = s.order, inputs = rows[0][-1], n = s.intervals + k;
  const Tensor grid = knots(inputs, s.intervals, k, s.uniform);
  OpCase c;
  c.name = fmt::format("{} order {} grid {}{}", edges ? "kan_edges" : "kan", k, s.intervals, s.uniform ? "" : " uneven");
  c.run = [=](const Vars& in) {
    return edges ? kan_edges(in[0], variables(in, grid, k)) : kan(in[0], variables(in, grid, k));
  };
  c.reference = [=](const Vars& in) {
    const Tensor phi = edge_values(in, grid, k);
    const int64_t r = phi.size(0);
    Tensor out = zeros(edges ? Shape{outputs, inputs} : in[0].shape().drop_last().append(outputs), DType::f64, kCpu);
    for (int64_t b = 0; b < r; ++b)
      for (int64_t o = 0; o < outputs; ++o)
        for (int64_t i = 0; i < inputs; ++i) {
          const double v = value(phi, {b, o, i});
          if (edges)
            out.data<double>()[o * inputs + i] += std::abs(v) / static_cast<double>(r);
          else
            out.data<double>()[b * outputs + o] += v;
        }
    return Variable(out);
  };
  for (const Shape& shape : rows) {
    std::vector<Shape> shapes{shape, {outputs, inputs, n}, {outputs, inputs}, {outputs, inputs}};
    shapes.resize(parts);
    c.shapes.push_back(shapes);
  }
  c.inputs = {Uniform{-1.6, 1.6}};
  c.fills = {{1, Normal{0, 0.3}}, {3, Normal{1, 0.3}}};
  return c;
}

const std::vector<Setting> kSettings{{0, 4}, {1, 1}, {1, 3}, {2, 8}, {3, 1}, {3, 5}, {3, 5, false}, {4, 7},
                                     {5, 3}, {2, 6, false}, {1, 5, false}, {0, 5, false}, {3, 40}, {5, 11, false}};

template <class F>
void for_each_layer(F f) {
  for (const Setting& s : kSettings) {
    OpCase c = layer_case(s, {{7, 3}, {1, 3}}, 5, 4);
    if (s.order == 1) c.grad_step = 1e-7, c.grad_tolerance = 1e-5;  // kinks at the knots
    f(c);
  }
  f(layer_case({3, 5}, {{2, 65, 9}, {0, 9}, {9}}, 70, 4));   // more than one block, vector piece and tile
  f(layer_case({3, 5}, {{130, 1}}, 1, 3));                   // no scaler
  f(layer_case({2, 3, false}, {{33, 17}}, 16, 2));           // nor base
  f(layer_case({3, 5}, {{2, 3}}, 0, 4));                     // no outputs
  f(layer_case({3, 70}, {{40, 2}}, 67, 4));                  // more coefficients than a tile of the CUDA kernels
}

template <class F>
void for_each_edges(F f) {
  f(layer_case({3, 5}, {{70, 3}, {1, 3}}, 5, 4, true));
  f(layer_case({2, 4, false}, {{129, 2}}, 20, 3, true));
  f(layer_case({3, 70}, {{9, 2}}, 65, 2, true));
  f(layer_case({1, 3}, {{5, 2, 3}}, 1, 4, true));
}

}  // namespace

TEST_CASE("kan matches plain loops for orders 0 to 5, uniform and uneven knots") {
  for_each_layer([](const OpCase& c) { check_reference(c); });
}
TEST_CASE("kan passes gradcheck for orders 0 to 5") {
  for_each_layer([](const OpCase& c) { check_grad(c); });
}
TEST_CASE("kan: cuda equals cpu", "[cuda]") {
  for_each_layer([](const OpCase& c) { check_twin(c); });
  check_twin(layer_case({3, 5}, {{2100, 19}}, 800, 4));        // large enough for products of whole bases
  check_twin(layer_case({2, 3, false}, {{2000, 19}}, 1300, 2));  // without a base branch
  check_twin(layer_case({3, 5, false}, {{4100, 117}}, 10, 4));   // few outputs
}
TEST_CASE("L1 norms of KAN edges match plain loops") {
  for_each_edges([](const OpCase& c) { check_reference(c); });
}
TEST_CASE("L1 norms of KAN edges pass gradcheck") {
  for_each_edges([](OpCase c) {
    c.grad_step = 1e-8, c.grad_tolerance = 1e-5;  // kinks where an edge changes sign
    check_grad(c);
  });
}
TEST_CASE("L1 norms of KAN edges: cuda equals cpu", "[cuda]") {
  for_each_edges([](const OpCase& c) { check_twin(c); });
}

namespace {

void check_knots(Device device) {
  // On a knot the interval to its right counts; beyond the last knot everything is zero.
  for (const DType dtype : {DType::f64, DType::f32})
    for (const bool uniform : {true, false})
      for (const int64_t k : {0, 1, 2, 3, 5}) {
        const Tensor grid = knots(1, 7, k, uniform);
        const Tensor x = grid.transpose(0, 1);
        const Tensor b = kernels::bspline_basis(x.to(dtype).to(device), grid.to(dtype).to(device), k).to(kCpu);
        const Tensor d = kernels::bspline_basis(x.to(dtype).to(device), grid.to(dtype).to(device), k, true).to(kCpu);
        const auto values = b.to_vector<double>(), slopes = d.to_vector<double>();
        const int64_t n = 7 + k;
        INFO("order " << k << " uniform " << uniform << " " << name_of(dtype));
        for (int64_t q = 0; q < grid.size(1); ++q)
          for (int64_t g = 0; g < n; ++g) {
            const double at = grid.data<double>()[q];
            CHECK(values[static_cast<size_t>(q * n + g)] ==
                  Approx(basis(grid.data<double>(), g, k, at)).margin(dtype == DType::f64 ? 1e-12 : 2e-6));
            if (k < 2) continue;
            const double h = 1e-6;
            const double slope = (basis(grid.data<double>(), g, k, at + h) - basis(grid.data<double>(), g, k, at - h)) / (2 * h);
            CHECK(slopes[static_cast<size_t>(q * n + g)] == Approx(slope).margin(dtype == DType::f64 ? 1e-4 : 2e-4));
          }
      }
}

void check_far(Device device) {
  const Tensor grid = knots(2, 5, 3, true).to(DType::f32).to(device);
  const float inf = std::numeric_limits<float>::infinity();
  const Variable x(from_vector<float>({-inf, 1e30F, -1e30F, 3.0F, -5.0F, 40.0F}, {3, 2}).to(device), true);
  KanVariables p;
  p.spline = Variable(ones({4, 2, 8}, DType::f32, device), true);
  p.grid = grid;
  const Variable y = kan(x, p);
  for (const double v : y.data().to_vector<double>()) CHECK(v == 0);
  backward(y, ones({3, 4}, DType::f32, device));
  for (const double v : x.grad().to_vector<double>()) CHECK(v == 0);
  for (const double v : p.spline.grad().to_vector<double>()) CHECK(v == 0);
}

// Knots that coincide enclose no values; what is left stays finite and sums to one.
void check_double_knots(Device device) {
  const Tensor grid = from_vector<double>({-2, -1, -1, -1, 0, 0, 1, 1, 1, 2}, {1, 10}).to(device);
  const Tensor x = random_tensor({200, 1}, Uniform{-1, 1}, 3).to(device);
  const Tensor b = kernels::bspline_basis(x, grid, 2).to(kCpu);
  for (int64_t q = 0; q < 200; ++q) {
    double sum = 0;
    for (int64_t g = 0; g < 7; ++g) sum += b.data<double>()[q * 7 + g];
    CHECK(sum == Approx(1.0));
  }
}

}  // namespace

TEST_CASE("bases on the knots, far away and between coinciding knots are what the recursion says") {
  check_knots(kCpu), check_far(kCpu), check_double_knots(kCpu);
}
TEST_CASE("bases on the knots, far away and between coinciding knots, on cuda", "[cuda]") {
  check_knots(cuda_device()), check_far(cuda_device()), check_double_knots(cuda_device());
}

TEST_CASE("gradient buffers of bf16 weights receive fp32 sums") {
  Variable w(random_tensor({3, 2, 8}, Normal{}, 1, DType::bf16), true);
  w.set_grad(zeros({3, 2, 8}, DType::f32, kCpu));
  KanVariables p;
  p.spline = w;
  p.grid = knots(2, 5, 3, true).to(DType::f32);
  const Variable x(random_tensor({50, 2}, Uniform{-1, 1}, 2, DType::bf16));
  const Tensor dy = random_tensor({50, 3}, Normal{}, 3, DType::bf16);
  backward(kan(x, p), dy);
  KanVariables exact = p;
  exact.spline = Variable(w.data().to(DType::f64), true);
  backward(kan(Variable(x.data().to(DType::f64)), exact), dy.to(DType::f64));
  CHECK(relative_error(w.grad(), exact.spline.grad()) < 1e-5);
}

TEST_CASE("kan names the shapes it refuses") {
  const auto t = [](const Shape& s, DType d = DType::f32) { return Variable(zeros(s, d, kCpu)); };
  const auto run = [&](const Variable& x, const Variable& w, const Tensor& grid, int64_t k, const Variable& base = {}) {
    KanVariables p;
    p.spline = w, p.grid = grid, p.order = k, p.base = base;
    return error_of([&] { kan(x, p); });
  };
  const Tensor grid = zeros({3, 12}, DType::f32, kCpu);
  CHECK(contains(run(t({2, 3}), t({4, 3, 9}), grid, 3), "kan: spline_weight is (4, 3, 9), expected (out, 3, 8)"));
  CHECK(contains(run(t({2, 5}), t({4, 3, 8}), grid, 3), "kan: grid is (3, 12), expected (5, G + 7)"));
  CHECK(contains(run(t({2, 3}), t({4, 3, 8}), grid, 16), "spline order 16, expected 0 to 15"));
  CHECK(contains(run(t({2, 3}), t({4, 3, 8}), grid, 3, t({3, 4})), "base_weight is (3, 4), expected (4, 3)"));
  CHECK(contains(run(t({2, 3}), t({4, 3, 8}, DType::f64), grid, 3), "kan"));
}
