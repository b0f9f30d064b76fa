#include "kernels/logit_chunk.h"

#include "core/allocator.h"
#include "kernels/cross_entropy.h"
#include "tests/testing/tensors.h"

using namespace krait;
using kernels::logit_chunk_rows;

TEST_CASE("chunks of logits are as equal as multiples of 128 can be, and modest") {
  const Device gpu = cuda_device();
  const int64_t row = 50304 * 2, most = int64_t{832} << 20;
  for (const int64_t t : {1, 100, 128, 1000, 8192, 8672, 8673, 16384, 65536, 100'001}) {
    const int64_t rows = logit_chunk_rows(t, row, gpu), parts = (t + rows - 1) / rows;
    INFO("t " << t << " rows " << rows);
    CHECK(rows <= t);
    CHECK((rows == t || rows % 128 == 0));
    CHECK(rows * row <= most + 127 * row);
    CHECK((parts == 1 || (parts - 1) * (most / row) < t));  // no more parts than the limit asks for
  }
  CHECK(logit_chunk_rows(1000, int64_t{1} << 33, gpu) == 128);
  CHECK(logit_chunk_rows(int64_t{1} << 54, row, gpu) * row <= most + 127 * row);
  CHECK(logit_chunk_rows(1000, 0, gpu) == 1000);
  CHECK(logit_chunk_rows(1000, row, kCpu) == 192);
  CHECK(logit_chunk_rows(100, row, kCpu) == 100);
  CHECK(logit_chunk_rows(100'000, 1024, kCpu) == 960);
  CHECK(logit_chunk_rows(0, row, kCpu) == 0);
}

TEST_CASE("a chunk of logits is what linear_cross_entropy holds") {
  const int64_t t = 1000, d = 4, v = 3000;
  const Tensor x = random_tensor({t, d}, Normal{}, 1, DType::f32), w = random_tensor({v, d}, Normal{}, 2, DType::f32);
  const Tensor targets = random_integers({t}, {0, v}, 3);
  Allocator& memory = allocator(kCpu);
  memory.reset_peak();
  const int64_t before = memory.stats().current_bytes;
  kernels::linear_cross_entropy_nll(x, w, targets);
  const double held = static_cast<double>(memory.stats().peak_bytes - before), chunk = static_cast<double>(logit_chunk_rows(t, v * 4, kCpu) * v * 4);
  CHECK(held >= chunk);
  CHECK(held < 1.1 * chunk);
}
