#include "kernels/ssm_parameters.h"

namespace krait::kernels {

void check_ssm_parameters(const char* name, const Tensor& log_dt, const Tensor& log_A_re, const Tensor& A_im, const Tensor& B, const Tensor& C) {
  check_same(name, log_dt, log_A_re, A_im, B, C);
  const DType dtype = log_dt.dtype();
  KRAIT_CHECK(dtype == DType::f32 || dtype == DType::f64, "{}: parameters are {}, expected float32 or float64", name, dtype);
  KRAIT_CHECK(log_dt.ndim() == 1 && log_A_re.ndim() == 2, "{}: log_dt is {}, expected (h); A is {}, expected (s, n)", name, log_dt.shape(),
              log_A_re.shape());
  const int64_t h = log_dt.size(0), s = log_A_re.size(0), n = log_A_re.size(1);
  KRAIT_CHECK(s > 0 ? h % s == 0 : h == 0, "{}: {} sets of A do not divide {} channels", name, s, h);
  KRAIT_CHECK(A_im.shape() == (Shape{s, n}) && B.shape() == (Shape{s, n, 2}) && C.shape() == (Shape{h, n, 2}),
              "{}: A_im is {}, B is {}, C is {}; expected {}, {}, {}", name, A_im.shape(), B.shape(), C.shape(), Shape{s, n}, Shape{s, n, 2},
              Shape{h, n, 2});
}

}  // namespace krait::kernels
