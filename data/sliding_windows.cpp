#include <algorithm>

#include "core/error.h"
#include "data/dataset_rows.h"

namespace krait::data {
namespace {

class SlidingWindows final : public Dataset {
 public:
  SlidingWindows(TokensPtr tokens, const WindowOptions& options) : tokens_(std::move(tokens)), options_(options) {
    check_window(*tokens_, options_.context, options_.batch_size);
    if (options_.stride == 0) options_.stride = options_.context;
    KRAIT_CHECK(options_.stride > 0 && options_.stride <= options_.context,
                "the stride {} is not between 1 and the context {}: tokens would be left out", options_.stride,
                options_.context);
    const int64_t after_first = tokens_->size() - 1 - options_.context;
    windows_ = 1 + (after_first + options_.stride - 1) / options_.stride;
    options_.batch_size = std::min(options_.batch_size, windows_);  // rows without a window would be computed all the same
  }
  int64_t steps() const override { return (windows_ + options_.batch_size - 1) / options_.batch_size; }
  int64_t batch_size() const override { return options_.batch_size; }
  int64_t context() const override { return options_.context; }
  int64_t total_targets() const override { return countable_targets(*tokens_, options_.documents); }

  Batch get(int64_t step, int64_t rank, int64_t world) const override {
    KRAIT_CHECK(step >= 0 && step < steps(), "step {} of {} does not exist", step, steps());
    const RankRows rows = rows_of(options_.batch_size, rank, world);
    Batch batch = blank_batch(step, rows.count, options_.context, options_.documents);
    for (int64_t row = 0; row < rows.count; ++row) {
      const int64_t window = step * options_.batch_size + rows.first + row;
      if (window >= windows_) break;
      const int64_t start = window * options_.stride;
      // The window before has counted the targets up to start - stride + context.
      const int64_t first_target = window == 0 ? 1 : start - options_.stride + options_.context + 1;
      fill_row(batch, row, *tokens_, start, tokens_->size(), first_target, options_.documents);
    }
    return batch;
  }

 private:
  TokensPtr tokens_;
  WindowOptions options_;
  int64_t windows_ = 0;
};

}  // namespace

DatasetPtr sliding_windows(TokensPtr tokens, const WindowOptions& options) {
  return std::make_shared<SlidingWindows>(std::move(tokens), options);
}

}  // namespace krait::data
