#pragma once
#include <variant>

#include "core/tensor.h"
#include "tests/testing/catch.h"

// Tensors of tests: how they are filled and compared.
namespace krait::testing {

inline constexpr DType f32 = DType::f32, f64 = DType::f64, bf16_type = DType::bf16;

struct Normal { double mean = 0, std = 1; };
struct Uniform { double low = 0, high = 1; };
struct Constant { double value = 0; };
using Fill = std::variant<Normal, Uniform, Constant>;
struct IntegerRange { int64_t low = 0, high = 1; };  // [low, high)

/// max|a - ref| / max(max|ref|, 1e-6); infinite when finiteness differs.
double relative_error(const Tensor& a, const Tensor& reference);
Tensor random_tensor(const Shape& shape, const Fill& fill, uint64_t seed, DType dtype = DType::f64);
Tensor random_integers(const Shape& shape, IntegerRange range, uint64_t seed);
/// The same values behind other strides and a storage offset.
Tensor strided_copy_of(const Tensor& t);

}  // namespace krait::testing

namespace krait {
using namespace testing;  // test files say Normal, random_tensor
}
