#pragma once
#include <cstdio>
#include <string>

#include "train/clock.h"
#include "train/metrics.h"

namespace krait::train {

/// What a run shows: on a terminal one live line that is written over, elsewhere plain lines.
class Progress {
 public:
  /// first_step: where a resumed run starts, for the estimate of the time left. live: a live line on a terminal; not
  /// below mpirun, which gives its processes a terminal whatever it writes to itself. pause: seconds between the plain
  /// lines of an evaluation.
  Progress(int64_t total_steps, int64_t first_step = 0, std::FILE* out = stdout, bool live = true, double pause = 60);
  ~Progress() { finish(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void step(const StepMetrics& m);
  void evaluation(const EvalMetrics& m);
  /// How far an evaluation is, in place of the live line; elsewhere a line a minute, so that short ones have none. 0 at its
  /// beginning, 1 at its end, which brings the live line back.
  void evaluating(const std::string& split, double share);
  /// A line of its own, above the live line.
  void note(const std::string& text);
  /// Ends the live line.
  void finish();

 private:
  void clear();
  void show();
  int64_t total_, first_;
  std::FILE* out_;
  bool terminal_;
  double pause_;
  std::string live_, evaluating_;
  Clock::time_point start_, evaluation_start_, evaluation_shown_;
};

// "12.3 k", "1.5 GiB", "2:03:04": for people.
std::string human_count(double value);
std::string human_bytes(int64_t bytes);
std::string human_time(double seconds);

/// "step 10/100  loss 2.1  ppl 8.2  12.3 k tokens/s  MFU n/a  mem 1.5 GiB  ETA 0:10"
std::string progress_line(const StepMetrics& m, int64_t total_steps, double seconds_left);

}  // namespace krait::train
