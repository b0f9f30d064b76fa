#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/option_reader.h"
#include "data/dataset.h"
#include "data/example_set.h"
#include "data/split_plan.h"

namespace krait::data {

/// Something to learn other than running text: images as sequences, synthetic tasks, functions.
/// A task is made from its options alone; files are opened by split(). Immutable, safe from several threads.
class Task {
 public:
  Task(std::string name, const TaskShape& shape) : name_(std::move(name)), shape_(shape) {}
  virtual ~Task() = default;
  Task(const Task&) = delete;
  Task& operator=(const Task&) = delete;
  const std::string& name() const { return name_; }
  const TaskShape& shape() const { return shape_; }
  /// The data set (data/fetch.h) whose files split() reads, from the directory that `path` in the data section names;
  /// empty: it reads none.
  virtual std::string fetch_set() const { return {}; }

  /// train, valid or test. The training split never ends: new examples for ever (a function of seed, step and row), or
  /// a finite set in another order at each pass (order a function of seed and pass). valid and test go once through
  /// a fixed set, the same for every seed, in order; rows that fill up the last batch are ignored.
  /// `directory` is where data.path was found.
  DatasetPtr split(const std::string& split, int64_t batch_size, uint64_t seed, const std::string& directory = "") const;

 protected:
  virtual ExampleSetPtr examples(Split split, uint64_t seed, const std::string& directory) const = 0;

 private:
  std::string name_;
  TaskShape shape_;
};
using TaskPtr = std::shared_ptr<const Task>;

/// The task's options are read from the data section; `context` too, where it can be chosen, so nobody may read it
/// before. The caller reads `type` and `path` and calls options.finish().
/// Throws for a name that is not in task_names().
TaskPtr make_task(const std::string& name, OptionReader& options);

/// image_sequence, selective_copying, ...: values of data.type.
const std::vector<std::string>& task_names();

}  // namespace krait::data
