#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include "train/files.h"

namespace krait::train {

/// One logged training step.
struct StepMetrics {
  int64_t step = 0;    // finished steps
  int64_t tokens = 0;  // seen since the start of the run
  double loss = 0;     // nats per token, mean over the step
  std::optional<double> aux_loss = {};  // what else training minimises: balance of experts, regularisation
  double lr = 0, grad_norm = 0;
  double tokens_per_s = 0;
  std::optional<double> mfu = {};  // 0..1; none on a device of unknown peak
  int64_t mem_bytes = 0;      // peak on the device
  double time_s = 0;          // training time since the start of the run
  double ppl() const;
};

/// One evaluation.
struct EvalMetrics {
  int64_t step = 0, tokens = 0;
  std::string split = {};
  double nll = 0;                       // nats per token
  std::optional<double> bpb = {}, accuracy = {}, rmse = {};  // bits per byte of text; share of right answers
  double time_s = 0;
  double ppl() const;
};

/// Higher accuracy where there is one, else lower likelihood loss.
bool is_better(const EvalMetrics& a, const EvalMetrics& b);

/// A perplexity for people: with so many digits behind the point; a million and more as 1.25e+06.
std::string human_ppl(double ppl, int digits = 2);

/// "nll 1.2345  ppl 3.44  bits/byte 1.78", "nll 0.0512  accuracy 98.31 %", "rmse 0.0021": for people.
std::string describe(const EvalMetrics& m);

/// One line of metrics.jsonl, without the newline. Numbers are the shortest that read back the same;
/// what is not finite is null.
std::string to_json(const StepMetrics& m);
std::string to_json(const EvalMetrics& m);

/// What metrics.jsonl holds of a step; of evaluations that of one split.
struct LoggedStep {
  std::optional<StepMetrics> training;
  std::optional<EvalMetrics> evaluation;
};
LoggedStep read_logged(const std::string& path, int64_t step, const std::string& split);

/// RUN_DIR/metrics.jsonl. Every line is on its way to the disk when write() returns.
class MetricsLog {
 public:
  /// Continues after `last_step`: lines of later steps, and a last line cut short by a kill, are dropped, so that
  /// the file becomes that of a run that was never interrupted. -1 starts anew.
  MetricsLog(const std::string& path, int64_t last_step);
  template <class Metrics>
  void write(const Metrics& m) {
    file_.append(to_json(m) + "\n");
  }

 private:
  AppendFile file_;
};

/// What summary.json holds.
struct Summary {
  std::string name = {}, status = {};  // status: finished | interrupted
  int64_t steps = 0, tokens = 0, parameters = 0;
  double final_loss = 0;
  std::optional<EvalMetrics> final_eval = {}, best_eval = {};
  double wall_time_s = 0, tokens_per_s = 0;
  std::optional<double> mfu = {};
  int64_t peak_mem_bytes = 0;
  std::string device = {}, hardware = {}, precision = {};
  int64_t threads = 0;
};
std::string to_json(const Summary& s);  // several lines
/// Whether a file is the summary of a run that finished with this step.
bool is_summary_of(const std::string& path, int64_t step);

}  // namespace krait::train
