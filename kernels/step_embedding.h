#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// What begins a decoding step: y[i, :] = table[tokens[i], :] + places[positions[i], :], the sum rounded once.
/// table (v, d), places (p, d): fp32, bf16 or fp64, alike; tokens (...) int64; positions int32, as many. Without places
/// (undefined, like positions) the rows of the table alone. y (..., d).
/// Outside the tables: an error on a CPU; on a GPU, which nobody waits for, NaN.
Tensor step_embedding(const Tensor& table, const Tensor& tokens, const Tensor& places, const Tensor& positions);

// Backends: y (n, d), all contiguous.
KRAIT_BACKENDS(void step_embedding(Tensor& y, const Tensor& table, const Tensor& tokens, const Tensor& places, const Tensor& positions))

}  // namespace kernels
}  // namespace krait
