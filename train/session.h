#pragma once
#include <memory>
#include <string>

#include "core/comm/process_group.h"
#include "core/upload.h"
#include "data/dataset.h"
#include "data/token_store.h"
#include "layers/model.h"
#include "train/config.h"

namespace krait::train {

/// Where a run's data come from: a token store with its tokenizer, or the files of a task.
struct DataSource {
  data::TokenStorePtr store;     // null for a task, and for evaluation on other text
  data::TokenizerPtr tokenizer;  // null for a task
  std::string directory;         // of a task's files
};
/// Opens what data.path names.
DataSource open_data(const Config& config);
/// The split that `key` of the config names; ConfigError with the store's splits where it has none of that name.
data::TokensPtr split_of(const Config& config, const data::TokenStore& store, const std::string& key, const std::string& name);

/// A config brought to life on one device: data, model, parameters. What train, eval and generate share.
struct Session {
  Config config;
  Device device;
  comm::Mesh mesh = comm::single_mesh();
  DataSource data;
  std::unique_ptr<layers::Model> model;
  std::unique_ptr<layers::ParameterStore> parameters;
  bool learns = true;  // whether the parameters have gradients

  /// Whether this rank speaks for the job: prints, writes metrics.
  bool leads() const { return mesh.world->rank() == 0; }
  /// Micro-batches of each data rank in a step, and of all together.
  int64_t gradient_accumulation() const { return config.gradient_accumulation(mesh.data->size()); }
  int64_t micro_batches() const { return gradient_accumulation() * mesh.data->size(); }
  /// The model as a language model; throws when it is not one.
  layers::LanguageModel& language_model(const char* purpose);
};

/// Applies runtime settings (threads, device, TF32) and builds the model with its initial values, in the shapes that it
/// has after `finished_steps` (layers::config_at_step).
Session make_session(const Config& config, DataSource data, int64_t finished_steps = 0,
                     comm::Mesh mesh = comm::single_mesh(), bool learns = true);
/// The device that runtime.device means for this process.
Device device_of(const RuntimeConfig& runtime);
/// Gives the session a new model with initial values, and parameters.
void build_model(Session& session, const layers::ModelConfig& config);

/// The CPU batch on the session's device, as the model takes it: of this rank's positions.
layers::ModelInput model_input(const data::Batch& batch, Device device, const comm::ProcessGroup& sequence);

/// Elements of the parameters that this process holds.
int64_t parameter_count(const layers::Model& model);

/// What the data decide about the model: vocabulary, features, context.
layers::ModelShape model_shape(const Config& config, const DataSource& data);
/// runtime.precision as the dtype that products compute in.
DType compute_dtype(const std::string& precision);

/// Lines about the hardware and the kernels that will serve the run; refuses slow paths with require_fast.
std::vector<std::string> describe_session(Session& session);

/// Dense peak of the device for this precision in FLOP/s; 0 where it is not known.
double peak_flops(Device device, const std::string& precision, bool tf32);

}  // namespace krait::train
