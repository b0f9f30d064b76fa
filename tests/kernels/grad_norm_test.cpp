#include "kernels/grad_norm.h"

#include <cmath>

#include "core/parallel.h"
#include "tests/testing/tensors.h"

using namespace krait;
using namespace krait::kernels;

namespace {

double plain_sum(const Tensor& x) {
  double s = 0;
  for (const double v : x.to_vector<double>()) s += v * v;
  return s;
}

void check_sizes(Device device) {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16})
    for (const int64_t n : {0, 1, 7, 16383, 16384, 16385, 100003}) {
      INFO(name_of(dtype) << " " << n);
      const Tensor x = random_tensor({n + 1}, Normal{.mean = 0.5}, 3, DType::f64).to(dtype);
      const Tensor whole = x.slice(0, 0, n), shifted = x.slice(0, 1, n + 1);  // the second is not aligned
      for (const Tensor& part : {whole, shifted}) {
        const Tensor on_device = device.is_cpu() ? part : x.to(device).slice(0, part.offset(), part.offset() + n);
        CHECK(grad_norm(on_device, 0).sum_squares().item() == Approx(plain_sum(part)).epsilon(1e-12));
      }
    }
}

}  // namespace

TEST_CASE("grad_norm is the L2 norm for every size, dtype and alignment") { check_sizes(kCpu); }
TEST_CASE("grad_norm is the L2 norm on a GPU", "[cuda]") { check_sizes(cuda_device()); }

TEST_CASE("grad_norm does not depend on the number of threads, bit for bit") {
  const Tensor x = random_tensor({300007}, Normal{}, 5, DType::f32);
  const double all = grad_norm(x, 1).norm().item();
  set_num_threads(1);
  const double one = grad_norm(x, 1).norm().item();
  set_num_threads(0);
  CHECK(all == one);
}

TEST_CASE("grad_norm on a GPU gives the same bits twice", "[cuda]") {
  const Tensor x = random_tensor({300007}, Normal{}, 5, DType::f32).to(cuda_device());
  CHECK(grad_norm(x, 1).norm().item() == grad_norm(x, 1).norm().item());
}

TEST_CASE("clip_scale is 1 below max_norm and where max_norm is 0") {
  const Tensor x = full({4}, 2, DType::f32, kCpu);  // norm 4
  CHECK(grad_norm(x, 2).clip_scale().item() == Approx(2 / (4 + 1e-6)).epsilon(1e-15));
  CHECK(grad_norm(x, 5).clip_scale().item() == 1);
  CHECK(grad_norm(x, 0).clip_scale().item() == 1);
  CHECK(grad_norm(x, -1).norm().item() == 4);
}

TEST_CASE("large finite gradients have a finite norm") {
  const Tensor x = full({1000}, 1e30, DType::f32, kCpu);
  CHECK(grad_norm(x, 1).finite().item() == 1);
  CHECK(grad_norm(x, 1).norm().item() == Approx(1e30 * std::sqrt(1000.0)).epsilon(1e-6));
}

TEST_CASE("the norm over several buffers comes from their sums") {
  const Tensor x = random_tensor({50000}, Normal{}, 7, DType::f64);
  const double a = grad_norm(x.slice(0, 0, 16384), 0).sum_squares().item();
  const double b = grad_norm(x.slice(0, 16384, 50000), 0).sum_squares().item();
  CHECK(norm_clip(from_vector(std::vector<double>{a, b}), 1).norm().item() ==
        Approx(grad_norm(x, 1).norm().item()).epsilon(1e-14));
}
