#include "kernels/cpu/fft.h"

#include <complex>

#include "tests/testing/tensors.h"

using namespace krait;
using namespace krait::kernels::cpu;

namespace {

using Cd = std::complex<double>;

Cd root(int64_t k, int64_t n) {
  return std::polar(1.0, 2.0 * std::numbers::pi * static_cast<double>(k % n) / static_cast<double>(n));
}

template <class T>
void check_complex(int64_t n, int64_t lanes, double tolerance) {
  const auto x = random_tensor({2, n * lanes}, Normal{}, 7).to_vector<double>();
  std::vector<T> re(x.begin(), x.begin() + n * lanes), im(x.begin() + n * lanes, x.end());
  std::vector<T> scratch(static_cast<size_t>(2 * n * lanes));
  const Fft<T> fft(n);
  const auto r0 = re, i0 = im;
  fft.forward(re.data(), im.data(), scratch.data(), lanes);
  double worst = 0, scale = 0;
  for (int64_t q = 0; q < lanes; ++q)
    for (int64_t k = 0; k < n; ++k) {
      Cd sum = 0;
      for (int64_t t = 0; t < n; ++t)
        sum += Cd(r0[static_cast<size_t>(t * lanes + q)], i0[static_cast<size_t>(t * lanes + q)]) *
               std::conj(root(k * t, n));
      const auto at = static_cast<size_t>(k * lanes + q);
      worst = std::max(worst, std::abs(sum - Cd(re[at], im[at])));
      scale = std::max(scale, std::abs(sum));
    }
  INFO("complex " << n << " lanes " << lanes);
  CHECK(worst <= tolerance * scale);
  fft.inverse(re.data(), im.data(), scratch.data(), lanes);
  double back = 0;
  for (size_t i = 0; i < re.size(); ++i)
    back = std::max({back, std::abs(double(re[i]) / double(n) - r0[i]), std::abs(double(im[i]) / double(n) - i0[i])});
  CHECK(back <= 10 * tolerance);
}

template <class T>
void check_real(int64_t n, double tolerance) {
  const auto x = random_tensor({n}, Normal{}, 7).to_vector<double>();
  const std::vector<T> input(x.begin(), x.end());
  const AnyRealFft<T> fft(n);
  std::vector<T> re(static_cast<size_t>(fft.bins())), im(re.size()), back(input.size());
  std::vector<T> scratch(static_cast<size_t>(fft.scratch_size()));
  fft.forward(re.data(), im.data(), input.data(), scratch.data());
  double worst = 0, scale = 0;
  for (int64_t k = 0; k < fft.bins(); ++k) {
    Cd sum = 0;
    for (int64_t t = 0; t < n; ++t) sum += x[static_cast<size_t>(t)] * std::conj(root(k * t, n));
    worst = std::max(worst, std::abs(sum - Cd(re[static_cast<size_t>(k)], im[static_cast<size_t>(k)])));
    scale = std::max(scale, std::abs(sum));
  }
  INFO("real " << n);
  CHECK(worst <= tolerance * scale);
  im[0] += T(3);  // imaginary parts that a real sequence cannot have are not read
  if (n % 2 == 0) im.back() -= T(2);
  fft.inverse(back.data(), re.data(), im.data(), scratch.data());
  double difference = 0;
  for (int64_t t = 0; t < n; ++t)
    difference = std::max(difference, std::abs(double(back[static_cast<size_t>(t)]) / double(n) - x[static_cast<size_t>(t)]));
  CHECK(difference <= 10 * tolerance);
}

}  // namespace

TEST_CASE("the complex FFT equals the defining sum for every power of two and any number of lanes") {
  for (const int64_t n : {1, 2, 4, 8, 16, 32, 64, 128, 512, 1024})
    for (const int64_t lanes : {1, 3, 16}) {
      check_complex<double>(n, lanes, 1e-14);
      check_complex<float>(n, lanes, 1e-6);
    }
}

TEST_CASE("the real FFT equals the defining sum for any length") {
  for (const int64_t n : {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 33, 64, 97, 100, 128, 250, 257, 784, 1000, 1024}) {
    check_real<double>(n, 1e-13);
    check_real<float>(n, 3e-6);
  }
}

TEST_CASE("the real FFT of many lanes equals one lane at a time") {
  constexpr int64_t n = 64, lanes = 5;
  const auto x = random_tensor({n * lanes}, Normal{}, 3).to_vector<double>();
  const auto& fft = fft_plan<RealFft<double>>(n);
  std::vector<double> re((n / 2 + 1) * lanes), im(re.size()), one_re(n / 2 + 1), one_im(n / 2 + 1), one(n), back(n * lanes);
  std::vector<double> scratch(static_cast<size_t>(fft.scratch_size(lanes)));
  fft.forward(re.data(), im.data(), x.data(), scratch.data(), lanes);
  for (size_t q = 0; q < lanes; ++q) {
    for (size_t t = 0; t < n; ++t) one[t] = x[t * lanes + q];
    fft.forward(one_re.data(), one_im.data(), one.data(), scratch.data());
    for (size_t k = 0; k <= n / 2; ++k) {
      CHECK(std::abs(one_re[k] - re[k * lanes + q]) < 1e-12);
      CHECK(std::abs(one_im[k] - im[k * lanes + q]) < 1e-12);
    }
  }
  fft.inverse(back.data(), re.data(), im.data(), scratch.data(), lanes);
  for (size_t i = 0; i < x.size(); ++i) CHECK(std::abs(back[i] / n - x[i]) < 1e-13);
}
