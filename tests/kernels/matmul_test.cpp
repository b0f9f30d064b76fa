#include "kernels/matmul.h"

#include <cmath>

#include "core/parallel.h"
#include "kernels/cpu/gemm.h"
#include "tests/testing/tensors.h"

using namespace krait;

namespace {

// Plain triple loop over fp64 values, leading dimensions broadcast.
Tensor reference(const Tensor& a_in, const Tensor& b_in, bool ta, bool tb) {
  Tensor a = a_in.to(DType::f64), b = b_in.to(DType::f64);
  if (ta) a = a.transpose(-1, -2);
  if (tb) b = b.transpose(-1, -2);
  const int64_t m = a.size(-2), k = a.size(-1), n = b.size(-1);
  const Shape batch = broadcast_shapes(a.shape().drop_last(2), b.shape().drop_last(2));
  a = a.expand(batch.append(m).append(k)).contiguous();
  b = b.expand(batch.append(k).append(n)).contiguous();
  Tensor c = zeros(batch.append(m).append(n), DType::f64, kCpu);
  for (int64_t q = 0; q < batch.numel(); ++q)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j)
        for (int64_t p = 0; p < k; ++p)
          c.data<double>()[(q * m + i) * n + j] +=
              a.data<double>()[(q * m + i) * k + p] * b.data<double>()[(q * k + p) * n + j];
  return c;
}

Tensor normal(const Shape& shape, uint64_t seed, DType dtype) { return random_tensor(shape, Normal{}, seed, dtype); }

const std::vector<std::array<int64_t, 3>> kSizes = {{1, 1, 1},   {1, 7, 5},    {5, 1, 9},    {12, 32, 16}, {13, 33, 17},
                                                    {97, 65, 130}, {8, 8, 800}, {110, 70, 1601}, {101, 70, 1024}, {3, 5, 0}};

}  // namespace

TEST_CASE("matmul equals a plain triple loop in every dtype, size and transposition") {
  for (const auto& [m, n, k] : kSizes)
    for (const DType dtype : {f32, f64, bf16_type})
      for (int t = 0; t < 4; ++t) {
        const bool ta = t & 1, tb = t & 2;
        const Tensor a = normal(ta ? Shape{k, m} : Shape{m, k}, 1, dtype);
        const Tensor b = normal(tb ? Shape{n, k} : Shape{k, n}, 2, dtype);
        INFO(a.shape().str() << " " << b.shape().str() << " " << t << " " << name_of(dtype));
        const double tolerance = dtype == f64 ? 1e-13 : dtype == f32 ? 2e-6 : 5e-3;
        CHECK(relative_error(kernels::matmul(a, b, ta, tb), reference(a, b, ta, tb)) < tolerance);
      }
}

TEST_CASE("matmul broadcasts leading dimensions and reads strided views in place") {
  const Tensor a = normal({3, 1, 5, 7}, 1, f64), b = normal({4, 7, 6}, 2, f64);
  CHECK(relative_error(kernels::matmul(a, b), reference(a, b, false, false)) < 1e-13);
  // (b, l, h, d) seen as (b, h, l, d): two batch dimensions that do not join
  const Tensor q = normal({2, 9, 3, 8}, 3, f32).transpose(1, 2), k = normal({2, 11, 3, 8}, 4, f32).transpose(1, 2);
  CHECK(relative_error(kernels::matmul(q, k, false, true), reference(q, k, false, true)) < 2e-6);
  const Tensor wide = normal({40, 60}, 5, f32);
  const Tensor x = wide.slice(0, 3, 33).slice(1, 10, 30), y = wide.transpose(0, 1).slice(0, 7, 27);
  CHECK(relative_error(kernels::matmul(x, y), reference(x, y, false, false)) < 2e-6);
  const Tensor gaps = strided_copy_of(normal({6, 20}, 6, f32));
  CHECK(relative_error(kernels::matmul(gaps, y), reference(gaps, y, false, false)) < 2e-6);
  const Tensor none = kernels::matmul(empty({0, 4}, f32, kCpu), empty({4, 3}, f32, kCpu));
  CHECK(none.shape() == Shape{0, 3});
}

TEST_CASE("matmul_out accumulates, scales, widens bf16 into fp32 and sums broadcast dimensions") {
  const Tensor a = normal({4, 30, 20}, 1, bf16_type), b = normal({4, 30, 25}, 2, bf16_type);
  Tensor c = full({20, 25}, 3.0, f32, kCpu);
  kernels::matmul_out(c, a, b, true, false, 0.5, 2.0);  // sum over the batch of a^T b
  Tensor expected = full({20, 25}, 6.0, f64, kCpu);
  const Tensor products = reference(a, b, true, false);
  for (int64_t q = 0; q < 4; ++q)
    for (int64_t i = 0; i < 500; ++i) expected.data<double>()[i] += 0.5 * products.data<double>()[q * 500 + i];
  CHECK(relative_error(c, expected) < 2e-6);

  Tensor inside = zeros({30, 50}, f64, kCpu);  // into a slice, and into a transpose
  const Tensor x = normal({10, 6}, 3, f64), y = normal({6, 20}, 4, f64);
  Tensor window = inside.slice(0, 5, 15).slice(1, 7, 27);
  kernels::matmul_out(window, x, y);
  CHECK(relative_error(window, reference(x, y, false, false)) < 1e-13);
  CHECK(inside.select(0, 4).to_vector<double>() == std::vector<double>(50, 0.0));
  Tensor turned = zeros({20, 10}, f64, kCpu).transpose(0, 1);
  kernels::matmul_out(turned, x, y);
  CHECK(relative_error(turned, reference(x, y, false, false)) < 1e-13);
}

