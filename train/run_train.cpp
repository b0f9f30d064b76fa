#include <map>

#include "core/comm/job.h"
#include "train/agreement.h"
#include "train/auto_mesh.h"
#include "train/commands.h"
#include "train/parallelism.h"
#include "train/trainer.h"

namespace krait::train {

namespace {

// Made and locked by the rank that leads; the others are told where it is.
RunDirectory shared_directory(const TrainCommand& command, const std::string& name, comm::ProcessGroup& world) {
  if (world.size() == 1) return RunDirectory::create(command.run_dir, name, command.resume);
  std::optional<RunDirectory> own;
  if (world.rank() == 0) own = RunDirectory::create(command.run_dir, name, command.resume);
  const std::string path = from_rank(world, 0, own ? own->path() : std::string());
  const bool has_run = !from_rank(world, 0, own && own->has_run() ? "yes" : "").empty();
  return own ? std::move(*own) : RunDirectory::join(path, has_run);
}

void print_plan(Session& session, const std::vector<std::string>& description) {
  const Config& c = session.config;
  for (const std::string& line : description) fmt::print("{}\n", line);
  const double flops = session.model->train_flops_per_token(c.data.context);
  const std::string shape =
      c.model.d_model > 0 ? fmt::format("{} layers, width {}, ", c.model.n_layers, c.model.d_model) : std::string();
  fmt::print("model: {}{} parameters ({} master weights, {} compute)\n", shape,
             human_count(static_cast<double>(session.parameters->parameter_count())),
             session.parameters->options().master, session.parameters->options().compute);
  std::map<ParameterGroup, std::pair<int64_t, std::string>> groups;  // elements, an example's name
  for (const auto& e : session.parameters->entries()) {
    auto& [count, example] = groups[group_of(e.options, c.optimizer)];
    count += e.length;
    if (example.empty()) example = e.name;
  }
  fmt::print("optimizer: {}\n", c.optimizer.type);
  for (const auto& [group, members] : groups)
    fmt::print("  {}: {} parameters ({}, ...)\n",
               group.lr_scale == 0 ? std::string("frozen")
                                   : fmt::format("lr {:g}, weight decay {:g}", c.optimizer.lr * group.lr_scale, group.weight_decay),
               human_count(static_cast<double>(members.first)), members.second);
  fmt::print("step: {} tokens = {} sequences of {} x {} micro-batches{}; {} steps, {} tokens in all\n",
             c.train.tokens_per_step, c.train.micro_batch_size, c.data.context, session.gradient_accumulation(),
             session.mesh.data->size() > 1 ? fmt::format(" x {} data ranks", session.mesh.data->size()) : std::string(),
             c.total_steps(), human_count(static_cast<double>(c.total_steps()) * static_cast<double>(c.train.tokens_per_step)));
  const double peak = peak_flops(session.device, c.runtime.precision, c.runtime.tf32);
  fmt::print("model FLOPs: {:.4g} per trained token = 6 x matrix parameters + 3 x what mixes along the sequence "
             "(attention counted causal); MFU = tokens/s x FLOPs / {}\n",
             flops, peak > 0 ? fmt::format("{:.4g} FLOP/s", peak) : std::string("peak (n/a on this device)"));
  std::fflush(stdout);
}

}  // namespace

int run_train(const TrainCommand& command) {
  const Launch launch = detect_launch();
  return run_train(command, launch, start_job(launch));
}

int run_train(const TrainCommand& command, const Launch& launch, const comm::GroupPtr& world) {
  Config config = load_config(command.config, command.overrides);
  settle_mesh(config, launch, *world);
  const MeshShape shape = fit_to_ranks(config, launch);
  Session session = make_session(config, open_data(config), 0,
                                 comm::make_mesh(world, static_cast<int>(shape.data), static_cast<int>(shape.sequence),
                                                 static_cast<int>(shape.tensor)));
  const TrainData data = open_train_data(session);
  const RunDirectory directory = shared_directory(command, config.name, *world);
  if (command.resume && session.model->adapts()) {  // the checkpoint's shapes may be others than the first step's
    if (const auto found = latest_checkpoint(directory.checkpoints()))
      build_model(session, layers::config_at_step(config.model, CheckpointReader(found->path).step() - 1));
  }
  const std::vector<std::string> description = describe_session(session);
  if (session.leads()) {
    if (directory.has_run()) {
      const Config before = load_config(directory.config_file());
      for (const std::string& line : config_differences(before.tree, config.tree))
        fmt::print("changed since the run began: {}\n", line);
    }
    fmt::print("run: {}\n", directory.path());
    if (world->size() > 1) fmt::print("ranks: {}\n", describe(shape, launch));
    print_plan(session, description);
  }
  // First of all in a new directory: one without it is not taken for a run's. A run that goes on keeps the one it has until
  // its checkpoint has been taken.
  if (session.leads() && !directory.has_run()) directory.write_config(config.to_yaml());
  Trainer trainer(session, data, directory, command.resume);
  if (session.leads() && directory.has_run()) directory.write_config(config.to_yaml());
  if (trainer.complete()) {
    const bool summed_up = trainer.summed_up();
    if (session.leads())
      fmt::print("all {} steps are done; {}\n", config.total_steps(),
                 summed_up ? "raise train.steps to go on" : "what is missing of the evaluation and of summary.json follows");
    if (summed_up) return 0;
  }
  const Summary summary = trainer.run();
  if (!session.leads()) return 0;
  directory.write_summary(to_json(summary));
  std::string end;
  if (summary.final_eval) end += fmt::format("{}: {}", summary.final_eval->split, describe(*summary.final_eval));
  if (summary.final_eval && summary.best_eval)
    end += fmt::format("  (best, at step {}: {})", summary.best_eval->step, describe(*summary.best_eval));
  if (!end.empty()) end += "\n";
  end += fmt::format("{} after {} steps, {} of training at {} tokens/s, peak memory {}; run directory {}\n", summary.status,
                     summary.steps, human_time(summary.wall_time_s), human_count(summary.tokens_per_s),
                     human_bytes(summary.peak_mem_bytes), directory.path());
  if (summary.status == "interrupted")
    end += fmt::format("continue with: krait train '{}' --run-dir '{}' --resume\n", directory.config_file(), directory.path());
  std::fputs(end.c_str(), stdout);  // all is done: that nobody reads it is no error
  return 0;
}

}  // namespace krait::train
