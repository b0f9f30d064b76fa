#include "train/trainer.h"

#include <cmath>
#include <cstdio>

#include "core/allocator.h"
#include "core/parallel.h"
#include "train/agreement.h"
#include "train/clock.h"
#include "train/signals.h"

namespace krait::train {

namespace {

TrainData open_task(const Session& session) {
  const Config& c = session.config;
  const auto seed = static_cast<uint64_t>(c.seed);
  const auto split = [&](const std::string& name, int64_t batch) {
    return c.data.task->split(name, batch, seed, session.data.directory);
  };
  return {split(c.data.split, c.train.micro_batch_size), nullptr, split(c.eval.split, c.eval.micro_batch_size)};
}

TrainData open_tokens(const Session& session) {
  const Config& c = session.config;
  TrainData d;
  const data::TokensPtr train = split_of(c, *session.data.store, "data.split", c.data.split);
  if (train->size() < c.data.context + 1)
    c.fail("data.context",
           fmt::format("{} tokens need {} in a row, but {} has {}", c.data.context, c.data.context + 1,
                       train->where(), train->size()),
           fmt::format("{} or less", std::max<int64_t>(train->size() - 1, 1)));
  const data::Documents documents = data::documents_from_name(c.data.documents);
  const auto seed = static_cast<uint64_t>(c.seed);
  const int64_t ranks = session.mesh.data->size();
  d.train = c.data.state == "carry"  // every rank has rows of its own, all along
                ? data::streams(train, {c.data.context, c.train.micro_batch_size * ranks, documents, true, seed})
                : data::random_crops(train, {c.data.context, c.train.micro_batch_size, seed, documents});
  if (session.data.store->has_split(c.eval.split) || c.eval.interval > 0)
    d.eval_tokens = split_of(c, *session.data.store, "eval.split", c.eval.split);
  if (d.eval_tokens && c.data.state != "carry" && d.eval_tokens->size() <= c.eval.context) {
    if (c.eval.interval > 0)  // now, and not when the first evaluation is due
      c.fail("eval.context", fmt::format("{} tokens need {} in a row, but {} has {}", c.eval.context, c.eval.context + 1,
                                         d.eval_tokens->where(), d.eval_tokens->size()),
             fmt::format("eval.context={}, or a larger share held out (krait data prepare --valid)",
                         std::max<int64_t>(d.eval_tokens->size() - 1, 1)));
    d.eval_tokens.reset();
  }
  return d;
}

}  // namespace

TrainData open_train_data(const Session& session) { return session.config.data.task ? open_task(session) : open_tokens(session); }

EvalResult TrainData::evaluate(Session& session, const EvalProgress& progress) const {
  if (eval_examples) return evaluate_task(session, eval_examples, progress);
  return train::evaluate(session, eval_tokens, eval_options(session.config), progress);
}

Trainer::Trainer(Session& session, const TrainData& data, const RunDirectory& directory, bool resume)
    : session_(session), config_(session.config), directory_(directory), step_(session),
      total_steps_(session.config.total_steps()), data_(data) {
  const Config& c = config_;
  if (resume) {
    std::string path;  // the rank that leads compares checksums
    if (session.leads()) {
      if (const auto found = find_checkpoint(latest_checkpoint, directory.checkpoints(),
                                             "\n       try to restore one; or remove them all, and the run starts from step 0"))
        path = found->path;
    }
    path = from_rank(*session.mesh.world, 0, path);
    if (!path.empty()) {
      const CheckpointReader reader(path, false);
      load_run(session, step_, reader);
      state_ = run_state_from_json(reader.meta(), reader.path());
      if (session.leads()) fmt::print("resumed after step {} from {}\n", state_.step, path);
    } else if (session.leads()) {
      fmt::print("no checkpoint yet: starting from step 0\n");
    }
  }
  first_step_ = state_.step;

  const int64_t ranks = session.mesh.data->size(), rank = session.mesh.data->rank();
  batches_ = c.data.state == "carry"
                 ? std::make_unique<data::Prefetcher>(data.train, first_step_ * session.gradient_accumulation(), rank, ranks)
                 : std::make_unique<data::Prefetcher>(data.train, first_step_ * session.micro_batches() + rank, 0, 1, 3, ranks);

  checkpoints_ = std::make_unique<CheckpointWriter>(
      directory.checkpoints(), CheckpointOptions{c.checkpoint.keep_latest, c.checkpoint.keep_best, c.checkpoint.async},
      session.mesh.world);
  if (session.leads() && first_step_ > 0) {  // where it goes on
    LoggedStep logged = read_logged(directory.metrics_file(), first_step_, c.eval.split);
    last_ = logged.training.value_or(StepMetrics{.loss = std::nan("")});
    last_eval_ = logged.evaluation;
  }
  if (session.leads())
    metrics_ = std::make_unique<MetricsLog>(directory.metrics_file(), first_step_ > 0 ? first_step_ : -1);
  if (session.leads() && c.logging.tensorboard)
    tensorboard_ = std::make_unique<TensorBoardWriter>(directory.tensorboard(), first_step_ > 0 ? first_step_ : -1);
  flops_per_token_ = session.model->train_flops_per_token(c.data.context);
  peak_flops_ = peak_flops(session.device, c.runtime.precision, c.runtime.tf32) * session.mesh.world->size();
}

void Trainer::train_step() {
  const int64_t accumulation = session_.gradient_accumulation();
  std::vector<data::Batch> batches;
  for (int64_t i = 0; i < accumulation; ++i) batches.push_back(*batches_->next());
  step_.run(batches, state_.step);
  ++state_.step;
  if (progress_ && !step_.note().empty()) progress_->note(fmt::format("step {}: {}", state_.step, step_.note()));
  state_.tokens += config_.train.tokens_per_step;
  window_tokens_ += config_.train.tokens_per_step;
}

int Trainer::agreed(int own) {
  if (session_.mesh.world->size() == 1) return own;
  const Tensor flag = full({1}, own, DType::i32, kCpu);
  session_.mesh.world->all_reduce(flag, comm::Reduce::max).wait();
  return flag.data<int32_t>()[0];
}

// No training is lost with a line of a log: the error waits until the step is saved.
template <class Metrics>
void Trainer::write_logs(const Metrics& m, const std::vector<std::pair<std::string, double>>& scalars) {
  try {
    metrics_->write(m);
    if (tensorboard_) tensorboard_->write(m.step, scalars);
  } catch (const Error& e) {
    log_error_ = e.what();
  }
}

// Reading the loss waits for the device, so that times are of finished work.
void Trainer::log_step() {
  const StepReport report = step_.report();
  StepMetrics& m = last_;
  m.step = state_.step;
  m.tokens = state_.tokens;
  m.loss = report.loss;
  m.grad_norm = report.grad_norm;
  m.aux_loss = report.auxiliary;
  m.lr = step_.learning_rate_at(state_.step - 1);
  m.tokens_per_s = window_seconds_ > 0 ? static_cast<double>(window_tokens_) / window_seconds_ : 0;
  m.mfu.reset();
  if (peak_flops_ > 0) m.mfu = m.tokens_per_s * flops_per_token_ / peak_flops_;
  m.mem_bytes = allocator(session_.device).stats().peak_bytes;
  m.time_s = state_.time_s;
  if (!session_.leads()) return;
  progress_->step(m);
  if (report.skipped)
    progress_->note(fmt::format("step {}: the gradient norm is not finite; the step was skipped", state_.step));
  std::vector<std::pair<std::string, double>> scalars{
      {"train/loss", m.loss}, {"train/ppl", m.ppl()}, {"train/lr", m.lr}, {"train/grad_norm", m.grad_norm},
      {"speed/tokens_per_s", m.tokens_per_s}, {"memory/peak_bytes", static_cast<double>(m.mem_bytes)}};
  if (m.aux_loss) scalars.emplace_back("train/aux_loss", *m.aux_loss);
  if (m.mfu) scalars.emplace_back("speed/mfu", *m.mfu);
  write_logs(m, scalars);
}

bool Trainer::evaluate_now() {
  if (!data_.has_eval()) return false;
  unevaluated_ = stopped_;
  if (stopped_) return false;
  step_.leave_training();
  const EvalResult r = data_.evaluate(session_, [this](double share) {
    if (progress_) progress_->evaluating(config_.eval.split, share);
    return share >= 1 || agreed(stop_requested()) == 0;
  });
  step_.leave_training();
  if (r.stopped) {
    if (progress_) progress_->evaluating(config_.eval.split, 1);
    stopped_ = unevaluated_ = true;
    return false;
  }
  EvalMetrics m;
  m.step = state_.step;
  m.tokens = state_.tokens;
  m.split = config_.eval.split;
  m.nll = r.nll;
  m.accuracy = r.accuracy;
  m.rmse = r.rmse;
  if (r.bytes > 0) m.bpb = r.bpb;
  m.time_s = state_.time_s;
  last_eval_ = m;
  if (session_.leads()) {
    progress_->evaluation(m);
    std::vector<std::pair<std::string, double>> scalars{{"eval/" + m.split + "_nll", m.nll}};
    if (m.accuracy) scalars.emplace_back("eval/" + m.split + "_accuracy", *m.accuracy);
    else if (m.rmse) scalars.emplace_back("eval/" + m.split + "_rmse", *m.rmse);
    else scalars.emplace_back("eval/" + m.split + "_ppl", m.ppl());
    write_logs(m, scalars);
  }
  const bool best = std::isfinite(m.nll) && (!state_.best || is_better(m, *state_.best));
  if (best) state_.best = m;
  return best;
}

// The checkpoint at which a run goes on may be that of a stop before the end of the step's evaluation.
void Trainer::evaluate_resumed() {
  const int64_t interval = config_.eval.interval;
  const bool due = complete() || (interval > 0 && state_.step % interval == 0);
  if (first_step_ == 0 || !due || agreed(session_.leads() && last_eval_) != 0) return;
  const bool best = evaluate_now();
  if (agreed(!log_error_.empty()) != 0) give_up(best);
  if (best && config_.checkpoint.keep_best) save(best);
}

bool Trainer::summed_up() {
  return agreed(session_.leads() && is_summary_of(directory_.summary_file(), state_.step)) != 0;
}

void Trainer::save(bool is_best) {
  checkpoints_->save(state_.step, checkpoint_tensors(session_, step_), to_json(state_), is_best);
}

void Trainer::give_up(bool is_best) {
  const std::string error = from_rank(*session_.mesh.world, 0, log_error_);
  try {
    save(is_best);
    checkpoints_->finish();
  } catch (const std::exception& e) {
    throw Error(fmt::format("{}\n       {}", error, e.what()));
  }
  throw Error(fmt::format("{}\n       step {} is saved in {}; once that is mended, continue with --resume", error, state_.step,
                          directory_.checkpoints()));
}

Summary Trainer::run() {
  const StopSignals signals;
  if (session_.leads()) progress_ = std::make_unique<Progress>(total_steps_, first_step_, stdout, session_.mesh.world->size() == 1);
  const auto due = [&](int64_t interval) { return interval > 0 && state_.step % interval == 0; };
  allocator(session_.device).reset_peak();
  evaluate_resumed();
  while (state_.step < total_steps_ && !stopped_) {
    const auto start = Clock::now();
    train_step();
    const bool last = state_.step == total_steps_;
    constexpr int kStop = 1, kCannotSave = 2;
    const int told = agreed(checkpoints_->failed() ? kCannotSave : stop_requested() ? kStop : 0);
    if (told == kCannotSave) checkpoints_->finish();  // throws: until the next save all steps would be for nothing
    stopped_ = told == kStop;
    const bool log = due(config_.logging.interval) || last || stopped_ || state_.step == first_step_ + 1;
    const bool eval = due(config_.eval.interval) || last;
    const bool checkpoint = due(config_.checkpoint.interval) || last || stopped_;
    if (log || eval || checkpoint) synchronize(session_.device);
    const double seconds = seconds_since(start);
    state_.time_s += seconds;
    window_seconds_ += seconds;
    trained_seconds_ += seconds;
    if (log) {
      log_step();
      trained_tokens_ += window_tokens_;
      window_tokens_ = 0;
      window_seconds_ = 0;
    }
    const auto cannot_log = [&] { return agreed(!log_error_.empty()) != 0; };
    if (log && cannot_log()) give_up(false);
    const bool best = eval && evaluate_now();
    if (eval && cannot_log()) give_up(best);
    if (checkpoint || stopped_ || (best && config_.checkpoint.keep_best)) save(best);
  }
  checkpoints_->finish();
  if (progress_) progress_->finish();
  return summary(state_.step < total_steps_ || unevaluated_);
}

Summary Trainer::summary(bool interrupted) const {
  Summary s;
  s.name = config_.name;
  s.status = interrupted ? "interrupted" : "finished";
  s.steps = state_.step;
  s.tokens = state_.tokens;
  s.parameters = session_.parameters->parameter_count();
  s.final_loss = last_.loss;
  s.final_eval = last_eval_;
  s.best_eval = state_.best;
  s.wall_time_s = state_.time_s;
  // Of this process; of the whole run where that had no step left to train.
  if (trained_seconds_ > 0) s.tokens_per_s = static_cast<double>(trained_tokens_) / trained_seconds_;
  else if (state_.time_s > 0) s.tokens_per_s = static_cast<double>(state_.tokens) / state_.time_s;
  if (peak_flops_ > 0) s.mfu = s.tokens_per_s * flops_per_token_ / peak_flops_;
  s.peak_mem_bytes = trained_seconds_ > 0 ? allocator(session_.device).stats().peak_bytes : last_.mem_bytes;
  s.device = session_.device.str();
  s.hardware = device_info(session_.device).name;
  s.precision = config_.runtime.precision;
  s.threads = num_threads();
  return s;
}

}  // namespace krait::train
