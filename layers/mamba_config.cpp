#include "layers/mamba_config.h"

#include "layers/option_sizes.h"

namespace krait::layers {

MambaConfig read_mamba_config(ConfigNode& section, int64_t d_model) {
  MambaConfig c;
  OptionReader options(section);
  options.read("d_state", c.d_state, size_from(1));
  options.read("expand", c.expand, size_from(1));
  options.read("d_conv", c.d_conv, size_from(1));
  const ConfigNode* rank = section.find("dt_rank");
  if (rank && rank->is_scalar() && rank->text() == "auto") options.resolve("dt_rank", int64_t{0});
  options.read("dt_rank", c.dt_rank, size_from(0));
  options.read("dt_min", c.dt_min, above(0));
  options.read("dt_max", c.dt_max, above(0));
  options.read("dt_init_floor", c.dt_init_floor, at_least(0));
  options.read("conv_bias", c.conv_bias);
  options.read("bias", c.bias);

  if (c.dt_max < c.dt_min) {
    options.fail("dt_max", fmt::format("{} is below dt_min, {}", c.dt_max, c.dt_min),
                 fmt::format("dt_max: {} or more", c.dt_min));
  }
  c.d_inner = c.expand * d_model;
  if (c.dt_rank == 0) {
    c.dt_rank = (d_model + 15) / 16;
    options.resolve("dt_rank", c.dt_rank);
  }
  if (c.dt_rank > c.d_inner) {
    options.fail("dt_rank", fmt::format("{} is more than the inner width {} (d_model {} x expand {})", c.dt_rank,
                                        c.d_inner, d_model, c.expand),
                 fmt::format("dt_rank: {}", (d_model + 15) / 16));
  }
  options.finish();
  return c;
}

}  // namespace krait::layers
