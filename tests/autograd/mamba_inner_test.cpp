#include "autograd/mamba_inner.h"

#include "autograd/causal_conv1d.h"
#include "autograd/linear.h"
#include "autograd/selective_scan.h"
#include "autograd/shape.h"
#include "core/allocator.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

MambaInnerArguments arguments(const Vars& in, bool packed) {
  const auto sums = [&](size_t i) { return cast(in[i], accum_dtype(in[0].dtype())); };
  MambaInnerArguments a{in[0], in[1], in[2], in[3], in[4], sums(5), sums(6), sums(7), in[8]};
  a.conv_state = in[9];
  a.ssm_state = sums(10);
  if (!packed) return a;
  const int64_t b = in[0].size(0), l = in[0].size(1);
  std::vector<int32_t> segments;
  for (int64_t i = 0; i < b * l; ++i) segments.push_back(static_cast<int32_t>(i / 19));
  a.segments = from_vector(segments, {b, l}).to(in[0].device());
  return a;
}

Vars outputs(const MambaInnerOut& out) { return {out.out, out.conv_state, out.ssm_state}; }

// The functions it is made of, one after the other.
Vars composed(const MambaInnerArguments& in) {
  const int64_t n = in.A.size(1);
  const Vars xz = chunk(in.xz, 2, -1);
  const ConvOut x = causal_conv1d(xz[0], in.conv_weight, in.conv_bias, in.conv_state, true, in.segments);
  const Vars dbc = split(linear(x.y, in.x_proj), {in.dt_proj.size(1), n, n}, -1);
  SelectiveScanArguments scan{x.y, linear(dbc[0], in.dt_proj), in.A, dbc[1], dbc[2]};
  scan.D = in.D;
  scan.z = xz[1];
  scan.dt_bias = in.dt_bias;
  scan.h0 = in.ssm_state;
  scan.segments = in.segments;
  const ScanOut out = selective_scan(scan);
  return {linear(out.y, in.out_proj), x.final_state, out.final_state};
}

std::vector<Shape> shapes(int64_t b, int64_t l, int64_t e, int64_t n, int64_t r, int64_t k) {
  return {{b, l, 2 * e}, {e, k}, {e}, {r + 2 * n, e}, {e, r}, {e}, {e, n}, {e}, {7, e}, {b, k - 1, e}, {b, e, n}};
}

OpCase inner_case(bool packed) {
  return {.name = packed ? "mamba_inner with documents" : "mamba_inner",
          .run = [=](const Vars& in) { return outputs(mamba_inner(arguments(in, packed))); },
          .reference = [=](const Vars& in) { return composed(arguments(in, packed)); },
          .shapes = {shapes(1, 1, 3, 2, 1, 4), shapes(2, 70, 5, 4, 2, 4), shapes(1, 37, 34, 3, 3, 2),
                     shapes(2, 70, 24, 16, 2, 4)},
          .tolerance = {{f32, 5e-5}, {bf16_type, 5e-2}},
          .fills = {{3, Normal{0, 0.3}}, {4, Normal{0, 0.3}}, {6, Uniform{-2, -0.1}}}};
}

}  // namespace

TEST_CASE("mamba_inner is the functions it is made of, in outputs and gradients") {
  for (const bool packed : {false, true}) {
    check_reference(inner_case(packed));
    const auto sizes = shapes(2, 70, 5, 4, 2, 4);
    std::vector<Vars> grads;
    for (const bool fused : {true, false}) {
      Vars in;
      for (size_t i = 0; i < sizes.size(); ++i)
        in.emplace_back(random_tensor(sizes[i], i == 6 ? Fill(Uniform{-2, -0.1}) : Fill(Normal{0, 0.5}), i + 1), true);
      const MambaInnerArguments a = arguments(in, packed);
      const Vars out = fused ? outputs(mamba_inner(a)) : composed(a);
      std::vector<Tensor> seeds;
      for (const Variable& v : out) seeds.push_back(random_tensor(v.shape(), Normal{}, 50 + seeds.size()));
      backward(out, seeds);
      grads.push_back(in);
    }
    for (size_t i = 0; i < sizes.size(); ++i) {
      INFO("input " << i);
      CHECK(relative_error(grads[0][i].grad(), grads[1][i].grad()) < 1e-12);
    }
  }
}

TEST_CASE("mamba_inner passes gradcheck") { check_grad(inner_case(true)); }
TEST_CASE("mamba_inner: cuda equals cpu", "[cuda]") { check_twin(inner_case(false)), check_twin(inner_case(true)); }

TEST_CASE("between forward and backward mamba_inner keeps neither the convolution's output nor the time steps nor y") {
  const int64_t l = 4096, e = 64, n = 16, r = 2;
  const auto sizes = shapes(1, l, e, n, r, 4);
  Vars in;
  for (size_t i = 0; i < 9; ++i)
    in.emplace_back(random_tensor(sizes[i], i == 6 ? Fill(Uniform{-2, -0.1}) : Fill(Normal{0, 0.1}), i + 1, f32), true);
  const int64_t before = allocator(kCpu).stats().current_bytes;
  const MambaInnerOut out = mamba_inner({in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7], in[8]});
  const int64_t kept = allocator(kCpu).stats().current_bytes - before;
  const int64_t expected = 4 * l * (7 + r + 2 * n + e * n / 64);  // out, [d; B; C], states; blocks are rounded up
  CHECK(kept < expected + expected / 5);
}
