#pragma once
#include <array>
#include <span>

#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

using Scalars = std::array<double, 4>;

/// dst (n), fp64, n <= 4: gets the values. On a GPU they travel as launch arguments: ordered by the stream, no
/// staging buffer, no wait. For per-step scalars that a captured graph reads.
void set_scalars(const Tensor& dst, std::span<const double> values);

KRAIT_BACKENDS(void set_scalars(const Tensor& dst, const Scalars& values))

}  // namespace kernels
}  // namespace krait
