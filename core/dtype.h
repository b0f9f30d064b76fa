#pragma once
#include <bit>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

#include "core/error.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KRAIT_HOST_DEVICE __host__ __device__
#else
#define KRAIT_HOST_DEVICE
#endif

namespace krait {
inline namespace core {

/// Storage type of bfloat16; arithmetic happens in float. Conversions round to nearest even.
struct bf16 {
  uint16_t bits = 0;
  bf16() = default;
  KRAIT_HOST_DEVICE bf16(float value) : bits(round_bits(value)) {}  // NOLINT: converts like a float
  KRAIT_HOST_DEVICE operator float() const {                         // NOLINT
#ifdef __CUDA_ARCH__
    return __uint_as_float(uint32_t{bits} << 16);
#else
    return std::bit_cast<float>(uint32_t{bits} << 16);
#endif
  }

 private:
  KRAIT_HOST_DEVICE static uint16_t round_bits(float value) {
#ifdef __CUDA_ARCH__
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    const uint32_t u = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    const uint32_t nan = (u >> 16) | 0x40u;
    return static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
#endif
  }
};

/// Storage type of IEEE half precision; arithmetic happens in float.
struct f16 {
  uint16_t bits = 0;
  f16() = default;
  KRAIT_HOST_DEVICE f16(float value) : bits(to_bits(value)) {}           // NOLINT
  KRAIT_HOST_DEVICE operator float() const { return to_float(bits); }    // NOLINT

 private:
  KRAIT_HOST_DEVICE static uint16_t to_bits(float value) {
#ifdef __CUDA_ARCH__
    return __half_as_ushort(__float2half_rn(value));
#else
    return host_to_bits(value);
#endif
  }
  KRAIT_HOST_DEVICE static float to_float(uint16_t bits) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(bits));
#else
    return host_to_float(bits);
#endif
  }
  static uint16_t host_to_bits(float value);
  static float host_to_float(uint16_t bits);
};

enum class DType : uint8_t { f32, f64, bf16, f16, i32, i64, u8, boolean };

int64_t size_of(DType dtype);
/// "float32", "bfloat16", ...
std::string_view name_of(DType dtype);
/// Accepts the long names and the short ones (fp32, bf16, ...). Throws Error with the list of names.
DType dtype_from_name(std::string_view name);
bool is_floating(DType dtype);

template <class T> struct dtype_of_impl;
template <> struct dtype_of_impl<float> { static constexpr DType value = DType::f32; };
template <> struct dtype_of_impl<double> { static constexpr DType value = DType::f64; };
template <> struct dtype_of_impl<bf16> { static constexpr DType value = DType::bf16; };
template <> struct dtype_of_impl<f16> { static constexpr DType value = DType::f16; };
template <> struct dtype_of_impl<int32_t> { static constexpr DType value = DType::i32; };
template <> struct dtype_of_impl<int64_t> { static constexpr DType value = DType::i64; };
template <> struct dtype_of_impl<uint8_t> { static constexpr DType value = DType::u8; };
template <> struct dtype_of_impl<bool> { static constexpr DType value = DType::boolean; };
template <class T> inline constexpr DType dtype_of = dtype_of_impl<std::remove_cv_t<T>>::value;

/// The type sums are made in: double for double, float for the other floating types.
template <class T> using accum_t = std::conditional_t<std::is_same_v<T, double>, double, float>;
inline DType accum_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

/// Calls f.template operator()<T>() with the C++ type of the dtype.
/// visit_float: f32, f64, bf16. Half precision is a storage type only: cast it first.
template <class F>
decltype(auto) visit_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f.template operator()<float>();
    case DType::f64: return f.template operator()<double>();
    case DType::bf16: return f.template operator()<bf16>();
    default: throw_error(fmt::format("expected float32, float64 or bfloat16, found {}", name_of(dtype)));
  }
}

template <class F>
decltype(auto) visit_index(DType dtype, F&& f) {
  switch (dtype) {
    case DType::i32: return f.template operator()<int32_t>();
    case DType::i64: return f.template operator()<int64_t>();
    default: throw_error(fmt::format("expected int32 or int64, found {}", name_of(dtype)));
  }
}

template <class F>
decltype(auto) visit_all(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f.template operator()<float>();
    case DType::f64: return f.template operator()<double>();
    case DType::bf16: return f.template operator()<bf16>();
    case DType::f16: return f.template operator()<f16>();
    case DType::i32: return f.template operator()<int32_t>();
    case DType::i64: return f.template operator()<int64_t>();
    case DType::u8: return f.template operator()<uint8_t>();
    case DType::boolean: return f.template operator()<bool>();
  }
  throw_error("invalid dtype");
}

}  // namespace core
}  // namespace krait

template <>
struct fmt::formatter<krait::DType> : fmt::formatter<fmt::string_view> {
  template <class Context>
  auto format(krait::DType dtype, Context& ctx) const {
    const std::string_view name = krait::name_of(dtype);
    return fmt::formatter<fmt::string_view>::format({name.data(), name.size()}, ctx);
  }
};
