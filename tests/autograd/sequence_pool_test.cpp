#include "autograd/sequence_pool.h"

#include "tests/testing/op_case.h"

using namespace krait;

namespace {

// Lengths 1, l, and in between, by row.
Tensor lengths_of(int64_t b, int64_t l, Device device) {
  std::vector<int32_t> n;
  for (int64_t row = 0; row < b; ++row) n.push_back(static_cast<int32_t>(1 + (row * 7 + l - 1) % l));
  return from_vector(n).to(device);
}

Variable reference(const Variable& x, Pool pool) {
  const int64_t b = x.size(0), l = x.size(1), d = x.size(2);
  const auto n = lengths_of(b, l, kCpu).to_vector<int32_t>();
  const auto in = x.data().to_vector<double>();
  std::vector<double> out;
  for (int64_t row = 0; row < b; ++row)
    for (int64_t c = 0; c < d; ++c) {
      const int64_t last = n[static_cast<size_t>(row)];
      double sum = 0;
      for (int64_t t = 0; t < last; ++t) {
        const double v = in[static_cast<size_t>((row * l + t) * d + c)];
        sum = pool == Pool::mean ? sum + v / static_cast<double>(last) : v;
      }
      out.push_back(sum);
    }
  return Variable(from_vector(out, Shape{b, d}));
}

OpCase pool_case(Pool pool) {
  return {.name = pool == Pool::mean ? "mean" : "last",
          .run = [pool](const Vars& in) {
            return sequence_pool(in[0], lengths_of(in[0].size(0), in[0].size(1), in[0].device()), pool);
          },
          .reference = [pool](const Vars& in) { return reference(in[0], pool); },
          .shapes = {{{1, 1, 1}}, {{3, 5, 33}}, {{2, 130, 65}}, {{0, 3, 4}}, {{4, 17, 1}}},
          .inputs = {Normal{}, Normal{.mean = 100}},
          .tolerance = {{f32, 1e-5}, {bf16_type, 1e-2}}};
}

}  // namespace

TEST_CASE("sequence_pool matches plain loops") {
  check_reference(pool_case(Pool::mean));
  check_reference(pool_case(Pool::last));
}
TEST_CASE("sequence_pool passes gradcheck") {
  check_grad(pool_case(Pool::mean));
  check_grad(pool_case(Pool::last));
}
TEST_CASE("sequence_pool: cuda equals cpu", "[cuda]") {
  check_twin(pool_case(Pool::mean));
  check_twin(pool_case(Pool::last));
}
TEST_CASE("sequence_pool without lengths takes the whole sequence") {
  const Variable x(random_tensor({2, 3, 4}, Normal{}, 1));
  const Tensor all = from_vector(std::vector<int32_t>{3, 3});
  for (const Pool pool : {Pool::mean, Pool::last})
    CHECK(relative_error(sequence_pool(x, {}, pool).data(), sequence_pool(x, all, pool).data()) == 0);
}
