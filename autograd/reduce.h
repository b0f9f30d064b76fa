#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// For readable calls: mean(x, -1, keepdim).
inline constexpr bool keepdim = true;
using Dims = std::vector<int64_t>;

// Over all dimensions, one, or a list; the reduced ones disappear or stay with size 1. See kernels/reduce.h.
Variable sum(const Variable& x, const Dims& dims, bool keep = false);
Variable mean(const Variable& x, const Dims& dims, bool keep = false);
/// The gradient is shared equally by all maxima.
Variable amax(const Variable& x, const Dims& dims, bool keep = false);
Variable logsumexp(const Variable& x, const Dims& dims, bool keep = false);

inline Variable sum(const Variable& x) { return sum(x, Dims{}); }
inline Variable mean(const Variable& x) { return mean(x, Dims{}); }
inline Variable amax(const Variable& x) { return amax(x, Dims{}); }
inline Variable logsumexp(const Variable& x) { return logsumexp(x, Dims{}); }
inline Variable sum(const Variable& x, int64_t dim, bool keep = false) { return sum(x, Dims{dim}, keep); }
inline Variable mean(const Variable& x, int64_t dim, bool keep = false) { return mean(x, Dims{dim}, keep); }
inline Variable amax(const Variable& x, int64_t dim, bool keep = false) { return amax(x, Dims{dim}, keep); }
inline Variable logsumexp(const Variable& x, int64_t dim, bool keep = false) { return logsumexp(x, Dims{dim}, keep); }

}  // namespace autograd
}  // namespace krait
