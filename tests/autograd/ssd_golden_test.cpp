#include <cmath>

#include "autograd/ssd.h"
#include "tests/testing/golden.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

// Outputs, final state and every gradient, for several chunk lengths.
void check_case(const GoldenCase& c, Device device) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    for (const int64_t chunk : {4, 16, 64, 256}) {
      INFO(c.name() << " " << name_of(dtype) << " chunk " << chunk);
      const DType sums = accum_dtype(dtype);
      const auto leaf = [&](const std::string& path, DType d) { return Variable(c.tensor(path).to(d).to(device), true); };
      const Variable x = leaf("in/x", dtype), dt = leaf("in/dt", dtype), B = leaf("in/B", dtype), C = leaf("in/C", dtype);
      const Variable A_log = leaf("param/A_log", sums), bias = leaf("param/dt_bias", sums), D = leaf("param/D", sums);
      const Variable h0 = c.has("in/h0") ? leaf("in/h0", sums) : Variable();
      SsdOptions options{.chunk = chunk};
      if (c.has("in/seq_idx")) options.segments = c.tensor("in/seq_idx").to(DType::i32).to(device);
      const SsdTimeStep s = ssd_time_step(dt, bias, A_log, c.find_number("dt_min").value_or(0),
                                          c.find_number("dt_max").value_or(INFINITY));
      const SsdOut out = ssd(x, s.dt, s.a, B, C, D, h0, options);
      const auto check = [&](const std::string& path, const Tensor& value) {
        c.check_within(path, value, c.tolerance(path, dtype));
      };
      check("out/y", out.y.data());
      check("state/h_last", out.final_state.data());
      backward(Vars{out.y, out.final_state}, {c.tensor("upstream/y").to(dtype).to(device),
                                              c.tensor("upstream/h_last").to(sums).to(device)});
      check("grad/in/x", x.grad());
      check("grad/in/dt", dt.grad());
      check("grad/in/B", B.grad());
      check("grad/in/C", C.grad());
      check("grad/param/A_log", A_log.grad());
      check("grad/param/dt_bias", bias.grad());
      check("grad/param/D", D.grad());
      if (h0.defined()) check("grad/in/h0", h0.grad());
    }
  }
}

void check_all(Device device) {
  for_each_golden("mamba2.h5", "ssd_", [&](const GoldenCase& c) { check_case(c, device); });
}

}  // namespace

TEST_CASE("ssd meets its goldens in fp64, fp32 and bf16") { check_all(kCpu); }
TEST_CASE("ssd meets its goldens in fp64, fp32 and bf16 on cuda", "[cuda]") { check_all(cuda_device()); }
