#include "layers/hippo.h"

#include <algorithm>
#include <cmath>
#include <complex>
#include <numbers>

#include "core/random.h"

using Complex = std::complex<double>;

// LAPACK: eigenvalues in ascending order and eigenvectors (over `a`) of a Hermitian matrix, column-major.
extern "C" void zheev_(const char* jobz, const char* uplo, const int* n, Complex* a, const int* lda, double* w,
                       Complex* work, const int* lwork, double* rwork, int* info, size_t, size_t);

namespace krait::layers {

namespace {

constexpr double kPi = std::numbers::pi;
constexpr double kSmallestDecay = 1e-4;

double r(int64_t n) { return std::sqrt(2.0 * static_cast<double>(n) + 1.0); }

[[noreturn]] void unknown(std::string_view what, std::string_view name, const std::vector<std::string>& names) {
  std::string list;
  for (const std::string& s : names) list += (list.empty() ? "" : ", ") + s;
  throw_error(fmt::format("{}: '{}' is unknown; expected one of {}", what, std::string(name), list));
}

const std::vector<std::string>& hippo_names() {
  static const std::vector<std::string> names{"legs", "legt", "lagt", "lagt1", "fout", "foud"};
  return names;
}

bool is_hippo(std::string_view kind) {
  return std::find(hippo_names().begin(), hippo_names().end(), kind) != hippo_names().end();
}

Tensor zero_tensor(const Shape& shape) { return zeros(shape, DType::f64, kCpu); }

Complex& at(const Tensor& t, int64_t i) { return reinterpret_cast<Complex*>(t.data<double>())[i]; }

struct Eigen {
  std::vector<double> values;    // ascending
  std::vector<Complex> vectors;  // vector j at [j N, (j + 1) N)
};

Eigen hermitian_eigen(std::vector<Complex> h, int64_t N) {
  const int n = static_cast<int>(N);
  Eigen e{std::vector<double>(static_cast<size_t>(N)), std::move(h)};
  // OpenBLAS's zgemv for AVX-512 (0.3.21) reads some columns past its matrix: without room behind it, at the end of a
  // page, that is a crash.
  const size_t room = static_cast<size_t>(8 * n + 64);
  e.vectors.resize(e.vectors.size() + room);
  std::vector<double> rwork(static_cast<size_t>(std::max(1, 3 * n - 2)));
  Complex best;
  int info = 0, ask = -1;
  zheev_("V", "U", &n, e.vectors.data(), &n, e.values.data(), &best, &ask, rwork.data(), &info, 1, 1);
  const int lwork = std::max(2 * n, static_cast<int>(best.real()));
  std::vector<Complex> work(static_cast<size_t>(lwork) + room);
  zheev_("V", "U", &n, e.vectors.data(), &n, e.values.data(), work.data(), &lwork, rwork.data(), &info, 1, 1);
  KRAIT_CHECK(info == 0, "hippo: the eigenvalue decomposition of a {0} x {0} matrix did not converge", N);
  e.vectors.resize(static_cast<size_t>(N * N));
  return e;
}

// v^H p
Complex project(const Complex* v, const double* p, int64_t N) {
  Complex sum = 0;
  for (int64_t i = 0; i < N; ++i) sum += std::conj(v[i]) * p[i];
  return sum;
}

double length_of(const double* p, int64_t N) {
  double sum = 0;
  for (int64_t i = 0; i < N; ++i) sum += p[i] * p[i];
  return std::sqrt(sum);
}

// The unit factor that makes v^H p real and positive, for the first row of P, else B, that v is not orthogonal to.
Complex canonical_phase(const Complex* v, const Tensor& P, const Tensor& B, int64_t N) {
  for (int64_t k = 0; k <= P.size(0); ++k) {
    const double* p = k < P.size(0) ? P.data<double>() + k * N : B.data<double>();
    const Complex c = project(v, p, N);
    if (std::abs(c) > 1e-10 * length_of(p, N)) return c / std::abs(c);
  }
  return 1.0;
}

// FouT's and FouD's eigenvalue 0 is double; of its plane they take this vector.
void split_double_zero(Eigen& e, int64_t N) {
  Complex* v = e.vectors.data() + N / 2 * N;
  std::fill_n(v, N, Complex(0));
  v[0] = std::sqrt(0.5);
  v[1] = Complex(0, -std::sqrt(0.5));
  e.values[static_cast<size_t>(N / 2)] = 0;
}

Dplr decompose(const StateSpace& system, const Tensor& P_in, bool double_zero) {
  const int64_t N = system.A.size(0), n = N / 2, rank = P_in.size(0);
  KRAIT_CHECK(N > 0 && N % 2 == 0, "dplr: the state size must be even, found {}", N);
  KRAIT_CHECK(system.A.shape() == (Shape{N, N}) && system.B.shape() == Shape{N} && P_in.shape() == (Shape{rank, N}),
              "dplr: A is {}, B is {}, P is {}", system.A.shape(), system.B.shape(), P_in.shape());
  const Tensor A = system.A.contiguous(), B = system.B.contiguous(), P = P_in.contiguous();
  std::vector<double> S(A.data<double>(), A.data<double>() + N * N);
  for (int64_t k = 0; k < rank; ++k)
    for (int64_t i = 0; i < N; ++i)
      for (int64_t j = 0; j < N; ++j) S[static_cast<size_t>(i * N + j)] += P.data<double>()[k * N + i] * P.data<double>()[k * N + j];
  double rho = 0, largest = 0;
  for (int64_t i = 0; i < N; ++i) rho += S[static_cast<size_t>(i * N + i)] / static_cast<double>(N);
  for (const double s : S) largest = std::max(largest, std::abs(s));
  std::vector<Complex> h(static_cast<size_t>(N * N));  // -i (S - rho I), column-major
  for (int64_t i = 0; i < N; ++i)
    for (int64_t j = 0; j < N; ++j) {
      const double a = S[static_cast<size_t>(i * N + j)] - (i == j ? rho : 0.0);
      const double b = S[static_cast<size_t>(j * N + i)] - (i == j ? rho : 0.0);
      KRAIT_CHECK(std::abs(a + b) <= 1e-9 * std::max(1.0, largest),
                  "dplr: A + P^T P is not a multiple of the identity plus a skew matrix at ({}, {})", i, j);
      h[static_cast<size_t>(i + j * N)] = Complex(0, -0.5 * (a - b));
    }
  Eigen e = hermitian_eigen(std::move(h), N);
  if (double_zero) split_double_zero(e, N);

  Dplr out{zero_tensor({n, 2}), zero_tensor({rank, n, 2}), zero_tensor({n, 2}), zero_tensor({N, n, 2})};
  for (int64_t j = 0; j < n; ++j) {
    Complex* v = e.vectors.data() + (n + j) * N;
    const Complex phase = canonical_phase(v, P, B, N);
    for (int64_t i = 0; i < N; ++i) at(out.V, i * n + j) = v[i] *= phase;
    at(out.Lambda, j) = Complex(rho, e.values[static_cast<size_t>(n + j)]);
    for (int64_t k = 0; k < rank; ++k) at(out.P, k * n + j) = project(v, P.data<double>() + k * N, N);
    at(out.B, j) = project(v, B.data<double>(), N);
  }
  return out;
}

Tensor normals(const Shape& shape, double std, uint64_t key, std::string_view stream) {
  Tensor t = zero_tensor(shape);
  fill_normal_(t, 0.0, std, random_key(key, stream));
  return t;
}

void clip_modulus(Tensor& B, double limit) {
  for (int64_t j = 0; j < B.size(0); ++j) {
    const double modulus = std::abs(at(B, j));
    if (modulus > limit) at(B, j) *= limit / modulus;
  }
}

// log_A_re, A_im of eigenvalues (n, 2).
S4Init with_diagonal(const Tensor& lambda) {
  const int64_t n = lambda.size(0);
  S4Init out{zero_tensor({n}), zero_tensor({n}), {}, zero_tensor({n, 2})};
  for (int64_t j = 0; j < n; ++j) {
    out.log_A_re.data<double>()[j] = std::log(std::max(-at(lambda, j).real(), kSmallestDecay));
    out.A_im.data<double>()[j] = at(lambda, j).imag();
    at(out.B, j) = 1.0;
  }
  return out;
}

S4Init random_init(std::string_view init, int64_t n, uint64_t key) {
  const Tensor spread = normals({n}, 1.0, key, "A");
  Tensor lambda = zero_tensor({n, 2});
  const bool real = init == "diag_gaussian";
  for (int64_t j = 0; j < n; ++j) {
    const double scale = std::exp(spread.data<double>()[j]);
    at(lambda, j) = real ? Complex(-scale, 0) : Complex(-0.5, scale);
  }
  S4Init out = with_diagonal(lambda);
  if (real) {
    const Tensor b = normals({n}, 1.0, key, "B");
    for (int64_t j = 0; j < n; ++j) at(out.B, j) = b.data<double>()[j];
  }
  out.P = init == "random" ? normals({n, 2}, std::sqrt(0.5), key, "P") : zero_tensor({n, 2});
  return out;
}

}  // namespace

const std::vector<std::string>& s4_init_names() {
  static const std::vector<std::string> names{"legs", "legt", "lagt", "lagt1",  "fout",            "foud",
                                              "lin",  "inv",  "real", "random", "random_diagonal", "diag_gaussian"};
  return names;
}

const std::vector<std::string>& dense_init_names() {
  static const std::vector<std::string> names{"legs", "legt", "lagt",     "lagt1",
                                              "fout", "foud", "gaussian", "diag_gaussian"};
  return names;
}

StateSpace hippo(std::string_view kind, int64_t N) {
  KRAIT_CHECK(N >= 1, "hippo: the state size must be positive, found {}", N);
  StateSpace out{zero_tensor({N, N}), zero_tensor({N})};
  double *A = out.A.data<double>(), *B = out.B.data<double>();
  if (kind == "legs") {
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t k = 0; k < n; ++k) A[n * N + k] = -r(n) * r(k);
      A[n * N + n] = -static_cast<double>(n + 1);
      B[n] = r(n);
    }
  } else if (kind == "legt") {
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t k = 0; k < N; ++k) A[n * N + k] = -0.5 * r(n) * r(k) * (k > n && (k - n) % 2 ? -1.0 : 1.0);
      B[n] = 0.5 * r(n);
    }
  } else if (kind == "lagt" || kind == "lagt1") {
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t k = 0; k < n; ++k) A[n * N + k] = -1.0;
      A[n * N + n] = kind == "lagt" ? -0.5 : -1.0;
      B[n] = 1.0;
    }
  } else if (kind == "fout" || kind == "foud") {
    const double w = kind == "fout" ? kPi : 2.0 * kPi;
    for (int64_t n = 0; n < N; n += 2) B[n] = n == 0 ? 1.0 : std::numbers::sqrt2;
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < N; ++k) {
        double& a = A[n * N + k];
        if (n % 2 == 0 && k == n + 1) a = -w * static_cast<double>(n / 2);
        if (n % 2 == 1 && k == n - 1) a = w * static_cast<double>(n / 2);
        a -= kind == "fout" ? B[n] * B[k] : (n == k ? 0.5 : 0.0);
      }
  } else {
    unknown("hippo", kind, hippo_names());
  }
  return out;
}

