#pragma once
// Fast Fourier transforms on the CPU, in float or double, on split real and imaginary arrays.
// `lanes` sequences are transformed at once, interleaved: element t of lane q at index t * lanes + q. Many lanes keep
// the vector units full; one lane keeps a long sequence in cache. Nothing is divided by n: inverse(forward(x)) = n x.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <numbers>
#include <vector>

#include "core/error.h"

namespace krait::kernels::cpu {

/// The smallest power of two that is at least n.
inline int64_t next_power_of_two(int64_t n) {
  return n <= 1 ? 1 : static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n)));
}

/// Complex transform of a power-of-two length: forward X_k = sum_t x_t e^(-2 pi i k t / n), inverse with +.
/// Stockham's self-sorting form in radix 4.
template <class T>
class Fft {
 public:
  explicit Fft(int64_t n) : n_(n), cos_(static_cast<size_t>(n)), sin_(static_cast<size_t>(n)) {
    KRAIT_ASSERT(n >= 1 && (n & (n - 1)) == 0, "fft: {} is no power of two", n);
    for (int64_t k = 0; k < n; ++k) {
      const double angle = -2.0 * std::numbers::pi * static_cast<double>(k) / static_cast<double>(n);
      cos_[static_cast<size_t>(k)] = static_cast<T>(std::cos(angle));
      sin_[static_cast<size_t>(k)] = static_cast<T>(std::sin(angle));
    }
  }
  int64_t size() const { return n_; }

  /// In place. scratch: 2 n lanes values.
  void forward(T* re, T* im, T* scratch, int64_t lanes = 1) const {
    T *xr = re, *xi = im, *yr = scratch, *yi = scratch + n_ * lanes;
    int64_t m = n_, s = lanes;
    for (; m >= 4; m /= 4, s *= 4) {
      radix4(yr, yi, xr, xi, m, s);
      std::swap(xr, yr);
      std::swap(xi, yi);
    }
    if (m == 2) {
      radix2(yr, yi, xr, xi, s);
      std::swap(xr, yr);
      std::swap(xi, yi);
    }
    if (xr != re) {
      std::copy_n(xr, n_ * lanes, re);
      std::copy_n(xi, n_ * lanes, im);
    }
  }
  void inverse(T* re, T* im, T* scratch, int64_t lanes = 1) const { forward(im, re, scratch, lanes); }

  /// cos and sin of -2 pi k / n, k < n.
  const T* cosines() const { return cos_.data(); }
  const T* sines() const { return sin_.data(); }

 private:
  [[gnu::always_inline]] static void butterfly(T* __restrict yr, T* __restrict yi, const T* __restrict xr,
                                               const T* __restrict xi, int64_t from, int64_t jump, int64_t to,
                                               int64_t step, T c1, T s1, T c2, T s2, T c3, T s3) {
    const T ar = xr[from], ai = xi[from], br = xr[from + jump], bi = xi[from + jump];
    const T cr = xr[from + 2 * jump], ci = xi[from + 2 * jump], dr = xr[from + 3 * jump], di = xi[from + 3 * jump];
    const T pr = ar + cr, pi = ai + ci, mr = ar - cr, mi = ai - ci;
    const T qr = br + dr, qi = bi + di, jr = di - bi, ji = br - dr;  // j = i (b - d)
    const T ur = mr - jr, ui = mi - ji, vr = pr - qr, vi = pi - qi, wr = mr + jr, wi = mi + ji;
    yr[to] = pr + qr;
    yi[to] = pi + qi;
    yr[to + step] = ur * c1 - ui * s1;
    yi[to + step] = ur * s1 + ui * c1;
    yr[to + 2 * step] = vr * c2 - vi * s2;
    yi[to + 2 * step] = vr * s2 + vi * c2;
    yr[to + 3 * step] = wr * c3 - wi * s3;
    yi[to + 3 * step] = wr * s3 + wi * c3;
  }

