#include "autograd/ssd.h"

#include <cmath>

#include "autograd/elementwise.h"
#include "autograd/shape.h"
#include "kernels/ssd.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

// Documents of uneven length: boundaries inside chunks, at their edges, and a document of one position.
Tensor documents(int64_t b, int64_t l) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < b; ++i) {
    int32_t id = static_cast<int32_t>(i);
    for (int64_t t = 0; t < l; ++t) {
      if (t > 0 && (t == 3 || t == 4 || t % 16 == 0 || (t + i) % 23 == 0)) ++id;
      ids.push_back(id);
    }
  }
  return from_vector(ids, {b, l});
}

struct Sizes {
  int64_t b, l, h, p, g, n;
  Sizes(const Tensor& x, const Tensor& B)
      : b(x.size(0)), l(x.size(1)), h(x.size(2)), p(x.size(3)), g(B.size(2)), n(B.size(3)) {}
};

// h_t = e^{a_t} h_{t-1} + dt_t x_t (x) B_t, y_t = h_t C_t + D x_t, position by position in fp64.
Vars recurrent(const Vars& in, const Tensor& segments) {
  const Sizes s(in[0].data(), in[3].data());
  const double *x = in[0].data().data<double>(), *dt = in[1].data().data<double>(), *a = in[2].data().data<double>();
  const double *B = in[3].data().data<double>(), *C = in[4].data().data<double>(), *D = in[5].data().data<double>();
  Tensor y = zeros_like(in[0].data()), state = in[6].data().clone();
  const bool wide = in[5].ndim() == 2;
  for (int64_t b = 0; b < s.b; ++b)
    for (int64_t t = 0; t < s.l; ++t)
      for (int64_t h = 0; h < s.h; ++h) {
        const int64_t r = (b * s.l + t) * s.h + h, q = ((b * s.l + t) * s.g + h / (s.h / s.g)) * s.n;
        const int32_t* id = segments.defined() ? segments.data<int32_t>() + b * s.l + t : nullptr;
        const double keep = id && t > 0 && id[0] != id[-1] ? 0.0 : std::exp(a[r]);
        for (int64_t p = 0; p < s.p; ++p) {
          double* state_row = state.data<double>() + ((b * s.h + h) * s.p + p) * s.n;
          double sum = D[wide ? h * s.p + p : h] * x[r * s.p + p];
          for (int64_t n = 0; n < s.n; ++n) {
            state_row[n] = keep * state_row[n] + dt[r] * x[r * s.p + p] * B[q + n];
            sum += state_row[n] * C[q + n];
          }
          y.data<double>()[r * s.p + p] = sum;
        }
      }
  return {Variable(y), Variable(state)};
}

// The masked attention form (Dao & Gu 2024, section 4): y_i = sum_j (C_i . B_j) e^{a_{j+1} + ... + a_i} dt_j x_j + D x_i.
Tensor quadratic(const Vars& in, const Tensor& segments) {
  const Sizes s(in[0].data(), in[3].data());
  const double *x = in[0].data().data<double>(), *dt = in[1].data().data<double>(), *a = in[2].data().data<double>();
  const double *B = in[3].data().data<double>(), *C = in[4].data().data<double>(), *D = in[5].data().data<double>();
  Tensor y = zeros_like(in[0].data());
  for (int64_t b = 0; b < s.b; ++b)
    for (int64_t h = 0; h < s.h; ++h)
      for (int64_t i = 0; i < s.l; ++i) {
        const auto at = [&](int64_t t) { return (b * s.l + t) * s.h + h; };
        double* out = y.data<double>() + at(i) * s.p;
        for (int64_t p = 0; p < s.p; ++p) out[p] = D[in[5].ndim() == 2 ? h * s.p + p : h] * x[at(i) * s.p + p];
        double sum = 0;
        for (int64_t j = i; j >= 0; --j) {
          if (segments.defined() && segments.data<int32_t>()[b * s.l + j] != segments.data<int32_t>()[b * s.l + i]) break;
          double product = 0;
          for (int64_t n = 0; n < s.n; ++n)
            product += C[((b * s.l + i) * s.g + h / (s.h / s.g)) * s.n + n] *
                       B[((b * s.l + j) * s.g + h / (s.h / s.g)) * s.n + n];
          const double w = product * std::exp(sum) * dt[at(j)];
          for (int64_t p = 0; p < s.p; ++p) out[p] += w * x[at(j) * s.p + p];
          sum += a[at(j)];
        }
      }
  return y;
}

