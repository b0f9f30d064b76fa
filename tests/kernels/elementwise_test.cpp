#include "kernels/elementwise.h"

#include <cmath>
#include <limits>

#include "core/parallel.h"
#include "tests/testing/tensors.h"

using namespace krait;
using namespace krait::kernels;

TEST_CASE("comparisons give bool tensors and broadcast") {
  const Tensor a = from_vector<float>({1, 2, 3, 4}, {2, 2}), b = from_vector<float>({2, 2});
  CHECK(kernels::less(a, b).dtype() == DType::boolean);
  CHECK(kernels::less(a, b).to_vector<int32_t>() == std::vector<int32_t>{1, 0, 0, 0});
  CHECK(kernels::greater(a, b).to_vector<int32_t>() == std::vector<int32_t>{0, 0, 1, 1});
  CHECK(kernels::equal(a, b).to_vector<int32_t>() == std::vector<int32_t>{0, 1, 0, 0});
}

TEST_CASE("comparisons take integers") {
  const Tensor a = from_vector<int64_t>({1, 1LL << 52, 7}), b = from_vector<int64_t>({1, (1LL << 52) + 1, 7});
  CHECK(kernels::equal(a, b).to_vector<int32_t>() == std::vector<int32_t>{1, 0, 1});
}

TEST_CASE("maximum, minimum and relu pass NaN on") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Tensor a = from_vector<float>({nan, 1, 2}), b = from_vector<float>({1, nan, 1});
  const auto high = kernels::maximum(a, b).to_vector<float>(), low = kernels::minimum(a, b).to_vector<float>();
  CHECK((std::isnan(high[0]) && std::isnan(high[1]) && high[2] == 2));
  CHECK((std::isnan(low[0]) && std::isnan(low[1]) && low[2] == 1));
  CHECK(std::isnan(kernels::relu(a).to_vector<float>()[0]));
}

TEST_CASE("where does not look at values that are not chosen") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Tensor mask = from_vector<uint8_t>({1, 0}).to(DType::boolean);
  const Tensor y = kernels::where(mask, from_vector<float>({3, nan}), from_vector<float>({nan, 4}));
  CHECK(y.to_vector<float>() == std::vector<float>{3, 4});
}

TEST_CASE("long tensors give the same on any number of threads, contiguous or not") {
  const Tensor a = random_tensor({1500, 70}, Normal{}, 1, DType::f32), b = random_tensor({70}, Normal{}, 2, DType::f32);
  const auto whole = kernels::mul(a, b).to_vector<float>();
  set_num_threads(1);
  CHECK(kernels::mul(a, b).to_vector<float>() == whole);
  set_num_threads(0);
  CHECK(kernels::mul(strided_copy_of(a), strided_copy_of(b)).to_vector<float>() == whole);
  CHECK(kernels::mul(a.transpose(0, 1), b.unsqueeze(1)).transpose(0, 1).to_vector<float>() == whole);
  for (size_t i : {size_t{0}, size_t{69}, size_t{70}, size_t{104999}})
    CHECK(whole[i] == a.to_vector<float>()[i] * b.to_vector<float>()[i % 70]);
}
