#include "autograd/moe.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "autograd/elementwise.h"
#include "autograd/reduce.h"
#include "autograd/shape.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

// x (t, m), logits (t, n), gates and ups (2 e, f, m), downs (e, m, f), token by token in fp64.
Variable by_token(const Vars& in, const MoeOptions& o) {
  const Tensor &x = in[0].data(), &logits = in[1].data(), &gate_up = in[2].data(), &down = in[3].data();
  const int64_t t = x.size(0), m = x.size(1), n = logits.size(1), f = down.size(2);
  Tensor y = zeros({t, m}, DType::f64, kCpu);
  for (int64_t i = 0; i < t; ++i) {
    const double* r = logits.data<double>() + i * n;
    std::vector<int64_t> slots(static_cast<size_t>(n));
    std::iota(slots.begin(), slots.end(), 0);
    std::stable_sort(slots.begin(), slots.end(), [&](int64_t a, int64_t b) { return r[a] > r[b]; });
    double all = 0, chosen = 0;
    for (int64_t e = 0; e < n; ++e) all += std::exp(r[e]);
    slots.resize(static_cast<size_t>(o.top_k));
    for (const int64_t e : slots) chosen += e < o.experts ? std::exp(r[e]) : 0;
    for (const int64_t e : slots) {
      if (e >= o.experts) continue;
      const double w = std::exp(r[e]) / (o.renormalize ? chosen : all);
      for (int64_t j = 0; j < f; ++j) {
        double g = 0, u = 0;
        for (int64_t c = 0; c < m; ++c) {
          g += gate_up.data<double>()[(e * f + j) * m + c] * x.data<double>()[i * m + c];
          u += gate_up.data<double>()[((o.experts + e) * f + j) * m + c] * x.data<double>()[i * m + c];
        }
        const double h = w * g / (1 + std::exp(-g)) * u;
        for (int64_t c = 0; c < m; ++c) y.data<double>()[i * m + c] += h * down.data<double>()[(e * m + c) * f + j];
      }
    }
  }
  return Variable(y);
}

OpCase case_of(const std::string& name, const MoeOptions& o, int64_t slots,
               const std::vector<std::array<int64_t, 3>>& sizes) {  // tokens, width, hidden
  std::vector<std::vector<Shape>> shapes;
  for (const auto& [t, m, f] : sizes)
    shapes.push_back({{t, m}, {t, slots}, {2 * o.experts, f, m}, {o.experts, m, f}});
  return {.name = name,
          .run =
              [o](const Vars& in) {
                return moe_experts(in[0], moe_route(cast(in[1], accum_dtype(in[1].dtype())), o), in[2], in[3]);
              },
          .reference = [o](const Vars& in) { return by_token(in, o); },
          .shapes = shapes,
          .tolerance = {{f32, 2e-5}, {bf16_type, 2e-2}},
          .fills = {{2, Normal{.std = 0.3}}, {3, Normal{.std = 0.3}}}};
}

const std::vector<OpCase>& cases() {
  static const std::vector<OpCase> all{
      case_of("moe, 2 of 4", {4, 2, true}, 4, {{37, 6, 9}, {1, 1, 1}, {0, 4, 4}, {3, 72, 70}}),
      case_of("moe, 1 of 8, not renormalised", {8, 1, false}, 8, {{29, 8, 16}, {3, 5, 4}}),
      case_of("moe, 3 of 5 and 2 null experts", {5, 3, true}, 7, {{41, 8, 8}, {1, 3, 2}}),
      case_of("moe, 2 of 3 and 5 null experts, not renormalised", {3, 2, false}, 8, {{23, 4, 6}}),
      case_of("moe, all of 3", {3, 3, false}, 3, {{70, 16, 8}}),
      case_of("moe, one expert", {1, 1, true}, 1, {{5, 4, 6}})};
  return all;
}

Tensor random_logits(int64_t t, int64_t n, uint64_t seed = 3) { return random_tensor({t, n}, Normal{}, seed); }

}  // namespace