  // One pass over transforms of length m whose elements lie s apart.
  void radix4(T* __restrict yr, T* __restrict yi, const T* __restrict xr, const T* __restrict xi, int64_t m,
              int64_t s) const {
    const int64_t quarter = m / 4, jump = s * quarter, stride = n_ / m;
    const T *__restrict c = cos_.data(), *__restrict sn = sin_.data();
    if (s == 1) {
#pragma omp simd
      for (int64_t p = 0; p < quarter; ++p)
        butterfly(yr, yi, xr, xi, p, jump, 4 * p, 1, c[p], sn[p], c[2 * p], sn[2 * p], c[3 * p], sn[3 * p]);
      return;
    }
    for (int64_t p = 0; p < quarter; ++p) {
      const int64_t k = p * stride;
      const T c1 = c[k], s1 = sn[k], c2 = c[2 * k], s2 = sn[2 * k], c3 = c[3 * k], s3 = sn[3 * k];
#pragma omp simd
      for (int64_t q = 0; q < s; ++q)
        butterfly(yr, yi, xr, xi, s * p + q, jump, 4 * s * p + q, s, c1, s1, c2, s2, c3, s3);
    }
  }

  static void radix2(T* __restrict yr, T* __restrict yi, const T* __restrict xr, const T* __restrict xi, int64_t s) {
#pragma omp simd
    for (int64_t q = 0; q < s; ++q) {
      const T ar = xr[q], ai = xi[q], br = xr[s + q], bi = xi[s + q];
      yr[q] = ar + br;
      yi[q] = ai + bi;
      yr[s + q] = ar - br;
      yi[s + q] = ai - bi;
    }
  }

  int64_t n_;
  std::vector<T> cos_, sin_;
};

/// Transform of real sequences of a power-of-two length n, through a complex one of n / 2.
template <class T>
class RealFft {
 public:
  explicit RealFft(int64_t n) : n_(n), half_(std::max<int64_t>(n / 2, 1)), full_(n) {}
  int64_t size() const { return n_; }
  int64_t scratch_size(int64_t lanes = 1) const { return 2 * half_.size() * lanes; }

  /// X_k = sum_t x_t e^(-2 pi i k t / n), k = 0 ... n/2: x (n, lanes) to re, im (n/2 + 1, lanes), which must not
  /// overlap x.
  void forward(T* __restrict re, T* __restrict im, const T* __restrict x, T* scratch, int64_t lanes = 1) const {
    const int64_t m = n_ / 2;
    if (n_ == 1) {
      std::copy_n(x, lanes, re);
      std::fill_n(im, lanes, T(0));
      return;
    }
    for (int64_t t = 0; t < m; ++t) {
      std::copy_n(x + 2 * t * lanes, lanes, re + t * lanes);
      std::copy_n(x + (2 * t + 1) * lanes, lanes, im + t * lanes);
    }
    half_.forward(re, im, scratch, lanes);
    for (int64_t q = 0; q < lanes; ++q) {  // bins 0 and n/2
      const T r = re[q], i = im[q];
      re[q] = r + i;
      re[m * lanes + q] = r - i;
      im[q] = im[m * lanes + q] = T(0);
    }
    for (int64_t k = 1; k <= m - k; ++k) {
      const T c = full_.cosines()[k], s = full_.sines()[k];
      T *ar = re + k * lanes, *ai = im + k * lanes, *br = re + (m - k) * lanes, *bi = im + (m - k) * lanes;
#pragma omp simd
      for (int64_t q = 0; q < lanes; ++q) {
        const T er = T(0.5) * (ar[q] + br[q]), ei = T(0.5) * (ai[q] - bi[q]);
        const T pr = T(0.5) * (ai[q] + bi[q]), pi = T(0.5) * (br[q] - ar[q]);  // odd samples' transform
        const T wr = c * pr - s * pi, wi = c * pi + s * pr;
        ar[q] = er + wr;
        ai[q] = ei + wi;
        br[q] = er - wr;
        bi[q] = wi - ei;
      }
    }
  }

