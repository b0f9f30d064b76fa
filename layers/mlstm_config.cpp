#include "layers/mlstm_config.h"

#include <cmath>

#include "layers/head_count.h"
#include "layers/near_divisors.h"
#include "layers/option_sizes.h"

namespace krait::layers {

MlstmConfig read_mlstm_config(ConfigNode& section, int64_t d_model) {
  MlstmConfig c;
  OptionReader options(section);
  options.read("n_heads", c.n_heads, size_from(1));
  options.read("proj_factor", c.proj_factor, factor());
  options.read("inner", c.inner, size_from(0));
  options.read("conv", c.conv, between(1, 64));
  options.read("qkv_block_size", c.qkv_block_size, size_from(1));
  options.read("chunk_size", c.chunk_size, between(1, 1024));
  options.read("denominator_gradient", c.denominator_gradient);
  options.read("eps", c.eps, at_least(0));
  options.read("norm_eps", c.norm_eps, above(0));
  if (c.inner == 0) {
    c.inner = static_cast<int64_t>(std::ceil(c.proj_factor * static_cast<double>(d_model) / 64)) * 64;
    options.resolve("inner", c.inner);
  }
  if (c.inner % c.n_heads != 0)
    options.fail("n_heads", fmt::format("{} heads do not divide the inner width {} (d_model {})", c.n_heads, c.inner, d_model),
                 near_divisors(c.inner, c.n_heads));
  if (c.inner % c.qkv_block_size != 0)
    options.fail("qkv_block_size", fmt::format("blocks of {} do not divide the inner width {}", c.qkv_block_size, c.inner),
                 near_divisors(c.inner, c.qkv_block_size));
  options.finish();
  return c;
}

MlstmLargeConfig read_mlstm_large_config(ConfigNode& section, int64_t d_model) {
  MlstmLargeConfig c;
  OptionReader options(section);
  options.read("n_heads", c.n_heads, size_from(1));
  options.read("qk_factor", c.qk_factor, factor());
  options.read("gate_cap", c.gate_cap, above(0));
  options.read("input_gate_bias", c.input_gate_bias);
  options.read("chunk_size", c.chunk_size, between(1, 1024));
  options.read("denominator_gradient", c.denominator_gradient);
  options.read("eps", c.eps, at_least(0));
  options.read("norm_eps", c.norm_eps, above(0));
  c.qk_width = std::llround(c.qk_factor * static_cast<double>(d_model));
  complete_head_count(options, c.n_heads, d_model);
  if (c.qk_width < 1 || c.qk_width % c.n_heads != 0)
    options.fail("n_heads", fmt::format("{} heads do not divide the width {} of q and k (d_model {} x qk_factor {})",
                                        c.n_heads, c.qk_width, d_model, c.qk_factor),
                 c.qk_width < 1 ? "" : near_divisors(c.qk_width, c.n_heads));
  options.finish();
  return c;
}

}  // namespace krait::layers
