#include "autograd/causal_conv1d.h"
#include "tests/testing/golden.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

void check_all(Device device) {
  for_each_golden("mamba.h5", "causal_conv1d_", [&](const GoldenCase& c) {
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      const auto leaf = [&](const std::string& path, DType d) { return Variable(c.tensor(path).to(d).to(device), true); };
      const auto upstream = [&](const std::string& path) { return c.tensor(path).to(dtype).to(device); };
      const DType sums = accum_dtype(dtype);
      const Variable x = leaf("in/x", dtype), w = leaf("param/weight", sums), bias = leaf("param/bias", sums);
      const Variable x0 = c.has("in/x0") ? leaf("in/x0", dtype) : Variable();
      const ConvOut out = causal_conv1d(x, w, bias, x0, c.number("silu") != 0);
      backward(Vars{out.y, out.final_state}, {upstream("upstream/y"), upstream("upstream/x_last")});
      c.check("out/y", out.y.data());
      c.check("state/x_last", out.final_state.data());
      c.check("grad/in/x", x.grad());
      if (x0.defined()) c.check("grad/in/x0", x0.grad());
      c.check_within("grad/param/weight", w.grad(), c.tolerance("grad/param/weight", dtype));
      c.check_within("grad/param/bias", bias.grad(), c.tolerance("grad/param/bias", dtype));
    }
  });
}

}  // namespace

TEST_CASE("causal_conv1d meets its goldens") { check_all(kCpu); }
TEST_CASE("causal_conv1d meets its goldens on cuda", "[cuda]") { check_all(cuda_device()); }
