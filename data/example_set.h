#pragma once
#include <cstdint>
#include <memory>
#include <span>

#include "data/dataset.h"

namespace krait::data {

/// What a model of a task must take and give.
struct TaskShape {
  enum class Kind : uint8_t {
    token_targets,  // Batch.targets: classes at marked positions, as for a language model; n_classes == vocab_size
    labels,         // Batch.labels: one class a row
    values,         // Batch.values: regression
  };
  Kind kind = Kind::labels;
  int64_t vocab_size = 0;      // 0: continuous inputs
  int64_t input_features = 0;  // of Batch.inputs; 0: tokens
  int64_t n_classes = 0;       // classes, or outputs of a regression
  int64_t context = 0;         // length of rows of the training split
  int64_t eval_context = 0;    // of valid and test: longer where a task asks for length generalisation
  bool variable_length = false;  // Batch.lengths is set
};

/// One row of a batch to be filled in. Spans that the task's shape does not have are empty. They come blank: tokens and
/// numbers 0, targets and label kIgnore, length the context.
struct ExampleRow {
  std::span<int32_t> tokens;   // (l)
  std::span<int64_t> targets;  // (l)
  std::span<float> inputs;     // (l d)
  std::span<float> values;     // (outputs)
  int64_t label = kIgnore;
  int32_t length = 0;
};

/// The examples of one split by index: fill() gives the same for the same index, from any thread.
class ExampleSet {
 public:
  virtual ~ExampleSet() = default;
  virtual int64_t size() const = 0;  // -1: endless
  virtual void fill(int64_t index, ExampleRow& row) const = 0;
  /// Examples worth a thread of their own: few where one takes long to make.
  virtual int64_t grain() const { return int64_t{1} << 20; }
};
using ExampleSetPtr = std::shared_ptr<const ExampleSet>;

enum class Order : uint8_t {
  once,      // in order, one pass
  shuffled,  // passes without end, each in its own order
};
/// Batches of examples. An endless set is taken in order, whatever `order` says: row g of the run is example g.
DatasetPtr example_batches(ExampleSetPtr set, const TaskShape& shape, int64_t context, int64_t batch_size, Order order,
                           uint64_t seed);

}  // namespace krait::data
