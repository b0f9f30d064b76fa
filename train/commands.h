#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "train/launcher.h"

namespace krait::train {

// What the command line asks for. Each run_* returns the exit status of success; failures are thrown
// (ConfigError: status 2, anything else: 1).

struct TrainCommand {
  std::string config;                  // file
  std::vector<std::string> overrides;  // key.path=value
  std::string run_dir;                 // empty: runs/<name>-<date>-<time>
  bool resume = false;
};
int run_train(const TrainCommand& command);
/// The same with the processes of a job that has begun; `launch` says which of them this is. All together.
int run_train(const TrainCommand& command, const Launch& launch, const comm::GroupPtr& world);

struct EvalCommand {
  std::string run_dir;
  std::vector<std::string> overrides;
  std::string data;    // a token store, or a text file; empty: the run's
  std::string split;   // empty: eval.split
  int64_t context = 0, stride = 0;  // 0: the config's
  bool json = false;
};
int run_eval(const EvalCommand& command);

struct GenerateCommand {
  std::string run_dir;
  std::vector<std::string> overrides;
  std::string prompt;
  int64_t max_tokens = 256;
  double temperature = 1.0;  // 0: the likeliest token
  double top_p = 1.0;
  std::string state_dtype = "fp32";  // or bf16
  std::optional<uint64_t> seed;      // none: the run's
};
int run_generate(const GenerateCommand& command);

struct AblateCommand {
  std::string file;
  std::string run_dir;  // empty: runs/<name>
  int64_t jobs = 0;     // 0: one per GPU, or per CPU core
};
int run_ablate(const AblateCommand& command);

struct BenchCommand {
  std::string what;           // kernels | train | decode | lengths
  std::string filter;         // rows whose name has all these words; empty: all
  std::string device = "auto";
  std::string json;           // file to write; empty: none
  std::string baseline;       // report of an earlier run to compare with; empty: none
  double margin = 0.1;        // slower than the baseline by more than this share is a regression
  double seconds = 0;         // of timed work in a row; 0: the default of what is measured
  std::string only;           // one row by its whole name, without ceilings: what `bench train` starts for each row
  bool list = false;          // print the names and measure nothing
};
int run_bench(const BenchCommand& command);

struct PlanCommand {
  std::string config;
  std::vector<std::string> overrides;
  int64_t ranks = 1;
  std::string machine = "h100-sxm";
  std::string hardware;  // a table of machines; empty: the built-in one
  bool show_hardware = false, json = false;
};
int run_plan(const PlanCommand& command);

struct InfoCommand {
  std::string run_dir;  // empty: about this build and machine
  bool verify = false;
};
int run_info(const InfoCommand& command);

}  // namespace krait::train
