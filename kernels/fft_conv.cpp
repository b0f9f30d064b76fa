#include "kernels/fft_conv.h"

namespace krait::kernels {

namespace {

Tensor contiguous_or_none(const Tensor& t) { return t.defined() ? t.contiguous() : Tensor(); }

void check_inputs(const Tensor& u, const Tensor& K, const Tensor& K1, const Tensor& D, const Tensor& segments) {
  KRAIT_CHECK(u.ndim() == 3, "fft_conv: u is {}, expected (batch, length, channels)", u.shape());
  const DType a = accum_dtype(u.dtype());
  const auto check_kernel = [&](const char* name, const Tensor& k) {
    KRAIT_CHECK(k.ndim() == 2 && k.size(0) == u.size(2) && k.size(1) >= 1,
                "fft_conv: {} is {}, expected ({}, at least 1) to match u {}", name, k.shape(), u.size(2), u.shape());
    KRAIT_CHECK(k.dtype() == a && k.device() == u.device(), "fft_conv: {} is {}, expected {} on {} with u {}", name,
                describe(k), name_of(a), u.device(), describe(u));
  };
  check_kernel("K", K);
  if (K1.defined()) check_kernel("K1", K1);
  if (D.defined()) {
    KRAIT_CHECK(D.shape() == Shape{u.size(2)}, "fft_conv: D is {}, expected {}", D.shape(), Shape{u.size(2)});
    KRAIT_CHECK(D.dtype() == a && D.device() == u.device(), "fft_conv: D is {}, expected {} on {}", describe(D),
                name_of(a), u.device());
  }
  if (segments.defined()) {
    KRAIT_CHECK(segments.shape() == u.shape().drop_last() && segments.dtype() == DType::i32,
                "fft_conv: segments are {}, expected int32 {}", describe(segments), u.shape().drop_last());
    KRAIT_CHECK(segments.device() == u.device(), "fft_conv: segments are on {}, u is on {}", segments.device(),
                u.device());
  }
}

}  // namespace

Tensor fft_conv_forward(const Tensor& u, const Tensor& K, const Tensor& K1, const Tensor& D, const Tensor& segments) {
  check_inputs(u, K, K1, D, segments);
  Tensor y = empty(u.shape(), u.dtype(), u.device());
  if (u.numel() == 0) return y;
  KRAIT_DISPATCH(u.device(), fft_conv_forward(y, u.contiguous(), K.contiguous(), contiguous_or_none(K1),
                                              contiguous_or_none(D), contiguous_or_none(segments)));
  return y;
}

FftConvGrad fft_conv_backward(const Tensor& dy, const Tensor& u, const Tensor& K, const Tensor& K1, const Tensor& D,
                              const Tensor& segments) {
  check_inputs(u, K, K1, D, segments);
  check_same("fft_conv", u, dy);
  KRAIT_CHECK(dy.shape() == u.shape(), "fft_conv: dy is {}, u is {}", dy.shape(), u.shape());
  FftConvGrad g{empty(u.shape(), u.dtype(), u.device()), empty(K.shape(), K.dtype(), K.device()), {}, {}};
  if (K1.defined()) g.dK1 = empty(K1.shape(), K1.dtype(), K1.device());
  if (u.numel() == 0) {
    zero_(g.dK);
    if (K1.defined()) zero_(g.dK1);
  } else {
    KRAIT_DISPATCH(u.device(), fft_conv_backward(g.du, g.dK, g.dK1, dy.contiguous(), u.contiguous(), K.contiguous(),
                                                 contiguous_or_none(K1), contiguous_or_none(D),
                                                 contiguous_or_none(segments)));
  }
  if (D.defined()) g.dD = g.dK.select(1, 0).contiguous();  // the skip is the kernel's lag 0
  return g;
}

std::string fft_conv_kernel_name(int64_t length, DType dtype, Device device, bool has_segments) {
  std::string name;
  KRAIT_DISPATCH(device, fft_conv_kernel_name(name, length, dtype, has_segments));
  return name;
}

}  // namespace krait::kernels
