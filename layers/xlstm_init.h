#pragma once
#include <cmath>
#include <cstdint>

namespace krait::layers {

/// Standard deviations of the xLSTM family's first values: "small" (Nguyen & Salazar 2019) for the embedding, the head
/// and maps inside a block, "wang" (Wang & Komatsuzaki 2021) for maps into the residual stream.
inline double small_std(int64_t d_model) { return std::sqrt(2.0 / (5.0 * static_cast<double>(d_model))); }
inline double wang_std(int64_t n_layers, int64_t d_model) {
  return 2.0 / (static_cast<double>(n_layers) * std::sqrt(static_cast<double>(d_model)));
}

}  // namespace krait::layers
