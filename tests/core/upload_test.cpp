#include "core/upload.h"

#include "tests/testing/tensors.h"

using namespace krait;

namespace {

// More uploads into one tensor than may be in flight, of which every one is kept as it arrived.
void check_uploads(Device device, int64_t n) {
  INFO("elements " << n);
  constexpr int64_t kCount = 40;
  Uploader uploader(device);
  Tensor fixed = empty({n}, DType::i32, device), all = empty({kCount, n}, DType::i32, device);
  Tensor host = arange(n, DType::i32, kCpu);
  for (int64_t i = 0; i < kCount; ++i) {
    if (n > 0) host.data<int32_t>()[n - 1] = static_cast<int32_t>(-i);
    uploader.upload(fixed, host);
    Tensor row = all.select(0, i);
    copy_(row, fixed);
  }
  const Tensor found = all.cpu();
  bool same = true;
  for (int64_t i = 0; i < kCount; ++i)
    for (int64_t j = 0; j < n; ++j)
      same = same && found.data<int32_t>()[i * n + j] == (j + 1 == n ? -i : j);
  CHECK(same);
}

}  // namespace

TEST_CASE("uploads arrive in order") {
  for (const int64_t n : {0, 1, 1000}) check_uploads(kCpu, n);
}
TEST_CASE("uploads arrive in order on cuda, small ones and those beside the queued work", "[cuda]") {
  if (cuda_device_count() == 0) return;
  for (const int64_t n : {0, 1, 1000, 65536, 1000003}) check_uploads(cuda_device(), n);
}
