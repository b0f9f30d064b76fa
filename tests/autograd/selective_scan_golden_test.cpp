#include "autograd/elementwise.h"
#include "autograd/selective_scan.h"
#include "tests/testing/golden.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

void check_all(Device device) {
  for_each_golden("mamba.h5", "selective_scan_", [&](const GoldenCase& c) {
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      const DType sums = accum_dtype(dtype);
      const auto leaf = [&](const std::string& path, DType d) {
        return c.has(path) ? Variable(c.tensor(path).to(d).to(device), true) : Variable();
      };
      const Variable A_log = leaf("param/A_log", sums);
      SelectiveScanArguments a{leaf("in/u", dtype), leaf("in/dt", dtype), -exp(A_log), leaf("in/B", dtype),
                               leaf("in/C", dtype)};
      a.D = leaf("param/D", sums);
      a.z = leaf("in/z", dtype);
      a.dt_bias = leaf("param/dt_bias", sums);
      a.h0 = leaf("in/h0", sums);
      const ScanOut out = selective_scan(a);
      backward(Vars{out.y, out.final_state},
               {c.tensor("upstream/y").to(dtype).to(device), c.tensor("upstream/h_last").to(sums).to(device)});
      const auto check = [&](const std::string& path, const Tensor& value) {
        c.check_within(path, value, c.tolerance(path, dtype));
      };
      check("out/y", out.y.data());
      check("state/h_last", out.final_state.data());
      check("grad/in/u", a.x.grad());
      check("grad/in/dt", a.dt.grad());
      check("grad/in/B", a.B.grad());
      check("grad/in/C", a.C.grad());
      check("grad/param/A_log", A_log.grad());
      check("grad/param/D", a.D.grad());
      check("grad/param/dt_bias", a.dt_bias.grad());
      if (a.z.defined()) check("grad/in/z", a.z.grad());
      if (a.h0.defined()) check("grad/in/h0", a.h0.grad());
    }
  });
}

}  // namespace

TEST_CASE("selective_scan meets its goldens") { check_all(kCpu); }
TEST_CASE("selective_scan meets its goldens on cuda", "[cuda]") { check_all(cuda_device()); }
