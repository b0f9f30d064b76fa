#include "layers/linear_attention_config.h"

#include "layers/near_divisors.h"
#include "layers/option_sizes.h"

namespace krait::layers {

LinearAttentionConfig read_linear_attention_config(ConfigNode& section, int64_t d_model) {
  LinearAttentionConfig c;
  OptionReader options(section);
  options.read("n_heads", c.n_heads, size_from(0));
  options.choice("feature", c.feature, {"elu1", "identity"});
  options.read("gate", c.gate);
  options.read("eps", c.eps, at_least(0));
  options.read("chunk_size", c.chunk_size, size_from(1));
  options.read("bias", c.bias);
  if (c.n_heads == 0) {
    if (d_model % 64 != 0) {
      options.fail("n_heads", fmt::format("is needed: d_model {} does not split into heads of 64 channels", d_model),
                   near_divisors(d_model, d_model / 64));
    }
    c.n_heads = d_model / 64;
    options.resolve("n_heads", c.n_heads);
  }
  if (d_model % c.n_heads != 0) {
    options.fail("n_heads", fmt::format("{} heads do not divide the width {} (d_model)", c.n_heads, d_model),
                 near_divisors(d_model, c.n_heads));
  }
  c.head_dim = d_model / c.n_heads;
  options.finish();
  return c;
}

}  // namespace krait::layers
