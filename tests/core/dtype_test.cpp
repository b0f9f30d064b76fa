#include "core/dtype.h"

#include <cmath>
#include <limits>

#include "tests/testing/catch.h"

using namespace krait;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Rounds to a format with `mantissa` stored bits and smallest exponent `lowest`, ties to even, in double.
double rounded(double x, int mantissa, int lowest, double largest) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), lowest);
  const double unit = std::ldexp(1.0, exponent - mantissa), y = std::nearbyint(x / unit) * unit;
  return std::fabs(y) > largest ? std::copysign(kInf, x) : y;
}

// Floats over all exponents, with values halfway between neighbours of the short formats among them.
template <class F>
void for_floats(F body) {
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 5003) body(std::bit_cast<float>(static_cast<uint32_t>(bits)));
  for (uint32_t high = 0; high < 65536; high += 3)
    for (const uint32_t low : {0x7FFFu, 0x8000u, 0x8001u, 0x1000u, 0x0FFFu, 0x3000u})
      body(std::bit_cast<float>((high << 16) | low));
}

template <class T>
int64_t count_wrong(int mantissa, int lowest, double largest) {
  int64_t wrong = 0;
  for_floats([&](float x) {
    const float y = T(x);
    if (std::isnan(x))
      wrong += !std::isnan(y);
    else
      wrong += y != static_cast<float>(rounded(x, mantissa, lowest, largest)) || std::signbit(y) != std::signbit(x);
  });
  return wrong;
}

}  // namespace

TEST_CASE("bf16 rounds to nearest even, subnormals, infinities and NaN included") {
  CHECK(count_wrong<bf16>(7, -126, 3.3895313892515355e38) == 0);
  CHECK(float(bf16(1.00390625f)) == 1.0f);  // a tie goes to the even neighbour
  CHECK(float(bf16(1.01171875f)) == 1.015625f);
  CHECK(float(bf16(3.4e38f)) == kInf);
  CHECK(std::isnan(float(bf16(std::bit_cast<float>(0x7F800001u)))));  // the payload lies in the bits cut off
}

TEST_CASE("f16 rounds to nearest even, subnormals, infinities and NaN included") {
  CHECK(count_wrong<f16>(10, -14, 65504) == 0);
  CHECK(float(f16(65519.0f)) == 65504.0f);
  CHECK(float(f16(65520.0f)) == kInf);
  CHECK(float(f16(0x1p-24f)) == 0x1p-24f);
  CHECK(float(f16(0x1p-25f)) == 0.0f);
  CHECK(float(f16(0x1.8p-25f)) == 0x1p-24f);
}

TEST_CASE("every short value survives a trip through float") {
  int64_t wrong = 0;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    bf16 b;
    b.bits = static_cast<uint16_t>(bits);
    f16 h;
    h.bits = static_cast<uint16_t>(bits);
    if (!std::isnan(float(b))) wrong += bf16(float(b)).bits != bits;
    if (!std::isnan(float(h))) wrong += f16(float(h)).bits != bits;
  }
  CHECK(wrong == 0);
}

TEST_CASE("dtypes have sizes and names, long and short") {
  CHECK(size_of(DType::bf16) == 2);
  CHECK(size_of(DType::i64) == 8);
  CHECK(size_of(DType::boolean) == 1);
  for (const DType d : {DType::f32, DType::f64, DType::bf16, DType::f16, DType::i32, DType::i64, DType::u8, DType::boolean})
    CHECK(dtype_from_name(name_of(d)) == d);
  CHECK(dtype_from_name("bf16") == DType::bf16);
  CHECK(dtype_from_name("fp32") == DType::f32);
  CHECK(contains(error_of([] { dtype_from_name("float8"); }), "unknown dtype 'float8': expected fp32"));
  CHECK(is_floating(DType::f16));
  CHECK(!is_floating(DType::u8));
  CHECK(accum_dtype(DType::bf16) == DType::f32);
  CHECK(accum_dtype(DType::f64) == DType::f64);
}

TEST_CASE("half precision is stored, not computed in") {
  CHECK(contains(error_of([] { visit_float(DType::f16, []<class T>() {}); }), "found float16"));
  CHECK(contains(error_of([] { visit_index(DType::f32, []<class T>() {}); }), "expected int32 or int64"));
}
