#include "layers/recurrent_config.h"

#include "layers/option_sizes.h"

namespace krait::layers {

RecurrentConfig read_recurrent_config(ConfigNode& section, int64_t d_model, bool lstm) {
  RecurrentConfig c;
  OptionReader options(section);
  options.read("hidden", c.hidden, size_from(0));
  if (lstm) options.read("forget_bias", c.forget_bias);
  if (c.hidden == 0) {
    c.hidden = d_model;
    options.resolve("hidden", c.hidden);
  }
  options.finish();
  return c;
}

}  // namespace krait::layers
