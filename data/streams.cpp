#include <algorithm>

#include "core/error.h"
#include "core/random.h"
#include "data/dataset_rows.h"

namespace krait::data {
namespace {

class Streams final : public Dataset {
 public:
  Streams(TokensPtr tokens, const StreamOptions& options)
      : tokens_(std::move(tokens)), options_(options), key_(random_key(options.seed, "data.stream")) {
    check_window(*tokens_, options_.context, options_.batch_size);
    const int64_t targets = tokens_->size() - 1;
    if (options_.repeat) {
      steps_ = targets / (options_.batch_size * options_.context);
      KRAIT_CHECK(
          steps_ > 0,
          "{} has {} tokens, too few for {} rows of {} that carry their state on; lower the batch size or the context",
          tokens_->where(), tokens_->size(), options_.batch_size, options_.context);
      stretch_ = steps_ * options_.context;
    } else {
      stretch_ = (targets + options_.batch_size - 1) / options_.batch_size;
      steps_ = (stretch_ + options_.context - 1) / options_.context;
    }
  }
  int64_t steps() const override { return options_.repeat ? -1 : steps_; }
  int64_t batch_size() const override { return options_.batch_size; }
  int64_t context() const override { return options_.context; }
  int64_t total_targets() const override {
    return options_.repeat ? -1 : countable_targets(*tokens_, options_.documents);
  }

  Batch get(int64_t step, int64_t rank, int64_t world) const override {
    KRAIT_CHECK(step >= 0 && (options_.repeat || step < steps_), "step {} of {} does not exist", step, steps_);
    const RankRows rows = rows_of(options_.batch_size, rank, world);
    Batch batch = blank_batch(step, rows.count, options_.context, options_.documents);
    const int64_t pass = step / steps_, window = step % steps_;
    const int64_t shift = options_.repeat ? shift_of(pass) : 0;
    const auto starts = tokens_->documents();
    for (int64_t row = 0; row < rows.count; ++row) {
      const int64_t begin = shift + (rows.first + row) * stretch_;
      const int64_t end = std::min(begin + stretch_ + 1, tokens_->size());  // one more: the last target
      const int64_t start = begin + window * options_.context;
      fill_row(batch, row, *tokens_, start, end, 0, options_.documents);
      const bool new_document =
          options_.documents == Documents::pack && std::binary_search(starts.begin(), starts.end(), start);
      batch.resets.data<bool>()[row] = window == 0 || new_document;
    }
    return batch;
  }

 private:
  // The tokens a pass leaves over, put in front of it instead of behind, in part: other cuts in each pass.
  int64_t shift_of(int64_t pass) const {
    const uint64_t spare = static_cast<uint64_t>(tokens_->size() - 1 - options_.batch_size * stretch_);
    const uint64_t places = std::min<uint64_t>(spare + 1, uint64_t{1} << 32);
    return static_cast<int64_t>((places * philox(key_, static_cast<uint64_t>(pass), 0).word[0]) >> 32);
  }

  TokensPtr tokens_;
  StreamOptions options_;
  uint64_t key_;
  int64_t steps_ = 0, stretch_ = 0;
};

}  // namespace

DatasetPtr streams(TokensPtr tokens, const StreamOptions& options) {
  return std::make_shared<Streams>(std::move(tokens), options);
}

}  // namespace krait::data
