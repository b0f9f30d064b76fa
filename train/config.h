#pragma once
#include <array>
#include <string>
#include <vector>

#include "core/config_node.h"
#include "data/task.h"
#include "layers/model_config.h"

namespace krait::train {

// One struct for each section of a config; the member initialisers are the defaults.

struct RuntimeConfig {
  std::string device = "auto";     // auto (a GPU when there is one) | cpu | cuda
  std::string precision = "fp32";  // fp32 | bf16 (fp32 master weights) | fp64
  bool deterministic = true;
  bool strict = false;        // deterministic: strict: sums over micro-batches in one order on any number of data ranks
  bool cuda_graphs = true;
  bool require_fast = false;  // refuse every slow path
  bool tf32 = false;          // fp32 matrix products in TF32
  int64_t threads = 0;        // CPU threads; 0: the processors of this process. At most 64, or 4 for each of them
};

struct DataConfig {
  std::string type = "tokens";   // tokens | the name of a task (data/task.h), whose options stand beside
  std::string path;              // of a token store or of a task's files; required where there are any
  std::string split = "train";
  int64_t context = 1024;        // tokens of a sequence; some tasks fix it
  /// What recurrent state does between windows. reset: each window starts anew, at a random place. carry (also
  /// tbptt, truncated backpropagation through time): rows walk through the text, state goes on, gradients do not;
  /// evaluation streams too.
  std::string state = "reset";
  std::string documents = "ignore";  // ignore | pack
  data::TaskPtr task;                // null for tokens
};

struct OptimizerConfig {
  std::string type = "adamw";  // adamw | sgd | lion
  double lr = 1e-3;
  std::array<double, 2> betas{0.9, 0.95};  // lion: (0.9, 0.99) by default
  double eps = 1e-8;
  double weight_decay = 0.1;
  bool decay_embeddings = false;
  double momentum = 0.0;   // sgd
  double grad_clip = 1.0;  // global norm; 0: none
};

struct SchedulerConfig {
  std::string type = "cosine";  // cosine | wsd | linear | constant
  int64_t warmup_steps = 0;
  double min_lr_ratio = 0.1;         // last learning rate / lr
  double decay_ratio = 0.2;          // wsd: share of the steps that decay
  std::string decay_shape = "sqrt";  // wsd: sqrt (1 - sqrt x) | linear
};

struct TrainConfig {
  int64_t steps = 0;   // one of steps and tokens is required
  int64_t tokens = 0;
  int64_t tokens_per_step = 0;  // default: one micro-batch on every data rank
  bool default_tokens_per_step = false;
  int64_t micro_batch_size = 1;
  std::string recompute = "none";  // none | block: activations of a block are computed again in the backward
  double label_smoothing = 0;
  double z_loss = 0;
};

struct EvalConfig {
  int64_t interval = 0;  // steps; 0: only at the end
  std::string split = "valid";
  int64_t context = 0;     // default: data.context
  int64_t stride = 0;      // default: context (no overlap)
  int64_t max_tokens = 0;  // 0: the whole split
  int64_t micro_batch_size = 0;  // default: train.micro_batch_size
};

struct CheckpointConfig {
  int64_t interval = 0;  // steps; 0: only at the end
  int64_t keep_latest = 2;
  bool keep_best = true;  // of the evaluations
  bool async = true;
};

struct LoggingConfig {
  int64_t interval = 10;
  bool tensorboard = true;
};

struct ParallelismConfig {
  bool automatic = false;  // parallelism: auto; choose_mesh() fills in the rest
  int64_t data = -1, tensor = 1, sequence = 1;  // ranks; data: -1 takes what is left
  int64_t zero = 0;         // what the ranks that share gradients keep a part of: 1 optimizer state, 2 also gradients, 3 also parameters
  bool default_zero = false;  // it was left out: default_zero() decides when the ranks are known
  double bucket_mb = 50;    // MiB of gradients summed at a time, while the backward pass goes on
  /// In which gradients travel between the ranks. bfloat16: half of the bytes, and sums with 8 digits where the
  /// gradients of a rank have 24: losses differ from those of one rank by more than rounding in fp32.
  std::string reduce_dtype = "float32";
  /// Of a GPU, that sums beside the backward pass and gathers beside the forward pass may take; 0: as many as NCCL likes.
  int64_t multiprocessors = 4;
  bool copy_engines = true;  // instead of multiprocessors where NCCL and the machine can
};

struct Config {
  std::string name;  // default: the file's name
  int64_t seed = 1337;
  RuntimeConfig runtime;
  DataConfig data;
  layers::ModelConfig model;
  OptimizerConfig optimizer;
  SchedulerConfig lr_scheduler;
  TrainConfig train;
  EvalConfig eval;
  CheckpointConfig checkpoint;
  LoggingConfig logging;
  ParallelismConfig parallelism;

  /// The same as a tree: complete, with the place of every value. What config.yaml holds.
  ConfigNode tree;

  /// Micro-batches of one data rank in a step.
  int64_t gradient_accumulation(int64_t ranks = 1) const {
    return train.tokens_per_step / (train.micro_batch_size * data.context * ranks);
  }
  /// Steps of the run: train.steps, or enough of them for train.tokens.
  int64_t total_steps() const {
    return train.steps > 0 ? train.steps : (train.tokens + train.tokens_per_step - 1) / train.tokens_per_step;
  }
  std::string to_yaml() const;

  /// ConfigError at the place of "section.key" in the file, for checks that need more than the config:
  ///   config.fail("data.context", "1024 tokens are more than the 900 of split train", "900 or less");
  [[noreturn]] void fail(const std::string& path, const std::string& message, const std::string& suggestion = "") const;
};

/// Reads, completes and checks. Throws ConfigError that says where, what was found, what was expected.
/// Nothing outside the text is looked at, except for the CUDA device that `device: cuda` asks for.
Config load_config(const std::string& file, const std::vector<std::string>& overrides = {});
Config parse_config(const std::string& yaml, const std::string& source, const std::vector<std::string>& overrides = {});
Config config_from_tree(ConfigNode tree);

/// Where data.path is: KRAIT_DATA_DIR/<path>, KRAIT_DATA_DIR/<file name>, then <path> itself.
/// ConfigError that names what was tried when nothing is there.
std::string find_data_file(const Config& config);

}  // namespace krait::train
