#include <array>
#include <cmath>
#include <limits>

#include "kernels/cross_entropy.h"
#include "tests/testing/tensors.h"

using namespace krait;
using kernels::CrossEntropyOptions;

namespace {

struct Head {
  Tensor x, w, y;  // fp64, int64, on the CPU
  CrossEntropyOptions options = {};
  int64_t chunk_rows = 0;
};
struct Gradients {
  kernels::LinearCrossEntropyOut out;
  Tensor dw, nll;
};

// x and w rounded to bf16; computed in `dtype`.
Gradients run(const Head& h, DType dtype, Device device, DType index = DType::i64) {
  REQUIRE((device.is_cpu() || cuda_device_count() > 0));
  const auto there = [&](const Tensor& t) { return t.to(bf16_type).to(dtype).to(device); };
  const Tensor x = there(h.x), w = there(h.w), y = h.y.to(index).to(device);
  Gradients g;
  g.dw = full(w.shape(), 0.5, accum_dtype(dtype), device);  // added to
  g.out = kernels::linear_cross_entropy(x, w, y, {.options = h.options, .loss_scale = 0.25, .chunk_rows = h.chunk_rows,
                                                  .want_dx = true, .dw_sum = g.dw});
  g.nll = kernels::linear_cross_entropy_nll(x, w, y, h.options, h.chunk_rows);
  return g;
}

// bf16 on the GPU against fp64 plain products: nearer than a rounding of logits would allow.
void check_head(const Head& h, double of_loss = 2e-6) {
  INFO("x " << fmt::format("{}", h.x.shape()) << " w " << fmt::format("{}", h.w.shape()));
  const Gradients exact = run(h, f64, kCpu), fast = run(h, bf16_type, cuda_device());
  const auto error = [](const Tensor& a, const Tensor& b) { return relative_error(a.to(kCpu).to(f64), b); };
  CHECK(error(fast.out.loss, exact.out.loss) < of_loss);
  CHECK(error(fast.out.nll_sum, exact.out.nll_sum) < of_loss);
  CHECK(error(fast.nll, exact.nll) < 5 * of_loss);
  CHECK(error(fast.out.dx, exact.out.dx) < 8e-3);
  CHECK(error(fast.dw, exact.dw) < 8e-3);
  const Gradients again = run(h, bf16_type, cuda_device(), DType::i32);
  CHECK(again.dw.to_vector<float>() == fast.dw.to_vector<float>());
  CHECK(again.nll.to_vector<float>() == fast.nll.to_vector<float>());
}

Head random_head(int64_t t, int64_t v, int64_t d, double logit, CrossEntropyOptions options = {}, int64_t chunk = 0) {
  const int64_t valid = options.valid_vocab > 0 ? options.valid_vocab : v;
  return {random_tensor({t, d}, Normal{}, 1), random_tensor({v, d}, Normal{0, logit / std::sqrt(static_cast<double>(d))}, 2),
          random_integers({t}, {0, valid}, 3), options, chunk};
}

}  // namespace

TEST_CASE("the head's loss in bf16 is that of fp64 at any size", "[cuda]") {
  for (const auto& [t, v, d, chunk] : std::vector<std::array<int64_t, 4>>{{1, 32, 8, 0},
                                                                          {5, 64, 64, 2},
                                                                          {127, 96, 72, 0},
                                                                          {300, 1024, 768, 128},
                                                                          {520, 2080, 136, 0},
                                                                          {129, 50304, 64, 0},
                                                                          {257, 800, 2048, 0}})
    check_head(random_head(t, v, d, 2, {}, chunk));
}
TEST_CASE("the head's loss in bf16: z-loss, padding, ignored targets", "[cuda]") {
  Head h = random_head(300, 1024, 128, 2, {.z_loss = 0.01, .valid_vocab = 957});
  for (int64_t i = 0; i < 300; i += 3) h.y.data<int64_t>()[i] = -100;
  check_head(h);
  h.y = full({300}, -100, DType::i64, kCpu);
  const Gradients none = run(h, bf16_type, cuda_device());
  CHECK(none.out.loss.item() == 0.0);
  CHECK(relative_error(none.dw.to(kCpu).to(f64), full({1024, 128}, 0.5, f64, kCpu)) == 0.0);
}
TEST_CASE("the head's loss in bf16 stays right with logits far above the target's", "[cuda]") {
  check_head(random_head(200, 1024, 64, 60));  // most rows
  check_head(random_head(40, 544, 64, 0));     // all logits equal
  for (const double logit : {100.0, 1e4}) {
    Head h = random_head(200, 1024, 64, 1, {.valid_vocab = 990});
    const double* row = h.x.data<double>() + 77 * 64;
    double square = 0;
    for (int64_t k = 0; k < 64; ++k) square += row[k] * row[k];
    for (int64_t k = 0; k < 64; ++k) h.w.data<double>()[989 * 64 + k] = row[k] * logit / square;  // the last column
    check_head(h, 1e-5);
    h.y.data<int64_t>()[77] = 989;  // and as a target, which is certain then
    check_head(h, 1e-5);
  }
}
TEST_CASE("the head's loss in bf16: a bad target is NaN in its own row, ignored rows may hold anything", "[cuda]") {
  Head h = random_head(40, 64, 64, 1);
  h.y.data<int64_t>()[7] = 64;
  const Gradients bad = run(h, bf16_type, cuda_device());
  CHECK(std::isnan(bad.out.loss.item()));
  for (int64_t i = 0; i < 40; ++i) {
    CHECK(std::isnan(bad.nll.slice(0, i, i + 1).item()) == (i == 7));
    CHECK(std::isnan(bad.out.dx.slice(0, i, i + 1).slice(1, 0, 1).item()) == (i == 7));
  }
  h.y.data<int64_t>()[7] = -100;
  for (int64_t k = 0; k < 64; ++k) h.x.data<double>()[7 * 64 + k] = std::numeric_limits<double>::quiet_NaN();
  const Gradients ignored = run(h, bf16_type, cuda_device());
  CHECK(std::isfinite(ignored.out.loss.item()));
  for (const float g : ignored.dw.to_vector<float>()) REQUIRE(std::isfinite(g));
  for (const float g : ignored.out.dx.to_vector<float>()) REQUIRE(std::isfinite(g));
}
