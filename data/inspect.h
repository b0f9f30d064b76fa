#pragma once
#include <cstdint>
#include <string>

namespace krait::data {

/// `krait data inspect`: what a token store holds, and the first `n_tokens` tokens of each split, decoded.
/// Reads every token: checksums, ids and document offsets are verified. Throws at the first damage.
std::string inspect(const std::string& path, int64_t n_tokens = 40);

}  // namespace krait::data
