#include "autograd/rope.h"

#include <cmath>

#include "autograd/linear.h"
#include "autograd/shape.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

constexpr double kBase = 10000;

kernels::RopeTable table_for(const Tensor& x, int64_t rotary_dim, int64_t max_len = 64) {
  return kernels::rope_table(max_len, rotary_dim, kBase, x.device(), accum_dtype(x.dtype()));
}

// Pairs at their positions, angle by angle.
Tensor rotated(const Tensor& x, int64_t rotary_dim, RopeStyle style, const std::vector<int64_t>& positions) {
  const int64_t l = x.size(1), h = x.size(2), d = x.size(3), half = rotary_dim / 2;
  Tensor y = x.clone();
  for (int64_t t = 0; t < x.size(0) * l; ++t)
    for (int64_t k = 0; k < h; ++k)
      for (int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(positions[static_cast<size_t>(t)]) *
                             std::pow(kBase, -2.0 * static_cast<double>(i) / static_cast<double>(rotary_dim));
        const int64_t at = (t * h + k) * d, first = style == RopeStyle::half ? i : 2 * i,
                      second = style == RopeStyle::half ? i + half : 2 * i + 1;
        const double a = x.data<double>()[at + first], b = x.data<double>()[at + second];
        y.data<double>()[at + first] = a * std::cos(angle) - b * std::sin(angle);
        y.data<double>()[at + second] = a * std::sin(angle) + b * std::cos(angle);
      }
  return y;
}

OpCase offset_case(RopeStyle style, int64_t d, int64_t rotary_dim) {
  return {.name = fmt::format("rope style {} d {} rotary_dim {}", static_cast<int>(style), d, rotary_dim),
          .run =
              [=](const Vars& in) {
                const auto t = table_for(in[0].data(), rotary_dim);
                return rope(in[0], t.cos, t.sin, style, 3);
              },
          .reference =
              [=](const Vars& in) {
                std::vector<int64_t> positions;
                for (int64_t i = 0; i < in[0].size(0) * in[0].size(1); ++i) positions.push_back(3 + i % in[0].size(1));
                return Variable(rotated(in[0].data(), rotary_dim, style, positions));
              },
          .shapes = {{{1, 1, 1, d}}, {{2, 7, 3, d}}, {{1, 33, 2, d}}, {{2, 0, 3, d}}},
          .inputs = {Normal{}, Normal{.mean = 100}, Constant{0}}};
}

OpCase positions_case(DType index, bool per_batch) {
  return {.name = fmt::format("rope at positions {} {}", index, per_batch),
          .run =
              [=](const Vars& in) {
                const auto t = table_for(in[0].data(), 16);
                const Tensor p = in[1].data().to(index);
                return rope(in[0], t.cos, t.sin, RopeStyle::half, per_batch ? p : p.select(0, 0));
              },
          .reference =
              [=](const Vars& in) {
                auto p = in[1].data().to_vector<int64_t>();
                const size_t l = static_cast<size_t>(in[0].size(1));
                if (!per_batch)
                  for (size_t i = l; i < p.size(); ++i) p[i] = p[i % l];
                return Variable(rotated(in[0].data(), 16, RopeStyle::half, p));
              },
          .shapes = {{{2, 7, 3, 16}, {2, 7}}, {{1, 1, 1, 20}, {1, 1}}},
          .integers = {{1, {0, 64}}}};
}

std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  for (const RopeStyle style : {RopeStyle::half, RopeStyle::interleaved})
    for (const auto& [d, rotary] :
         {std::pair<int64_t, int64_t>{64, 64}, {64, 32}, {8, 6}, {7, 4}, {2, 2}, {5, 0}, {128, 128}, {33, 32}})
      all.push_back(offset_case(style, d, rotary));
  for (const DType index : {DType::i32, DType::i64})
    for (const bool per_batch : {true, false}) all.push_back(positions_case(index, per_batch));
  return all;
}

// q and k as one slice of a fused projection (b, l, 3h, d), rotated where they lie.
void check_in_place(Device device) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Tensor qkv = random_tensor({2, 5, 6, 16}, Normal{}, 1, dtype).to(device);
    const Tensor before = qkv.clone();
    Tensor qk = qkv.slice(2, 0, 4);
    const auto t = table_for(qkv, 16);
    const Tensor apart = kernels::rope(qk, t.cos, t.sin, RopeStyle::half, {}, 2);
    kernels::rope_into(qk, qk, t.cos, t.sin, RopeStyle::half, {}, 2);
    CHECK(qk.to_vector<float>() == apart.to_vector<float>());
    CHECK(qkv.slice(2, 4, 6).to_vector<float>() == before.slice(2, 4, 6).to_vector<float>());
    kernels::rope_into(qk, qk, t.cos, t.sin, RopeStyle::half, {}, 2, /*inverse=*/true);
    CHECK(relative_error(qkv, before) < (dtype == DType::f32 ? 1e-6 : 1e-2));
  }
}

}  // namespace

TEST_CASE("rope matches plain loops") {
  for (const OpCase& c : cases()) check_reference(c);
}
TEST_CASE("rope passes gradcheck") {
  for (const OpCase& c : cases()) check_grad(c);
}
TEST_CASE("rope: cuda equals cpu", "[cuda]") {
  for (const OpCase& c : cases()) check_twin(c);
}
TEST_CASE("rope rotates a slice of a fused projection in place") { check_in_place(kCpu); }
TEST_CASE("rope rotates a slice of a fused projection in place, on cuda", "[cuda]") { check_in_place(cuda_device()); }

