#include "data/example_set.h"

#include <algorithm>
#include <mutex>
#include <vector>

#include "core/error.h"
#include "core/parallel.h"
#include "core/random.h"
#include "data/dataset_rows.h"
#include "data/permutation.h"

namespace krait::data {
namespace {

using Kind = TaskShape::Kind;

class ExampleBatches final : public Dataset {
 public:
  ExampleBatches(ExampleSetPtr set, const TaskShape& shape, int64_t context, int64_t batch_size, Order order, uint64_t seed)
      : set_(std::move(set)), shape_(shape), context_(context), batch_size_(batch_size), size_(set_->size()),
        once_(order == Order::once && size_ >= 0), seed_(seed) {
    KRAIT_CHECK(batch_size > 0, "the batch size must be positive, not {}", batch_size);
    KRAIT_CHECK(size_ != 0, "the split has no examples");
    if (once_) batch_size_ = std::min(batch_size_, size_);  // rows without an example would be computed all the same
  }
  int64_t steps() const override { return once_ ? (size_ + batch_size_ - 1) / batch_size_ : -1; }
  int64_t batch_size() const override { return batch_size_; }
  int64_t context() const override { return context_; }

  int64_t total_targets() const override {
    if (!once_) return -1;
    if (shape_.kind != Kind::token_targets) return size_;
    std::call_once(counted_, [&] {
      for (int64_t step = 0; step < steps(); ++step) total_targets_ += get(step, 0, 1).n_targets;
    });
    return total_targets_;
  }

  Batch get(int64_t step, int64_t rank, int64_t world) const override {
    KRAIT_CHECK(step >= 0 && (!once_ || step < steps()), "step {} of {} does not exist", step, steps());
    const RankRows rows = rows_of(batch_size_, rank, world);
    const int64_t first = step * batch_size_ + rows.first;
    Batch batch = blank(step, rows.count);
    batch.n_rows = once_ ? std::clamp<int64_t>(size_ - first, 0, rows.count) : rows.count;
    std::vector<int64_t> counts(static_cast<size_t>(rows.count), 0);
    parallel_for(0, batch.n_rows, set_->grain(), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) counts[static_cast<size_t>(row)] = fill(batch, row, first + row);
    });
    for (const int64_t count : counts) batch.n_targets += count;
    return batch;
  }

 private:
  Batch blank(int64_t step, int64_t rows) const {
    Batch batch;
    batch.step = step;
    batch.resets = ones({rows}, DType::boolean, kCpu);
    if (shape_.input_features > 0) batch.inputs = zeros({rows, context_, shape_.input_features}, DType::f32, kCpu);
    else batch.tokens = zeros({rows, context_}, DType::i32, kCpu);
    if (shape_.kind == Kind::token_targets) batch.targets = full({rows, context_}, kIgnore, DType::i64, kCpu);
    if (shape_.kind == Kind::labels) batch.labels = full({rows}, kIgnore, DType::i64, kCpu);
    if (shape_.kind == Kind::values) batch.values = zeros({rows, shape_.n_classes}, DType::f32, kCpu);
    if (shape_.variable_length) batch.lengths = ones({rows}, DType::i32, kCpu);
    return batch;
  }

  template <class T>
  static std::span<T> row_of(const Tensor& t, int64_t row) {
    if (!t.defined()) return {};
    const int64_t n = t.numel() / t.size(0);
    return {t.data<T>() + row * n, static_cast<size_t>(n)};
  }

  // Returns how many targets count.
  int64_t fill(Batch& batch, int64_t row, int64_t place) const {
    ExampleRow out{.tokens = row_of<int32_t>(batch.tokens, row),
                   .targets = row_of<int64_t>(batch.targets, row),
                   .inputs = row_of<float>(batch.inputs, row),
                   .values = row_of<float>(batch.values, row),
                   .label = kIgnore,
                   .length = static_cast<int32_t>(context_)};
    set_->fill(index_at(place), out);
    if (batch.labels.defined()) batch.labels.data<int64_t>()[row] = out.label;
    if (batch.lengths.defined()) batch.lengths.data<int32_t>()[row] = out.length;
    if (shape_.kind != Kind::token_targets) return 1;
    return std::count_if(out.targets.begin(), out.targets.end(), [](int64_t t) { return t != kIgnore; });
  }

  int64_t index_at(int64_t place) const {
    if (size_ < 0 || once_) return place;
    const int64_t pass = place / size_;
    const uint64_t key = random_key(seed_ + static_cast<uint64_t>(pass) * 0x9E3779B97F4A7C15u, "data.order");
    return Permutation(size_, key)(place % size_);
  }

  ExampleSetPtr set_;
  TaskShape shape_;
  int64_t context_, batch_size_, size_;
  bool once_;
  uint64_t seed_;
  mutable std::once_flag counted_;
  mutable int64_t total_targets_ = 0;
};

}  // namespace

DatasetPtr example_batches(ExampleSetPtr set, const TaskShape& shape, int64_t context, int64_t batch_size, Order order,
                           uint64_t seed) {
  return std::make_shared<ExampleBatches>(std::move(set), shape, context, batch_size, order, seed);
}

}  // namespace krait::data
