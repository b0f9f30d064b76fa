#include "kernels/elementwise.h"

#include <array>

namespace krait::kernels {

namespace {

using Backend = void (*)(Tensor& y, Inputs in, double p, double q);

template <size_t N>
Tensor run(Backend on_cpu, Backend on_cuda, std::array<Tensor, N> in, DType out, double p = 0, double q = 0) {
  Shape shape = in[0].shape();
  for (const Tensor& t : in)
    if (t.shape() != shape) shape = broadcast_shapes(shape, t.shape());
  for (Tensor& t : in)
    if (t.shape() != shape) t = t.expand(shape);
  const Device device = in[0].device();
  Tensor y = empty(shape, out, device);
  if (y.numel() == 0) return y;
  const Backend backend = device.is_cpu() ? on_cpu : on_cuda;
  if (!backend) throw_no_cuda();
  backend(y, in, p, q);
  return y;
}

template <class... T>
void check_floats(std::string_view name, const Tensor& a, const T&... rest) {
  (check_same(name, a, rest), ...);
  KRAIT_CHECK(a.dtype() == DType::f32 || a.dtype() == DType::f64 || a.dtype() == DType::bf16,
              "{}: expected float32, float64 or bfloat16, found {}", fmt::string_view(name.data(), name.size()),
              describe(a));
}

}  // namespace

#if KRAIT_WITH_CUDA
#define KRAIT_BOTH(name) cpu::name, cuda::name
#else
#define KRAIT_BOTH(name) cpu::name, nullptr
#endif

#define X(name, value)             \
  Tensor name(const Tensor& a) {   \
    check_floats(#name, a);        \
    return run<1>(KRAIT_BOTH(name), {a}, a.dtype()); \
  }
KRAIT_UNARY(X)
#undef X

#define X(name, value)                      \
  Tensor name(const Tensor& a, double p) {  \
    check_floats(#name, a);                 \
    return run<1>(KRAIT_BOTH(name), {a}, a.dtype(), p); \
  }
KRAIT_SCALAR(X)
#undef X

#define X(name, value)                                \
  Tensor name(const Tensor& a, double p, double q) {  \
    check_floats(#name, a);                           \
    return run<1>(KRAIT_BOTH(name), {a}, a.dtype(), p, q); \
  }
KRAIT_SCALAR2(X)
#undef X

#define X(name, value)                             \
  Tensor name(const Tensor& a, const Tensor& b) {  \
    check_floats(#name, a, b);                     \
    return run<2>(KRAIT_BOTH(name), {a, b}, a.dtype()); \
  }
KRAIT_BINARY(X)
#undef X

#define X(name, value)                                       \
  Tensor name(const Tensor& a, const Tensor& b, double p) {  \
    check_floats(#name, a, b);                               \
    return run<2>(KRAIT_BOTH(name), {a, b}, a.dtype(), p);   \
  }
KRAIT_BINARY_SCALAR(X)
#undef X

#define X(name, value)                                                 \
  Tensor name(const Tensor& a, const Tensor& b, double p, double q) {  \
    check_floats(#name, a, b);                                         \
    return run<2>(KRAIT_BOTH(name), {a, b}, a.dtype(), p, q);          \
  }
KRAIT_BINARY_SCALAR2(X)
#undef X

#define X(name, value)                                              \
  Tensor name(const Tensor& a, const Tensor& b, const Tensor& c) {  \
    check_floats(#name, a, b, c);                                   \
    return run<3>(KRAIT_BOTH(name), {a, b, c}, a.dtype());          \
  }
KRAIT_TERNARY(X)
#undef X

#define X(name, value)                                            \
  Tensor name(const Tensor& a, const Tensor& b) {                 \
    check_same(#name, a, b);                                      \
    return run<2>(KRAIT_BOTH(name), {a, b}, DType::boolean);      \
  }
KRAIT_COMPARISON(X)
#undef X

Tensor where(const Tensor& mask, const Tensor& a, const Tensor& b) {
  check_floats("where", a, b);
  KRAIT_CHECK(mask.dtype() == DType::boolean && mask.device() == a.device(),
              "where: the mask is {}, expected bool on {}", describe(mask), a.device());
  return run<3>(KRAIT_BOTH(where), {mask, a, b}, a.dtype());
}

}  // namespace krait::kernels
