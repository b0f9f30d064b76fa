#include <algorithm>

#include "core/random.h"
#include "kernels/matmul.h"
#include "train/bench.h"

namespace krait::train::bench {

namespace {

Tensor random_matrix(int64_t n, DType dtype, Device device, uint64_t key) {
  // Zeros would run faster than data do. A strip of random rows, repeated.
  const int64_t strip = std::min<int64_t>(n, 64);
  Tensor rows = empty({strip, n}, DType::f32, kCpu);
  fill_normal_(rows, 0, 1, key);
  Tensor all = empty({n / strip, strip, n}, dtype, device);
  copy_(all, rows.to(dtype).to(device).unsqueeze(0).expand(all.shape()));
  return all.view({n, n});
}

double product_rate(Device device, DType dtype, int64_t n, double seconds) {
  const Tensor a = random_matrix(n, dtype, device, 1), b = random_matrix(n, dtype, device, 2);
  Tensor c = empty({n, n}, dtype, device);
  const Timing t = measure(device, [&] { kernels::matmul_out(c, a, b); },
                           {.seconds = seconds, .min_laps = 5, .max_laps = 100, .cold = false});
  return 2e3 * static_cast<double>(n * n * n) / t.median_ms;
}

// The better of a copy queued by itself and one inside a captured graph, where the library may take another way.
double copy_rate(Device device, int64_t bytes, double seconds) {
  const Tensor from = full({bytes / 4}, 1.5, DType::f32, device);
  Tensor to = zeros_like(from);
  double best = 0;
  for (const bool graph : {false, true}) {
    const Timing t = measure(device, [&] { copy_(to, from); },
                             {.seconds = seconds, .min_laps = 5, .max_laps = 100, .cold = false, .graph = graph});
    best = std::max(best, 2e3 * static_cast<double>(bytes) / t.median_ms);
  }
  return best;
}

}  // namespace

Ceilings measure_ceilings(Device device, double seconds) {
  Ceilings c;
  if (device.is_cpu()) {
    c.product["fp32 1024"] = product_rate(device, DType::f32, 1024, seconds);
    c.copy = copy_rate(device, int64_t{256} << 20, seconds);
    return c;
  }
  const bool before = kernels::tf32();
  for (const int64_t mib : {256, 1024, 2048}) c.copy = std::max(c.copy, copy_rate(device, mib << 20, seconds));
  kernels::set_tf32(false);
  c.product["bf16 4096"] = product_rate(device, DType::bf16, 4096, seconds);
  c.product["bf16 8192"] = product_rate(device, DType::bf16, 8192, seconds);
  c.product["fp32 4096"] = product_rate(device, DType::f32, 4096, seconds);
  kernels::set_tf32(true);
  c.product["tf32 8192"] = product_rate(device, DType::f32, 8192, seconds);
  kernels::set_tf32(before);
  return c;
}

}  // namespace krait::train::bench
