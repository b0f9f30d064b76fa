#include "autograd/mamba2_inner.h"

#include "autograd/causal_conv1d.h"
#include "autograd/gated_rms_norm.h"
#include "autograd/linear.h"
#include "autograd/shape.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

constexpr int64_t kHeads = 4, kGroups = 2, kState = 8, kInner = 32, kWidth = 4;

Tensor documents(int64_t b, int64_t l) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < b; ++i)
    for (int64_t t = 0; t < l; ++t) ids.push_back(static_cast<int32_t>(t / 9));
  return from_vector(ids, {b, l});
}

Mamba2InnerArguments arguments(const Vars& in, bool segments, bool norm_first) {
  const DType sums = accum_dtype(in[0].dtype());
  Mamba2InnerArguments a{in[0], in[1], in[2], cast(in[3], sums), cast(in[4], sums), cast(in[5], sums), cast(in[6], sums),
                         in[7], in[8], in[9], cast(in[10], sums)};
  a.sizes = {kHeads, kGroups, kState};
  a.options.chunk = 16;
  if (segments) a.options.segments = documents(in[0].size(0), in[0].size(1)).to(in[0].device());
  a.dt_low = 0.2;
  a.dt_high = 2.0;
  a.norm_first = norm_first;
  return a;
}

Vars all_of(const Mamba2InnerArguments& a) {
  const Mamba2InnerOut out = mamba2_inner(a);
  return {out.y, out.conv_state, out.ssm_state};
}

Vars one_by_one(const Mamba2InnerArguments& a) {
  const Vars parts = split(a.zxbcdt, {kInner, kInner + 2 * kGroups * kState, kHeads}, 2);
  const ConvOut conv = causal_conv1d(parts[1], a.conv_weight, a.conv_bias, a.conv_state, true, a.options.segments);
  const SsdTimeStep time = ssd_time_step(parts[2], a.dt_bias, a.A_log, a.dt_low, a.dt_high);
  const SsdOut scan = ssd_packed(conv.y, time.dt, time.a, a.D, a.ssm_state, a.sizes, a.options);
  const Variable y = gated_rms_norm(scan.y, parts[0], a.norm_weight, a.norm_eps, kGroups, a.norm_first);
  return {a.out_weight.defined() ? linear(y, a.out_weight, a.out_bias) : y, conv.final_state, scan.final_state};
}

OpCase case_of(bool segments, bool norm_first) {
  constexpr int64_t kMixed = kInner + 2 * kGroups * kState;
  const auto shapes = [](int64_t b, int64_t l) {
    return std::vector<Shape>{{b, l, kInner + kMixed + kHeads}, {kMixed, kWidth}, {kMixed}, {kHeads}, {kHeads}, {kHeads},
                              {kInner}, {12, kInner}, {12}, {b, kWidth - 1, kMixed}, {b, kHeads, kInner / kHeads, kState}};
  };
  return {.name = "mamba2_inner",
          .run = [=](const Vars& in) { return all_of(arguments(in, segments, norm_first)); },
          .reference = [=](const Vars& in) { return one_by_one(arguments(in, segments, norm_first)); },
          .shapes = {shapes(2, 37), shapes(1, 1), shapes(1, 150)},
          .tolerance = {{f32, 5e-5}, {bf16_type, 4e-2}},
          .fills = {{6, Normal{1, 0.2}}}};
}

}  // namespace

TEST_CASE("mamba2_inner equals its parts one after the other") {
  for (const bool segments : {false, true})
    for (const bool norm_first : {false, true}) check_reference(case_of(segments, norm_first));
}
TEST_CASE("mamba2_inner: gradients equal those of its parts") {
  for (const bool segments : {false, true}) {
    const OpCase c = case_of(segments, false);
    std::vector<Tensor> grads[2];
    for (const bool whole : {false, true}) {
      Vars in;
      for (size_t i = 0; i < c.shapes[0].size(); ++i)
        in.emplace_back(random_tensor(c.shapes[0][i], i == 6 ? Fill(Normal{1, 0.2}) : Fill(Normal{}), 20 + i), true);
      const Vars out = whole ? all_of(arguments(in, segments, false)) : one_by_one(arguments(in, segments, false));
      std::vector<Tensor> up;
      for (size_t i = 0; i < out.size(); ++i) up.push_back(random_tensor(out[i].shape(), Normal{}, 50 + i));
      backward(out, up);
      for (const Variable& v : in) grads[whole].push_back(v.grad());
    }
    for (size_t i = 0; i < grads[0].size(); ++i) {
      INFO(i);
      CHECK(relative_error(grads[1][i], grads[0][i]) < 1e-12);
    }
  }
}
TEST_CASE("mamba2_inner without a projection gives the normalised y") {
  const OpCase c = case_of(false, false);
  std::vector<Tensor> grads[2];
  for (const bool whole : {false, true}) {
    Vars in;
    for (size_t i = 0; i < c.shapes[0].size(); ++i) in.emplace_back(random_tensor(c.shapes[0][i], Normal{}, 20 + i), true);
    Mamba2InnerArguments a = arguments(in, false, false);
    a.out_weight = a.out_bias = {};
    const Vars out = whole ? all_of(a) : one_by_one(a);
    backward(out[0], random_tensor(out[0].shape(), Normal{}, 50));
    for (size_t i = 0; i < 7; ++i) grads[whole].push_back(in[i].grad());
  }
  for (size_t i = 0; i < grads[0].size(); ++i) CHECK(relative_error(grads[1][i], grads[0][i]) < 1e-12);
}
TEST_CASE("mamba2_inner: gradients of the states alone") {
  const OpCase c = case_of(false, false);
  Vars in;
  for (size_t i = 0; i < c.shapes[0].size(); ++i) in.emplace_back(random_tensor(c.shapes[0][i], Normal{}, 20 + i), true);
  const Vars out = all_of(arguments(in, false, false));
  backward(out[2], random_tensor(out[2].shape(), Normal{}, 50));
  CHECK(relative_error(in[0].grad(), in[0].grad()) == 0);  // finite
  CHECK(!in[7].grad().defined());
}
TEST_CASE("mamba2_inner: cuda equals cpu", "[cuda]") {
  for (const bool segments : {false, true})
    for (const bool norm_first : {false, true}) check_twin(case_of(segments, norm_first));
}
