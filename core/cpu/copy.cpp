#include "core/copy.h"

#include <cstring>
#include <vector>

#include "core/parallel.h"

namespace krait::core::cpu {

namespace {

template <class D, class S>
D convert(S value) {
  if constexpr (std::is_same_v<D, bf16> || std::is_same_v<D, f16>)
    return D(static_cast<float>(value));
  else if constexpr (std::is_same_v<S, bf16> || std::is_same_v<S, f16>)
    return static_cast<D>(static_cast<float>(value));
  else
    return static_cast<D>(value);
}

// n values, ds and ss elements apart. One small function for each pair of dtypes: a hundred walks over all dimensions would
// take minutes to compile under the sanitizers.
template <class D, class S>
void copy_row(void* to, const void* from, int64_t n, int64_t ds, int64_t ss) {
  D* d = static_cast<D*>(to);
  const S* s = static_cast<const S*>(from);
  if (ds == 1 && ss == 1) {
    if constexpr (std::is_same_v<D, S>) {
      std::memcpy(d, s, static_cast<size_t>(n) * sizeof(D));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) d[i] = convert<D>(s[i]);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) d[i * ds] = convert<D>(s[i * ss]);
  }
}
using CopyRow = void (*)(void*, const void*, int64_t, int64_t, int64_t);

// The last dimension is a row; the leading ones are walked by index.
void copy_rows(Tensor& dst, const Tensor& src, CopyRow copy) {
  const int64_t n = dst.ndim();
  const int64_t inner = n == 0 ? 1 : dst.size(-1);
  const int64_t ds = n == 0 ? 1 : dst.stride(-1), ss = n == 0 ? 1 : src.stride(-1);
  const int64_t rows = dst.numel() / inner;
  char* const d0 = static_cast<char*>(dst.raw_data());
  const char* const s0 = static_cast<const char*>(src.raw_data());
  struct Dim { int64_t size, d, s; };  // strides in bytes
  std::vector<Dim> outer;
  for (int64_t i = 0; i < n - 1; ++i)
    outer.push_back({dst.size(i), dst.stride(i) * size_of(dst.dtype()), src.stride(i) * size_of(src.dtype())});
  parallel_for(0, rows, std::max<int64_t>(1, 8192 / inner), [&](int64_t first, int64_t last) {
    std::vector<int64_t> at(outer.size());
    int64_t rest = first, doff = 0, soff = 0;
    for (size_t i = outer.size(); i-- > 0; rest /= outer[i].size) {
      at[i] = rest % outer[i].size;
      doff += at[i] * outer[i].d;
      soff += at[i] * outer[i].s;
    }
    const auto next_row = [&] {
      for (size_t i = outer.size(); i-- > 0;) {
        doff += outer[i].d;
        soff += outer[i].s;
        if (++at[i] < outer[i].size) return;
        doff -= at[i] * outer[i].d;
        soff -= at[i] * outer[i].s;
        at[i] = 0;
      }
    };
    for (int64_t r = first; r < last; ++r, next_row()) copy(d0 + doff, s0 + soff, inner, ds, ss);
  });
}

Tensor flat(const Tensor& t) { return t.view({-1}); }

// Long contiguous tensors are cut into rows so that all threads share the work.
Tensor rows_of(const Tensor& t, int64_t inner) { return t.view({-1, inner}); }

}  // namespace

void strided_copy(Tensor& dst, const Tensor& src) {
  Tensor d = dst, s = src;
  if (d.is_contiguous() && s.is_contiguous()) {
    const int64_t n = d.numel();
    int64_t inner = 1;
    while (inner < 4096 && n % (inner * 2) == 0) inner *= 2;
    d = inner >= 64 ? rows_of(d, inner) : flat(d);
    s = inner >= 64 ? rows_of(s, inner) : flat(s);
  }
  visit_all(d.dtype(), [&]<class D>() { visit_all(s.dtype(), [&]<class S>() { copy_rows(d, s, copy_row<D, S>); }); });
}

void fill(Tensor& dst, double value) {
  visit_all(dst.dtype(), [&]<class T>() {
    const T v = convert<T>(value);
    if (dst.is_contiguous()) {
      T* p = dst.data<T>();
      parallel_for(0, dst.numel(), 1 << 15, [&](int64_t first, int64_t last) { std::fill(p + first, p + last, v); });
      return;
    }
    const Tensor one = full({}, value, dst.dtype(), kCpu).expand(dst.shape());
    copy_rows(dst, one, copy_row<T, T>);
  });
}

}  // namespace krait::core::cpu
