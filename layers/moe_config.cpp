#include "layers/moe_config.h"

#include "layers/option_sizes.h"

namespace krait::layers {

void read_moe_options(OptionReader& options, MoeConfig& c) {
  options.read("n_experts", c.n_experts, size_from(1));
  options.read("top_k", c.top_k, size_from(1));
  options.read("n_null_experts", c.n_null_experts, size_from(0));
  options.read("renormalize", c.renormalize);
  options.read("balance_coef", c.balance_coef, at_least(0));
  options.read("z_coef", c.z_coef, at_least(0));
  if (c.top_k > c.n_experts + c.n_null_experts)
    options.fail("top_k", fmt::format("{} experts per token, but there are {} (n_experts {} + n_null_experts {})", c.top_k,
                                      c.n_experts + c.n_null_experts, c.n_experts, c.n_null_experts),
                 fmt::format("at most {}", c.n_experts + c.n_null_experts));
}

}  // namespace krait::layers
