#include "data/functions.h"
#include "data/generated_task.h"
#include "data/task_kinds.h"

namespace krait::data {
namespace {

using Kind = TaskShape::Kind;

/// The adding problem (Hochreiter & Schmidhuber 1997): at each position a number in [0, 1) and a mark, which is 1 at one
/// position of each half; the target is the sum of the two marked numbers. Always answering 1 has an error of 1/6.
class Adding final : public Generator {
 public:
  void generate(Split, RandomStream& random, ExampleRow& row) const override {
    const auto l = static_cast<int64_t>(row.inputs.size()) / 2;
    for (int64_t i = 0; i < l; ++i) row.inputs[static_cast<size_t>(2 * i)] = random.unit_float();
    const auto marked = {random.below(l / 2), random.between(l / 2, l - 1)};
    for (const int64_t i : marked) {
      row.inputs[static_cast<size_t>(2 * i + 1)] = 1;
      row.values[0] += row.inputs[static_cast<size_t>(2 * i)];
    }
  }
};

/// Samples of a function, uniform in [-1, 1]^n. The value belongs to the rounded inputs.
class FunctionSamples final : public Generator {
 public:
  explicit FunctionSamples(const FunctionSpec& spec) : spec_(spec) {}
  void generate(Split, RandomStream& random, ExampleRow& row) const override {
    std::vector<double> x(row.inputs.size());
    for (size_t i = 0; i < x.size(); ++i) x[i] = row.inputs[i] = static_cast<float>(2 * random.unit() - 1);
    row.values[0] = static_cast<float>(spec_(x.data()));
  }

 private:
  const FunctionSpec& spec_;  // of the table, which stays
};

}  // namespace

TaskPtr make_adding(OptionReader& options) {
  int64_t context = 1000;
  ExampleCounts counts;
  options.read("context", context, between(2, kMaxContext));
  read_counts(options, counts);
  const TaskShape shape{.kind = Kind::values, .input_features = 2, .n_classes = 1, .context = context, .eval_context = context};
  return generated_task("adding", shape, counts, std::make_shared<Adding>());
}

TaskPtr make_function(OptionReader& options) {
  std::string name = functions().front().name;
  std::vector<std::string> names;
  for (const FunctionSpec& spec : functions()) names.push_back(spec.name);
  ExampleCounts counts{.train = 3000};
  options.require("function");
  options.choice("function", name, names);
  read_fixed_context(options, 1);
  read_counts(options, counts);
  const FunctionSpec& spec = find_function(name);
  const TaskShape shape{.kind = Kind::values, .input_features = spec.n_inputs(), .n_classes = 1, .context = 1, .eval_context = 1};
  // Each function has samples of its own.
  return generated_task("function." + name, shape, counts, std::make_shared<FunctionSamples>(spec));
}

}  // namespace krait::data
