#include "layers/linear_attention_config.h"

#include "layers/head_count.h"
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
  complete_head_count(options, c.n_heads, d_model);
  c.head_dim = d_model / c.n_heads;
  options.finish();
  return c;
}

}  // namespace krait::layers
