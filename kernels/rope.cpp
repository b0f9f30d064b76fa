#include "kernels/rope.h"

#include <cmath>

namespace krait::kernels {

RopeTable rope_table(int64_t max_len, int64_t rotary_dim, double base, Device device, DType dtype) {
  KRAIT_CHECK(max_len >= 0 && rotary_dim >= 0 && rotary_dim % 2 == 0,
              "rope_table: {} positions of {} rotated channels; the channels must be even", max_len, rotary_dim);
  KRAIT_CHECK(base > 0, "rope_table: base is {}, expected a positive number", base);
  const int64_t half = rotary_dim / 2;
  const Tensor cos = empty({max_len, half}, DType::f64, kCpu), sin = empty({max_len, half}, DType::f64, kCpu);
  for (int64_t i = 0; i < half; ++i) {
    const double frequency = std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(rotary_dim));
    for (int64_t p = 0; p < max_len; ++p) {
      const double angle = static_cast<double>(p) * frequency;
      cos.data<double>()[p * half + i] = std::cos(angle);
      sin.data<double>()[p * half + i] = std::sin(angle);
    }
  }
  return {cos.to(dtype).to(device), sin.to(dtype).to(device)};
}

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, RopeStyle style, const Tensor& positions,
            int64_t offset, bool inverse) {
  Tensor y = empty_like(x);
  rope_into(y, x, cos, sin, style, positions, offset, inverse);
  return y;
}

void rope_into(Tensor& y, const Tensor& x_in, const Tensor& cos, const Tensor& sin, RopeStyle style,
               const Tensor& positions, int64_t offset, bool inverse) {
  KRAIT_CHECK(x_in.ndim() == 4, "rope: x is {}, expected (b, l, h, d)", x_in.shape());
  KRAIT_CHECK(y.shape() == x_in.shape(), "rope: y is {}, x is {}", y.shape(), x_in.shape());
  check_same("rope", x_in, y);
  check_same("rope tables", cos, sin);
  const int64_t b = x_in.size(0), l = x_in.size(1), d = x_in.size(3);
  KRAIT_CHECK(cos.ndim() == 2 && cos.shape() == sin.shape() && 2 * cos.size(1) <= d,
              "rope: tables are {} and {}, expected (positions, at most {}) for x {}", cos.shape(), sin.shape(), d / 2,
              x_in.shape());
  KRAIT_CHECK(cos.dtype() == accum_dtype(x_in.dtype()) && cos.device() == x_in.device(),
              "rope: tables are {}, expected {} on {}", describe(cos), accum_dtype(x_in.dtype()), x_in.device());
  KRAIT_CHECK(y.stride(3) == 1 || d <= 1, "rope: the last dimension of y is not contiguous");
  Tensor at;
  if (positions.defined()) {
    KRAIT_CHECK(positions.shape() == Shape({b, l}) || positions.shape() == Shape{l},
                "rope: positions are {}, expected ({}, {}) or ({})", positions.shape(), b, l, l);
    KRAIT_CHECK(positions.device() == x_in.device(), "rope: positions are on {}, x on {}", positions.device(),
                x_in.device());
    at = positions.expand({b, l});
  } else {
    KRAIT_CHECK(offset >= 0 && offset + l <= cos.size(0),
                "rope: positions {} to {} do not fit the table of {}; build a longer one", offset, offset + l - 1,
                cos.size(0));
  }
  if (x_in.numel() == 0) return;
  const Tensor x = x_in.stride(3) == 1 || d == 1 ? x_in : x_in.contiguous();
  KRAIT_DISPATCH(x.device(), rope(y, x, cos.contiguous(), sin.contiguous(), style, at, offset, inverse));
}

Tensor linear_rope(const Tensor& x, const Tensor& w, const Tensor& bias, int64_t heads, int64_t rotated, const Tensor& cos,
                   const Tensor& sin, RopeStyle style, int64_t offset) {
  check_same("linear_rope", x, w);
  check_same("rope tables", cos, sin);
  KRAIT_CHECK(x.ndim() == 3 && w.ndim() == 2 && x.size(2) == w.size(1) && w.size(1) > 0 && heads > 0 &&
                  w.size(0) % heads == 0 && rotated >= 0 && rotated <= heads,
              "linear_rope: x is {}, weight is {} of {} heads, {} of them rotated", x.shape(), w.shape(), heads, rotated);
  const int64_t b = x.size(0), l = x.size(1), d = w.size(0) / heads;
  KRAIT_CHECK(!bias.defined() || bias.shape() == Shape{w.size(0)}, "linear_rope: bias is {}, expected {}", bias.shape(),
              Shape{w.size(0)});
  KRAIT_CHECK(cos.ndim() == 2 && cos.shape() == sin.shape() && 2 * cos.size(1) <= d &&
                  cos.dtype() == accum_dtype(x.dtype()) && cos.device() == x.device(),
              "linear_rope: tables are {} and {}, expected (positions, at most {}) of {} on {}", describe(cos),
              describe(sin), d / 2, accum_dtype(x.dtype()), x.device());
  KRAIT_CHECK(offset >= 0 && offset + l <= cos.size(0),
              "rope: positions {} to {} do not fit the table of {}; build a longer one", offset, offset + l - 1, cos.size(0));
  Tensor y = empty({b, l, heads, d}, x.dtype(), x.device());
  if (y.numel() == 0) return y;
  const Tensor rows = blas_ready(x.flatten_leading()), weight = blas_ready(w);
  Tensor flat = y.view({b * l, heads * d});
  const Gemm product = gemm_of(flat, rows, weight, false, true);
  KRAIT_DISPATCH(x.device(), linear_rope(y, product, bias.defined() ? bias.contiguous() : bias, rotated, cos.contiguous(),
                                         sin.contiguous(), style, offset));
  return y;
}

}  // namespace krait::kernels
