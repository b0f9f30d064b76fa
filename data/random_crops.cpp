#include "core/error.h"
#include "core/random.h"
#include "data/dataset_rows.h"

namespace krait::data {
namespace {

class RandomCrops final : public Dataset {
 public:
  RandomCrops(TokensPtr tokens, const CropOptions& options)
      : tokens_(std::move(tokens)), options_(options), key_(random_key(options.seed, "data.crop")) {
    check_window(*tokens_, options_.context, options_.batch_size);
  }
  int64_t steps() const override { return -1; }
  int64_t batch_size() const override { return options_.batch_size; }
  int64_t context() const override { return options_.context; }
  int64_t total_targets() const override { return -1; }

  Batch get(int64_t step, int64_t rank, int64_t world) const override {
    KRAIT_CHECK(step >= 0, "step {} does not exist", step);
    const RankRows rows = rows_of(options_.batch_size, rank, world);
    Batch batch = blank_batch(step, rows.count, options_.context, options_.documents);
    for (int64_t row = 0; row < rows.count; ++row)
      fill_row(batch, row, *tokens_, start_of(step * options_.batch_size + rows.first + row), tokens_->size(), 0,
               options_.documents);
    return batch;
  }

 private:
  // Uniform over the places where context + 1 tokens fit: the high half of a random number times their count.
  int64_t start_of(int64_t global_row) const {
    const Philox r = philox(key_, static_cast<uint64_t>(global_row), 0);
    const auto places = static_cast<uint64_t>(tokens_->size() - options_.context);
    const uint64_t random = uint64_t{r.word[0]} << 32 | r.word[1];
    return static_cast<int64_t>((static_cast<unsigned __int128>(places) * random) >> 64);
  }

  TokensPtr tokens_;
  CropOptions options_;
  uint64_t key_;
};

}  // namespace

DatasetPtr random_crops(TokensPtr tokens, const CropOptions& options) {
  return std::make_shared<RandomCrops>(std::move(tokens), options);
}

}  // namespace krait::data
