#include "autograd/mlstm.h"
#include "autograd/shape.h"
#include "tests/testing/golden.h"

namespace krait {
namespace {

// The file holds (b, heads, l, ...).
Variable heads_last(const GoldenCase& c, const char* name, DType dtype, Device device) {
  return Variable(c.tensor(name).to(dtype).to(device).transpose(1, 2), true);
}

void check_case(const GoldenCase& c, DType dtype, Device device, bool full) {
  INFO(c.name() << " " << name_of(dtype) << (full ? "" : " with a constant denominator"));
  const DType a = accum_dtype(dtype);
  const Variable q = heads_last(c, "in/q", dtype, device), k = heads_last(c, "in/k", dtype, device),
                 v = heads_last(c, "in/v", dtype, device), i = heads_last(c, "in/i", a, device),
                 f = heads_last(c, "in/f", a, device);
  MlstmMemory initial;
  if (c.has("in/C0"))
    initial = {Variable(c.tensor("in/C0").to(a).to(device), true), Variable(c.tensor("in/n0").to(a).to(device), true),
               c.tensor("in/m0").to(a).to(device)};
  const MlstmResult r = mlstm(q, k, v, i, f, initial, {}, {.eps = c.number("eps"), .denominator_gradient = full});
  const auto check = [&](const std::string& path, const Tensor& value) {
    c.check_within(path, value, c.tolerance(path, dtype));
  };
  check("out/h", r.h.data().transpose(1, 2));
  check("state/C_last", r.last.c.data());
  check("state/n_last", r.last.n.data());
  check("state/m_last", r.last.m);
  backward(r.h, c.tensor("upstream/h").to(a).to(device).transpose(1, 2));
  const std::string group = full ? "grad/in/" : "grad_den_const/in/";
  check(group + "q", q.grad().transpose(1, 2));
  check(group + "k", k.grad().transpose(1, 2));
  check(group + "v", v.grad().transpose(1, 2));
  check(group + "i", i.grad().transpose(1, 2));
  check(group + "f", f.grad().transpose(1, 2));
  if (!initial.c.defined()) return;
  check(group + "C0", initial.c.grad());
  // With a constant denominator nothing depends on n0.
  if (full) check(group + "n0", initial.n.grad());
}

TEST_CASE("mlstm meets the goldens in fp64, fp32 and bf16, with both gradients") {
  for_each_golden("xlstm.h5", "mlstm_cell_", [](const GoldenCase& c) {
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16})
      for (const bool full : {true, false}) check_case(c, dtype, kCpu, full);
  });
}

TEST_CASE("mlstm meets the goldens on cuda", "[cuda]") {
  for_each_golden("xlstm.h5", "mlstm_cell_", [](const GoldenCase& c) {
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16})
      for (const bool full : {true, false}) check_case(c, dtype, cuda_device(), full);
  });
}

}  // namespace
}  // namespace krait