// Decays, time steps, D and states are fp32 whatever the rest is.
Vars with_sums(const Vars& in) {
  const DType sums = accum_dtype(in[0].dtype());
  return {in[0], cast(in[1], sums), cast(in[2], sums), in[3], in[4], cast(in[5], sums), cast(in[6], sums)};
}

OpCase case_of(const std::string& name, int64_t chunk, bool segments, std::vector<std::vector<Shape>> shapes) {
  const auto ids = [segments](const Variable& x) {
    return segments ? documents(x.size(0), x.size(1)).to(x.device()) : Tensor();
  };
  return {.name = name,
          .run =
              [=](const Vars& raw) {
                const Vars in = with_sums(raw);
                const SsdOut out = ssd(in[0], in[1], in[2], in[3], in[4], in[5], in[6], {chunk, ids(in[0])});
                return Vars{out.y, out.final_state};
              },
          .reference = [=](const Vars& in) { return recurrent(in, ids(in[0])); },
          .shapes = std::move(shapes),
          .tolerance = {{f32, 2e-5}, {bf16_type, 2e-2}},
          .fills = {{1, Uniform{0.05, 1}}, {2, Uniform{-1.5, -0.01}}}};
}

std::vector<Shape> shapes_of(int64_t b, int64_t l, int64_t h, int64_t p, int64_t g, int64_t n, bool wide_D = false) {
  return {{b, l, h, p}, {b, l, h}, {b, l, h}, {b, l, g, n}, {b, l, g, n}, wide_D ? Shape{h, p} : Shape{h}, {b, h, p, n}};
}

// e^{a_1 + ... + a_q} is far below what fp32 holds.
OpCase fast_decays(double slow, double fast) {
  OpCase c = case_of("ssd, fast decays", 64, true, {shapes_of(2, 70, 3, 4, 1, 3), shapes_of(1, 200, 2, 3, 1, 2)});
  c.fills[2] = Uniform{-fast, -slow};
  return c;
}

const std::vector<OpCase>& cases() {
  static const std::vector<OpCase> all{
      case_of("ssd", 16, false,
              {shapes_of(2, 37, 4, 5, 2, 7), shapes_of(1, 1, 2, 4, 1, 3), shapes_of(1, 16, 3, 8, 3, 16, true),
               shapes_of(0, 9, 2, 4, 1, 4), shapes_of(2, 0, 2, 4, 1, 4), shapes_of(2, 33, 1, 1, 1, 1)}),
      case_of("ssd with documents", 16, true, {shapes_of(2, 50, 4, 5, 2, 7), shapes_of(1, 1, 2, 4, 1, 3)}),
      case_of("ssd, wide", 64, true, {shapes_of(1, 150, 2, 64, 1, 128), shapes_of(2, 131, 2, 72, 1, 40, true)}),
      case_of("ssd, one position per chunk", 1, true, {shapes_of(1, 9, 2, 4, 1, 4)}),
      // The CPU's pieces of a sequence and blocks of heads.
      case_of("ssd, pieces", 64, true, {shapes_of(1, 300, 2, 3, 1, 2), shapes_of(1, 140, 3, 130, 1, 3)}),
      // Chunks of two or three positions on the CPU, and such that almost all reach its 32.
      fast_decays(0.01, 40), fast_decays(1.1, 1.3)};
  return all;
}
// Nothing before the sequence and no gradient of what is behind it: on the CPU one square, where the sequence is short.
OpCase square_case(const std::string& name, bool segments, std::vector<std::vector<Shape>> shapes) {
  for (std::vector<Shape>& s : shapes) s.pop_back();
  const auto whole = [](const Vars& in) {
    Vars all = in;
    all.emplace_back(zeros({in[0].size(0), in[0].size(2), in[0].size(3), in[3].size(3)}, accum_dtype(in[0].dtype()), in[0].device()));
    return all;
  };
  OpCase c = case_of(name, 64, segments, {});
  c.shapes = std::move(shapes);
  c.run = [=](const Vars& raw) {
    const Vars in = with_sums(whole(raw));
    const Tensor ids = segments ? documents(in[0].size(0), in[0].size(1)).to(in[0].device()) : Tensor();
    return Vars{ssd(in[0], in[1], in[2], in[3], in[4], in[5], {}, {64, ids}).y};
  };
  c.reference = [=](const Vars& in) {
    return Vars{recurrent(whole(in), segments ? documents(in[0].size(0), in[0].size(1)) : Tensor())[0]};
  };
  return c;
}
const std::vector<OpCase>& square_cases() {
  static const std::vector<OpCase> all = [] {
    std::vector<OpCase> cases;
    for (const bool segments : {false, true})
      cases.push_back(square_case("ssd, one square", segments,
                                  {shapes_of(2, 37, 4, 5, 2, 20), shapes_of(1, 70, 3, 130, 1, 35), shapes_of(3, 33, 2, 4, 1, 17, true)}));
    // Chunks of two or three positions, and such that almost all reach 32.
    for (const auto& [slow, fast] : {std::pair{0.01, 40.0}, std::pair{1.1, 1.3}}) {
      cases.push_back(square_case("ssd, one square, fast decays", true, {shapes_of(2, 75, 3, 4, 1, 40)}));
      cases.back().fills[2] = Uniform{-fast, -slow};
    }
    return cases;
  }();
  return all;
}
// Tiles of the GPU's kernels: several per chunk, several per head and state.
const std::vector<OpCase>& large_cases() {
  static const std::vector<OpCase> all{case_of("ssd, long chunks", 256, false,
                                               {shapes_of(1, 600, 2, 64, 1, 128), shapes_of(1, 300, 4, 32, 2, 64)}),
                                       case_of("ssd, long chunks, documents", 200, true,
                                               {shapes_of(2, 333, 2, 136, 1, 200), shapes_of(1, 290, 3, 48, 1, 16, true)}),
                                       // Seven heads: blocks of three, three and one. Eleven chunks: cut in pieces.
                                       case_of("ssd, heads in bundles, length in pieces", 256, true,
                                               {shapes_of(1, 700, 7, 64, 1, 128), shapes_of(2, 515, 8, 40, 2, 24, true),
                                                shapes_of(3, 64, 3, 64, 3, 64)})};
  return all;
}

}  // namespace

