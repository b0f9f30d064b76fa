#include "autograd/attention.h"

#include <cmath>

#include "tests/testing/op_case.h"

namespace krait {
namespace {

// The definition, in loops over fp64.
Tensor reference(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  const int64_t b = q.size(0), lq = q.size(1), hq = q.size(2), d = q.size(3), lk = k.size(1), group = hq / k.size(2);
  const auto x = q.to_vector<double>(), y = k.to_vector<double>(), z = v.to_vector<double>();
  const auto slopes = options.alibi_slopes.defined() ? options.alibi_slopes.to_vector<double>() : std::vector<double>{};
  const auto ids = options.q_segments.defined() ? options.q_segments.to_vector<int64_t>() : std::vector<int64_t>{};
  const int64_t offset = options.q_offset.value_or(lk - lq);
  const double scale = options.scale == 0 ? 1 / std::sqrt(static_cast<double>(d)) : options.scale;
  std::vector<double> o(x.size(), 0.0);
  const auto at = [d](int64_t ib, int64_t i, int64_t h, int64_t l, int64_t heads) {
    return static_cast<size_t>(((ib * l + i) * heads + h) * d);
  };
  for (int64_t ib = 0; ib < b; ++ib)
    for (int64_t h = 0; h < hq; ++h)
      for (int64_t i = 0; i < lq; ++i) {
        std::vector<double> weight(static_cast<size_t>(lk), 0.0);
        const int64_t p = offset + i;
        double sum = 0;
        for (int64_t j = 0; j < lk; ++j) {
          if (options.causal && j > p) continue;
          if (options.window > 0 && j <= p - options.window) continue;
          if (!ids.empty() && ids[static_cast<size_t>(ib * lq + i)] != ids[static_cast<size_t>(ib * lk + j)]) continue;
          double s = 0;
          for (int64_t c = 0; c < d; ++c)
            s += x[at(ib, i, h, lq, hq) + static_cast<size_t>(c)] *
                 y[at(ib, j, h / group, lk, hq / group) + static_cast<size_t>(c)];
          s *= scale;
          if (!slopes.empty()) s -= slopes[static_cast<size_t>(h)] * static_cast<double>(std::abs(p - j));
          sum += weight[static_cast<size_t>(j)] = std::exp(s);
        }
        if (sum == 0) continue;
        for (int64_t j = 0; j < lk; ++j)
          for (int64_t c = 0; c < d; ++c)
            o[at(ib, i, h, lq, hq) + static_cast<size_t>(c)] +=
                weight[static_cast<size_t>(j)] / sum *
                z[at(ib, j, h / group, lk, hq / group) + static_cast<size_t>(c)];
      }
  return from_vector(o, q.shape());
}

std::vector<Shape> shapes(int64_t b, int64_t lq, int64_t lk, int64_t hq, int64_t hkv, int64_t d) {
  return {{b, lq, hq, d}, {b, lk, hkv, d}, {b, lk, hkv, d}};
}

OpCase make_case(const std::string& name, const std::function<AttentionOptions(const Vars&)>& options,
                 std::vector<std::vector<Shape>> all) {
  const auto on_device = [options](const Vars& in) {
    AttentionOptions o = options(in);
    if (o.alibi_slopes.defined()) o.alibi_slopes = o.alibi_slopes.to(in[0].device());
    if (o.q_segments.defined()) o.q_segments = o.q_segments.to(in[0].device());
    return o;
  };
  OpCase c;
  c.name = "attention " + name;
  c.run = [on_device](const Vars& in) { return attention(in[0], in[1], in[2], on_device(in)); };
  c.reference = [options](const Vars& in) {
    return Variable(reference(in[0].data(), in[1].data(), in[2].data(), options(in)));
  };
  c.shapes = std::move(all);
  c.tolerance = {{f32, 1e-5}, {bf16_type, 2e-2}};
  return c;
}

// Documents of 5, 9, 2, 40, 100, ... tokens; the second sequence starts elsewhere.
Tensor segments(int64_t b, int64_t l) {
  std::vector<int32_t> ids;
  for (int64_t ib = 0; ib < b; ++ib)
    for (int64_t i = 0; i < l; ++i) {
      const int64_t at = i + 3 * ib;
      ids.push_back(at < 5 ? 0 : at < 14 ? 1 : at < 16 ? 2 : at < 56 ? 3 : at < 156 ? 4 : 5);
    }
  return from_vector(ids, {b, l});
}

std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  all.push_back(make_case("causal", [](const Vars&) { return AttentionOptions{}; },
                          {shapes(1, 1, 1, 1, 1, 1), shapes(2, 7, 7, 2, 2, 5), shapes(1, 64, 64, 1, 1, 32),
                           shapes(1, 131, 131, 2, 1, 24), shapes(3, 65, 65, 6, 2, 16), shapes(0, 4, 4, 2, 2, 8),
                           shapes(1, 3, 90, 2, 1, 8), shapes(1, 1, 70, 4, 2, 33), shapes(1, 9, 4, 2, 2, 4),
                           shapes(1, 70, 70, 1, 1, 128), shapes(1, 66, 66, 1, 1, 256)}));
  all.push_back(make_case("both directions",
                          [](const Vars&) {
                            AttentionOptions o;
                            o.causal = false;
                            o.scale = 0.3;
                            return o;
                          },
                          {shapes(2, 5, 9, 2, 2, 8), shapes(1, 130, 67, 3, 1, 40), shapes(1, 2, 129, 2, 2, 8)}));
  all.push_back(make_case("window",
                          [](const Vars&) {
                            AttentionOptions o;
                            o.window = 19;
                            return o;
                          },
                          {shapes(1, 200, 200, 2, 1, 16), shapes(2, 19, 19, 1, 1, 8), shapes(1, 4, 100, 1, 1, 8)}));
  all.push_back(make_case("alibi",
                          [](const Vars& in) {
                            AttentionOptions o;
                            o.alibi_slopes = kernels::alibi_slopes(in[0].size(2));
                            o.causal = in[0].size(1) != 33;  // 33: both directions
                            return o;
                          },
                          {shapes(1, 100, 100, 6, 2, 8), shapes(2, 33, 33, 3, 3, 8), shapes(1, 2, 30, 2, 1, 8)}));
  all.push_back(make_case("documents",
                          [](const Vars& in) {
                            AttentionOptions o;
                            o.q_segments = segments(in[0].size(0), in[0].size(1));
                            o.causal = in[0].size(2) != 1;
                            return o;
                          },
                          {shapes(2, 200, 200, 2, 1, 8), shapes(1, 67, 67, 1, 1, 16), shapes(1, 2, 2, 2, 2, 8)}));
  all.push_back(make_case("early queries",  // the first queries see nothing
                          [](const Vars&) {
                            AttentionOptions o;
                            o.q_offset = -3;
                            return o;
                          },
                          {shapes(1, 10, 10, 2, 2, 8), shapes(1, 80, 80, 2, 1, 8), shapes(1, 2, 5, 1, 1, 8)}));
  return all;
}

TEST_CASE("attention matches the definition") {
  for (const OpCase& c : cases()) check_reference(c);
}
TEST_CASE("attention passes gradcheck") {
  for (const OpCase& c : cases()) check_grad(c);
}
TEST_CASE("attention: cuda equals cpu", "[cuda]") {
  for (OpCase c : cases()) {
    c.shapes.push_back(shapes(2, 130, 130, 4, 2, 64));
    c.shapes.push_back(shapes(1, 200, 200, 2, 2, 128));
    c.shapes.push_back(shapes(1, 77, 77, 2, 1, 96));
    check_twin(c);
  }
}

TEST_CASE("attention of a fused projection equals attention of its parts") {
  OpCase c;
  c.name = "attention_qkv";
  c.run = [](const Vars& in) { return attention_qkv(in[0], 4, 2); };
  c.reference = [](const Vars& in) {
    const Tensor parts = in[0].data().contiguous().view({in[0].size(0), in[0].size(1), 8, -1});
    return Variable(reference(parts.slice(2, 0, 4), parts.slice(2, 4, 6), parts.slice(2, 6, 8), {})
                        .view({in[0].size(0), in[0].size(1), parts.size(3) * 4}));
  };
  c.shapes = {{{2, 70, 8 * 12}}, {{1, 1, 8 * 3}}};
  c.tolerance = {{f32, 1e-5}, {bf16_type, 2e-2}};
  check_reference(c);
  check_grad(c);
  CHECK(contains(error_of([] { attention_qkv(Variable(zeros({1, 2, 30}, f32, kCpu)), 4, 2); }),
                 "does not split into 4 query and 2 x 2"));
}

}  // namespace
}  // namespace krait