TEST_CASE("the rope table is exact at far positions") {
  const auto t = kernels::rope_table(100001, 4, 500000, kCpu);
  CHECK(t.cos.select(0, 100000).to_vector<float>()[0] == static_cast<float>(std::cos(100000.0)));
  CHECK(t.sin.select(0, 100000).to_vector<float>()[1] ==
        static_cast<float>(std::sin(100000.0 / std::sqrt(500000.0))));
}

TEST_CASE("rope refuses positions beyond its table and odd rotations") {
  const Variable x(zeros({1, 4, 2, 8}, DType::f32, kCpu));
  const auto t = kernels::rope_table(6, 8, kBase, kCpu);
  CHECK(contains(error_of([&] { rope(x, t.cos, t.sin, RopeStyle::half, 3); }),
                 "positions 3 to 6 do not fit the table of 6"));
  CHECK(contains(error_of([&] { rope(x, t.cos, t.sin, RopeStyle::half, from_vector<int64_t>({0, 1, 6, 2})); }),
                 "position 6 of (0, 2) is outside the table of 6"));
  CHECK(contains(error_of([&] { rope(x, t.cos, t.sin, RopeStyle::half, from_vector<int64_t>({0, 1})); }),
                 "positions are (2,)"));
  CHECK(contains(error_of([&] { kernels::rope_table(6, 7, kBase, kCpu); }), "must be even"));
  const auto wide = kernels::rope_table(6, 10, kBase, kCpu);
  CHECK(contains(error_of([&] { rope(x, wide.cos, wide.sin, RopeStyle::half); }), "expected (positions, at most 4)"));
}

namespace {

// Inputs x (b, l, in), w (heads d, in) and perhaps b.
OpFunction linear_rope_run(int64_t heads, int64_t rotated, RopeStyle style, bool fused, int64_t rotary_dim = 0) {
  const auto tables = [=](const Tensor& x, const Tensor& w) {
    const int64_t d = w.size(0) / heads;
    return kernels::rope_table(x.size(1) + 3, rotary_dim > 0 ? rotary_dim : d, 10000, x.device(), accum_dtype(x.dtype()));
  };
  const auto bias_of = [](const Vars& in) { return in.size() > 2 ? in[2] : Variable(); };
  if (fused)
    return [=](const Vars& in) -> Outputs {
      const auto t = tables(in[0].data(), in[1].data());
      return linear_rope(in[0], in[1], bias_of(in), heads, rotated, t.cos, t.sin, style, 3);
    };
  return [=](const Vars& in) -> Outputs {
    const auto t = tables(in[0].data(), in[1].data());
    const Variable y = linear(in[0], in[1], bias_of(in));
    const Variable all = reshape(y, {y.size(0), y.size(1), heads, y.size(2) / heads});
    if (rotated == 0) return all;
    return concat({rope(slice(all, 2, 0, rotated), t.cos, t.sin, style, 3), slice(all, 2, rotated, heads)}, 2);
  };
}

OpCase linear_rope_against_parts(int64_t heads, int64_t rotated, RopeStyle style, int64_t rotary_dim = 0) {
  return {.name = "linear_rope",
          .run = linear_rope_run(heads, rotated, style, true, rotary_dim),
          .reference = linear_rope_run(heads, rotated, style, false, rotary_dim),
          .shapes = {{{1, 1, 1}, {heads * 8, 1}, {heads * 8}},
                     {{2, 5, 24}, {heads * 8, 24}},
                     {{0, 5, 3}, {heads * 8, 3}, {heads * 8}}}};
}

}  // namespace

TEST_CASE("linear_rope is a map whose first heads are rotated, and passes gradcheck") {
  for (const OpCase& c : {linear_rope_against_parts(3, 2, RopeStyle::half), linear_rope_against_parts(4, 3, RopeStyle::interleaved),
                          linear_rope_against_parts(3, 3, RopeStyle::half, 4), linear_rope_against_parts(2, 0, RopeStyle::half)}) {
    check_reference(c);
    check_grad(c);
  }
}
TEST_CASE("linear_rope: cuda equals cpu", "[cuda]") {
  check_twin(linear_rope_against_parts(3, 2, RopeStyle::half));
  check_twin(linear_rope_against_parts(4, 3, RopeStyle::interleaved));
}
TEST_CASE("linear_rope: a product that is rotated on the chip equals the cpu's, run for run", "[cuda]") {
  const Tensor x = random_tensor({3, 2817, 512}, Normal{}, 1, bf16_type), w = random_tensor({2048, 512}, Normal{0, 0.05}, 2, bf16_type),
               b = random_tensor({2048}, Normal{}, 3, bf16_type);
  const OpFunction run = linear_rope_run(32, 24, RopeStyle::half, true);
  const auto result = [&](DType dtype, Device device) {
    return run({Variable(x.to(dtype).to(device)), Variable(w.to(dtype).to(device)), Variable(b.to(dtype).to(device))})
        .values[0].data().cpu().to(f64);
  };
  const Tensor first = result(bf16_type, cuda_device()), again = result(bf16_type, cuda_device());
  CHECK(relative_error(first, result(f32, kCpu)) < 2e-2);
  CHECK(relative_error(again, first) == 0);
}