TEST_CASE("ssd matches the plain recurrence") {
  for (const OpCase& c : cases()) check_reference(c);
  for (const OpCase& c : large_cases()) check_reference(c);
  for (const OpCase& c : square_cases()) check_reference(c);
}
TEST_CASE("ssd passes gradcheck") {
  for (const OpCase& c : cases()) check_grad(c);
  for (const OpCase& c : square_cases()) check_grad(c);
}
TEST_CASE("ssd: cuda equals cpu", "[cuda]") {
  for (const OpCase& c : cases()) check_twin(c);
  for (const OpCase& c : large_cases()) check_twin(c);
}

namespace {

Vars random_inputs(const std::vector<Shape>& shapes, uint64_t seed) {
  Vars in;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const Fill fill = i == 1 ? Fill(Uniform{0.05, 1}) : i == 2 ? Fill(Uniform{-1.5, -0.01}) : Fill(Normal{});
    in.emplace_back(random_tensor(shapes[i], fill, seed + i), true);
  }
  return in;
}

struct Run { std::vector<Tensor> values; };
Run run_chunk(const Vars& from, int64_t chunk, const Tensor& segments) {
  Vars in;
  for (const Variable& v : from) in.emplace_back(v.data(), true);
  const SsdOut out = ssd(in[0], in[1], in[2], in[3], in[4], in[5], in[6], {chunk, segments});
  backward(Vars{out.y, out.final_state}, {random_tensor(out.y.shape(), Normal{}, 91),
                                          random_tensor(out.final_state.shape(), Normal{}, 92)});
  Run r{{out.y.data(), out.final_state.data()}};
  for (const Variable& v : in) r.values.push_back(v.grad());
  return r;
}

}  // namespace

TEST_CASE("every chunk length gives the recurrence, outputs and gradients alike, with and without documents") {
  const Vars in = random_inputs(shapes_of(2, 77, 4, 6, 2, 5), 3);
  for (const Tensor& segments : {Tensor(), documents(2, 77)}) {
    const Run first = run_chunk(in, 1, segments);
    const Vars expected = recurrent(in, segments);
    CHECK(relative_error(first.values[0], expected[0].data()) < 1e-13);
    CHECK(relative_error(first.values[1], expected[1].data()) < 1e-13);
    for (const int64_t chunk : {4, 16, 64, 1000}) {
      INFO(chunk);
      const Run r = run_chunk(in, chunk, segments);
      for (size_t i = 0; i < r.values.size(); ++i) CHECK(relative_error(r.values[i], first.values[i]) < 1e-12);
    }
  }
}

