#include "kernels/accumulate.h"

#include "tests/testing/tensors.h"

using namespace krait;

// Pieces of 8, what is left over, and pointers that are not aligned.
TEST_CASE("accumulate: cuda equals cpu", "[cuda]") {
  for (const auto& [to, from] : std::vector<std::pair<DType, DType>>{
           {f32, f32}, {f64, f64}, {bf16_type, bf16_type}, {f32, bf16_type}, {bf16_type, f32}})
    for (const int64_t n : {1, 7, 8, 1000, 5003})
      for (const int64_t offset : {0, 1}) {
        const Tensor a = random_tensor({n + 1}, Normal{}, 1, to), b = random_tensor({n + 1}, Normal{}, 2, from);
        const auto sum = [&](Device device) {
          Tensor whole = a.clone().to(device);
          Tensor part = whole.slice(0, offset, offset + n);
          kernels::accumulate(part, b.to(device).slice(0, offset, offset + n));
          return whole.to(kCpu);
        };
        CHECK(relative_error(sum(cuda_device()), sum(kCpu)) <= (to == bf16_type ? 8e-3 : 1e-6));
      }
}
