#pragma once
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/comm/process_group.h"
#include "core/tensor.h"

/// Checkpoints: RUN_DIR/checkpoints/step-00001000/
///   shard-0002-of-0004.h5   what rank 2 of 4 wrote: /meta (JSON text as bytes), /tensors/<name> with attribute dtype;
///                           bits are exact (bfloat16 and float16 as uint16, bool as uint8). Of a tensor that several
///                           ranks wrote each file has a piece, one-dimensional, with attribute piece (JSON): shape of
///                           the whole; dim and ranges: the part that the rank's own tensor is; flat: ranges of the
///                           elements of that part
///   manifest.json           format, format_version, step, and for each file its bytes and crc32c
/// A directory of that name is always complete: it is written under a hidden name, synced and renamed.
/// `best` is a symbolic link to the checkpoint with the best evaluation.
namespace krait::train {

using Ranges = std::vector<std::pair<int64_t, int64_t>>;  // [begin, end), ascending

/// Which part of a whole tensor a process has: of dimension `dim` the ranges, side by side, which make its own tensor;
/// of the elements of that tensor, in row-major order, those in `flat`.
struct TensorPiece {
  Shape whole;
  int64_t dim = 0;
  Ranges ranges;
  Ranges flat;
};

struct NamedTensor {
  std::string name;
  Tensor value;  // any device; of a piece as many elements as its flat ranges
  std::optional<TensorPiece> piece = {};  // none: the whole tensor
};

struct CheckpointOptions {
  int64_t keep_latest = 2;  // older ones are removed once a newer one is published
  bool keep_best = true;    // the target of `best` is not removed
  bool async = true;        // write on a thread of its own
};

/// Writes the checkpoints of one run: every rank a file of its own, at the same time; rank 0 publishes them when all are
/// there. A failed write leaves the earlier ones untouched and nothing of its own. All ranks call alike.
class CheckpointWriter {
 public:
  /// Makes the directory and clears what a killed process left unfinished in it.
  CheckpointWriter(std::string directory, const CheckpointOptions& options,
                   comm::GroupPtr world = comm::single_group("world"));
  ~CheckpointWriter();  // waits; an error that nobody asked for is lost: call finish()
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  /// Takes copies of the tensors (async) and returns; they may change afterwards. `meta` is JSON text.
  /// Waits for the write before it; throws the error of that one, without starting this one: on all ranks.
  void save(int64_t step, const std::vector<NamedTensor>& tensors, const std::string& meta, bool is_best);
  /// Whether this rank's part of the write in flight has failed: finish() throws the error.
  bool failed() const;
  /// Waits for the write in flight and throws its error. Call it at the end of a run.
  void finish();

 private:
  struct Job;
  void prepare(const Job& job);
  void start(Job& job);
  void publish_when_complete(Job& job);
  void prune(int64_t newest);
  std::string directory_;
  CheckpointOptions options_;
  comm::GroupPtr world_;
  std::unique_ptr<Job> job_;  // under way
};

/// One checkpoint, opened and verified: sizes and checksums of all its files. Throws Error that names the file at
/// fault. Tensors are read as they are asked for.
class CheckpointReader {
 public:
  /// Without `verify` (somebody else has) sizes alone are compared.
  explicit CheckpointReader(const std::string& path, bool verify = true);
  ~CheckpointReader();
  CheckpointReader(CheckpointReader&&) noexcept;
  const std::string& path() const { return path_; }
  int64_t step() const { return step_; }
  const std::string& meta() const { return meta_; }
  std::vector<std::string> names() const;
  bool has(const std::string& name) const;
  Tensor read(const std::string& name) const;  // on the CPU, put together from its pieces
  /// Fills the targets, which may be other pieces than those that were written, from the tensors named prefix +
  /// target.name. Names (none missing, none left over under the
  /// prefix), shapes and dtypes are compared first: on an error no target has changed.
  void read_into(const std::vector<NamedTensor>& targets, const std::string& prefix = "") const;

 private:
  struct Shard;
  std::string path_, meta_;
  int64_t step_ = 0;
  std::vector<Shard> shards_;
  struct Stored;
  std::map<std::string, std::vector<Stored>> stored_;  // the pieces of each tensor
};

struct CheckpointInfo {
  int64_t step = 0;
  std::string path;
  int64_t bytes = 0;
  bool best = false;
  std::string problem;  // why it cannot be used; empty when whole
  bool newer = false;   // not damaged: of a format that a later Krait writes
};
/// All checkpoints, oldest first; none where there is no such directory, an error where it cannot be read. Without `verify`
/// only the manifest and the file sizes are looked at.
std::vector<CheckpointInfo> list_checkpoints(const std::string& directory, bool verify);

/// The newest whole checkpoint; one message in `skipped` for each newer one that is damaged. None: nullopt.
/// One of a newer format is an error: going on before it would replace it by and by.
std::optional<CheckpointInfo> latest_checkpoint(const std::string& directory, std::vector<std::string>* skipped = nullptr);
/// The one that `best` points at, else the newest.
std::optional<CheckpointInfo> best_checkpoint(const std::string& directory, std::vector<std::string>* skipped = nullptr);

/// "step-00001000"
std::string checkpoint_name(int64_t step);

}  // namespace krait::train
