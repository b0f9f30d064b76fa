#pragma once

namespace krait::train {

/// While one lives, SIGINT and SIGTERM set a flag for the training loop to poll at the end of a step.
/// A second signal ends the process at once.
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
