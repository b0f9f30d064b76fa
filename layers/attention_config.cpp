#include "layers/attention_config.h"

#include <cstdlib>

#include "layers/head_count.h"
#include "layers/near_divisors.h"
#include "layers/option_sizes.h"

namespace krait::layers {

AttentionConfig read_attention_config(ConfigNode& section, int64_t d_model, double dropout) {
  AttentionConfig c;
  c.dropout = dropout;
  OptionReader options(section);
  options.read("n_heads", c.n_heads, size_from(0));
  options.read("n_kv_heads", c.n_kv_heads, size_from(0));
  options.read("alibi", c.alibi);
  if (!options.given("rope")) c.rope = !c.alibi;
  options.read("rope", c.rope);
  options.read("rope_base", c.rope_base, above(0));
  options.choice("rope_style", c.rope_style, {"half", "interleaved"});
  options.read("rotary_dim", c.rotary_dim, size_from(0));
  options.read("window", c.window, at_least(0));
  options.read("bias", c.bias);
  options.read("qk_norm", c.qk_norm);
  options.read("dropout", c.dropout, below_one());
  options.choice("sequence_parallel", c.sequence_parallel, {"auto", "ring", "all_to_all"});

  const auto fits = [&](int64_t heads) { return !c.rope || (d_model / heads) % 2 == 0; };
  complete_head_count(options, c.n_heads, d_model, fits);
  c.head_dim = d_model / c.n_heads;
  if (c.n_kv_heads == 0) {
    c.n_kv_heads = c.n_heads;
    options.resolve("n_kv_heads", c.n_kv_heads);
  }
  if (c.n_heads % c.n_kv_heads != 0) {
    options.fail("n_kv_heads", fmt::format("{} key/value heads do not divide the {} query heads (n_heads)", c.n_kv_heads, c.n_heads),
                 near_divisors(c.n_heads, c.n_kv_heads));
  }
  if (!c.rope && options.given("rotary_dim") && c.rotary_dim != 0) {
    options.fail("rotary_dim", fmt::format("{} has no effect with rope: false", c.rotary_dim), "rotary_dim: 0");
  }
  if (c.rope) {
    if (!options.given("rotary_dim") || c.rotary_dim == 0) {
      if (c.head_dim % 2 != 0) {
        options.fail("n_heads", fmt::format("{} heads of {} channels: rope turns pairs and needs an even number", c.n_heads, c.head_dim),
                     near_divisors(d_model, c.n_heads, fits));
      }
      c.rotary_dim = c.head_dim;
      options.resolve("rotary_dim", c.rotary_dim);
    }
    if (c.rotary_dim % 2 != 0 || c.rotary_dim > c.head_dim) {
      options.fail("rotary_dim", fmt::format("found {}, expected an even number up to the head width {} (d_model {} / n_heads {})",
                                             c.rotary_dim, c.head_dim, d_model, c.n_heads));
    }
  }
  options.finish();
  return c;
}

}  // namespace krait::layers
