#pragma once
#include <functional>

#include "core/option_reader.h"

namespace krait::layers {

/// Completes the option n_heads: 0 becomes as many heads as have 64 channels each. An error where they do not divide the
/// width d_model; it suggests those that `fits` accepts.
void complete_head_count(OptionReader& options, int64_t& n_heads, int64_t d_model,
                         const std::function<bool(int64_t)>& fits = [](int64_t) { return true; });

}  // namespace krait::layers
