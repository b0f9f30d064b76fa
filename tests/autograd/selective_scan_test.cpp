#include "autograd/selective_scan.h"

#include <cmath>

#include "autograd/elementwise.h"
#include "autograd/shape.h"
#include "core/allocator.h"
#include "core/parallel.h"
#include "kernels/selective_scan.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

double sigmoid_of(double x) { return 1 / (1 + std::exp(-x)); }
double softplus_of(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

using Segments = std::vector<int32_t>;

// Documents of uneven length that end inside and at the borders of chunks.
Segments documents(int64_t b, int64_t l) {
  Segments s;
  for (int64_t r = 0; r < b; ++r)
    for (int64_t t = 0; t < l; ++t) s.push_back(static_cast<int32_t>((t + 5 * r) / 23 + (t > 63) + (t + 1 == l)));
  return s;
}

// {y, final state} of x, dt, A, B, C, D, dt_bias, h0 and maybe z by loops over fp64 CPU tensors.
Vars plain(const Vars& in, const Segments& segments, bool softplus) {
  std::vector<Tensor> t;
  for (const Variable& v : in) t.push_back(v.data().contiguous());
  const int64_t b = t[0].size(0), l = t[0].size(1), e = t[0].size(2), n = t[2].size(1);
  Tensor y = empty({b, l, e}, f64, kCpu), last = empty({b, e, n}, f64, kCpu);
  const auto at = [&](size_t i, int64_t k) { return t[i].data<double>()[k]; };
  for (int64_t r = 0; r < b; ++r)
    for (int64_t j = 0; j < e; ++j) {
      std::vector<double> h(static_cast<size_t>(n));
      for (int64_t i = 0; i < n; ++i) h[static_cast<size_t>(i)] = at(7, (r * e + j) * n + i);
      for (int64_t s = 0; s < l; ++s) {
        const int64_t p = r * l + s;
        if (s > 0 && !segments.empty() && segments[static_cast<size_t>(p)] != segments[static_cast<size_t>(p - 1)])
          std::fill(h.begin(), h.end(), 0.0);
        const double raw = at(1, p * e + j) + at(6, j), delta = softplus ? softplus_of(raw) : raw, x = at(0, p * e + j);
        double u = at(5, j) * x;
        for (int64_t i = 0; i < n; ++i) {
          double& hi = h[static_cast<size_t>(i)];
          hi = std::exp(delta * at(2, j * n + i)) * hi + delta * at(3, p * n + i) * x;
          u += at(4, p * n + i) * hi;
        }
        if (t.size() > 8) u *= at(8, p * e + j) * sigmoid_of(at(8, p * e + j));
        y.data<double>()[p * e + j] = u;
      }
      for (int64_t i = 0; i < n; ++i) last.data<double>()[(r * e + j) * n + i] = h[static_cast<size_t>(i)];
    }
  return {Variable(y), Variable(last)};
}

// Parameters and states stay fp32 (fp64) when the rest is bf16: the case casts them.
SelectiveScanArguments arguments(const Vars& in) {
  const auto sums = [&](size_t i) { return cast(in[i], accum_dtype(in[0].dtype())); };
  SelectiveScanArguments a{in[0], in[1], sums(2), in[3], in[4]};
  a.D = sums(5);
  a.dt_bias = sums(6);
  a.h0 = sums(7);
  if (in.size() > 8) a.z = in[8];
  return a;
}

OpCase scan_case(bool gated, bool packed, bool softplus = true) {
  OpCase c{.name = fmt::format("selective_scan{}{}{}", gated ? " gated" : "", packed ? " with documents" : "",
                               softplus ? "" : " without softplus"),
           .run =
               [=](const Vars& in) {
                 SelectiveScanArguments a = arguments(in);
                 a.softplus = softplus;
                 const int64_t b = in[0].size(0), l = in[0].size(1);
                 if (packed) a.segments = from_vector(documents(b, l), {b, l}).to(in[0].device());
                 const ScanOut out = selective_scan(a);
                 return Vars{out.y, out.final_state};
               },
           .reference =
               [=](const Vars& in) {
                 return plain(in, packed ? documents(in[0].size(0), in[0].size(1)) : Segments{}, softplus);
               },
           .shapes = {},
           .tolerance = {{f32, 2e-5}, {bf16_type, 2e-2}},
           .fills = {{1, softplus ? Fill(Normal{-1, 1}) : Fill(Uniform{0, 0.3})},
                     {2, Uniform{-2, -0.05}},
                     {6, softplus ? Fill(Normal{}) : Fill(Uniform{0, 0.1})}}};
  for (const auto& [b, l, e, n] : std::vector<std::array<int64_t, 4>>{
           {1, 1, 1, 1}, {2, 7, 5, 3}, {1, 0, 3, 4}, {0, 3, 2, 2}, {1, 64, 3, 16}, {2, 65, 37, 16}, {3, 150, 9, 5},
           {1, 33, 130, 2}, {1, 21, 3, 33}, {1, 6, 2, 200}, {2, 1, 8, 16}, {2, 67, 24, 16}, {1, 131, 136, 16},
           {200, 66, 8, 16}}) {
    std::vector<Shape> shapes{{b, l, e}, {b, l, e}, {e, n}, {b, l, n}, {b, l, n}, {e}, {e}, {b, e, n}};
    if (gated) shapes.push_back({b, l, e});
    c.shapes.push_back(shapes);
  }
  return c;
}

template <class F>
void for_each_case(F check) {
  for (const bool gated : {true, false})
    for (const bool packed : {true, false}) check(scan_case(gated, packed));
  check(scan_case(true, false, false));
}

Variable values(const Shape& shape, uint64_t seed, DType dtype = f32, Device device = kCpu) {
  return Variable(random_tensor(shape, Normal{}, seed, dtype).to(device), true);
}

// B, C and dt as slices of one projection, x and z of another.
Vars run_sliced(DType dtype, Device device, bool slices, int64_t e = 6, int64_t n = 4) {
  const int64_t b = 2, l = 70;
  const Variable xz = values({b, l, 2 * e}, 1, dtype, device), dbc = values({b, l, e + 2 * n}, 2, dtype, device);
  const Variable A(random_tensor({e, n}, Uniform{-2, -0.1}, 3, accum_dtype(dtype)).to(device), true);
  Vars halves = chunk(xz, 2, -1), parts = split(dbc, {e, n, n}, -1);
  if (!slices)
    for (Vars* vs : {&halves, &parts})
      for (Variable& v : *vs) v = contiguous(v);
  SelectiveScanArguments a{halves[0], parts[0], A, parts[1], parts[2]};
  a.z = halves[1];
  const Variable y = selective_scan(a).y;
  backward(y, random_tensor({b, l, e}, Normal{}, 9, dtype).to(device));
  return {y.detach(), Variable(xz.grad()), Variable(dbc.grad()), Variable(A.grad())};
}

void check_slices(Device device) {
  for (const DType dtype : {f64, f32, bf16_type}) {
    for (const auto& [e, n] : {std::pair<int64_t, int64_t>{6, 4}, {24, 16}}) {
      const Vars a = run_sliced(dtype, device, true, e, n), b = run_sliced(dtype, device, false, e, n);
      for (size_t i = 0; i < a.size(); ++i) CHECK(relative_error(a[i].data(), b[i].data()) == 0);
    }
  }
}

}  // namespace

