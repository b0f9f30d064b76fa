#include "core/dtype.h"

#include <array>
#include <cmath>
#include <cstring>

namespace krait::core {

namespace {
struct Entry {
  DType dtype;
  std::string_view name, alias;
  int64_t bytes;
  bool floating;
};
constexpr std::array<Entry, 8> kTypes{{{DType::f32, "float32", "fp32", 4, true},
                                       {DType::f64, "float64", "fp64", 8, true},
                                       {DType::bf16, "bfloat16", "bf16", 2, true},
                                       {DType::f16, "float16", "fp16", 2, true},
                                       {DType::i32, "int32", "i32", 4, false},
                                       {DType::i64, "int64", "i64", 8, false},
                                       {DType::u8, "uint8", "u8", 1, false},
                                       {DType::boolean, "bool", "bool", 1, false}}};
const Entry& entry(DType dtype) { return kTypes[static_cast<size_t>(dtype)]; }
}  // namespace

int64_t size_of(DType dtype) { return entry(dtype).bytes; }
std::string_view name_of(DType dtype) { return entry(dtype).name; }
bool is_floating(DType dtype) { return entry(dtype).floating; }

DType dtype_from_name(std::string_view name) {
  for (const Entry& e : kTypes)
    if (e.name == name || e.alias == name) return e.dtype;
  throw_error(fmt::format("unknown dtype '{}': expected fp32, fp64, bf16, fp16, int32, int64, uint8 or bool", name));
}

uint16_t f16::host_to_bits(float value) {
  const uint32_t u = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {  // subnormal half: add in units of 2^-24 and let the FPU round
    const float scaled = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(scaled) - 0x3F000000u));
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

float f16::host_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t exponent = (bits >> 10) & 0x1Fu, mantissa = bits & 0x3FFu;
  if (exponent == 0) {
    const float value = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -value : value;
  }
  const uint32_t e = exponent == 31 ? 255u : exponent + 112u;
  return std::bit_cast<float>(sign | (e << 23) | (mantissa << 13));
}

}  // namespace krait::core
