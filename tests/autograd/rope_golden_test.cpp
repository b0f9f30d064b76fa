#include "autograd/rope.h"
#include "tests/testing/golden.h"

using namespace krait;

namespace {

// Goldens are (b, h, l, d); rope takes (b, l, h, d), which is a view.
void check_all(Device device) {
  for_each_golden("transformer.h5", "rope_", [&](const GoldenCase& c) {
    const auto offset = static_cast<int64_t>(c.number("off")), l = static_cast<int64_t>(c.number("L"));
    const RopeStyle style = c.number("interleaved") != 0 ? RopeStyle::interleaved : RopeStyle::half;
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      const auto t = kernels::rope_table(offset + l, static_cast<int64_t>(c.number("rot")), c.number("theta"), device,
                                         accum_dtype(dtype));
      const auto load = [&](const char* path) { return c.tensor(path).to(dtype).to(device).transpose(1, 2); };
      const Variable x(load("in/x"), true);
      const Variable y = rope(x, t.cos, t.sin, style, offset);
      backward(y, load("upstream/y"));
      c.check("out/y", y.data().transpose(1, 2));
      c.check("grad/in/x", x.grad().transpose(1, 2));
    }
  });
}

}  // namespace

TEST_CASE("rope meets the goldens") { check_all(kCpu); }
TEST_CASE("rope meets the goldens on cuda", "[cuda]") { check_all(cuda_device()); }
