#include <cmath>
#include <cstring>

#include "autograd/attention.h"
#include "core/random.h"
#include "tests/testing/op_case.h"

namespace krait {
namespace {

constexpr uint64_t kKey = 0x123456789ABCDEF1u;
constexpr int64_t kStep = 5;

Tensor step_on(Device device) { return from_vector<int64_t>({kStep}).view({}).to(device); }

AttentionOptions with_dropout(double p, int64_t batch_offset = 0, Device device = kCpu) {
  AttentionOptions o;
  o.dropout = {p, kKey, step_on(device), batch_offset};
  return o;
}

// m of kernels/attention.h, from the definition of the stream of random numbers.
double multiplier(const AttentionOptions& options, int64_t b, int64_t h, int64_t i, int64_t j, const Shape& q, int64_t lk) {
  const double p = options.dropout.p;
  if (p == 0) return 1;
  const int64_t pitch = (lk + 3) / 4 * 4;
  const int64_t e = (((b + options.dropout.offset) * q[2] + h) * q[1] + i) * pitch + j;
  const Philox r = philox(kKey, static_cast<uint64_t>(e / 4), kStep);
  return static_cast<double>(r.word[e % 4] >> 8) / 16777216.0 < p ? 0 : 1 / (1 - p);
}

struct Reference {
  Tensor o, lse, dq, dk, dv;