TEST_CASE("moe equals a loop over tokens") {
  for (const OpCase& c : cases()) check_reference(c);
}
TEST_CASE("moe passes gradcheck") {
  for (const OpCase& c : cases()) check_grad(c);
}
TEST_CASE("moe: cuda equals cpu", "[cuda]") {
  for (const OpCase& c : cases()) check_twin(c);
  check_twin(case_of("moe, beyond tiles and pieces", {6, 2, true}, 8, {{1500, 72, 136}, {200, 130, 67}}));
}

TEST_CASE("moe routes equal logits to the lower slot and survives values that are not numbers") {
  for (const Device device : cuda_device_count() > 0 ? std::vector<Device>{kCpu, cuda_device()} : std::vector<Device>{kCpu}) {
    const double inf = HUGE_VAL, nan = std::nan("");
    const Tensor logits = from_vector<double>({0, 0, 0, 0, 1, 2, 2, 1, nan, nan, nan, nan, -inf, -inf, 3, -inf}, {4, 4});
    const MoeRouting r = kernels::moe_route(logits.to(device), {4, 2, true});
    CHECK(r.index.cpu().to_vector<int32_t>() == std::vector<int32_t>{0, 1, 1, 2, 0, 1, 2, 0});
    CHECK(r.counts.cpu().to_vector<int32_t>() == std::vector<int32_t>{3, 3, 2, 0});
    CHECK(r.groups.offsets.cpu().to_vector<int32_t>() == std::vector<int32_t>{0, 3, 6, 8, 8});
    CHECK(r.groups.order.cpu().to_vector<int32_t>() == std::vector<int32_t>{0, 4, 7, 1, 2, 5, 3, 6});
  }
}

TEST_CASE("moe gives every real choice one row, by expert and then by token") {
  for (const Device device : cuda_device_count() > 0 ? std::vector<Device>{kCpu, cuda_device()} : std::vector<Device>{kCpu}) {
    const int64_t t = 3001, n = 70, k = 3, experts = 64;
    const MoeRouting r = kernels::moe_route(random_logits(t, n).to(device), {experts, k, true});
    const auto index = r.index.cpu().to_vector<int32_t>(), position = r.position.cpu().to_vector<int32_t>();
    const auto order = r.groups.order.cpu().to_vector<int32_t>(), offsets = r.groups.offsets.cpu().to_vector<int32_t>();
    const auto counts = r.counts.cpu().to_vector<int32_t>();
    CHECK(std::accumulate(counts.begin(), counts.end(), 0) == t * k);
    bool right = true;
    for (size_t c = 0; c < index.size(); ++c) {
      const auto e = static_cast<size_t>(index[c]);
      if (index[c] >= experts) {
        right = right && position[c] == -1;
        continue;
      }
      right = right && position[c] >= offsets[e] && position[c] < offsets[e + 1] &&
              order[static_cast<size_t>(position[c])] == static_cast<int32_t>(c);
    }
    for (size_t e = 0; e < static_cast<size_t>(experts); ++e) {
      right = right && offsets[e + 1] - offsets[e] == counts[e];
      for (int32_t i = offsets[e] + 1; i < offsets[e + 1]; ++i)
        right = right && order[static_cast<size_t>(i)] > order[static_cast<size_t>(i - 1)];
    }
    CHECK(right);
  }
}

TEST_CASE("moe penalties add the auxiliary losses' gradient to the logits'") {
  for (const Device device : cuda_device_count() > 0 ? std::vector<Device>{kCpu, cuda_device()} : std::vector<Device>{kCpu})
    for (const auto& [experts, slots] : {std::pair<int64_t, int64_t>{6, 6}, {4, 7}})
      for (const bool renormalize : {true, false}) {
        const MoeOptions o{experts, 3, renormalize};
        const Tensor values = random_logits(19, slots).to(device), dy = random_tensor({19, 3}, Normal{}, 4).to(device);
        const Variable a(values, true), b(values, true);
        backward(moe_route(a, o, {0.7, 0.2}).weight, dy);
        const MoeRoute plain = moe_route(b, o);
        const MoeLosses losses = moe_losses(b, plain.routing, o);
        backward(sum(plain.weight * Variable(dy)) + losses.balance * 0.7 + losses.router_z * 0.2);
        CHECK(relative_error(a.grad(), b.grad()) < 1e-12);
      }
}

