#include "kernels/elementwise.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "core/parallel.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_math.h"

namespace krait::kernels::cpu {

namespace math {
template <class A> [[gnu::always_inline]] inline A exp(A x) { return vexp(x); }
template <class A> [[gnu::always_inline]] inline A expm1(A x) { return vexpm1(x); }
template <class A> [[gnu::always_inline]] inline A log(A x) { return vlog(x); }
template <class A> [[gnu::always_inline]] inline A log1p(A x) { return vlog1p(x); }
template <class A> [[gnu::always_inline]] inline A tanh(A x) { return vtanh(x); }
template <class A> [[gnu::always_inline]] inline A sigmoid(A x) { return vsigmoid(x); }
template <class A> [[gnu::always_inline]] inline A softplus(A x) { return vsoftplus(x); }
template <class A> [[gnu::always_inline]] inline A erf(A x) { return verf(x); }
template <class A> [[gnu::always_inline]] inline A sqrt(A x) { return std::sqrt(x); }
template <class A> [[gnu::always_inline]] inline A abs(A x) { return std::fabs(x); }
template <class A> [[gnu::always_inline]] inline A sin(A x) { return std::sin(x); }
template <class A> [[gnu::always_inline]] inline A cos(A x) { return std::cos(x); }
template <class A> [[gnu::always_inline]] inline A pow(A x, A y) { return std::pow(x, y); }
}  // namespace math

namespace {

// An operation is a loop over short packed arrays of A. Everything else (strides, broadcasting, bf16, masks)
// happens while a block is read into and written from the first-level cache, once for all operations.
constexpr int64_t kBlock = 1024;
template <class A>
using Loop = void (*)(A* y, const A* a, const A* b, const A* c, A p, A q, int64_t n);

template <class F, class A>
void loop(A* y, [[maybe_unused]] const A* a, [[maybe_unused]] const A* b, [[maybe_unused]] const A* c, A p, A q,
          int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (F::inputs == 1) y[i] = F::value(a[i], A(0), A(0), p, q);
    if constexpr (F::inputs == 2) y[i] = F::value(a[i], b[i], A(0), p, q);
    if constexpr (F::inputs == 3) y[i] = F::value(a[i], b[i], c[i], p, q);
  }
}

// Reads elements [first, first + n) in row-major order of a strided tensor.
template <class A>
class Reader {
 public:
  explicit Reader(const Tensor& t) : dtype_(t.dtype()), data_(t.raw_data()) {
    for (int64_t d = t.ndim() - 1; d >= 0; --d) {  // innermost first; dimensions that follow each other are joined
      const int64_t size = t.size(d), stride = t.stride(d);
      if (size == 1) continue;
      if (!size_.empty() && stride == stride_.back() * size_.back())
        size_.back() *= size;
      else
        size_.push_back(size), stride_.push_back(stride);
    }
    if (size_.empty()) size_.push_back(1), stride_.push_back(1);
  }

  const A* read(int64_t first, int64_t n, A* buffer) const {
    if (dtype_ == dtype_of<A> && size_.size() == 1 && stride_[0] == 1) return static_cast<const A*>(data_) + first;
    switch (dtype_) {
      case DType::f32: return copy<float>(first, n, buffer);
      case DType::bf16: return copy<bf16>(first, n, buffer);
      case DType::boolean: return copy<bool>(first, n, buffer);
      default: break;
    }
    if constexpr (std::is_same_v<A, double>) switch (dtype_) {
        case DType::f64: return copy<double>(first, n, buffer);
        case DType::i64: return copy<int64_t>(first, n, buffer);
        default: break;
      }
    throw_error(fmt::format("elementwise operations do not take {}", dtype_));
  }

