#pragma once
#include "data/task.h"

// Every task's maker, for the table in task.cpp. Each reads its own options.
namespace krait::data {

TaskPtr make_image_sequence(OptionReader& options);
TaskPtr make_selective_copying(OptionReader& options);
TaskPtr make_induction_heads(OptionReader& options);
TaskPtr make_mqar(OptionReader& options);
TaskPtr make_listops(OptionReader& options);
TaskPtr make_pathfinder(OptionReader& options);
TaskPtr make_formal_language(OptionReader& options);
TaskPtr make_adding(OptionReader& options);
TaskPtr make_function(OptionReader& options);

/// For tasks whose rows have one length: `context` may be written down, but must be that.
void read_fixed_context(OptionReader& options, int64_t context);

/// Longest row that a task may ask for.
inline constexpr int64_t kMaxContext = int64_t{1} << 24;

}  // namespace krait::data
