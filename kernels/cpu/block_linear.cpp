#include "kernels/block_linear.h"

#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/chunk_sums.h"

namespace krait::kernels::cpu {

namespace {

constexpr int64_t kChunk = 256;  // rows whose part of dw is made in one go

struct Sizes {
  int64_t blocks, out, in;
};
Sizes sizes_of(const Tensor& w) { return {w.size(0), w.size(1), w.size(2)}; }

// Calls f with the block's sides as compile-time values for the usual 4 x 4 blocks, else as 0.
template <class F>
void visit_side(const Sizes& s, F&& f) {
  if (s.out == 4 && s.in == 4)
    f.template operator()<4>();
  else
    f.template operator()<0>();
}

template <int kSide, class T>
void forward_row(T* __restrict y, const T* __restrict x, const T* __restrict w, const Sizes& s) {
  using A = accum_t<T>;
  const int64_t out = kSide ? kSide : s.out, in = kSide ? kSide : s.in;
  for (int64_t n = 0; n < s.blocks; ++n)
    for (int64_t o = 0; o < out; ++o) {
      A sum = A(0);
      for (int64_t i = 0; i < in; ++i) sum += static_cast<A>(w[(n * out + o) * in + i]) * static_cast<A>(x[n * in + i]);
      y[n * out + o] = static_cast<T>(sum);
    }
}

template <int kSide, class T>
void backward_row(T* __restrict dx, accum_t<T>* __restrict dw, const T* __restrict dy, const T* __restrict x,
                  const T* __restrict w, const Sizes& s) {
  using A = accum_t<T>;
  const int64_t out = kSide ? kSide : s.out, in = kSide ? kSide : s.in;
  for (int64_t n = 0; n < s.blocks; ++n) {
    if (dx)
      for (int64_t i = 0; i < in; ++i) {
        A sum = A(0);
        for (int64_t o = 0; o < out; ++o) sum += static_cast<A>(w[(n * out + o) * in + i]) * static_cast<A>(dy[n * out + o]);
        dx[n * in + i] = static_cast<T>(sum);
      }
    if (dw)
      for (int64_t o = 0; o < out; ++o)
        for (int64_t i = 0; i < in; ++i)
          dw[(n * out + o) * in + i] += static_cast<A>(dy[n * out + o]) * static_cast<A>(x[n * in + i]);
  }
}

}  // namespace

void block_linear_forward(Tensor& y, const Tensor& x, const Tensor& w) {
  const Sizes s = sizes_of(w);
  visit_float(x.dtype(), [&]<class T>() {
    visit_side(s, [&]<int kSide>() {
      parallel_for(0, x.size(0), 1 + 16384 / y.size(1), [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r)
          forward_row<kSide>(y.data<T>() + r * y.size(1), x.data<T>() + r * x.stride(0), w.data<T>(), s);
      });
    });
  });
}

void block_linear_backward(Tensor& dx, Tensor& dw, bool add_dw, const Tensor& dy, const Tensor& x, const Tensor& w) {
  const Sizes s = sizes_of(w);
  const int64_t rows = x.size(0), chunks = (rows + kChunk - 1) / kChunk, n = w.numel();
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    Tensor partial = dw.defined() ? zeros({chunks, n}, dtype_of<A>, kCpu) : Tensor{};
    A* sums = dw.defined() ? partial.data<A>() : nullptr;
    T* to = dx.defined() ? dx.data<T>() : nullptr;
    visit_side(s, [&]<int kSide>() {
      parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
        for (int64_t r = first * kChunk; r < std::min(rows, last * kChunk); ++r)
          backward_row<kSide>(to ? to + r * x.size(1) : nullptr, sums ? sums + r / kChunk * n : nullptr,
                              dy.data<T>() + r * dy.stride(0), x.data<T>() + r * x.stride(0), w.data<T>(), s);
      });
    });
    if (dw.defined()) add_in_order(dw, add_dw, sums, chunks, n);
  });
}

}  // namespace krait::kernels::cpu
