#pragma once
#include <memory>
#include <string>

#include "data/random_stream.h"
#include "data/task.h"

// What the generated tasks share. Example i of a split is a function of the split's key and i.
namespace krait::data {

/// Makes one example from random numbers.
class Generator {
 public:
  virtual ~Generator() = default;
  virtual void generate(Split split, RandomStream& random, ExampleRow& row) const = 0;
  virtual int64_t grain() const { return int64_t{1} << 20; }
};

/// How many examples: options train_examples (0: new ones without end), valid_examples, test_examples.
struct ExampleCounts {
  int64_t train = 0, valid = 1000, test = 1000;
};
void read_counts(OptionReader& options, ExampleCounts& counts);

/// The held-out examples, and those of a finite training set, are the same for every seed of a run.
TaskPtr generated_task(const std::string& name, const TaskShape& shape, const ExampleCounts& counts,
                       std::shared_ptr<const Generator> generator);

}  // namespace krait::data
