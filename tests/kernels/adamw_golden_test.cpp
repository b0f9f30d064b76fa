// AdamW over ten steps, every case of train.h5, fp64 to 1e-12 and fp32 state to 1e-5.
#include <cmath>

#include "kernels/adamw.h"
#include "kernels/grad_norm.h"
#include "kernels/set_scalars.h"
#include "kernels/sgd.h"
#include "tests/testing/golden.h"
#include "tests/testing/tensors.h"

using namespace krait;
using namespace krait::kernels;

namespace {

void check_adamw(const GoldenCase& c, DType dtype, Device device, double tolerance) {
  const Tensor p0 = c.tensor("out/p0"), grads = c.tensor("out/grads"), lr = c.tensor("out/lr");
  const int64_t n = p0.numel(), steps = grads.size(0);
  const AdamWOptions options{c.number("beta1"), c.number("beta2"), c.number("eps")};
  FlatUpdate u{.param = p0.view({n}).to(dtype).to(device), .grad = {}, .compute = {},
               .hyper = zeros({3}, DType::f64, device), .clip = {}};
  u.param = u.param.clone();
  const Tensor m = zeros_like(u.param), v = zeros_like(u.param);
  const auto segments = make_optimizer_segments({{0, n, 1, c.number("weight_decay")}}, n, device);
  const std::vector<double> rates = lr.to_vector<double>();
  for (int64_t s = 0; s < steps; ++s) {
    u.grad = grads.select(0, s).reshape({n}).to(dtype).to(device).clone();
    const auto t = static_cast<double>(s + 1);
    set_scalars(u.hyper, std::array{rates[static_cast<size_t>(s)], 1 / (1 - std::pow(options.beta1, t)),
                                    1 / (1 - std::pow(options.beta2, t))});
    adamw_(u, m, v, segments, options);
    const auto close = [&](const char* path, const Tensor& value) {
      const Tensor expected = c.tensor(path).select(0, s).reshape({n});
      INFO(c.name() << " " << path << " step " << s << " " << name_of(dtype));
      CHECK(relative_error(value.cpu(), expected) <= tolerance);
    };
    close("out/p", u.param);
    close("out/m", m);
    close("out/v", v);
  }
}

void check_clip(const GoldenCase& c, DType dtype, Device device, double tolerance) {
  // Three tensors behind each other, each at a multiple of 64, and SGD with lr 1 from zero to see the clipped ones.
  FlatUpdate u{.param = zeros({192}, dtype, device), .grad = zeros({192}, dtype, device), .compute = {},
               .hyper = zeros({3}, DType::f64, device), .clip = {}};
  for (int64_t i = 0; i < 3; ++i) {
    const Tensor g = c.tensor("out/g" + std::to_string(i)).reshape({-1});
    Tensor at = u.grad.slice(0, 64 * i, 64 * i + g.numel());
    copy_(at, g);
  }
  const GradNorm norm = grad_norm(u.grad, c.number("max_norm"));
  INFO(c.name() << " " << name_of(dtype));
  CHECK(relative_error(norm.norm().cpu(), c.tensor("out/norm")) <= tolerance);
  CHECK(norm.finite().item() == 1);
  u.clip = norm.values;
  set_scalars(u.hyper, std::array{-1.0, 0.0, 0.0});
  sgd_(u, {}, make_optimizer_segments({{0, 192}}, 192, device), {});
  for (int64_t i = 0; i < 3; ++i) {
    const Tensor expected = c.tensor("out/c" + std::to_string(i)).reshape({-1});
    CHECK(relative_error(u.param.slice(0, 64 * i, 64 * i + expected.numel()).cpu(), expected) <= tolerance);
  }
}

void for_each_case(Device device) {
  for_each_golden("train.h5", "adamw_", [&](const GoldenCase& c) {
    check_adamw(c, DType::f64, device, 1e-12);
    check_adamw(c, DType::f32, device, 1e-5);
  });
  for_each_golden("train.h5", "clip_", [&](const GoldenCase& c) {
    check_clip(c, DType::f64, device, 1e-12);
    check_clip(c, DType::f32, device, 1e-5);
  });
}

}  // namespace

TEST_CASE("adamw and clipping meet the goldens") { for_each_case(kCpu); }
TEST_CASE("adamw and clipping meet the goldens on a GPU", "[cuda]") { for_each_case(cuda_device()); }