TEST_CASE("a short sequence as one square equals the chunks, outputs, final state and gradients") {
  for (const bool carried : {false, true})
    for (const int64_t l : {45, 97, 128}) {
      const Vars in = random_inputs(shapes_of(2, l, 5, 6, 1, 64, true), 4);
      for (const Tensor& segments : {Tensor(), documents(2, l)}) {
        const auto run = [&](int64_t chunk) {
          Vars leaves;
          for (size_t i = 0; i < 6; ++i) leaves.emplace_back(in[i].data(), true);
          const SsdOut out = ssd(leaves[0], leaves[1], leaves[2], leaves[3], leaves[4], leaves[5], {}, {chunk, segments});
          Vars results{out.y};
          std::vector<Tensor> up{random_tensor(out.y.shape(), Normal{}, 91)};
          if (carried) {
            results.push_back(out.final_state);
            up.push_back(random_tensor(out.final_state.shape(), Normal{}, 92));
          }
          backward(results, up);
          std::vector<Tensor> values{out.y.data(), out.final_state.data()};
          for (const Variable& v : leaves) values.push_back(v.grad());
          return values;
        };
        const auto chunked = run(16), square = run(1000);
        for (size_t i = 0; i < square.size(); ++i) CHECK(relative_error(square[i], chunked[i]) < 1e-12);
      }
    }
}

TEST_CASE("the quadratic form equals the chunked one") {
  Vars in = random_inputs(shapes_of(2, 45, 4, 6, 2, 5), 5);
  in[6] = Variable(zeros(in[6].shape(), DType::f64, kCpu));
  for (const Tensor& segments : {Tensor(), documents(2, 45)})
    CHECK(relative_error(run_chunk(in, 16, segments).values[0], quadratic(in, segments)) < 1e-12);
}

TEST_CASE("single steps give the outputs and the state of the chunked form") {
  for (const DType dtype : {DType::f64, DType::f32}) {
    const Vars in = random_inputs(shapes_of(2, 19, 4, 6, 2, 5), 7);
    const auto get = [&](size_t i) { return in[i].data().to(dtype); };
    const auto whole = kernels::ssd_forward({get(0), get(1), get(2), get(3), get(4), get(5), get(6), {}, 8});
    Tensor state = get(6).clone();
    for (int64_t t = 0; t < 19; ++t) {
      const auto at = [&](size_t i) { return get(i).select(1, t); };
      const Tensor y = kernels::ssd_step(state, at(0), at(1), at(2), at(3), at(4), get(5));
      CHECK(relative_error(y, whole.y.select(1, t)) < (dtype == DType::f64 ? 1e-13 : 1e-5));
    }
    CHECK(relative_error(state, whole.final_state) < (dtype == DType::f64 ? 1e-13 : 1e-5));
  }
}

TEST_CASE("single steps on cuda give those on the cpu", "[cuda]") {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    const DType sums = accum_dtype(dtype);
    const auto make = [&](const Shape& s, DType d, uint64_t seed, const Fill& f = Normal{}) { return random_tensor(s, f, seed).to(d); };
    const Tensor x = make({3, 4, 70}, dtype, 1), dt = make({3, 4}, sums, 2, Uniform{0, 1}), a = make({3, 4}, sums, 3, Uniform{-2, 0});
    const Tensor B = make({3, 2, 33}, dtype, 4), C = make({3, 2, 33}, dtype, 5), D = make({4}, sums, 6);
    Tensor state = make({3, 4, 70, 33}, sums, 7), there = state.to(cuda_device());
    const auto dev = [](const Tensor& t) { return t.to(cuda_device()); };
    const Tensor y = kernels::ssd_step(state, x, dt, a, B, C, D);
    const Tensor z = kernels::ssd_step(there, dev(x), dev(dt), dev(a), dev(B), dev(C), dev(D));
    const double tolerance = dtype == DType::f64 ? 1e-12 : dtype == DType::f32 ? 1e-5 : 1e-2;
    CHECK(relative_error(z, y) < tolerance);
    CHECK(relative_error(there, state) < tolerance);
  }
}

