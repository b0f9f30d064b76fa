#include "autograd/dense_ssm_kernel.h"

#include <cmath>

#include "autograd/elementwise.h"
#include "autograd/linear.h"
#include "autograd/shape.h"
#include "kernels/elementwise.h"
#include "kernels/inverse.h"
#include "kernels/matmul.h"

namespace krait::autograd {

namespace {

Variable identity(int64_t n, Device device) {
  Tensor out = zeros({n, n}, DType::f64, device);
  Tensor diagonal(out.storage(), {n}, {n + 1}, out.offset(), out.dtype());
  fill_(diagonal, 1.0);
  return Variable(out);
}

// e^X by scaling and squaring of a Taylor polynomial, with I taken off throughout, (I + F)^2 = I + (2 F + F^2), so that
// squaring a matrix near I loses nothing. The scale is fixed, since X is known to the device alone: right to rounding
// for norms up to 800.
Variable matrix_exponential(const Variable& X) {
  constexpr int kSquarings = 14, kDegree = 8;
  const Variable I = identity(X.size(-1), X.device()), small = X * std::ldexp(1.0, -kSquarings);
  Variable F = small / kDegree;
  for (int k = kDegree - 1; k >= 1; --k) F = (small + matmul(small, F)) / k;
  for (int k = 0; k < kSquarings; ++k) F = 2.0 * F + matmul(F, F);
  return I + F;
}

// (s, ...) -> (h, ...), each set repeated for its channels
Variable per_channel(const Variable& x, int64_t h) {
  const int64_t s = x.size(0), group = h / s;
  if (group == 1) return x;
  return reshape(expand(unsqueeze(x, 1), x.shape().inserted(1, group)), x.shape().with(0, h));
}

void check_dense(const Variable& log_dt, const Variable& A, const Variable& B) {
  check_same("dense_ssm_kernel", log_dt.data(), A.data(), B.data());
  KRAIT_CHECK(log_dt.ndim() == 1 && A.ndim() == 3 && A.size(1) == A.size(2) && B.shape() == A.shape().drop_last(),
              "dense_ssm_kernel: log_dt is {}, A is {}, B is {}; expected (h), (s, n, n), (s, n)", log_dt.shape(),
              A.shape(), B.shape());
  KRAIT_CHECK(A.size(0) > 0 && log_dt.size(0) % A.size(0) == 0,
              "dense_ssm_kernel: {} sets of A do not divide {} channels", A.size(0), log_dt.size(0));
}

}  // namespace

Variable batched_inverse(const Variable& a) {
  const Tensor y = kernels::batched_inverse(a.data());
  return record("batched_inverse", {a}, y, [y](const Tensor& dy) -> Grads {  // -y^T dy y^T
    return {kernels::neg(kernels::matmul(kernels::matmul(y, dy, true, false), y, false, true))};
  });
}

DenseSystem dense_ssm_discretize(const Variable& log_dt, const Variable& A_in, const Variable& B_in,
                                 Discretization discretization) {
  check_dense(log_dt, A_in, B_in);
  const int64_t h = log_dt.size(0), n = A_in.size(1);
  const Variable dt = reshape(exp(cast(log_dt, DType::f64)), {h, 1, 1});
  const Variable A = per_channel(cast(A_in, DType::f64), h) * dt;
  const Variable B = unsqueeze(per_channel(cast(B_in, DType::f64), h), -1) * dt;
  const Variable I = identity(n, A.device());
  switch (discretization) {
    case Discretization::euler: return {I + A, squeeze(B, -1)};
    case Discretization::bilinear: {
      const Variable inverse = batched_inverse(I - 0.5 * A);
      return {matmul(inverse, I + 0.5 * A), squeeze(matmul(inverse, B), -1)};
    }
    case Discretization::zoh: break;
  }
  // exp of ((A, B), (0, 0)) is ((A_bar, B_bar), (0, 1)): A need not be invertible
  const Variable zero_row(zeros({h, 1, n + 1}, DType::f64, A.device()));
  const Variable both = matrix_exponential(concat({concat({A, B}, -1), zero_row}, 1));
  const Variable rows = slice(both, 1, 0, n);
  return {slice(rows, 2, 0, n), select(rows, 2, n)};
}

Variable dense_ssm_kernel(const Variable& log_dt, const Variable& A, const Variable& B, const Variable& C,
                          int64_t length, Discretization discretization) {
  check_same("dense_ssm_kernel", log_dt.data(), C.data());
  KRAIT_CHECK(length >= 1, "dense_ssm_kernel: length is {}", length);
  const auto [A_bar, B_bar] = dense_ssm_discretize(log_dt, A, B, discretization);
  KRAIT_CHECK(C.shape() == B_bar.shape(), "dense_ssm_kernel: C is {}, expected {}", C.shape(), B_bar.shape());
  // K_(r m + t) = (C A_bar^(r m)) (A_bar^t B_bar): both factors by doubling, m about sqrt(length)
  Variable power = A_bar, columns = unsqueeze(B_bar, -1), rows = unsqueeze(cast(C, DType::f64), 1);
  int64_t m = 1, r = 1;
  for (; m * m < length; m *= 2) {
    columns = concat({columns, matmul(power, columns)}, -1);
    power = matmul(power, power);
  }
  for (; r * m < length; r *= 2) {
    rows = concat({rows, matmul(rows, power)}, 1);
    if (2 * r * m < length) power = matmul(power, power);
  }
  const Variable K = reshape(matmul(rows, columns), {log_dt.size(0), r * m});
  return cast(contiguous(slice(K, 1, 0, length)), log_dt.dtype());
}

}  // namespace krait::autograd
