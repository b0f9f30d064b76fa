#include "autograd/layer_norm.h"
#include "tests/testing/golden.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

constexpr DType kDTypes[] = {DType::f64, DType::f32, DType::bf16};

Variable leaf(const GoldenCase& c, const std::string& path, DType dtype, Device device) {
  return Variable(c.tensor(path).to(dtype).to(device), true);
}

void check_rms(const GoldenCase& c, Device device) {
  for (const DType dtype : kDTypes) {
    const Variable x = leaf(c, "in/x", dtype, device);
    const Variable w = leaf(c, "param/weight", accum_dtype(dtype), device);
    const Variable y = rms_norm(x, w, c.number("eps"));
    backward(y, c.tensor("upstream/y").to(dtype).to(device));
    c.check("out/y", y.data());
    c.check("grad/in/x", x.grad());
    c.check_within("grad/param/weight", w.grad(), c.tolerance("grad/param/weight", dtype));
  }
}

void check_layer(const GoldenCase& c, Device device) {
  for (const DType dtype : kDTypes) {
    const Variable x = leaf(c, "in/x", dtype, device);
    const Variable w = leaf(c, "param/weight", accum_dtype(dtype), device);
    const Variable b = leaf(c, "param/bias", accum_dtype(dtype), device);
    const Variable y = layer_norm(x, w, b, c.number("eps"));
    backward(y, c.tensor("upstream/y").to(dtype).to(device));
    c.check("out/y", y.data());
    c.check("grad/in/x", x.grad());
    c.check_within("grad/param/weight", w.grad(), c.tolerance("grad/param/weight", dtype));
    c.check_within("grad/param/bias", b.grad(), c.tolerance("grad/param/bias", dtype));
  }
}

void check_add_rms(const GoldenCase& c, Device device) {
  for (const DType dtype : kDTypes) {
    const Variable x = leaf(c, "in/x", dtype, device), res = leaf(c, "in/res", dtype, device);
    const Variable w = leaf(c, "param/weight", accum_dtype(dtype), device);
    const AddNorm out = add_rms_norm(x, res, w, c.number("eps"));
    backward(Vars{out.residual, out.y},
             {c.tensor("upstream/res_out").to(dtype).to(device), c.tensor("upstream/y").to(dtype).to(device)});
    c.check("out/res_out", out.residual.data());
    c.check("out/y", out.y.data());
    c.check("grad/in/x", x.grad());
    c.check("grad/in/res", res.grad());
    c.check_within("grad/param/weight", w.grad(), c.tolerance("grad/param/weight", dtype));
  }
}

void check_all(Device device) {
  for_each_golden("transformer.h5", "rmsnorm_", [&](const GoldenCase& c) { check_rms(c, device); });
  for_each_golden("transformer.h5", "layernorm_", [&](const GoldenCase& c) { check_layer(c, device); });
  for_each_golden("transformer.h5", "add_rmsnorm", [&](const GoldenCase& c) { check_add_rms(c, device); });
}

}  // namespace

TEST_CASE("norms meet the goldens") { check_all(kCpu); }
TEST_CASE("norms meet the goldens on cuda", "[cuda]") { check_all(cuda_device()); }
