#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// Elementwise activations; the backward recomputes them from x. Formulas: kernels/activation.h.
enum class GeluForm : uint8_t { tanh, erf };
Variable silu(const Variable& x);
Variable gelu(const Variable& x, GeluForm form);
Variable relu2(const Variable& x);

/// silu(gate) up and gelu(gate) up; gate and up (..., f), rows may be apart (slices of one projection).
Variable swiglu(const Variable& gate, const Variable& up);
Variable geglu(const Variable& gate, const Variable& up, GeluForm form);
/// The same on x (..., 2f) = [gate; up] -> (..., f).
Variable swiglu_packed(const Variable& x);
Variable geglu_packed(const Variable& x, GeluForm form);
/// x (..., 2f) = [up; gate] -> up s(gate), s the logistic function (Dauphin et al. 2017).
Variable glu(const Variable& x);

}  // namespace autograd
}  // namespace krait