TEST_CASE("selective_scan matches plain loops") { for_each_case(check_reference); }
TEST_CASE("selective_scan passes gradcheck") { for_each_case(check_grad); }
TEST_CASE("selective_scan: cuda equals cpu", "[cuda]") { for_each_case(check_twin); }
TEST_CASE("selective_scan reads slices of projections in place") { check_slices(kCpu); }
TEST_CASE("selective_scan reads slices of projections in place, on cuda", "[cuda]") { check_slices(cuda_device()); }

TEST_CASE("with one state, A = -1, B = C = 1 and D = 0 the scan is a gated recurrence") {
  const int64_t l = 100, e = 3;
  const Tensor x = random_tensor({1, l, e}, Normal{}, 1), z = random_tensor({1, l, e}, Normal{0, 3}, 2);
  const Variable one(ones({1, l, 1}, f64, kCpu));
  const Tensor y = selective_scan({Variable(x), Variable(z), Variable(full({e, 1}, -1, f64, kCpu)), one, one}).y.data();
  for (int64_t j = 0; j < e; ++j) {
    double h = 0;
    for (int64_t t = 0; t < l; ++t) {
      const double gate = z.data<double>()[t * e + j];
      h = (1 - sigmoid_of(gate)) * h + softplus_of(gate) * x.data<double>()[t * e + j];
      REQUIRE(y.data<double>()[t * e + j] == Approx(h).epsilon(1e-12).margin(1e-13));
    }
  }
}

