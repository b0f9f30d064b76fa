#pragma once
#include <optional>
#include <string>

#include "train/carried_state.h"
#include "train/checkpoint.h"
#include "train/metrics.h"
#include "train/step.h"

namespace krait::train {

/// What a run knows besides its tensors; goes into every checkpoint as JSON.
struct RunState {
  int64_t step = 0;    // finished steps
  int64_t tokens = 0;  // seen
  double time_s = 0;   // training time
  std::optional<EvalMetrics> best;
};
std::string to_json(const RunState& state);
RunState run_state_from_json(const std::string& json, const std::string& where);

/// The tensors of a checkpoint: "model.<parameter>", "optimizer.<state>.<parameter>", "tokenizer" (bytes, of token
/// data), "state.<layer>.<tensor>" (with data.state: carry; `carried` is null without).
/// Names are public and whole: independent of how the run lays its parameters out and of how many ranks there are.
/// Each element is written by one rank; these are this rank's.
std::vector<NamedTensor> checkpoint_tensors(Session& session, TrainStep& step);

/// Fills the parameters of a model that one process holds, or what a rank has of a run's parameters and optimizer
/// state; refuses a checkpoint of another model by name.
void load_model(Session& session, const CheckpointReader& reader);
void load_run(Session& session, TrainStep& step, const CheckpointReader& reader);

/// The tokenizer stored with a checkpoint.
data::TokenizerPtr load_checkpoint_tokenizer(const CheckpointReader& reader);

/// What `find` (latest_checkpoint, best_checkpoint) finds, with a warning for each that it skips. Where there are but
/// damaged ones, Error that ends in `advice`.
std::optional<CheckpointInfo> find_checkpoint(decltype(latest_checkpoint) find, const std::string& directory, const char* advice);

/// A finished or interrupted run, ready for evaluation or generation: its best checkpoint, else its newest.
struct LoadedRun {
  Session session;
  int64_t step = 0;
  std::string checkpoint;
};
LoadedRun load_finished_run(const std::string& run_dir, const std::vector<std::string>& overrides);

}  // namespace krait::train
