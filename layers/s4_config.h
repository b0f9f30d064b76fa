#pragma once
#include <string>
#include <vector>

#include "core/option_reader.h"

namespace krait::layers {

/// Options of the layer kinds `s4` (diagonal plus low rank; `init: random` is dense) and `s4d` (diagonal).
struct S4Config {
  int64_t d_state = 64;  // real states N; half of them are kept as complex ones
  /// legs | legt | lagt | lagt1 | fout | foud | lin | inv | real, and random ones (see layers/hippo.h):
  /// s4:  random: a dense real gaussian matrix | random_diagonal: a real diagonal | dplr_random | diag_random
  /// s4d: random = diag_random: complex diagonal | random_diagonal: a real diagonal
  std::string init = "legs";              // default of s4d: lin
  std::string discretization = "bilinear";  // zoh | bilinear; default of s4d: zoh, s4's DPLR form has bilinear only
  double dt_min = 0.001, dt_max = 0.1;    // time steps of the channels begin log-uniform between them
  double init_gain = 1.0;                 // of the dense random matrix: A_ij ~ N(0, (gain / N)^2)
  double b_clip = 0;                      // largest modulus of B at the start; 0: none. 2 is near to public S4
  int64_t n_ssm = 1;                      // sets of A, B (and P), each shared by d_model / n_ssm channels; 0: d_model
  int64_t copies = 1;                     // kernels of each channel, side by side in front of the output matrix
  bool bidirectional = false;             // a second kernel from the right; not for language models
  bool tie_reverse = true;                // it shares all but C with the first
  std::vector<std::string> freeze;        // of A (with P), B, C, D, dt: not trained
  /// Learning rate of A, B, P and dt in parts of the run's: the published settings have 0.001 where the run has 0.01.
  double ssm_lr_scale = 0.1;
  std::string activation = "gelu";  // gelu | silu | none
  std::string final_act = "glu";    // glu | id
  double dropout = 0;               // after the activation; default: model.dropout
  bool tie_dropout = false;         // one mask for all positions of a sequence

  // Derived.
  std::string form = "dplr";  // dplr | diagonal | dense
  bool real = false;          // a real diagonal: imaginary parts are zero and stay so
  bool frozen(const std::string& what) const;
};

/// kind: s4 or s4d. Throws ConfigError with the place of the option at fault; completes the section.
S4Config read_s4_config(ConfigNode& section, const std::string& kind, int64_t d_model, double dropout = 0,
                        bool language_model = false);

}  // namespace krait::layers
