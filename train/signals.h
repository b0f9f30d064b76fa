#pragma once

namespace krait::train {

/// While one lives, SIGINT, SIGTERM and SIGHUP (a closed terminal; not where it is ignored, as below nohup) set a flag to poll
/// at the end of a step and between the batches of an evaluation. A second SIGINT or SIGTERM ends the process at once.
class StopSignals {
 public:
  StopSignals();
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;
};

/// The signal that asked to stop, or 0.
int stop_requested();

}  // namespace krait::train
