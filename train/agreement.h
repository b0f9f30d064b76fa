#pragma once
#include <exception>
#include <string>

#include "core/comm/process_group.h"

namespace krait::train {

/// The text that rank `root` gives, on every rank.
std::string from_rank(comm::ProcessGroup& group, int root, const std::string& text);

/// What f() did on each rank is known to all: the error of the lowest rank that failed is thrown on every one.
/// All ranks together.
void throw_together(comm::ProcessGroup& group, const std::exception_ptr& own_failure);

}  // namespace krait::train