TEST_CASE("matmul gives the same bits on one thread and on two") {
  const Tensor a = normal({150, 900}, 1, f32), b = normal({900, 170}, 2, f32);
  set_num_threads(1);
  const auto one = kernels::matmul(a, b).to_vector<float>();
  set_num_threads(2);
  const auto two = kernels::matmul(a, b).to_vector<float>();
  set_num_threads(0);
  CHECK(one == two);
}

TEST_CASE("sgemm reports every block of c exactly once, when it is final") {
  constexpr int64_t m = 205, n = 100, k = 1700;
  const Tensor a = normal({m, k}, 1, f32), b = normal({k, n}, 2, f32);
  Tensor c = empty({m, n}, f32, kCpu), seen = zeros({m, n}, f32, kCpu), copy = zeros({m, n}, f32, kCpu);
  kernels::cpu::sgemm(m, n, k, 1.0f, {a.data<float>(), k, 1}, {b.data<float>(), n, 1}, 0.0f, c.data<float>(), n,
                      [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
                        for (int64_t i = i0; i < i1; ++i)
                          for (int64_t j = j0; j < j1; ++j) {
                            seen.data<float>()[i * n + j] += 1.0f;
                            copy.data<float>()[i * n + j] = c.data<float>()[i * n + j];
                          }
                      });
  CHECK(seen.to_vector<float>() == std::vector<float>(m * n, 1.0f));
  CHECK(copy.to_vector<float>() == c.to_vector<float>());
}

TEST_CASE("matmul names what does not fit") {
  const Tensor a = zeros({2, 3}, f32, kCpu);
  CHECK(contains(error_of([&] { kernels::matmul(a, a); }), "inner sizes 3 and 2 differ"));
  CHECK(contains(error_of([&] { kernels::matmul(a, zeros({3, 2}, f64, kCpu)); }), "dtypes differ"));
  CHECK(contains(error_of([&] { kernels::matmul(a, zeros({3}, f32, kCpu)); }), "at least two dimensions"));
  Tensor c = zeros({2, 4}, f32, kCpu);
  CHECK(contains(error_of([&] { kernels::matmul_out(c, a, zeros({3, 5}, f32, kCpu)); }), "expected (2, 5)"));
}

TEST_CASE("cuda matmul equals cpu for every dtype, transposition, batch and stride", "[cuda]") {
  const auto check = [](const Tensor& a, const Tensor& b, bool ta, bool tb) {
    const double tolerance = a.dtype() == f64 ? 1e-12 : a.dtype() == f32 ? 5e-6 : 8e-3;
    CHECK(relative_error(kernels::matmul(a.to(cuda_device()), b.to(cuda_device()), ta, tb).cpu(),
                         kernels::matmul(a, b, ta, tb)) < tolerance);
  };
  for (const DType dtype : {f32, f64, bf16_type}) {
    for (const auto& [m, n, k] : kSizes)
      for (int t = 0; t < 4; ++t) {
        INFO(m << " " << n << " " << k << " " << t << " " << name_of(dtype));
        check(normal(t & 1 ? Shape{k, m} : Shape{m, k}, 1, dtype), normal(t & 2 ? Shape{n, k} : Shape{k, n}, 2, dtype),
              t & 1, t & 2);
      }
    check(normal({3, 1, 5, 7}, 1, dtype), normal({4, 7, 6}, 2, dtype), false, false);
  }
  // Views must be made on the device: moving a tensor packs it.
  const Tensor q = normal({2, 9, 3, 8}, 3, f32), g = q.to(cuda_device());
  const auto product = [](const Tensor& t) {
    return kernels::matmul(t.transpose(1, 2), t.transpose(1, 2).slice(2, 1, 8), false, true);
  };
  CHECK(relative_error(product(g).cpu(), product(q)) < 5e-6);
  const Tensor a = normal({4, 30, 20}, 1, bf16_type), b = normal({4, 30, 25}, 2, bf16_type);
  Tensor c = full({20, 25}, 3.0, f32, kCpu), gc = c.to(cuda_device());
  kernels::matmul_out(c, a, b, true, false, 0.5, 2.0);
  kernels::matmul_out(gc, a.to(cuda_device()), b.to(cuda_device()), true, false, 0.5, 2.0);
  CHECK(relative_error(gc.cpu(), c) < 5e-6);
}