 private:
  template <class T>
  const A* copy(int64_t first, int64_t n, A* buffer) const {
    const T* p = static_cast<const T*>(data_);
    std::array<int64_t, 16> at;
    KRAIT_ASSERT(size_.size() <= at.size());
    int64_t rest = first;
    for (size_t d = 0; d < size_.size(); ++d) {
      at[d] = rest % size_[d];
      rest /= size_[d];
      p += at[d] * stride_[d];
    }
    for (int64_t done = 0;;) {
      const int64_t run = std::min(n - done, size_[0] - at[0]), stride = stride_[0];
      A* const out = buffer + done;
      if (stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < run; ++i) out[i] = static_cast<A>(p[i]);
      } else if (stride == 0) {
        std::fill(out, out + run, static_cast<A>(*p));
      } else {
        for (int64_t i = 0; i < run; ++i) out[i] = static_cast<A>(p[i * stride]);
      }
      done += run;
      if (done == n) return buffer;
      p -= at[0] * stride;  // to the start of the next run
      at[0] = 0;
      for (size_t d = 1; d < size_.size(); ++d) {
        p += stride_[d];
        if (++at[d] < size_[d]) break;
        p -= size_[d] * stride_[d];
        at[d] = 0;
      }
    }
  }

  DType dtype_;
  const void* data_;
  std::vector<int64_t> size_, stride_;
};

template <class T, class A>
void store(Tensor& y, int64_t first, int64_t n, const A* values) {
  T* const out = y.data<T>() + first;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) put(out[i], values[i]);
}

template <class A>
void for_blocks(Loop<A> f, Tensor& y, Inputs in, double p, double q) {
  std::vector<Reader<A>> readers;
  for (const Tensor& t : in) readers.emplace_back(t);
  const bool direct = y.dtype() == dtype_of<A>;
  parallel_for(0, (y.numel() + kBlock - 1) / kBlock, 16, [&](int64_t block0, int64_t block1) {
    alignas(64) A buffer[4][kBlock];
    for (int64_t block = block0; block < block1; ++block) {
      const int64_t first = block * kBlock, n = std::min(kBlock, y.numel() - first);
      const A* x[3] = {};
      for (size_t k = 0; k < readers.size(); ++k) x[k] = readers[k].read(first, n, buffer[k]);
      A* const out = direct ? y.data<A>() + first : buffer[3];
      f(out, x[0], x[1], x[2], static_cast<A>(p), static_cast<A>(q), n);
      if (direct) continue;
      if (y.dtype() == DType::bf16)
        store<bf16>(y, first, n, out);
      else
        store<bool>(y, first, n, out);
    }
  });
}

template <class F>
void run(Tensor& y, Inputs in, double p, double q) {
  const DType dtype = in.back().dtype();
  if (dtype == DType::f32 || dtype == DType::bf16)
    for_blocks<float>(loop<F, float>, y, in, p, q);
  else
    for_blocks<double>(loop<F, double>, y, in, p, q);
}

}  // namespace

#define KRAIT_DEFINE(name, n, expression)                                                                   \
  namespace {                                                                                               \
  struct name##_op {                                                                                        \
    static constexpr int inputs = n;                                                                        \
    template <class A>                                                                                      \
    [[gnu::always_inline]] static A value([[maybe_unused]] A a, [[maybe_unused]] A b, [[maybe_unused]] A c, [[maybe_unused]] A p,  \
                   [[maybe_unused]] A q) {                                                                  \
      return static_cast<A>(expression);                                                                    \
    }                                                                                                       \
  };                                                                                                        \
  }                                                                                                         \
  void name(Tensor& y, Inputs in, double p, double q) { run<name##_op>(y, in, p, q); }
#define X1(name, expression) KRAIT_DEFINE(name, 1, expression)
#define X2(name, expression) KRAIT_DEFINE(name, 2, expression)
#define X3(name, expression) KRAIT_DEFINE(name, 3, expression)
KRAIT_UNARY(X1)
KRAIT_SCALAR(X1)
KRAIT_SCALAR2(X1)
KRAIT_BINARY(X2)
KRAIT_BINARY_SCALAR(X2)
KRAIT_BINARY_SCALAR2(X2)
KRAIT_COMPARISON(X2)
KRAIT_TERNARY(X3)
X3(where, a != A(0) ? b : c)

}  // namespace krait::kernels::cpu