  /// x_t = sum over all n bins of X_k e^(2 pi i k t / n), from the first n/2 + 1 of a real sequence's transform.
  /// re and im are overwritten; the imaginary parts of bins 0 and n/2 are not read.
  void inverse(T* __restrict x, T* __restrict re, T* __restrict im, T* scratch, int64_t lanes = 1) const {
    const int64_t m = n_ / 2;
    if (n_ == 1) {
      std::copy_n(re, lanes, x);
      return;
    }
    for (int64_t q = 0; q < lanes; ++q) {
      const T a = re[q], b = re[m * lanes + q];
      re[q] = a + b;
      im[q] = a - b;
    }
    for (int64_t k = 1; k <= m - k; ++k) {
      const T c = full_.cosines()[k], s = full_.sines()[k];
      T *ar = re + k * lanes, *ai = im + k * lanes, *br = re + (m - k) * lanes, *bi = im + (m - k) * lanes;
#pragma omp simd
      for (int64_t q = 0; q < lanes; ++q) {
        const T er = ar[q] + br[q], ei = ai[q] - bi[q], dr = ar[q] - br[q], di = ai[q] + bi[q];
        const T pr = c * dr + s * di, pi = c * di - s * dr;  // times e^(+2 pi i k / n)
        ar[q] = er - pi;
        ai[q] = ei + pr;
        br[q] = er + pi;
        bi[q] = pr - ei;
      }
    }
    half_.inverse(re, im, scratch, lanes);
    for (int64_t t = 0; t < m; ++t) {
      std::copy_n(re + t * lanes, lanes, x + 2 * t * lanes);
      std::copy_n(im + t * lanes, lanes, x + (2 * t + 1) * lanes);
    }
  }

 private:
  int64_t n_;
  Fft<T> half_, full_;
};

/// Transform of one real sequence of any length n >= 1; other lengths than powers of two by Bluestein's identity
/// 2 k t = k^2 + t^2 - (k - t)^2, a convolution of power-of-two length.
template <class T>
class AnyRealFft {
 public:
  explicit AnyRealFft(int64_t n) : n_(n), bins_(n / 2 + 1) {
    KRAIT_ASSERT(n >= 1, "fft: length {}", n);
    if ((n & (n - 1)) == 0) {
      plain_ = std::make_unique<RealFft<T>>(n);
      return;
    }
    // t - k runs over n + bins - 1 values
    padded_ = std::make_unique<Fft<T>>(next_power_of_two(n + bins_ - 1));
    const int64_t m = padded_->size();
    for (auto* v : {&chirp_cos_, &chirp_sin_}) v->resize(static_cast<size_t>(n));
    for (auto* v : {&filter_re_, &filter_im_}) v->assign(static_cast<size_t>(2 * m), T(0));
    std::vector<T> scratch(static_cast<size_t>(2 * m));
    for (int64_t k = 0; k < n; ++k) {
      const double angle = std::numbers::pi * static_cast<double>(k * k % (2 * n)) / static_cast<double>(n);
      chirp_cos_[static_cast<size_t>(k)] = static_cast<T>(std::cos(angle));
      chirp_sin_[static_cast<size_t>(k)] = static_cast<T>(std::sin(angle));
    }
    // first the filter of forward (at j: input index up to n - 1 behind, bins - 1 ahead), then of inverse
    for (int direction = 0; direction < 2; ++direction) {
      T *re = filter_re_.data() + direction * m, *im = filter_im_.data() + direction * m;
      const int64_t ahead = direction == 0 ? bins_ : n, behind = direction == 0 ? n : bins_;
      for (int64_t k = 0; k < std::max(ahead, behind); ++k) {
        const T c = chirp_cos_[static_cast<size_t>(k)], s = chirp_sin_[static_cast<size_t>(k)];
        for (const int64_t at : {k < ahead ? k : -1, k > 0 && k < behind ? m - k : -1})
          if (at >= 0) {
            re[at] = c;
            im[at] = direction == 0 ? s : -s;
          }
      }
      padded_->forward(re, im, scratch.data());
    }
  }
  int64_t size() const { return n_; }
  int64_t bins() const { return bins_; }
  int64_t scratch_size() const { return plain_ ? plain_->scratch_size() : 4 * padded_->size(); }

