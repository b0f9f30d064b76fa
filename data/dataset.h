#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "core/tensor.h"
#include "data/token_store.h"

namespace krait::data {

inline constexpr int64_t kIgnore = -100;  // a target that no loss counts

/// What one rank trains or evaluates on at one step. CPU tensors; b rows of this rank, l the context.
struct Batch {
  int64_t step = 0;
  Tensor tokens;   // (b, l) int32
  Tensor targets;  // (b, l) int64: the next token, or kIgnore
  /// With documents packed, else undefined. Segment: index of the document within the row, 0 for the first.
  /// Position: distance from the start of the document, or of the row where the document began before it.
  Tensor segments, positions;  // (b, l) int32
  /// State of the step before must not enter this row: always, unless rows carry on where they stopped.
  Tensor resets;          // (b) bool
  int64_t n_targets = 0;  // targets of this rank that count; rows, where a row has one label or vector of values
  // Of tasks (data/task.h); undefined elsewhere.
  Tensor inputs;   // (b, l, d) float32: data that are not tokens; `tokens` is undefined then
  Tensor labels;   // (b) int64: a class for each row, or kIgnore; `targets` is undefined then
  Tensor values;   // (b, outputs) float32: what a regression aims at; `targets` is undefined then
  Tensor lengths;  // (b) int32, at least 1: positions that count, where rows differ; the rest is padding
  /// Rows [0, n_rows) are examples. Those behind fill up the last batch of a pass and must not count.
  int64_t n_rows = 0;
};

/// What happens at document boundaries inside a row.
enum class Documents : uint8_t {
  ignore,  // one long text: targets cross boundaries, no segments
  pack,    // segments and positions; the first token of a document is never a target
};
/// "ignore" or "pack"; throws otherwise.
Documents documents_from_name(std::string_view name);

/// Batches by step number. A batch depends on the options and the step alone: rank r of w gets the rows
/// [r B / w, (r + 1) B / w) of the global batch of B rows, which is the same for every w.
/// Stateless and safe to use from several threads: resuming needs only the step.
class Dataset {
 public:
  virtual ~Dataset() = default;
  virtual Batch get(int64_t step, int64_t rank = 0, int64_t world = 1) const = 0;
  /// Steps of one pass; -1 when it never ends.
  virtual int64_t steps() const = 0;
  virtual int64_t batch_size() const = 0;  // B
  virtual int64_t context() const = 0;     // l
  /// Targets that count in one pass over all ranks; -1 when it never ends.
  virtual int64_t total_targets() const = 0;
};
using DatasetPtr = std::shared_ptr<const Dataset>;

struct CropOptions {
  int64_t context = 0;
  int64_t batch_size = 0;
  uint64_t seed = 0;
  Documents documents = Documents::ignore;
};
/// Row g = step B + row starts at a uniform random position; endless. Training with state: reset.
DatasetPtr random_crops(TokensPtr tokens, const CropOptions& options);

struct WindowOptions {
  int64_t context = 0;
  int64_t batch_size = 0;
  int64_t stride = 0;  // 1..context; 0 means context
  Documents documents = Documents::ignore;
};
/// Evaluation: window i shows tokens [i stride, i stride + context); every token but the first (of the split, or of
/// each document when packed) is counted as a target in exactly one window, the first that shows what precedes it.
/// The last rows are filled up with token 0 and kIgnore.
DatasetPtr sliding_windows(TokensPtr tokens, const WindowOptions& options);

struct StreamOptions {
  int64_t context = 0;
  int64_t batch_size = 0;
  Documents documents = Documents::ignore;
  bool repeat = false;  // endless passes (training): full windows only, cut at a place drawn for each pass
  uint64_t seed = 0;    // of those places
};
/// State carried between windows: row r walks the r-th of B equal stretches, window after window.
/// `resets` is set where a pass begins, and with documents packed where a document begins with the window.
/// Without repeat every target is counted exactly once.
DatasetPtr streams(TokensPtr tokens, const StreamOptions& options);

/// Makes the batches of steps first_step, first_step + stride, ... on a thread of its own, up to `depth` ahead.
/// The same batches as calling get(). An error of the data set is thrown by next().
class Prefetcher {
 public:
  Prefetcher(DatasetPtr dataset, int64_t first_step, int64_t rank = 0, int64_t world = 1, int64_t depth = 3,
             int64_t stride = 1);
  ~Prefetcher();
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;
  /// nullopt after the last step of a data set that ends.
  std::optional<Batch> next();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace krait::data
