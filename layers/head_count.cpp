#include "layers/head_count.h"

#include "layers/near_divisors.h"

namespace krait::layers {

void complete_head_count(OptionReader& options, int64_t& n_heads, int64_t d_model, const std::function<bool(int64_t)>& fits) {
  if (n_heads == 0) {
    if (d_model % 64 != 0)
      options.fail("n_heads", fmt::format("is needed: d_model {} does not split into heads of 64 channels", d_model),
                   near_divisors(d_model, d_model / 64));
    n_heads = d_model / 64;
    options.resolve("n_heads", n_heads);
  }
  if (d_model % n_heads != 0)
    options.fail("n_heads", fmt::format("{} heads do not divide the width {} (d_model)", n_heads, d_model), near_divisors(d_model, n_heads, fits));
}

}  // namespace krait::layers