TEST_CASE("moe penalties leave padding out: those of padded rows are those of their tokens alone") {
  constexpr int64_t b = 3, l = 7;
  const std::vector<int32_t> lengths{5, 7, 1};
  std::vector<int64_t> real;
  for (int64_t i = 0; i < b * l; ++i)
    if (i % l < lengths[static_cast<size_t>(i / l)]) real.push_back(i);
  for (const Device device : cuda_device_count() > 0 ? std::vector<Device>{kCpu, cuda_device()} : std::vector<Device>{kCpu})
    for (const auto& [experts, slots] : {std::pair<int64_t, int64_t>{6, 6}, {4, 70}})
      for (const DType dtype : {DType::f64, DType::f32}) {
        const MoeOptions o{experts, 3, true};
        const MoePenalties penalties{0.7, 0.2};
        const double tolerance = dtype == DType::f64 ? 1e-12 : 1e-5;
        const Tensor values = random_logits(b * l, slots).to(dtype);
        Tensor alone = empty({static_cast<int64_t>(real.size()), slots}, dtype, kCpu);
        for (size_t i = 0; i < real.size(); ++i) {
          Tensor row = alone.select(0, static_cast<int64_t>(i));
          copy_(row, values.select(0, real[i]));
        }
        const auto group = comm::single_group("batch");
        const auto gradient_of = [&](const Variable& logits, const MoeRoute& route) {
          backward(route.weight, zeros(route.weight.shape(), dtype, device));
          return logits.grad().cpu();
        };
        const Variable padded(values.to(device), true), bare(alone.to(device), true);
        const MoeRoute found = moe_route(padded, o, penalties, *group, from_vector(lengths).to(device)), wanted = moe_route(bare, o, penalties);
        CHECK(relative_error(found.penalty.cpu(), wanted.penalty.cpu()) < tolerance);
        const Tensor d = gradient_of(padded, found), dw = gradient_of(bare, wanted);
        Tensor spread = zeros(d.shape(), dtype, kCpu);  // nothing in padding
        for (size_t i = 0; i < real.size(); ++i) {
          Tensor row = spread.select(0, real[i]);
          copy_(row, dw.select(0, static_cast<int64_t>(i)));
        }
        CHECK(relative_error(d, spread) < tolerance);
      }
}

TEST_CASE("moe's balance loss is 1 when every slot is chosen and probable alike") {
  const Variable logits(from_vector<double>({1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}, {4, 4}));
  for (const int64_t experts : {4, 2}) {
    const MoeOptions o{experts, 1, true};
    CHECK(moe_losses(logits, kernels::moe_route(logits.data(), o), o).balance.data().item() == Approx(1.0));
  }
}

TEST_CASE("moe names what it refuses") {
  const Tensor logits = zeros({3, 4}, DType::f32, kCpu);
  CHECK(contains(error_of([&] { kernels::moe_route(logits, {5, 2, true}); }), "5 experts and the 2 best of 4 slots"));
  CHECK(contains(error_of([&] { kernels::moe_route(logits.to(DType::bf16), {4, 2, true}); }), "expected fp32 or fp64"));
  const MoeRoute r = moe_route(Variable(logits), {4, 2, true});
  const auto v = [](const Shape& s) { return Variable(zeros(s, DType::f32, kCpu)); };
  CHECK(contains(error_of([&] { moe_experts(v({3, 5}), r, v({4, 6, 5}), v({4, 5, 6})); }),
                 "gate_up is (4, 6, 5) and down (4, 5, 6) for 4 experts"));
}
