#include "layers/mamba2_config.h"

#include "layers/near_divisors.h"
#include "layers/option_sizes.h"

namespace krait::layers {

Mamba2Config read_mamba2_config(ConfigNode& section, int64_t d_model) {
  Mamba2Config c;
  OptionReader options(section);
  options.read("d_state", c.d_state, size_from(1));
  options.read("head_dim", c.head_dim, size_from(1));
  options.read("expand", c.expand, size_from(1));
  options.read("n_groups", c.n_groups, size_from(1));
  options.read("d_conv", c.d_conv, size_from(1));
  options.read("chunk_size", c.chunk_size, size_from(1));
  options.read("dt_min", c.dt_min, above(0));
  options.read("dt_max", c.dt_max, above(0));
  options.read("dt_limit", c.dt_limit, at_least(0));
  options.read("A_init_range", c.A_init_range, above(0));
  options.read("D_has_hdim", c.D_has_hdim);
  options.read("norm_before_gate", c.norm_before_gate);
  options.read("bias", c.bias);
  options.read("conv_bias", c.conv_bias);

  c.inner = c.expand * d_model;
  if (c.inner % c.head_dim != 0) {
    if (!options.given("head_dim") && c.inner < c.head_dim) {  // the default suits wider models
      c.head_dim = c.inner;
      options.resolve("head_dim", c.head_dim);
    } else {
      options.fail("head_dim", fmt::format("{} does not divide the inner width {} (d_model {} x expand {})", c.head_dim,
                                           c.inner, d_model, c.expand),
                   near_divisors(c.inner, c.head_dim));
    }
  }
  c.heads = c.inner / c.head_dim;
  if (c.heads % c.n_groups != 0) {
    options.fail("n_groups", fmt::format("{} groups do not divide the {} heads (inner width {} / head_dim {})", c.n_groups,
                                         c.heads, c.inner, c.head_dim),
                 near_divisors(c.heads, c.n_groups));
  }
  if (c.dt_max < c.dt_min) {
    options.fail("dt_max", fmt::format("{} is below dt_min {}; expected a range", c.dt_max, c.dt_min));
  }
  if (c.A_init_range[1] < c.A_init_range[0]) {
    options.fail("A_init_range", fmt::format("[{}, {}] runs backwards; expected the smaller number first",
                                             c.A_init_range[0], c.A_init_range[1]));
  }
  const bool clamped = c.dt_limit[0] != 0 || c.dt_limit[1] != 0;
  if (clamped && c.dt_limit[1] <= c.dt_limit[0]) {
    options.fail("dt_limit", fmt::format("[{}, {}] leaves no time step; expected two rising numbers, or [0, 0] for none",
                                         c.dt_limit[0], c.dt_limit[1]));
  }
  options.finish();
  return c;
}

}  // namespace krait::layers
