#pragma once
#include <cstdint>
#include <span>

#include "data/dataset.h"

// What the token data sets share: rows of this rank, and one row of a batch from a place in the tokens.
namespace krait::data {

/// Throws unless the split is long enough for one window and the sizes make sense.
void check_window(const Tokens& tokens, int64_t context, int64_t batch_size);

/// Rows [first, first + count) of the global batch belong to the rank.
struct RankRows {
  int64_t first = 0, count = 0;
};
RankRows rows_of(int64_t batch_size, int64_t rank, int64_t world);

/// A batch of rows without tokens: token 0 everywhere, every target ignored, every reset set.
Batch blank_batch(int64_t step, int64_t rows, int64_t context, Documents documents);

/// Row `row` shows tokens [start, start + context) and predicts (start, start + context], as far as they lie before
/// `end`. Targets before position `first_target` are ignored, and the first tokens of packed documents.
void fill_row(Batch& batch, int64_t row, const Tokens& tokens, int64_t start, int64_t end, int64_t first_target,
              Documents documents);

/// Targets among positions [1, size) that count.
int64_t countable_targets(const Tokens& tokens, Documents documents);

}  // namespace krait::data