  /// X_k = sum_t x_t e^(-2 pi i k t / n), k = 0 ... n/2.
  void forward(T* re, T* im, const T* x, T* scratch) const {
    if (plain_) return plain_->forward(re, im, x, scratch);
    const int64_t m = padded_->size();
    T *ur = scratch, *ui = scratch + m;
    const T *c = chirp_cos_.data(), *s = chirp_sin_.data();
    for (int64_t t = 0; t < n_; ++t) {
      ur[t] = x[t] * c[t];
      ui[t] = -x[t] * s[t];
    }
    convolve(ur, ui, scratch + 2 * m, n_, 0);
    const T scale = T(1) / static_cast<T>(m);
    for (int64_t k = 0; k < bins_; ++k) {
      re[k] = (ur[k] * c[k] + ui[k] * s[k]) * scale;
      im[k] = (ui[k] * c[k] - ur[k] * s[k]) * scale;
    }
  }

  /// x_t = sum over all n bins of X_k e^(2 pi i k t / n); re and im are overwritten.
  void inverse(T* x, T* re, T* im, T* scratch) const {
    if (plain_) return plain_->inverse(x, re, im, scratch);
    const int64_t m = padded_->size();
    T *ur = scratch, *ui = scratch + m;
    const T *c = chirp_cos_.data(), *s = chirp_sin_.data();
    for (int64_t k = 0; k < bins_; ++k) {  // bins k and n - k give twice the real part
      const bool own = k == 0 || 2 * k == n_;
      const T r = own ? re[k] : 2 * re[k], i = own ? T(0) : 2 * im[k];
      ur[k] = r * c[k] - i * s[k];
      ui[k] = r * s[k] + i * c[k];
    }
    convolve(ur, ui, scratch + 2 * m, bins_, 1);
    const T scale = T(1) / static_cast<T>(m);
    for (int64_t t = 0; t < n_; ++t) x[t] = (ur[t] * c[t] - ui[t] * s[t]) * scale;
  }

 private:
  void convolve(T* ur, T* ui, T* scratch, int64_t filled, int direction) const {
    const int64_t m = padded_->size();
    std::fill(ur + filled, ur + m, T(0));
    std::fill(ui + filled, ui + m, T(0));
    padded_->forward(ur, ui, scratch);
    const T *fr = filter_re_.data() + direction * m, *fi = filter_im_.data() + direction * m;
#pragma omp simd
    for (int64_t k = 0; k < m; ++k) {
      const T r = ur[k] * fr[k] - ui[k] * fi[k], i = ur[k] * fi[k] + ui[k] * fr[k];
      ur[k] = r;
      ui[k] = i;
    }
    padded_->inverse(ur, ui, scratch);
  }

  int64_t n_, bins_;
  std::unique_ptr<RealFft<T>> plain_;
  std::unique_ptr<Fft<T>> padded_;
  std::vector<T> chirp_cos_, chirp_sin_, filter_re_, filter_im_;
};

/// The transform of that kind and length, made once: fft_plan<RealFft<float>>(2048).
template <class Plan>
const Plan& fft_plan(int64_t n) {
  static std::mutex mutex;
  static std::map<int64_t, std::unique_ptr<Plan>> plans;
  const std::lock_guard lock(mutex);
  auto& plan = plans[n];
  if (!plan) plan = std::make_unique<Plan>(n);
  return *plan;
}

}  // namespace krait::kernels::cpu
