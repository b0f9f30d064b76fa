#include "layers/slstm_config.h"

#include <cmath>

#include "layers/head_count.h"
#include "layers/option_sizes.h"

namespace krait::layers {

SlstmConfig read_slstm_config(ConfigNode& section, int64_t d_model) {
  SlstmConfig c;
  OptionReader options(section);
  options.read("n_heads", c.n_heads, size_from(1));
  options.read("conv", c.conv, between(0, 64));
  options.choice("recurrent_init", c.recurrent_init, {"zeros", "standard"});
  options.choice("forget_gate", c.forget_gate, {"sigmoid", "exp"});
  options.read("ratio", c.ratio, between(0, 1 << 16));
  options.read("hidden", c.hidden, size_from(0));
  complete_head_count(options, c.n_heads, d_model);
  if (c.conv == 1) options.fail("conv", "found 1, expected 0 (none) or at least 2 taps", "4");
  if (c.hidden == 0)
    c.hidden = static_cast<int64_t>(std::ceil(c.ratio * static_cast<double>(d_model) / 64.0 - 1e-9)) * 64;
  options.finish();
  return c;
}

}  // namespace krait::layers
