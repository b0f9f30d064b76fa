#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "core/config_node.h"
#include "train/files.h"

namespace krait::train {

/// Keeps other processes from writing to `directory` while what it returns is open; they are told who is `doing` so.
FileDescriptor lock_directory(const std::string& directory, std::string_view doing);

/// The directory of one run (DESIGN.md, "Edges: the run directory"). Locked against a second process that would
/// write to it, for as long as the object lives; the kernel lets go of the lock of a killed process.
class RunDirectory {
 public:
  /// For a new run: `path`, or runs/<name>-<date>-<time> when it is empty. A directory that already holds something
  /// is ConfigError unless `resume`; with `resume` it must hold a run, or nothing yet.
  static RunDirectory create(const std::string& path, const std::string& name, bool resume);
  /// The directory that the rank that leads has made: no lock.
  static RunDirectory join(const std::string& path, bool has_run) { return RunDirectory(path, has_run); }
  /// For reading only: no lock. ConfigError when it holds no run.
  static RunDirectory open(const std::string& path);

  const std::string& path() const { return path_; }
  /// Whether there was a run to continue (a config.yaml) when it was opened.
  bool has_run() const { return has_run_; }
  std::string config_file() const { return path_ + "/config.yaml"; }
  std::string metrics_file() const { return path_ + "/metrics.jsonl"; }
  std::string summary_file() const { return path_ + "/summary.json"; }
  std::string checkpoints() const { return path_ + "/checkpoints"; }
  std::string tensorboard() const { return path_ + "/tensorboard"; }

  void write_config(const std::string& yaml) const { write_file_atomic(config_file(), yaml); }
  void write_summary(const std::string& json) const { write_file_atomic(summary_file(), json); }

 private:
  RunDirectory(std::string path, bool has_run) : path_(std::move(path)), has_run_(has_run) {}
  void lock() { lock_ = lock_directory(path_, "training"); }
  std::string path_;
  bool has_run_;
  FileDescriptor lock_;
};

/// "optimizer.lr: 0.001 -> 0.002": where two complete configs differ, for the note at a resume.
std::vector<std::string> config_differences(const ConfigNode& before, const ConfigNode& after);

}  // namespace krait::train
