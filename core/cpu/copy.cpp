#include "core/copy.h"

#include <algorithm>
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

/// rows x n values; in dst and src a row is dr, sr elements behind the one before it, a value ds, ss.
struct Block {
  int64_t rows, n, dr, sr, ds, ss;
};

// One small function for each pair of dtypes: a hundred walks over all dimensions would take minutes to compile under the
// sanitizers.
template <class D, class S>
void copy_block(void* to, const void* from, const Block& b) {
  D* d = static_cast<D*>(to);
  const S* s = static_cast<const S*>(from);
  for (int64_t r = 0; r < b.rows; ++r, d += b.dr, s += b.sr) {
    if (b.ds == 1 && b.ss == 1) {
      if constexpr (std::is_same_v<D, S>) {
        std::memcpy(d, s, static_cast<size_t>(b.n) * sizeof(D));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < b.n; ++i) d[i] = convert<D>(s[i]);
      }
    } else {
      for (int64_t i = 0; i < b.n; ++i) d[i * b.ds] = convert<D>(s[i * b.ss]);
    }
  }
}
using CopyBlock = void (*)(void*, const void*, const Block&);

struct Dim { int64_t size, d, s; };  // strides in bytes

// From the outermost: neighbours that both tensors walk as one are one.
std::vector<Dim> common_dims(const Tensor& dst, const Tensor& src) {
  std::vector<Dim> dims;
  for (int64_t i = 0; i < dst.ndim(); ++i) {
    const Dim dim{dst.size(i), dst.stride(i) * size_of(dst.dtype()), src.stride(i) * size_of(src.dtype())};
    if (dim.size == 1) continue;
    if (!dims.empty() && dims.back().d == dim.size * dim.d && dims.back().s == dim.size * dim.s)
      dims.back() = {dims.back().size * dim.size, dim.d, dim.s};
    else
      dims.push_back(dim);
  }
  if (dims.empty()) dims.push_back({1, size_of(dst.dtype()), size_of(src.dtype())});
  return dims;
}

// The last two dimensions are blocks, or what a thread has of one; the leading ones are walked by index.
void copy_blocks(Tensor& dst, const Tensor& src, CopyBlock copy) {
  if (dst.numel() == 0) return;
  std::vector<Dim> outer = common_dims(dst, src);
  const auto take = [&] {
    const Dim dim = outer.back();
    outer.pop_back();
    return dim;
  };
  const int64_t wide_d = size_of(dst.dtype()), wide_s = size_of(src.dtype());
  char* const d0 = static_cast<char*>(dst.raw_data());
  const char* const s0 = static_cast<const char*>(src.raw_data());
  constexpr int64_t kGrain = 8192;
  const Dim inner = take();
  const int64_t ds = inner.d / wide_d, ss = inner.s / wide_s;
  if (outer.empty()) {
    parallel_for(0, inner.size, kGrain, [&](int64_t first, int64_t last) {
      copy(d0 + first * inner.d, s0 + first * inner.s, {1, last - first, 0, 0, ds, ss});
    });
    return;
  }
  const Dim row = take();
  parallel_for(0, dst.numel() / inner.size, std::max<int64_t>(1, kGrain / inner.size), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last;) {
      const int64_t at = r % row.size, rows = std::min(last - r, row.size - at);
      int64_t doff = at * row.d, soff = at * row.s, rest = r / row.size;
      for (size_t i = outer.size(); i-- > 0; rest /= outer[i].size) {
        doff += rest % outer[i].size * outer[i].d;
        soff += rest % outer[i].size * outer[i].s;
      }
      copy(d0 + doff, s0 + soff, {rows, inner.size, row.d / wide_d, row.s / wide_s, ds, ss});
      r += rows;
    }
  });
}

}  // namespace

void strided_copy(Tensor& dst, const Tensor& src) {
  visit_all(dst.dtype(), [&]<class D>() { visit_all(src.dtype(), [&]<class S>() { copy_blocks(dst, src, copy_block<D, S>); }); });
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
    copy_blocks(dst, one, copy_block<T, T>);
  });
}

void arange(Tensor& dst) {
  visit_all(dst.dtype(), [&]<class T>() {
    T* const p = dst.data<T>();
    parallel_for(0, dst.numel(), 1 << 15, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) p[i] = convert<T>(i);
    });
  });
}

}  // namespace krait::core::cpu
