#pragma once
#include "core/option_reader.h"

namespace krait::layers {

/// Counts of channels, heads, experts: products of three stay within 64 bits.
inline Range size_from(double least) { return between(least, 1 << 20); }

/// What a width is multiplied by.
inline Range factor() { return {.min = 0, .max = 1 << 16, .open_min = true}; }

}  // namespace krait::layers
