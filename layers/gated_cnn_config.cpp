#include "layers/gated_cnn_config.h"

#include <cmath>

#include "layers/option_sizes.h"

namespace krait::layers {

GatedCnnConfig read_gated_cnn_config(ConfigNode& section, int64_t d_model) {
  GatedCnnConfig c;
  OptionReader options(section);
  options.read("expand", c.expand, between(0, 1 << 16));
  options.read("hidden", c.hidden, size_from(0));
  options.read("conv_ratio", c.conv_ratio, factor());
  options.read("d_conv", c.d_conv, size_from(1));
  if (c.expand != 0 && c.hidden != 0 && options.given("expand")) {
    options.fail("hidden", fmt::format("{} and expand {} both set the inner width", c.hidden, c.expand), "leaving one out");
  }
  const double width = static_cast<double>(d_model);
  if (c.hidden == 0) {
    c.hidden = c.expand == 0 ? 8 * d_model / 3 : std::llround(c.expand * width);
    if (c.expand == 0) options.resolve("hidden", c.hidden);
  }
  c.conv_channels = std::llround(c.conv_ratio * width);
  if (c.conv_channels < 1 || c.conv_channels > c.hidden) {
    options.fail("conv_ratio", fmt::format("{} x d_model {} gives {} convolved channels, expected 1 to the inner width {}",
                                           c.conv_ratio, d_model, c.conv_channels, c.hidden),
                 fmt::format("at most {:.4g}", static_cast<double>(c.hidden) / width));
  }
  options.finish();
  return c;
}

}  // namespace krait::layers