TEST_CASE("ssd_scan is the same recurrence without dt and D") {
  const Vars in = random_inputs(shapes_of(2, 21, 4, 6, 2, 5), 9);
  const SsdOut scan = ssd_scan(in[0], in[2], in[3], in[4], 8, in[6], documents(2, 21));
  Vars plain = in;
  plain[1] = Variable(ones(in[1].shape(), DType::f64, kCpu));
  plain[5] = Variable(zeros(in[5].shape(), DType::f64, kCpu));
  const Vars expected = recurrent(plain, documents(2, 21));
  CHECK(relative_error(scan.y.data(), expected[0].data()) < 1e-13);
  CHECK(relative_error(scan.final_state.data(), expected[1].data()) < 1e-13);
  backward(scan.final_state, random_tensor(scan.final_state.shape(), Normal{}, 1));
  CHECK(in[0].grad().defined());
  CHECK(!in[1].grad().defined());
}

TEST_CASE("ssd_packed equals ssd on the pieces, outputs and gradients") {
  const int64_t b = 2, l = 21, h = 4, p = 6, g = 2, n = 5;
  const Vars in = random_inputs(shapes_of(b, l, h, p, g, n), 11);
  const Variable xbc(random_tensor({b, l, h * p + 2 * g * n}, Normal{}, 12), true);
  const Variable apart(xbc.data(), true);
  const Vars parts = split(apart, {h * p, g * n, g * n}, 2);
  const SsdOut one = ssd_packed(xbc, in[1], in[2], in[5], in[6], {h, g, n}, {8, documents(b, l)});
  const SsdOut two = ssd(reshape(parts[0], {b, l, h, p}), in[1], in[2], reshape(parts[1], {b, l, g, n}),
                         reshape(parts[2], {b, l, g, n}), in[5], in[6], {8, documents(b, l)});
  CHECK(relative_error(one.y.data(), two.y.data().view(one.y.shape())) < 1e-14);
  const Tensor dy = random_tensor(one.y.shape(), Normal{}, 13);
  backward(one.y, dy);
  backward(two.y, dy.view(two.y.shape()));
  CHECK(relative_error(xbc.grad(), apart.grad()) < 1e-14);
}

TEST_CASE("ssd_time_step passes gradcheck; a clamp stops the gradient") {
  const auto at = [](double low, double high) {
    return OpCase{.name = "ssd_time_step",
                  .run =
                      [=](const Vars& in) {
                        const SsdTimeStep s = ssd_time_step(in[0], in[1], in[2], low, high);
                        return Vars{s.dt, s.a};
                      },
                  .reference = {},
                  .shapes = {{{2, 5, 3}, {3}, {3}}}};
  };
  check_grad(at(0, INFINITY));
  const Variable dt(full({1, 1, 2}, 5.0, DType::f32, kCpu), true), bias(zeros({2}, DType::f32, kCpu)),
      A_log(zeros({2}, DType::f32, kCpu));
  const SsdTimeStep s = ssd_time_step(dt, bias, A_log, 0, 0.1);
  CHECK(s.dt.data().to_vector<float>() == std::vector<float>{0.1F, 0.1F});
  CHECK(s.a.data().to_vector<float>() == std::vector<float>{-0.1F, -0.1F});
  backward(s.dt, ones({1, 1, 2}, DType::f32, kCpu));
  CHECK(dt.grad().to_vector<float>() == std::vector<float>{0.0F, 0.0F});
}

TEST_CASE("ssd says what does not fit") {
  const auto t = [](const Shape& s, DType d = DType::f32) { return Variable(zeros(s, d, kCpu)); };
  const Variable x = t({2, 5, 4, 3}), a = t({2, 5, 4}), B = t({2, 5, 2, 7});
  CHECK(contains(error_of([&] { ssd_scan(x, t({2, 5, 3}), B, B, 8); }), "ssd: a is"));
  CHECK(contains(error_of([&] { ssd_scan(x, a, t({2, 5, 3, 7}), t({2, 5, 3, 7}), 8); }), "groups that divide the 4 heads"));
  CHECK(contains(error_of([&] { ssd_scan(x, a, B, t({2, 5, 2, 6}), 8); }), "C is (2, 5, 2, 6), B is (2, 5, 2, 7)"));
  CHECK(contains(error_of([&] { ssd_scan(x, a, B, B, 0); }), "chunk length is 0, expected at least 1"));
  CHECK(contains(error_of([&] { ssd_scan(x, a, B, B, 8, t({2, 4, 7, 3})); }), "the initial state is"));
  CHECK(contains(error_of([&] { ssd_scan(t({2, 5, 4, 3}, DType::bf16), t({2, 5, 4}, DType::bf16), B, B, 8); }),
                 "expected float32 (2, 5, 4)"));
}
