#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/tensor.h"

namespace krait {
namespace layers {

// State matrices of S4 and its controls: HiPPO (Gu et al. 2020), their diagonal-plus-low-rank form (S4, Gu, Goel & Re
// 2022, theorem 1), diagonal inits (S4D, Gu et al. 2022) and random ones. Everything in fp64 on the CPU; complex values
// end in an axis of 2 (re, im). N is the real state size; n = N/2 of each pair of conjugate states are kept.

/// x' = A x + B u.
struct StateSpace {
  Tensor A, B;  // (N, N), (N)
};

/// kind: legs, legt, lagt, lagt1, fout, foud. Windows: legt and fout look back 2 units of time. With r_n = sqrt(2n+1):
///   legs   A_nk = -r_n r_k (n > k), -(n + 1) (n = k), 0             B_n = r_n
///   legt   A_nk = -r_n r_k / 2 (1 if k <= n else (-1)^(k-n))        B_n = r_n / 2
///   lagt   A = -I/2 - strict_lower(1), lagt1 with -I                B = 1
///   fout   A = S - b b^T, S_(2k,2k+1) = -pi k = -S_(2k+1,2k)        B = b = (1, 0, sqrt 2, 0, sqrt 2, ...)
///   foud   A = S' - I/2, S' = S with 2 pi k                         B = b
StateSpace hippo(std::string_view kind, int64_t N);

/// P (r, N) such that A + P^T P is normal: rank 1, 2 for legt, zeros for foud, which is normal itself.
Tensor hippo_low_rank(std::string_view kind, int64_t N);

/// A = 2 Re(V diag(Lambda) V^H) - sum_r p_r p_r^T and B = 2 Re(V B_hat), with Im Lambda >= 0 ascending. Eigenvectors
/// are turned so that V^H p is real and positive (for the first p that is not orthogonal to the eigenvector).
struct Dplr {
  Tensor Lambda, P, B, V;  // (n, 2), (r, n, 2), (n, 2), (N, n, 2)
};
/// A + P^T P must be a multiple of the identity plus a skew matrix; N even.
Dplr dplr(const StateSpace& system, const Tensor& P);
Dplr hippo_dplr(std::string_view kind, int64_t N);

/// lin, inv, legs, real: the diagonal of S4D (n, 2).
Tensor s4d_diagonal(std::string_view kind, int64_t N);

/// Initial values of one set of S4 parameters; A = -e^log_A_re + i A_im with -Re A >= 1e-4.
struct S4Init {
  Tensor log_A_re, A_im;  // (n)
  Tensor P;               // (n, 2), or (r, n, 2) for rank r > 1
  Tensor B;               // (n, 2)
};
/// init: legs, legt, lagt, lagt1, fout, foud (DPLR form), lin, inv, real (P = 0), and from `key`:
///   random           A = -1/2 + i e^N(0,1), P complex normal (E|P|^2 = 1), B = 1
///   random_diagonal  the same with P = 0
///   diag_gaussian    A = -e^N(0,1), P = 0, B ~ N(0, 1), all real
/// b_clip > 0 scales every B to at most that modulus. Throws with the list of names for another init.
S4Init s4_init(std::string_view init, int64_t N, uint64_t key, double b_clip = 0);
/// The same without the low-rank part (P undefined): S4D.
S4Init s4d_init(std::string_view init, int64_t N, uint64_t key, double b_clip = 0);

/// Dense real systems for the ablation: a HiPPO kind, or
///   gaussian       A_ij ~ N(0, gain^2 / N^2), B ~ N(0, 1)
///   diag_gaussian  A = -diag(e^N(0,1)), B ~ N(0, 1)
StateSpace dense_init(std::string_view init, int64_t N, uint64_t key, double gain = 1.0);

/// Names that s4_init and dense_init accept, for option readers.
const std::vector<std::string>& s4_init_names();
const std::vector<std::string>& dense_init_names();

}  // namespace layers
}  // namespace krait
