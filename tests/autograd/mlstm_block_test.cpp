#include "autograd/mlstm_block.h"

#include <cmath>

#include "autograd/causal_conv1d.h"
#include "autograd/mlstm.h"
#include "autograd/shape.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

constexpr double kEps = 1e-3;

// y (rows, e) of blocks of 4 x 4.
Tensor mapped(const Tensor& x_in, const Tensor& w_in) {
  const Tensor x = x_in.contiguous(), w = w_in.contiguous();
  Tensor y = zeros(x.shape(), DType::f64, kCpu);
  const int64_t e = x.size(-1), rows = x.numel() / e;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < e; ++c)
      for (int64_t i = 0; i < 4; ++i)
        y.data<double>()[r * e + c] += w.data<double>()[c * 4 + i] * x.data<double>()[r * e + c / 4 * 4 + i];
  return y;
}

std::vector<Shape> map_shapes(int64_t b, int64_t l, int64_t e, int64_t gates) {
  return {{b, l, e}, {b, l, e}, {e / 4, 4, 4}, {e / 4, 4, 4}, {e / 4, 4, 4}, {gates, 3 * e}};
}

const OpCase kMaps{.name = "mlstm_maps",
                   .run =
                       [](const Vars& in) {
                         const MlstmMapped out = mlstm_maps(in[0], in[1], in[2], in[3], in[4], in[5]);
                         return Vars{out.q, out.k, out.v, out.gates, out.x_c};
                       },
                   .reference =
                       [](const Vars& in) {
                         const Tensor parts[3] = {mapped(in[0].data(), in[2].data()), mapped(in[0].data(), in[3].data()),
                                                  mapped(in[1].data(), in[4].data())};
                         const Tensor g = in[5].data().contiguous();
                         const int64_t e = in[0].size(-1), n = g.size(0), rows = parts[0].numel() / e;
                         Tensor gates = zeros(in[0].shape().with(-1, n), DType::f64, kCpu);
                         for (int64_t r = 0; r < rows; ++r)
                           for (int64_t k = 0; k < n; ++k)
                             for (int64_t p = 0; p < 3; ++p)
                               for (int64_t c = 0; c < e; ++c)
                                 gates.data<double>()[r * n + k] +=
                                     g.data<double>()[(k * 3 + p) * e + c] * parts[p].data<double>()[r * e + c];
                         return Vars{Variable(parts[0]), Variable(parts[1]), Variable(parts[2]), Variable(gates),
                                     in[0].detach()};
                       },
                   .shapes = {map_shapes(1, 1, 4, 8), map_shapes(2, 3, 24, 8), map_shapes(3, 100, 12, 8),
                              map_shapes(1, 5, 532, 8), map_shapes(1, 37, 32, 8), map_shapes(2, 50, 288, 8), map_shapes(2, 3, 8, 3), map_shapes(0, 2, 8, 8)},
                   .tolerance = {{DType::f32, 2e-5}, {DType::bf16, 2e-2}},
                   .fills = {{5, Normal{0, 0.3}}}};

// [x_m; z] (b, l, 2 e), the filters, the state before them, the maps.
std::vector<Shape> convolved_shapes(int64_t b, int64_t l, int64_t e, int64_t gates) {
  return {{b, l, 2 * e}, {e, 4}, {e}, {b, 3, e}, {e / 4, 4, 4}, {e / 4, 4, 4}, {e / 4, 4, 4}, {gates, 3 * e}};
}

const OpCase kConvolved{.name = "mlstm_conv_maps",
                        .run =
                            [](const Vars& in) {
                              const MlstmHalves up = mlstm_halves(in[0]);
                              const MlstmConvolved out =
                                  mlstm_conv_maps(up, in[1], in[2], in[3], {}, in[4], in[5], in[6], in[7]);
                              const MlstmMapped& m = out.maps;
                              return Vars{m.q, m.k, m.v, m.gates, m.x_c, out.final_state, up.z};
                            },
                        .reference =
                            [](const Vars& in) {
                              const Vars h = chunk(in[0], 2, -1);
                              const ConvOut conv = causal_conv1d(h[0], in[1], in[2], in[3], true);
                              const MlstmMapped m = mlstm_maps(conv.y, h[0], in[4], in[5], in[6], in[7]);
                              return Vars{m.q, m.k, m.v, m.gates, m.x_c, conv.final_state, h[1]};
                            },
                        .shapes = {convolved_shapes(1, 1, 4, 8), convolved_shapes(2, 5, 24, 8), convolved_shapes(2, 40, 32, 8),
                                   convolved_shapes(1, 70, 96, 8), convolved_shapes(1, 4, 8, 3), convolved_shapes(0, 2, 8, 8)},
                        .tolerance = {{DType::f32, 2e-5}, {DType::bf16, 3e-2}},
                        .fills = {{7, Normal{0, 0.3}}}};

