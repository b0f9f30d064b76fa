#include "layers/mlp_config.h"

#include <algorithm>
#include <cmath>

#include "layers/option_sizes.h"

namespace krait::layers {

MlpConfig read_mlp_config(ConfigNode& section, int64_t d_model) {
  MlpConfig c;
  OptionReader options(section);
  options.choice("type", c.type, {"none", "gelu", "gelu_tanh", "relu2", "silu", "swiglu", "gelu_gated", "kan", "moe"});
  options.read("ratio", c.ratio, between(0, 1 << 16));
  options.read("hidden", c.hidden, size_from(0));
  options.read("bias", c.bias);
  if (c.type == "kan") {
    if (c.bias) options.fail("bias", "KAN layers have no bias", "bias: false");
    read_kan_options(options, c.kan);
    options.read("squash", c.squash);
  }
  if (c.type == "moe") {
    if (c.bias) options.fail("bias", "experts have no bias", "bias: false");
    read_moe_options(options, c.moe);
  }
  options.finish();
  if (c.type == "none") return c;
  if (options.given("ratio") && options.given("hidden") && c.ratio != 0 && c.hidden != 0) {
    options.fail("hidden", fmt::format("{} and ratio {} both set the hidden width", c.hidden, c.ratio), "leaving one out");
  }
  if (c.hidden == 0) {
    if (c.ratio == 0) {
      const bool gated = c.type == "swiglu" || c.type == "gelu_gated" || c.type == "moe";
      c.hidden = gated ? (8 * d_model + 3 * 128 - 1) / (3 * 128) * 128 : 4 * d_model;
      // An edge of a KAN has a base weight, a scaler and G + k coefficients.
      if (c.type == "kan") c.hidden = std::max<int64_t>(4 * d_model / (c.kan.grid + c.kan.order + 2) / 8 * 8, 8);
    } else {
      // 2.667 x 768 means 2048, not 2048.256: a fraction is rounded to a multiple of 8, which matrix units like.
      const double exact = c.ratio * static_cast<double>(d_model);
      const double step = exact == std::floor(exact) ? 1 : 8;
      c.hidden = std::max<int64_t>(static_cast<int64_t>(std::llround(exact / step) * static_cast<int64_t>(step)), 1);
    }
    if (!options.given("ratio") || c.ratio == 0) options.resolve("hidden", c.hidden);
  }
  return c;
}

}  // namespace krait::layers
