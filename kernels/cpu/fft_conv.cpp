#include "kernels/fft_conv.h"

#include <optional>

#include "core/parallel.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/ring_fft.h"

namespace krait::kernels::cpu {

namespace {

struct Document {
  int64_t row, begin, length;
  int log2n;
};

/// The runs of one segment in rows [first, last); whole rows without segments.
std::vector<Document> documents_of(const Tensor& segments, int64_t first, int64_t last, int64_t l) {
  std::vector<Document> out;
  for (int64_t row = first; row < last; ++row) {
    if (!segments.defined()) {
      out.push_back({row, 0, l, fft_conv_log2(l)});
      continue;
    }
    const int32_t* s = segments.data<int32_t>() + row * l;
    for (int64_t begin = 0, t = 1; t <= l; ++t) {
      if (t < l && s[t] == s[begin]) continue;
      out.push_back({row, begin, t - begin, fft_conv_log2(t - begin)});
      begin = t;
    }
  }
  return out;
}

/// The work: tiles of kLanes channels times groups of sequences. The groups depend on the shapes alone, so that sums
/// over a group do not depend on the number of threads.
template <class A>
struct Tiling {
  int64_t b, l, h, tiles, groups;
  Tiling(const Tensor& u) : b(u.size(0)), l(u.size(1)), h(u.size(2)) {  // NOLINT: of a tensor's shape
    tiles = (h + kLanes<A> - 1) / kLanes<A>;
    groups = std::min(b, (32 + tiles - 1) / tiles);
  }
  int64_t channel(int64_t item) const { return item / groups * kLanes<A>; }
  int64_t channels(int64_t item) const { return std::min<int64_t>(kLanes<A>, h - channel(item)); }
  std::vector<Document> documents(const Tensor& segments, int64_t item) const {
    const int64_t g = item % groups;
    return documents_of(segments, b * g / groups, b * (g + 1) / groups, l);
  }
};

template <class A>
using Spectrum = std::vector<LaneComplex<A>>;

/// The transforms of one tile's kernels, with D at lag 0 and 1/n, by the length's log2; made when first asked for.
template <class A>
class TileKernel {
 public:
  TileKernel(const Tensor& K, const Tensor& K1, const Tensor& D, int64_t c0, int64_t channels)
      : k_(K), k1_(K1), d_(D), c0_(c0), channels_(channels) {}

  const Spectrum<A>& at(int log2n) {
    Spectrum<A>& w = made_[static_cast<size_t>(log2n)];
    if (!w.empty()) return w;
    const int64_t n = int64_t{1} << log2n;
    w.resize(static_cast<size_t>(n));
    const A scale = A(1) / static_cast<A>(n);
    const int64_t lags = k_.size(1), lags1 = k1_.defined() ? k1_.size(1) : 0;
    for (int64_t v = 0; v < channels_; ++v) {
      const A* k = k_.data<A>() + (c0_ + v) * lags;
      for (int64_t m = 0; m < std::min(n, lags); ++m) w[static_cast<size_t>(m)].re[v] = scale * k[m];
      if (d_.defined()) w[0].re[v] += scale * d_.data<A>()[c0_ + v];
      if (!k1_.defined()) continue;
      const A* k1 = k1_.data<A>() + (c0_ + v) * lags1;
      for (int64_t m = 0; m < std::min(n, lags1); ++m) w[static_cast<size_t>(n - 1 - m)].im[v] = -scale * k1[m];
    }
    ring_forward(w.data(), log2n, ring_roots<A>(log2n));
    return w;
  }

