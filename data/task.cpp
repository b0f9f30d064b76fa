#include "data/task.h"

#include <fmt/ranges.h>

#include "data/task_kinds.h"

namespace krait::data {
namespace {

struct TaskKind {
  const char* name;
  TaskPtr (*make)(OptionReader& options);
};

constexpr TaskKind kTasks[] = {
    {"image_sequence", make_image_sequence},
    {"selective_copying", make_selective_copying},
    {"induction_heads", make_induction_heads},
    {"mqar", make_mqar},
    {"listops", make_listops},
    {"pathfinder", make_pathfinder},
    {"formal_language", make_formal_language},
    {"adding", make_adding},
    {"function", make_function},
};

Split split_from_name(const std::string& name) {
  for (const Split split : {Split::train, Split::valid, Split::test})
    if (name == name_of(split)) return split;
  throw_error(fmt::format("split '{}' is unknown; choose train, valid or test", name));
}

}  // namespace

const std::vector<std::string>& task_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> list;
    for (const TaskKind& kind : kTasks) list.emplace_back(kind.name);
    return list;
  }();
  return names;
}

void read_fixed_context(OptionReader& options, int64_t context) {
  int64_t given = context;
  options.read("context", given, between(1, kMaxContext));
  if (given != context) options.fail("context", fmt::format("found {}, but rows of this task have {} positions", given, context), "leaving it out");
}

TaskPtr make_task(const std::string& name, OptionReader& options) {
  for (const TaskKind& kind : kTasks)
    if (name == kind.name) return kind.make(options);
  throw_error(fmt::format("task '{}' is unknown; choose one of {}", name, fmt::join(task_names(), ", ")));
}

DatasetPtr Task::split(const std::string& split, int64_t batch_size, uint64_t seed, const std::string& directory) const {
  const Split which = split_from_name(split);
  const bool train = which == Split::train;
  return example_batches(examples(which, seed, directory), shape_, train ? shape_.context : shape_.eval_context, batch_size,
                         train ? Order::shuffled : Order::once, seed);
}

}  // namespace krait::data