TEST_CASE("selective_scan cut anywhere, with the state passed on, is the whole scan, and so is step by step") {
  const int64_t b = 2, l = 131, e = 5, n = 3;
  kernels::SelectiveScanInputs in;
  in.x = random_tensor({b, l, e}, Normal{}, 1);
  in.dt = random_tensor({b, l, e}, Normal{}, 2);
  in.A = random_tensor({e, n}, Uniform{-2, -0.1}, 3);
  in.B = random_tensor({b, l, n}, Normal{}, 4);
  in.C = random_tensor({b, l, n}, Normal{}, 5);
  in.z = random_tensor({b, l, e}, Normal{}, 6);
  in.dt_bias = random_tensor({e}, Normal{}, 7);
  const auto whole = kernels::selective_scan_forward(in, false);
  const auto part = [&](int64_t first, int64_t last, const Tensor& h0) {
    kernels::SelectiveScanInputs p = in;
    for (Tensor* t : {&p.x, &p.dt, &p.B, &p.C, &p.z}) *t = t->slice(1, first, last);
    p.h0 = h0;
    return p;
  };
  for (const int64_t cut : {1, 63, 64, 65, 130}) {
    const auto one = kernels::selective_scan_forward(part(0, cut, {}), false);
    const auto two = kernels::selective_scan_forward(part(cut, l, one.final_state), false);
    CHECK(relative_error(one.y, whole.y.slice(1, 0, cut)) < 1e-12);
    CHECK(relative_error(two.y, whole.y.slice(1, cut, l)) < 1e-12);
    CHECK(relative_error(two.final_state, whole.final_state) < 1e-12);
  }
  Tensor h = zeros({b, e, n}, f64, kCpu);
  for (int64_t t = 0; t < l; ++t) {
    kernels::SelectiveScanInputs p = part(t, t + 1, {});
    for (Tensor* s : {&p.x, &p.dt, &p.B, &p.C, &p.z}) *s = s->squeeze(1);
    CHECK(relative_error(kernels::selective_scan_step(h, p), whole.y.select(1, t)) < 1e-12);
  }
  CHECK(relative_error(h, whole.final_state) < 1e-12);
}

TEST_CASE("the scan's memory at length 16384 is its inputs' and the chunks' states, in forward and backward") {
  const int64_t l = 16384, e = 64, n = 16;
  const Variable x = values({1, l, e}, 1), dt = values({1, l, e}, 2), B = values({1, l, n}, 3), C = values({1, l, n}, 4);
  const Variable A(random_tensor({e, n}, Uniform{-16, -1}, 5, f32), true);
  const Tensor dy = random_tensor({1, l, e}, Normal{}, 6, f32);
  Allocator& memory = allocator(kCpu);
  const int64_t row = l * e * 4;  // bytes of x; a tensor of all states would be 16 of these
  memory.reset_peak();
  const int64_t before = memory.stats().current_bytes;
  const Variable y = selective_scan({x, dt, A, B, C}).y;
  CHECK(memory.stats().peak_bytes - before < row * 7 / 4);  // y, and n / 64 of it for the chunks' states
  memory.reset_peak();
  backward(y, dy);
  CHECK(memory.stats().peak_bytes - before < 8 * row);  // with the five gradients
}

TEST_CASE("selective_scan is the same with any number of threads") {
  const auto run = [](int threads) {
    set_num_threads(threads);
    const Vars out = run_sliced(f32, kCpu, true);
    set_num_threads(0);
    return out;
  };
  const Vars one = run(1), two = run(2);
  for (size_t i = 0; i < one.size(); ++i) CHECK(relative_error(one[i].data(), two[i].data()) == 0);
}

TEST_CASE("selective_scan names the shapes when refusing") {
  const auto t = [](const Shape& s, DType d = f32) { return Variable(zeros(s, d, kCpu)); };
  CHECK(contains(error_of([&] { selective_scan({t({3, 4}), t({3, 4}), t({4, 2}), t({3, 2}), t({3, 2})}); }),
                 "selective_scan: x is (3, 4), expected (batch, length, channels)"));
  CHECK(contains(error_of([&] { selective_scan({t({1, 3, 4}), t({1, 3, 4}), t({5, 2}), t({1, 3, 2}), t({1, 3, 2})}); }),
                 "A is (5, 2), expected (4, states) to match x (1, 3, 4)"));
  CHECK(contains(error_of([&] { selective_scan({t({1, 3, 4}), t({1, 3, 4}), t({4, 2}), t({1, 3, 3}), t({1, 3, 2})}); }),
                 "selective_scan: B is (1, 3, 3), expected (1, 3, 2) to match x (1, 3, 4) and A (4, 2)"));
  CHECK(contains(error_of([&] {
                   selective_scan({t({1, 3, 4}, bf16_type), t({1, 3, 4}, bf16_type), t({4, 2}, bf16_type),
                                   t({1, 3, 2}, bf16_type), t({1, 3, 2}, bf16_type)});
                 }),
                 "expected float32 on cpu"));
}