Tensor hippo_low_rank(std::string_view kind, int64_t N) {
  Tensor P = zero_tensor({kind == "legt" ? 2 : 1, N});
  double* p = P.data<double>();
  for (int64_t n = 0; n < N; ++n) {
    if (kind == "legs")
      p[n] = std::sqrt(static_cast<double>(n) + 0.5);
    else if (kind == "legt")
      p[n % 2 ? n : N + n] = r(n) * std::sqrt(0.5);
    else if (kind == "lagt" || kind == "lagt1")
      p[n] = std::sqrt(0.5);
    else if (kind == "fout")
      p[n] = n % 2 ? 0.0 : (n == 0 ? 1.0 : std::numbers::sqrt2);
    else if (kind != "foud")
      unknown("hippo", kind, hippo_names());
  }
  return P;
}

Dplr dplr(const StateSpace& system, const Tensor& P) { return decompose(system, P, false); }

Dplr hippo_dplr(std::string_view kind, int64_t N) {
  return decompose(hippo(kind, N), hippo_low_rank(kind, N), kind == "fout" || kind == "foud");
}

Tensor s4d_diagonal(std::string_view kind, int64_t N) {
  KRAIT_CHECK(N > 0 && N % 2 == 0, "s4d: the state size must be even, found {}", N);
  if (kind == "legs") return hippo_dplr("legs", N).Lambda;
  const int64_t n = N / 2;
  const double size = static_cast<double>(N);
  Tensor lambda = zero_tensor({n, 2});
  for (int64_t k = 0; k < n; ++k) {
    const double j = static_cast<double>(k);
    if (kind == "lin")
      at(lambda, k) = Complex(-0.5, kPi * j);
    else if (kind == "inv")
      at(lambda, k) = Complex(-0.5, size / kPi * (size / (2 * j + 1) - 1));
    else if (kind == "real")
      at(lambda, k) = -(j + 1);
    else
      unknown("s4d_diagonal", kind, {"lin", "inv", "legs", "real"});
  }
  return lambda;
}