// Without a state before it: in one pass.
OpCase convolved_from_zero() {
  OpCase c = kConvolved;
  c.name += " from zero";
  const auto inputs = [](const Vars& in) {
    Vars all = in;
    all.insert(all.begin() + 3, Variable());
    return all;
  };
  c.run = [inputs](const Vars& in) { return kConvolved.run(inputs(in)); };
  c.reference = [inputs](const Vars& in) { return kConvolved.reference(inputs(in)); };
  c.shapes.push_back(convolved_shapes(3, 21, 64, 8));
  for (auto& shapes : c.shapes) shapes.erase(shapes.begin() + 3);
  c.fills = {{6, Normal{0, 0.3}}};
  return c;
}

std::vector<Shape> output_shapes(int64_t b, int64_t l, int64_t heads, int64_t p) {
  return {{b, l, heads, p}, {heads * p}, {heads * p}, {b, l, heads * p}, {b, l, heads * p}};
}

// h and w are in the dtype of sums.
const OpCase kOutput{.name = "mlstm_output",
                     .run =
                         [](const Vars& in) {
                           const DType a = accum_dtype(in[3].dtype());
                           return mlstm_output(cast(in[0], a), cast(in[1], a), in[2], in[3], in[4], kEps);
                         },
                     .reference =
                         [](const Vars& in) {
                           const Tensor h = in[0].data().contiguous(), w = in[1].data().contiguous(),
                                        skip = in[2].data().contiguous(), x = in[3].data().contiguous(),
                                        z = in[4].data().contiguous();
                           const int64_t p = h.size(-1), e = w.numel(), n = h.numel() / p;
                           Tensor y = empty_like(x);
                           for (int64_t i = 0; i < n; ++i) {
                             const double* v = h.data<double>() + i * p;
                             double mean = 0, variance = 0;
                             for (int64_t j = 0; j < p; ++j) mean += v[j] / static_cast<double>(p);
                             for (int64_t j = 0; j < p; ++j)
                               variance += (v[j] - mean) * (v[j] - mean) / static_cast<double>(p);
                             for (int64_t j = 0; j < p; ++j) {
                               const int64_t at = i * p + j, c = at % e;
                               const double gate = z.data<double>()[at];
                               y.data<double>()[at] = ((v[j] - mean) / std::sqrt(variance + kEps) * w.data<double>()[c] +
                                                       skip.data<double>()[c] * x.data<double>()[at]) *
                                                      gate / (1 + std::exp(-gate));
                             }
                           }
                           return Variable(y);
                         },
                     .shapes = {output_shapes(1, 1, 1, 1), output_shapes(2, 3, 4, 16), output_shapes(1, 7, 3, 5),
                                output_shapes(2, 150, 2, 12), output_shapes(2, 2, 4, 132), output_shapes(1, 3, 1, 384),
                                output_shapes(1, 2, 2, 700), output_shapes(1, 2, 1, 1028), output_shapes(0, 2, 2, 8)},
                     .inputs = {Normal{}, Normal{.mean = 3}, Constant{0}},
                     .tolerance = {{DType::f32, 2e-5}, {DType::bf16, 2e-2}}};

// Three results with gradients of their own.
const OpCase kHalves{.name = "mlstm_halves",
                     .run =
                         [](const Vars& in) {
                           const MlstmHalves h = mlstm_halves(in[0]);
                           return Vars{h.x_m, h.x_m_again, h.z};
                         },
                     .reference =
                         [](const Vars& in) {
                           const Vars h = chunk(in[0], 2, -1);
                           return Vars{h[0], h[0], h[1]};
                         },
                     .shapes = {{{1, 2}}, {{2, 3, 10}}, {{5, 48}}, {{3, 70, 16}}, {{0, 4}}}};

// The cell and its output: between them h may be rounded, and its gradient is.
std::vector<Shape> cell_shapes(int64_t b, int64_t l, int64_t heads, int64_t p) {
  const Shape head{b, l, heads, p}, gate{b, l, heads}, channels{heads * p}, row{b, l, heads * p};
  return {head, head, head, gate, gate, channels, channels, row, row};
}

const OpCase kCell{.name = "mlstm with its output",
                   .run =
                       [](const Vars& in) {
                         const DType a = accum_dtype(in[0].dtype());
                         return mlstm(in[0], in[1], in[2], cast(in[3], a), cast(in[4], a), {}, {}, {}, {},
                                      {cast(in[5], a), in[6], in[7], in[8], kEps, nullptr}).h;
                       },
                   .reference =
                       [](const Vars& in) {
                         return mlstm_output(mlstm(in[0], in[1], in[2], in[3], in[4]).h, in[5], in[6], in[7], in[8], kEps);
                       },
                   // A single position would leave rounding errors alone: dh . h = 0 is all that its q, k and i see.
                   .shapes = {cell_shapes(2, 9, 2, 8), cell_shapes(1, 5, 1, 192), cell_shapes(1, 70, 2, 12)},
                   .tolerance = {{DType::f32, 5e-5}, {DType::bf16, 4e-2}},
                   .fills = {{4, Normal{.mean = 3}}},
                   .grad_tolerance = 3e-6};

}  // namespace

