#pragma once
#include <cmath>

namespace krait::layers {

/// x with log(1 + e^x) = y, for y > 0: y + log(1 - e^-y), which loses no digits at small y.
inline double inverse_softplus(double y) { return y + std::log(-std::expm1(-y)); }

}  // namespace krait::layers