S4Init s4_init(std::string_view init, int64_t N, uint64_t key, double b_clip) {
  KRAIT_CHECK(N > 0 && N % 2 == 0, "s4: the state size must be even, found {}", N);
  const int64_t n = N / 2;
  S4Init out;
  if (is_hippo(init)) {
    const Dplr d = hippo_dplr(init, N);
    out = with_diagonal(d.Lambda);
    out.P = d.P.size(0) == 1 ? d.P.select(0, 0) : d.P;
    out.B = d.B;
  } else if (init == "lin" || init == "inv" || init == "real") {
    out = with_diagonal(s4d_diagonal(init, N));
    out.P = zero_tensor({n, 2});
  } else if (init == "random" || init == "random_diagonal" || init == "diag_gaussian") {
    out = random_init(init, n, key);
  } else {
    unknown("s4 init", init, s4_init_names());
  }
  if (b_clip > 0) clip_modulus(out.B, b_clip);
  return out;
}

S4Init s4d_init(std::string_view init, int64_t N, uint64_t key, double b_clip) {
  S4Init out = s4_init(init, N, key, b_clip);
  out.P = {};
  return out;
}

StateSpace dense_init(std::string_view init, int64_t N, uint64_t key, double gain) {
  if (is_hippo(init)) return hippo(init, N);
  KRAIT_CHECK(N >= 1, "dense init: the state size must be positive, found {}", N);
  StateSpace out{zero_tensor({N, N}), normals({N}, 1.0, key, "B")};
  if (init == "gaussian") {
    out.A = normals({N, N}, gain / static_cast<double>(N), key, "A");
  } else if (init == "diag_gaussian") {
    const Tensor a = normals({N}, 1.0, key, "A");
    for (int64_t i = 0; i < N; ++i) out.A.data<double>()[i * N + i] = -std::exp(a.data<double>()[i]);
  } else {
    unknown("dense init", init, dense_init_names());
  }
  return out;
}

}  // namespace krait::layers
