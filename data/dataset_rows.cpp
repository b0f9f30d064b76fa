#include "data/dataset_rows.h"

#include <algorithm>
#include <vector>

#include "core/error.h"

namespace krait::data {

Documents documents_from_name(std::string_view name) {
  if (name == "ignore") return Documents::ignore;
  if (name == "pack") return Documents::pack;
  throw_error(fmt::format("documents: '{}' is unknown; choose pack or ignore", name));
}

void check_window(const Tokens& tokens, int64_t context, int64_t batch_size) {
  KRAIT_CHECK(context > 0, "the context must be positive, not {}", context);
  KRAIT_CHECK(batch_size > 0, "the batch size must be positive, not {}", batch_size);
  KRAIT_CHECK(tokens.size() > 1, "{} has {} token(s), nothing to predict; at least 2 are needed", tokens.where(), tokens.size());
  KRAIT_CHECK(
      tokens.size() > context,
      "{} has {} tokens, too few for a context of {} and the token after it; lower the context to at most {}, or "
      "prepare more text",
      tokens.where(), tokens.size(), context, tokens.size() - 1);
}

RankRows rows_of(int64_t batch_size, int64_t rank, int64_t world) {
  KRAIT_CHECK(world > 0 && rank >= 0 && rank < world, "rank {} of {} does not exist", rank, world);
  KRAIT_CHECK(batch_size % world == 0, "a batch of {} rows cannot be shared evenly by {} ranks", batch_size, world);
  return {batch_size / world * rank, batch_size / world};
}

Batch blank_batch(int64_t step, int64_t rows, int64_t context, Documents documents) {
  Batch batch;
  batch.step = step;
  batch.n_rows = rows;
  batch.tokens = zeros({rows, context}, DType::i32, kCpu);
  batch.targets = full({rows, context}, kIgnore, DType::i64, kCpu);
  batch.resets = ones({rows}, DType::boolean, kCpu);
  if (documents == Documents::pack) {
    batch.segments = zeros({rows, context}, DType::i32, kCpu);
    batch.positions = zeros({rows, context}, DType::i32, kCpu);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < context; ++i)
        batch.positions.data<int32_t>()[row * context + i] = static_cast<int32_t>(i);
  }
  return batch;
}

void fill_row(Batch& batch, int64_t row, const Tokens& tokens, int64_t start, int64_t end, int64_t first_target,
              Documents documents) {
  const int64_t context = batch.tokens.size(1);
  const int64_t n = std::min(context + 1, end - start);  // tokens shown or predicted
  if (n <= 0) return;
  std::vector<int32_t> ids(static_cast<size_t>(n));
  tokens.read(start, ids);
  int32_t* shown = batch.tokens.data<int32_t>() + row * context;
  int64_t* targets = batch.targets.data<int64_t>() + row * context;
  std::copy_n(ids.begin(), std::min(n, context), shown);
  for (int64_t i = std::max<int64_t>(0, first_target - start - 1); i + 1 < n; ++i) {
    targets[i] = ids[static_cast<size_t>(i + 1)];
    ++batch.n_targets;
  }
  if (documents == Documents::ignore) return;

  int32_t* segments = batch.segments.data<int32_t>() + row * context;
  int32_t* positions = batch.positions.data<int32_t>() + row * context;
  const auto starts = tokens.documents();
  auto next = std::upper_bound(starts.begin(), starts.end(), start);  // the first boundary inside the row
  int32_t segment = 0;
  int64_t began = 0;
  for (int64_t i = 0; i <= context; ++i) {
    if (next != starts.end() && *next == start + i && i < n) {
      ++next;
      ++segment;
      began = i;
      if (targets[i - 1] != kIgnore) {  // what begins a document follows from nothing in it
        targets[i - 1] = kIgnore;
        --batch.n_targets;
      }
    }
    if (i == context) break;
    segments[i] = segment;
    positions[i] = static_cast<int32_t>(i - began);
  }
}

int64_t countable_targets(const Tokens& tokens, Documents documents) {
  return tokens.size() - (documents == Documents::pack ? static_cast<int64_t>(tokens.documents().size()) : 1);
}

}  // namespace krait::data