  // The definition and its derivative with whole matrices P, row by row, in fp64.
  Reference(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& do_in,
            const AttentionOptions& options) {
    const int64_t b = q_in.size(0), lq = q_in.size(1), hq = q_in.size(2), d = q_in.size(3), lk = k_in.size(1);
    const int64_t hkv = k_in.size(2), group = hq / hkv;
    const auto q = q_in.to_vector<double>(), k = k_in.to_vector<double>(), v = v_in.to_vector<double>();
    const auto g = do_in.to_vector<double>();
    const double scale = 1 / std::sqrt(static_cast<double>(d));
    std::vector<double> out(q.size()), gq(q.size()), gk(k.size()), gv(k.size());
    std::vector<double> logs(static_cast<size_t>(b * hq * lq), -INFINITY);
    const auto n = static_cast<size_t>(lk), width = static_cast<size_t>(d);
    for (int64_t ib = 0; ib < b; ++ib)
      for (int64_t h = 0; h < hq; ++h)
        for (int64_t i = 0; i < lq; ++i) {
          const size_t qi = static_cast<size_t>(((ib * lq + i) * hq + h) * d);
          const auto kj = [&](size_t j) {
            return static_cast<size_t>(((ib * lk + static_cast<int64_t>(j)) * hkv + h / group) * d);
          };
          std::vector<double> p(n), m(n), dp(n);
          double sum = 0;
          for (size_t j = 0; j < n; ++j) {
            const auto key = static_cast<int64_t>(j), at = lk - lq + i;
            if (options.causal && (key > at || (options.window > 0 && key <= at - options.window))) continue;
            double s = 0;
            for (size_t c = 0; c < width; ++c) s += q[qi + c] * k[kj(j) + c];
            sum += p[j] = std::exp(s * scale);
            m[j] = multiplier(options, ib, h, i, key, q_in.shape(), lk);
          }
          if (sum == 0) continue;
          logs[static_cast<size_t>((ib * hq + h) * lq + i)] = std::log(sum);
          double total = 0;  // sum_j P dP, which must be do . o
          for (size_t j = 0; j < n; ++j) {
            p[j] /= sum;
            for (size_t c = 0; c < width; ++c) {
              out[qi + c] += m[j] * p[j] * v[kj(j) + c];
              gv[kj(j) + c] += m[j] * p[j] * g[qi + c];
              dp[j] += m[j] * g[qi + c] * v[kj(j) + c];
            }
            total += p[j] * dp[j];
          }
          for (size_t j = 0; j < n; ++j)
            for (size_t c = 0; c < width; ++c) {
              gq[qi + c] += scale * p[j] * (dp[j] - total) * k[kj(j) + c];
              gk[kj(j) + c] += scale * p[j] * (dp[j] - total) * q[qi + c];
            }
        }
    o = from_vector(out, q_in.shape());
    lse = from_vector(logs, {b, hq, lq});
    dq = from_vector(gq, q_in.shape());
    dk = from_vector(gk, k_in.shape());
    dv = from_vector(gv, k_in.shape());
  }
};

struct Sizes { int64_t b, lq, lk, hq, hkv, d; };

void check_composed(const Sizes& n, const AttentionOptions& options) {
  INFO("b " << n.b << " lq " << n.lq << " lk " << n.lk << " heads " << n.hq << "/" << n.hkv << " d " << n.d);
  const Tensor q = random_tensor({n.b, n.lq, n.hq, n.d}, Normal{}, 1), k = random_tensor({n.b, n.lk, n.hkv, n.d}, Normal{}, 2);
  const Tensor v = random_tensor({n.b, n.lk, n.hkv, n.d}, Normal{}, 3), g = random_tensor(q.shape(), Normal{}, 4);
  const Reference expected(q, k, v, g, options);
  for (const auto& [dtype, tolerance] : {std::pair{f64, 1e-11}, std::pair{f32, 2e-5}}) {
    const Tensor x = q.to(dtype), y = k.to(dtype), z = v.to(dtype);
    const auto [o, lse] = kernels::attention_forward(x, y, z, options);
    const auto [dq, dk, dv] = kernels::attention_backward(g.to(dtype), x, y, z, o, lse, options);
    CHECK(relative_error(o, expected.o) < tolerance);
    CHECK(relative_error(lse, expected.lse) < tolerance);
    CHECK(relative_error(dq, expected.dq) < tolerance);
    CHECK(relative_error(dk, expected.dk) < tolerance);
    CHECK(relative_error(dv, expected.dv) < tolerance);
  }
}

const std::vector<Sizes> kSizes{{1, 1, 1, 1, 1, 1}, {2, 7, 7, 2, 2, 5},     {1, 2, 70, 4, 2, 8}, {1, 4, 4, 2, 1, 8},
                                {2, 131, 131, 4, 2, 12}, {16, 66, 66, 1, 1, 4}, {1, 9, 4, 2, 2, 4},  {3, 65, 130, 6, 2, 16}};

OpCase make_case(const std::string& name, AttentionOptions options) {
  OpCase c;
  c.name = "attention with dropout, " + name;
  c.run = [options](const Vars& in) {
    AttentionOptions o = options;
    o.dropout.step = step_on(in[0].device());
    if (o.q_segments.defined()) {  // three documents
      std::vector<int32_t> ids;
      for (int64_t i = 0; i < in[0].size(0) * in[0].size(1); ++i)
        ids.push_back(static_cast<int32_t>(3 * (i % in[0].size(1)) / in[0].size(1)));
      o.q_segments = from_vector(ids, {in[0].size(0), in[0].size(1)}).to(in[0].device());
    }
    if (o.alibi_slopes.defined()) o.alibi_slopes = kernels::alibi_slopes(in[0].size(2)).to(in[0].device());
    return attention(in[0], in[1], in[2], o);
  };
  for (const auto& [b, l, hq, hkv, d] : std::vector<std::array<int64_t, 5>>{
           {1, 1, 1, 1, 3}, {2, 7, 4, 2, 5}, {1, 2, 2, 1, 8}, {1, 67, 2, 1, 8}, {0, 4, 2, 2, 8}})
    c.shapes.push_back({{b, l, hq, d}, {b, l, hkv, d}, {b, l, hkv, d}});
  c.tolerance = {{f32, 1e-5}, {bf16_type, 2e-2}};
  return c;
}

std::vector<OpCase> cases() {
  AttentionOptions causal = with_dropout(0.3, 2), full = causal, window = causal, rest = causal;
  full.causal = false;
  window.window = 19;
  rest.q_segments = zeros({1, 1}, DType::i32, kCpu);
  rest.alibi_slopes = zeros({1}, f32, kCpu);
  return {make_case("causal", causal), make_case("both directions", full), make_case("window", window),
          make_case("documents and alibi", rest)};
}

bool same_bits(const Tensor& a, const Tensor& b) {
  const Tensor x = a.contiguous(), y = b.contiguous();
  return x.nbytes() == y.nbytes() && std::memcmp(x.raw_data(), y.raw_data(), static_cast<size_t>(x.nbytes())) == 0;
}

// Equal scores and v = 1 make o the mask: m[b, h, i, j] / lk at (b, i, h, j).
Tensor mask_of(const AttentionOptions& options, int64_t b, int64_t lq, int64_t h, int64_t lk) {
  std::vector<double> unit(static_cast<size_t>(lk * lk));
  for (int64_t j = 0; j < lk; ++j) unit[static_cast<size_t>(j * lk + j)] = 1;
  const Tensor q = zeros({b, lq, h, lk}, f32, kCpu), k = zeros({b, lk, h, lk}, f32, kCpu);
  const Tensor v = from_vector(unit, {1, lk, 1, lk}).to(f32).expand({b, lk, h, lk}).contiguous();
  return kernels::attention_forward(q, k, v, options).o;
}

TEST_CASE("attention with dropout equals the composed form and its gradients") {
  for (const Sizes& n : kSizes)
    for (const double p : {0.0, 0.1, 0.7}) {
      AttentionOptions options = with_dropout(p, 3);
      check_composed(n, options);
      options.window = 11;
      check_composed(n, options);
      options.window = 0;
      options.causal = false;
      check_composed(n, options);
    }
}

TEST_CASE("attention with dropout passes gradcheck") {
  for (const OpCase& c : cases()) check_grad(c);
}

TEST_CASE("attention with dropout: cuda equals cpu", "[cuda]") {
  for (OpCase c : cases()) {
    for (const auto& [b, l, hq, hkv, d] : std::vector<std::array<int64_t, 5>>{
             {2, 130, 4, 2, 64}, {1, 201, 2, 2, 128}, {1, 77, 2, 1, 96}, {2, 65, 3, 3, 32}, {1, 99, 2, 1, 40}, {1, 3, 4, 2, 64}})
      c.shapes.push_back({{b, l, hq, d}, {b, l, hkv, d}, {b, l, hkv, d}});
    // A query that sees a single key has a gradient of exactly zero: only rounding would be compared.
    const int64_t shortest = contains(c.name, "documents") ? 4 : 2;
    std::erase_if(c.shapes, [&](const std::vector<Shape>& shapes) {
      return shapes[0][1] > 0 && shapes[0][1] < shortest;
    });
    check_twin(c);
  }
}

TEST_CASE("dropout keeps the share of probabilities asked for") {
  const int64_t b = 2, lq = 500, h = 3, lk = 201;
  const double n = static_cast<double>(b * lq * h * lk);
  for (const double p : {0.1, 0.5, 0.9}) {
    AttentionOptions options = with_dropout(p);
    options.causal = false;
    double zero = 0, total = 0;
    for (const float x : mask_of(options, b, lq, h, lk).to_vector<float>()) {
      zero += x == 0;
      total += x * static_cast<double>(lk);
    }
    CHECK(std::abs(zero / n - p) < 4 * std::sqrt(p * (1 - p) / n));
    CHECK(total / n == Approx(1).margin(4 * std::sqrt(p / (1 - p) / n)));
  }
}

TEST_CASE("a sequence's dropped probabilities depend on its global index") {
  AttentionOptions options = with_dropout(0.5);
  options.causal = false;
  const Tensor whole = mask_of(options, 4, 9, 2, 21);
  CHECK(!same_bits(whole.slice(0, 0, 1), whole.slice(0, 1, 2)));
  options.dropout.offset = 2;
  CHECK(same_bits(mask_of(options, 2, 9, 2, 21), whole.slice(0, 2, 4)));
  options = with_dropout(0.5);
  options.causal = false;
  options.dropout.step = from_vector<int64_t>({kStep + 1}).view({});
  CHECK(!same_bits(mask_of(options, 4, 9, 2, 21), whole));
}

TEST_CASE("dropout of p = 0 changes no bit of attention") {
  for (const DType dtype : {f32, bf16_type}) {
    const Tensor q = random_tensor({2, 70, 4, 24}, Normal{}, 1, dtype), k = random_tensor({2, 70, 2, 24}, Normal{}, 2, dtype);
    AttentionOptions none = with_dropout(0);
    none.dropout.step = {};
    const auto a = kernels::attention_forward(q, k, k), b = kernels::attention_forward(q, k, k, none);
    CHECK(same_bits(a.o, b.o));
    CHECK(same_bits(a.lse, b.lse));
    const auto x = kernels::attention_backward(q, q, k, k, a.o, a.lse);
    const auto y = kernels::attention_backward(q, q, k, k, b.o, b.lse, none);
    CHECK(same_bits(x.dq, y.dq));
    CHECK(same_bits(x.dk, y.dk));
    CHECK(same_bits(x.dv, y.dv));
  }
}

TEST_CASE("attention refuses dropout without a step or outside [0, 1), and names it") {
  const Tensor q = zeros({1, 5, 2, 8}, f32, kCpu);
  AttentionOptions options = with_dropout(0.5);
  options.dropout.step = {};
  CHECK(contains(error_of([&] { kernels::attention_forward(q, q, q, options); }), "the step of dropout is undefined"));
  CHECK(contains(error_of([&] { kernels::attention_forward(q, q, q, with_dropout(1)); }), "p is 1, expected 0 <= p < 1"));
  CHECK(contains(kernels::attention_kernel_name(q, q, q, options), "dropout 0.5"));
}

}  // namespace
}  // namespace krait