TEST_CASE("an mLSTM cell with its output matches both apart") { check_reference(kCell); }
TEST_CASE("an mLSTM cell with its output: cuda equals cpu", "[cuda]") {
  OpCase c = kCell;
  c.shapes.push_back(cell_shapes(1, 290, 2, 192));
  c.shapes.push_back(cell_shapes(1, 300, 1, 384));
  c.shapes.push_back(cell_shapes(2, 130, 2, 64));
  check_twin(c);
}

TEST_CASE("halves with two readers of the first: gradients are added") {
  check_reference(kHalves);
  check_grad(kHalves);
}
TEST_CASE("halves with two readers of the first: cuda equals cpu", "[cuda]") { check_twin(kHalves); }

TEST_CASE("the maps of an mLSTM block match plain loops") { check_reference(kMaps); }
TEST_CASE("the maps of an mLSTM block pass gradcheck") { check_grad(kMaps); }
TEST_CASE("the maps of an mLSTM block: cuda equals cpu", "[cuda]") { check_twin(kMaps); }

TEST_CASE("convolution and maps of an mLSTM block match the functions apart") {
  check_reference(kConvolved);
  check_reference(convolved_from_zero());
}
TEST_CASE("convolution and maps of an mLSTM block pass gradcheck") {
  check_grad(kConvolved);
  check_grad(convolved_from_zero());
}
TEST_CASE("convolution and maps of an mLSTM block: cuda equals cpu", "[cuda]") {
  check_twin(kConvolved);
  check_twin(convolved_from_zero());
}

// With both gradients made where they belong, as in the layer, and a reader of x_m before the convolution.
TEST_CASE("the gradient of an mLSTM projection is the same made in place and joined") {
  const int64_t b = 2, l = 9, e = 24;
  std::vector<Shape> shapes = convolved_shapes(b, l, e, 8);
  const auto gradient = [&](bool in_place, bool reads_more) {
    Vars in;
    for (size_t i = 0; i < shapes.size(); ++i) in.emplace_back(random_tensor(shapes[i], Normal{}, i + 1, DType::f64), i == 0);
    const Vars w{Variable(random_tensor({e}, Normal{}, 20, DType::f64)), Variable(random_tensor({e}, Normal{}, 21, DType::f64))};
    const MlstmHalves up = mlstm_halves(in[0]);
    const MlstmConvolved c = mlstm_conv_maps(up, in[1], in[2], in[3], {}, in[4], in[5], in[6], in[7]);
    const auto heads = [&](const Variable& x) { return reshape(x, {b, l, 4, e / 4}); };
    const Vars g = chunk(c.maps.gates, 2, -1);
    const MlstmResult out = mlstm(heads(c.maps.q), heads(c.maps.k), heads(c.maps.v), g[0], g[1], {}, {}, {}, {},
                                  {w[0], w[1], c.maps.x_c, up.z, kEps, in_place ? up.gradient : nullptr});
    Vars ends{out.h};
    std::vector<Tensor> seeds{random_tensor(out.h.shape(), Normal{}, 30, DType::f64)};
    if (reads_more) {
      ends.push_back(up.x_m);
      seeds.push_back(random_tensor(up.x_m.shape(), Normal{}, 31, DType::f64));
    }
    backward(ends, seeds);
    return in[0].grad();
  };
  for (const bool more : {false, true}) CHECK(relative_error(gradient(true, more), gradient(false, more)) < 1e-12);
}

TEST_CASE("the output of an mLSTM block matches plain loops") { check_reference(kOutput); }
TEST_CASE("the output of an mLSTM block passes gradcheck") { check_grad(kOutput); }
TEST_CASE("the output of an mLSTM block: cuda equals cpu", "[cuda]") { check_twin(kOutput); }

TEST_CASE("the maps of an mLSTM block add into the buffers of bf16 weights") {
  const int64_t e = 12;
  const auto make = [](const Shape& s, uint64_t seed) { return random_tensor(s, Normal{}, seed, DType::bf16); };
  const std::vector<Shape> shapes = map_shapes(1, 300, e, 8);
  Vars rough, exact;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const Tensor t = make(shapes[i], i + 1);
    rough.emplace_back(t, i >= 2);
    exact.emplace_back(t.to(DType::f64), i >= 2);
    if (i >= 2) rough.back().set_grad(zeros(shapes[i], DType::f32, kCpu));
  }
  const Tensor seed = make({1, 300, e}, 9);
  for (int i = 0; i < 2; ++i) {
    const auto loss = [](const Vars& v) { return mlstm_maps(v[0], v[1], v[2], v[3], v[4], v[5]); };
    backward(loss(rough).q, seed);
    backward(loss(exact).q, seed.to(DType::f64));
  }
  CHECK(relative_error(rough[2].grad(), exact[2].grad()) < 1e-5);
}
