#include "layers/s4_config.h"

#include <algorithm>

#include "layers/option_sizes.h"

namespace krait::layers {

bool S4Config::frozen(const std::string& what) const {
  return std::find(freeze.begin(), freeze.end(), what) != freeze.end();
}

S4Config read_s4_config(ConfigNode& section, const std::string& kind, int64_t d_model, double dropout,
                        bool language_model) {
  S4Config c;
  const bool diagonal = kind == "s4d";
  if (diagonal) {
    c.init = "lin";
    c.discretization = "zoh";
  }
  c.dropout = dropout;
  OptionReader options(section);
  options.read("d_state", c.d_state, between(2, 1024));
  std::vector<std::string> inits{"legs", "legt", "lagt", "lagt1", "fout", "foud", "lin", "inv", "real", "random",
                                 "random_diagonal", "diag_random"};
  if (!diagonal) inits.push_back("dplr_random");
  options.choice("init", c.init, inits);
  c.real = c.init == "random_diagonal";
  c.form = diagonal || c.real ? "diagonal" : c.init == "random" ? "dense" : "dplr";
  options.choice("discretization", c.discretization, {"zoh", "bilinear"});
  options.read("dt_min", c.dt_min, above(0));
  options.read("dt_max", c.dt_max, above(0));
  options.read("init_gain", c.init_gain, above(0));
  options.read("b_clip", c.b_clip, at_least(0));
  options.read("n_ssm", c.n_ssm, size_from(0));
  options.read("copies", c.copies, between(1, 64));
  options.read("bidirectional", c.bidirectional);
  options.read("tie_reverse", c.tie_reverse);
  options.read("freeze", c.freeze);
  options.read("ssm_lr_scale", c.ssm_lr_scale, at_least(0));
  options.choice("activation", c.activation, {"gelu", "silu", "none"});
  options.choice("final_act", c.final_act, {"glu", "id"});
  options.read("dropout", c.dropout, below_one());
  options.read("tie_dropout", c.tie_dropout);

  if (c.d_state % 2 != 0)
    options.fail("d_state", fmt::format("found {}, expected an even number: states come in conjugate pairs", c.d_state),
                 fmt::format("{} or {}", c.d_state - 1, c.d_state + 1));
  if (c.form == "dplr" && c.discretization != "bilinear")
    options.fail("discretization", fmt::format("'{}' with a diagonal plus low rank matrix (init {}): only bilinear is "
                                               "defined", c.discretization, c.init),
                 "bilinear, or the layer s4d");
  if (c.dt_max < c.dt_min)
    options.fail("dt_max", fmt::format("{} is below dt_min {}", c.dt_max, c.dt_min));
  if (c.n_ssm == 0) {
    c.n_ssm = d_model;
    options.resolve("n_ssm", c.n_ssm);
  }
  if (d_model % c.n_ssm != 0)
    options.fail("n_ssm", fmt::format("{} sets do not divide the width {} (d_model)", c.n_ssm, d_model),
                 fmt::format("1, 2 or {}", d_model));
  for (const std::string& name : c.freeze) {
    const std::vector<std::string> known{"A", "B", "C", "D", "dt"};
    if (std::find(known.begin(), known.end(), name) == known.end())
      options.fail("freeze", fmt::format("found '{}', expected of A, B, C, D, dt", name), nearest_name(name, known));
  }
  if (c.bidirectional && language_model)
    options.fail("bidirectional", "true in a language model: it would see the tokens it predicts", "false");
  options.finish();
  return c;
}

}  // namespace krait::layers