 private:
  const Tensor &k_, &k1_, &d_;
  int64_t c0_, channels_;
  std::array<Spectrum<A>, 48> made_;
};

// The document's channels as a real polynomial of n coefficients: value t at position t, or n-1-t when reversed.
template <class T, class A>
void load(Spectrum<A>& x, const Tensor& u, const Document& d, int64_t c0, int64_t channels, bool reversed) {
  const int64_t n = int64_t{1} << d.log2n, l = u.size(1), h = u.size(2);
  const T* from = u.data<T>() + (d.row * l + d.begin) * h + c0;
  for (int64_t t = 0; t < n; ++t) {
    LaneComplex<A> value{};
    if (t < d.length) {
      if (channels == kLanes<A>) {
        for (int v = 0; v < kLanes<A>; ++v) value.re[v] = static_cast<A>(from[t * h + v]);
      } else {
        for (int64_t v = 0; v < channels; ++v) value.re[v] = static_cast<A>(from[t * h + v]);
      }
    }
    x[static_cast<size_t>(reversed ? n - 1 - t : t)] = value;
  }
}

template <class T, class A>
void store(Tensor& y, const Spectrum<A>& x, const Document& d, int64_t c0, int64_t channels, bool reversed) {
  const int64_t n = int64_t{1} << d.log2n, l = y.size(1), h = y.size(2);
  T* to = y.data<T>() + (d.row * l + d.begin) * h + c0;
  for (int64_t t = 0; t < d.length; ++t) {
    const Lanes<A> value = x[static_cast<size_t>(reversed ? n - 1 - t : t)].re;
    if (channels == kLanes<A>) {
      for (int v = 0; v < kLanes<A>; ++v) put(to[t * h + v], value[v]);
    } else {
      for (int64_t v = 0; v < channels; ++v) put(to[t * h + v], value[v]);
    }
  }
}

template <class A>
void multiply(Spectrum<A>& x, const Spectrum<A>& w, int64_t n) {
  for (size_t k = 0; k < static_cast<size_t>(n); ++k) {
    const LaneComplex<A> a = x[k], b = w[k];
    x[k] = {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
  }
}

template <class A>
void multiply_add(Spectrum<A>& sum, const Spectrum<A>& x, const Spectrum<A>& w, int64_t n) {
  for (size_t k = 0; k < static_cast<size_t>(n); ++k) {
    const LaneComplex<A> a = x[k], b = w[k], s = sum[k];
    sum[k] = {s.re + a.re * b.re - a.im * b.im, s.im + a.re * b.im + a.im * b.re};
  }
}

/// sum_{documents} reversed(dy) * u of one tile, by log2 of the length; coefficient n-1-m is dK[m], n+m is dK1[m].
template <class A>
struct KernelGradient {
  std::array<Spectrum<A>, 48> sum;
  std::array<int64_t, 48> longest{};

  Spectrum<A>& at(const Document& d) {
    const auto i = static_cast<size_t>(d.log2n);
    sum[i].resize(size_t{1} << d.log2n);
    longest[i] = std::max(longest[i], d.length);
    return sum[i];
  }
  // Adds to the rows of dK and dK1 that begin at the given addresses.
  void finish(A* dk, int64_t lk, A* dk1, int64_t lk1, int64_t channels) {
    for (int log2n = 0; log2n < 48; ++log2n) {
      Spectrum<A>& x = sum[static_cast<size_t>(log2n)];
      if (x.empty()) continue;
      const int64_t n = int64_t{1} << log2n, longest_here = longest[static_cast<size_t>(log2n)];
      ring_inverse(x.data(), log2n, ring_roots<A>(log2n));
      const A scale = A(1) / static_cast<A>(n);
      for (int64_t v = 0; v < channels; ++v) {
        for (int64_t m = 0; m < std::min(lk, longest_here); ++m)
          dk[v * lk + m] += scale * x[static_cast<size_t>(n - 1 - m)].re[v];
        for (int64_t m = 0; dk1 && m < std::min(lk1, longest_here - 1); ++m)
          dk1[v * lk1 + m] += scale * x[static_cast<size_t>(m)].im[v];
      }
    }
  }
};

// dk (rows) = sum over groups of partial (groups, rows), in order.
template <class A>
void sum_groups(Tensor& dk, const Tensor& partial) {
  const int64_t n = dk.numel(), groups = partial.size(0);
  A* to = dk.data<A>();
  const A* from = partial.data<A>();
  parallel_for(0, n, 1 << 14, [&](int64_t first, int64_t last) {
    for (int64_t g = 0; g < groups; ++g) {
#pragma omp simd
      for (int64_t i = first; i < last; ++i) to[i] = (g == 0 ? A(0) : to[i]) + from[g * n + i];
    }
  });
}

}  // namespace

void fft_conv_forward(Tensor& y, const Tensor& u, const Tensor& K, const Tensor& K1, const Tensor& D,
                      const Tensor& segments) {
  visit_float(u.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tiling<A> tiling(u);
    parallel_for(0, tiling.tiles * tiling.groups, 1, [&](int64_t first, int64_t last) {
      Spectrum<A> x(size_t{1} << fft_conv_log2(tiling.l));
      for (int64_t item = first; item < last; ++item) {
        const int64_t c0 = tiling.channel(item), channels = tiling.channels(item);
        TileKernel<A> kernel(K, K1, D, c0, channels);
        for (const Document& d : tiling.documents(segments, item)) {
          const Spectrum<A>& w = kernel.at(d.log2n);
          const Root<A>* roots = ring_roots<A>(d.log2n);
          load<T>(x, u, d, c0, channels, false);
          ring_forward(x.data(), d.log2n, roots);
          multiply(x, w, int64_t{1} << d.log2n);
          ring_inverse(x.data(), d.log2n, roots);
          store<T>(y, x, d, c0, channels, false);
        }
      }
    });
  });
}

void fft_conv_backward(Tensor& du, Tensor& dK, Tensor& dK1, const Tensor& dy, const Tensor& u, const Tensor& K,
                       const Tensor& K1, const Tensor& D, const Tensor& segments) {
  visit_float(u.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tiling<A> tiling(u);
    const int64_t h = tiling.h, lk = K.size(1), lk1 = K1.defined() ? K1.size(1) : 0;
    Tensor dk = zeros({tiling.groups, h, lk}, K.dtype(), kCpu), dk1;
    if (lk1) dk1 = zeros({tiling.groups, h, lk1}, K.dtype(), kCpu);
    parallel_for(0, tiling.tiles * tiling.groups, 1, [&](int64_t first, int64_t last) {
      const size_t n = size_t{1} << fft_conv_log2(tiling.l);
      Spectrum<A> x(n), g(n);
      for (int64_t item = first; item < last; ++item) {
        const int64_t c0 = tiling.channel(item), channels = tiling.channels(item), group = item % tiling.groups;
        TileKernel<A> kernel(K, K1, D, c0, channels);
        KernelGradient<A> gradient;
        for (const Document& d : tiling.documents(segments, item)) {
          const Spectrum<A>& w = kernel.at(d.log2n);
          const Root<A>* roots = ring_roots<A>(d.log2n);
          load<T>(g, dy, d, c0, channels, true);
          ring_forward(g.data(), d.log2n, roots);
          load<T>(x, u, d, c0, channels, false);
          ring_forward(x.data(), d.log2n, roots);
          multiply_add(gradient.at(d), x, g, int64_t{1} << d.log2n);
          multiply(g, w, int64_t{1} << d.log2n);
          ring_inverse(g.data(), d.log2n, roots);
          store<T>(du, g, d, c0, channels, true);
        }
        gradient.finish(dk.data<A>() + (group * h + c0) * lk, lk,
                        lk1 ? dk1.data<A>() + (group * h + c0) * lk1 : nullptr, lk1, channels);
      }
    });
    sum_groups<A>(dK, dk);
    if (lk1) sum_groups<A>(dK1, dk1);
  });
}

void fft_conv_kernel_name(std::string& name, int64_t length, DType, bool has_segments) {
  name = fmt::format("own FFT of {} points over vector lanes{}", int64_t{1} << fft_conv_log2(length),
                     has_segments ? ", one per document" : "");
}

}  // namespace krait::kernels::cpu
