#pragma once
#include <string_view>

#include "autograd/activation.h"
#include "autograd/variable.h"
#include "core/comm/process_group.h"

namespace krait {
inline namespace autograd {

/// That x (b, l, c) is a rank's part of a (b, length, channels): positions from `position`, channels from `channel`.
/// length or channels 0: all of that dimension are here.
struct DropoutPart {
  int64_t position = 0, length = 0, channel = 0, channels = 0;
  /// The part of x (b, l, c) that a member of groups over positions and over channels holds.
  static DropoutPart of(const Variable& x, const comm::ProcessGroup& sequence) {
    return {sequence.rank() * x.size(1), sequence.size() * x.size(1)};
  }
  static DropoutPart of(const Variable& x, const comm::ProcessGroup& sequence, const comm::ProcessGroup& tensor) {
    return {sequence.rank() * x.size(1), sequence.size() * x.size(1), tensor.rank() * x.size(2),
            tensor.size() * x.size(2)};
  }
};

/// Zero with probability p, else x / (1 - p), with the numbers of current_random(). The first dimension is the
/// batch: a sequence's mask depends on its global index, not on the rank, and a part's mask is its part of the
/// whole's. Streams need distinct names: the same name draws the same mask. p = 0 returns x.
Variable dropout(const Variable& x, double p, std::string_view stream, const DropoutPart& part = {});
/// dropout(gelu(x)), in one pass.
Variable gelu_dropout(const Variable& x, GeluForm form, double p, std::string_view stream, const DropoutPart& part = {});
/// residual + dropout(x), in one pass.
Variable dropout_add(const Variable& x, const Variable& residual, double p, std::string_view stream,
                     const DropoutPart& part = {});

}  // namespace autograd
}  // namespace krait
