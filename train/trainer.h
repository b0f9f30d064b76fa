#pragma once
#include <memory>
#include <optional>

#include "train/evaluate.h"
#include "train/progress.h"
#include "train/run_directory.h"
#include "train/run_state.h"
#include "train/tensorboard.h"

namespace krait::train {

/// What a run reads. Opening it checks what the config asks of the data, before anything is written.
struct TrainData {
  data::DatasetPtr train;
  data::TokensPtr eval_tokens;    // of a token store; null when there is no such split and none is asked for
  data::DatasetPtr eval_examples;  // of a task
  EvalResult evaluate(Session& session, const EvalProgress& progress) const;
  bool has_eval() const { return eval_tokens || eval_examples; }
};
TrainData open_train_data(const Session& session);

/// A training run from its first step, or the checkpoint it resumes from, to its last. All ranks of the job together;
/// the one that leads prints and keeps the logs.
class Trainer {
 public:
  Trainer(Session& session, const TrainData& data, const RunDirectory& directory, bool resume);
  /// A resumed run that had reached its last step already.
  bool complete() const { return state_.step >= total_steps_; }
  /// Whether it had also been evaluated and summed up there. All ranks together.
  bool summed_up();
  /// Trains until the last step or a stop signal, which leaves a checkpoint, also out of an evaluation: a resumed run begins with
  /// the evaluation that its checkpoint has not had. Returns what summary.json holds.
  Summary run();

 private:
  void train_step();
  void log_step();
  /// The largest of what the ranks say, on all of them.
  int agreed(int own);
  template <class Metrics>
  void write_logs(const Metrics& m, const std::vector<std::pair<std::string, double>>& scalars);
  /// Saves the step whose logs cannot be written, where that can be, and ends the run with an error.
  [[noreturn]] void give_up(bool is_best);
  bool evaluate_now();  // whether it is the best so far
  void evaluate_resumed();
  void save(bool is_best);
  Summary summary(bool interrupted) const;

  Session& session_;
  const Config& config_;
  const RunDirectory& directory_;
  TrainStep step_;
  RunState state_;
  int64_t first_step_ = 0, total_steps_ = 0;
  bool stopped_ = false, unevaluated_ = false;  // unevaluated: an evaluation that is due has not come to its end
  double flops_per_token_ = 0, peak_flops_ = 0;
  std::unique_ptr<data::Prefetcher> batches_;
  TrainData data_;
  std::unique_ptr<MetricsLog> metrics_;
  std::unique_ptr<TensorBoardWriter> tensorboard_;
  std::unique_ptr<CheckpointWriter> checkpoints_;
  std::unique_ptr<Progress> progress_;
  std::string log_error_;  // why the rank that leads cannot write its logs; empty: it can
  StepMetrics last_;
  std::optional<EvalMetrics> last_eval_;
  double window_seconds_ = 0, trained_seconds_ = 0;  // since the last logged step; of this process
  int64_t window_tokens_ = 0, trained_tokens_ = 0;
};

}  // namespace krait::train
