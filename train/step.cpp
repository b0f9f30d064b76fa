#include "train/step.h"

#include <algorithm>
#include <map>
#include <set>

#include "core/comm/background.h"
#include "core/comm/job.h"
#include "core/random.h"
#include "kernels/matmul.h"

namespace krait::train {

ParameterGroup group_of(const layers::ParameterOptions& parameter, const OptimizerConfig& config) {
  if (!parameter.trainable) return {0, 0};
  const bool decays = parameter.embedding ? config.decay_embeddings : parameter.decay;
  return {parameter.lr_scale, decays ? config.weight_decay : 0.0};
}

namespace {

std::vector<kernels::SegmentSpec> segments_of(const layers::ParameterStore& store, const ParameterShards& shards,
                                              const OptimizerConfig& config) {
  std::vector<kernels::SegmentSpec> segments;
  const auto& entries = store.entries();
  for (size_t i = 0; i < entries.size(); ++i) {
    const ParameterGroup group = group_of(entries[i].options, config);
    const int64_t end = i + 1 < entries.size() ? entries[i + 1].offset : store.numel();  // with the gap behind it
    for (const auto& p : shards.cut(entries[i].offset, end))
      segments.push_back({p.at, p.end - p.begin, group.lr_scale, group.weight_decay});
  }
  return segments;
}

// Which gradients count in the norm. Strict: one range for each parameter, because sums over longer ones depend on
// the gaps between parameters, which depend on the number of ranks.
std::vector<std::pair<int64_t, int64_t>> norm_ranges(const layers::ParameterStore& store, const ParameterShards& shards,
                                                     bool strict) {
  if (!strict) return shards.primary_ranges();
  std::vector<std::pair<int64_t, int64_t>> out;
  for (const auto& e : store.entries())
    for (const auto& [begin, end] : shards.primary_ranges()) {
      const int64_t first = std::max(begin, e.offset), last = std::min(end, e.offset + e.length);
      if (first < last) out.push_back({first, last});
    }
  return out;
}

OptimizerOptions optimizer_options(const OptimizerConfig& c) {
  OptimizerOptions o;
  o.type = optimizer_type_from_name(c.type);
  o.beta1 = c.betas[0];
  o.beta2 = c.betas[1];
  o.eps = c.eps;
  o.momentum = c.momentum;
  return o;
}

ScheduleOptions schedule_options(const Config& c) {
  ScheduleOptions o;
  o.type = schedule_type_from_name(c.lr_scheduler.type);
  o.lr = c.optimizer.lr;
  o.warmup_steps = c.lr_scheduler.warmup_steps;
  o.total_steps = c.total_steps();
  o.min_lr_ratio = c.lr_scheduler.min_lr_ratio;
  o.decay_fraction = c.lr_scheduler.decay_ratio;
  o.decay_shape = decay_shape_from_name(c.lr_scheduler.decay_shape);
  return o;
}

}  // namespace

TrainStep::TrainStep(Session& session)
    : session_(session), schedule_(schedule_options(session.config)), uploader_(session.device),
      use_graphs_(session.device.is_cuda() && session.config.runtime.cuda_graphs), pool_(session.device) {
  const ParallelismConfig& p = session.config.parallelism;
  background_ = comm::background_group(session.mesh.replicas, {static_cast<int>(p.multiprocessors), p.copy_engines});
  kernels::set_spare_multiprocessors(comm::multiprocessors_beside(background_, session.device));
  build_optimizer();
  const layers::ParameterStore& store = *session.parameters;
  const DType wide = accum_dtype(store.options().compute);
  target_count_ = zeros({}, DType::f32, session.device);
  micro_loss_ = zeros({2}, wide, session.device);
  losses_ = zeros({session.gradient_accumulation(), 2}, wide, session.device);
  if (session.config.data.state == "carry")
    carried_ = std::make_unique<CarriedState>(dynamic_cast<layers::DecoderModel&>(*session.model).decoder(),
                                              session.config.train.micro_batch_size,
                                              session.config.data.context, store.options().compute, session.device);
  RandomSource& random = current_random();
  random.seed = static_cast<uint64_t>(session.config.seed);
  random.step = zeros({}, DType::i64, session.device);
  // Rows that carry their state on belong to one rank for good; the micro-batch is spread over the ranks.
  random.batch_offset = carried_ ? session.mesh.data->rank() * session.config.train.micro_batch_size : 0;
}

void TrainStep::build_optimizer() {
  layers::ParameterStore& store = *session_.parameters;
  const Config& config = session_.config;
  const comm::GroupPtr& replicas = session_.mesh.replicas;
  const Replicas both{replicas, background_};
  if (config.parallelism.zero > 0 && session_.model->adapts())
    config.fail("parallelism.zero", "this model changes its own parameters between steps, which needs all of them on every rank",
                "zero: 0");
  // A model that adapts comes here again and again, and such memory is never given back; strict sums use none of it.
  const comm::ReachableMemory reachable =
      session_.model->adapts() || config.runtime.strict ? comm::ReachableMemory()
                                                        : comm::reachable_memory(background_, session_.device);
  shards_ = std::make_unique<ParameterShards>(store, replicas, config.parallelism.zero, reachable);
  if (shards_->zero() == 3) gather_ = std::make_unique<ParameterGather>(store, *shards_, both);
  const ReduceDtype dtype = config.parallelism.reduce_dtype == "bfloat16" ? ReduceDtype::bf16 : ReduceDtype::as_is;
  if (config.runtime.strict)
    reduction_ = ordered_reduction(store, replicas);
  else if (shards_->zero() >= 2)
    reduction_ = bucket_reduction(store, *shards_, both, dtype);
  else if (replicas->size() > 1 || shards_->sharded())
    reduction_ = overlapped_reduction(store, *shards_, both, dtype);
  inner_.clear();
  outer_.clear();
  for (const auto& [begin, end] : norm_ranges(store, *shards_, config.runtime.strict)) {
    const int64_t edge = reduction_ && !config.runtime.strict ? std::clamp(shards_->outer(), begin, end) : end;
    if (begin < edge) outer_.push_back({begin, edge});
    if (edge < end) inner_.push_back({edge, end});
  }
  optimizer_ = std::make_unique<Optimizer>(optimizer_options(config.optimizer), shards_->master(), shards_->grad(),
                                           shards_->compute(), segments_of(store, *shards_, config.optimizer),
                                           shards_->gathers() ? shards_->outer() : 0);
}

// What the model wants to change between steps: values, or its shapes, with the optimizer's state kept by name.
void TrainStep::adapt_model(const data::Batch& batch, int64_t step) {
  note_.clear();
  if (!session_.model->adapts_at(step)) return;
  layers::ModelInput samples = model_input(batch, session_.device, *session_.mesh.sequence);
  // All ranks change alike: after the step's first micro-batch.
  for (Tensor* t : {&samples.tokens, &samples.inputs, &samples.targets, &samples.lengths})
    if (t->defined() && session_.mesh.data->size() > 1) {
      *t = t->clone();
      session_.mesh.data->broadcast(*t, 0).wait();
    }
  if (session_.model->resize_due(step)) {
    const layers::Resized resized = session_.model->resize(step, samples, *session_.parameters);
    const std::unique_ptr<layers::ParameterStore> old = std::move(session_.parameters);
    const std::unique_ptr<Optimizer> old_optimizer = std::move(optimizer_);
    build_model(session_, resized.config);
    layers::set_masters(*session_.parameters, resized.parameters);
    build_optimizer();
    for (auto& row : micro_graphs_)
      for (auto& graph : row) graph.reset();
    update_graph_.reset();
    runs_ = 0;
    session_.model->set_training(true);
    const std::set<std::string> reset(resized.reset.begin(), resized.reset.end());
    std::map<std::string, Tensor> before;
    for (const auto& [state, flat] : old_optimizer->state())
      if (flat.numel() == old->numel())
        for (const auto& part : old->named(flat)) before[state + "." + part.name] = part.value;
    for (const auto& [state, flat] : optimizer_->state()) {
      if (flat.numel() != session_.parameters->numel()) continue;
      for (auto& part : session_.parameters->named(flat))
        // A parameter whose shape changed begins again too, whether it is trained or not.
        if (const Tensor& old_value = before.at(state + "." + part.name);
            !reset.count(part.name) && old_value.shape() == part.value.shape())
          copy_(part.value, old_value);
    }
  }
  note_ = session_.model->before_step(step, samples, *session_.parameters);
}

TrainStep::~TrainStep() {
  // The graphs' memory may go only when the device has finished with it.
  try {
    synchronize(session_.device);
  } catch (const Error&) {  // the failure has been reported where it happened
  }
}

void TrainStep::fill_inputs(const data::Batch& batch) {
  const layers::ModelInput host = model_input(batch, kCpu, *session_.mesh.sequence);
  const auto fill = [&](Tensor& fixed, const Tensor& now) {
    KRAIT_ASSERT(!fixed.defined() || fixed.shape() == now.shape(), "batches of a run must have one shape.");
    if (!now.defined()) return;
    if (!fixed.defined()) fixed = empty(now.shape(), now.dtype(), session_.device);
    uploader_.upload(fixed, now.contiguous());
  };
  fill(input_.tokens, host.tokens);
  fill(input_.inputs, host.inputs);
  fill(input_.targets, host.targets);
  fill(input_.lengths, host.lengths);
  fill(input_.info.segments, host.info.segments);
  fill(input_.info.positions, host.info.positions);
  if (carried_) carried_->set_resets(batch.resets);
}

// The loss is divided by the targets of all ranks, so that gradients are summed and not averaged.
void TrainStep::count_targets(const std::vector<data::Batch>& batches) {
  int64_t targets = 0;
  for (const data::Batch& b : batches) targets += b.n_targets;
  if (session_.mesh.data->size() == 1) return fill_(target_count_, static_cast<double>(targets));
  // Between the hosts, which are ahead: GPUs that met here would wait for the slowest of each step once more.
  const Tensor count = full({}, static_cast<double>(targets), DType::f64, kCpu);
  session_.mesh.data->all_reduce(count).wait();
  fill_(target_count_, count.item());
}

// What the update before left in the ranks' pieces is gathered here and not behind it, so that the forward pass can begin;
// but for what it begins with.
void TrainStep::micro_step(bool first, bool last) {
  layers::DecoderState state;
  if (carried_) {
    state = carried_->begin();
    input_.state = &state;
  }
  if (gather_) gather_->begin_micro_batch();
  if (first && shards_->gathers()) shards_->begin_gather(*background_);
  const layers::ModelLoss out = session_.model->loss(input_, target_count_);
  input_.state = nullptr;
  shards_->end_gather();
  if (reduction_) reduction_->begin(last);
  backward(out.loss);
  if (reduction_) reduction_->end(last, [this] {
    if (!inner_.empty()) inner_squares_ = kernels::norm_clip(squares(inner_), 0).sum_squares();
  });
  if (carried_) carried_->keep(state);
  if (gather_) gather_->drop_all();
  Tensor sum = micro_loss_.select(0, 0), auxiliary = micro_loss_.select(0, 1);
  copy_(sum, out.loss_sum.view({}));
  has_auxiliary_ = out.auxiliary.defined();
  if (has_auxiliary_) copy_(auxiliary, out.auxiliary.view({}));
}

void TrainStep::leave_training() {
  if (gather_) gather_->drop_all();
  if (stale_) shards_->gather();
  stale_ = false;
}

void TrainStep::run_micro_batch(bool first, bool last) {
  const MemoryPool::Scope scope(pool_);
  std::unique_ptr<CapturedGraph>& graph = micro_graphs_[first && shards_->gathers()][last && reduction_];
  if (use_graphs_ && runs_ == 1 && !graph) {  // the first run has made every lazy table, plan and workspace
    graph = std::make_unique<CapturedGraph>(session_.device);
    graph->begin();
    micro_step(first, last);
    graph->end();
  }
  if (graph)
    graph->replay();
  else
    micro_step(first, last);
}

// fp64 sums of squares of parts of the gradients, and `more` of them.
Tensor TrainStep::squares(const Ranges& ranges, Tensor more) const {
  std::vector<Tensor> parts;
  for (const auto& [begin, end] : ranges) parts.push_back(kernels::sum_squares(shards_->grad().slice(0, begin, end)));
  if (more.defined()) parts.push_back(std::move(more));
  if (parts.size() == 1) return parts.front();
  int64_t n = 0, at = 0;
  for (const Tensor& part : parts) n += part.numel();
  const Tensor all = empty({n}, DType::f64, session_.device);
  for (const Tensor& part : parts) {
    Tensor place = all.slice(0, at, at + part.numel());
    copy_(place, part);
    at += part.numel();
  }
  return all;
}

// Of the gradients of the whole model, fp64: each rank adds those that no other rank adds.
Tensor TrainStep::sum_squares() const {
  const comm::Mesh& mesh = session_.mesh;
  comm::ProcessGroup& owners = shards_->sharded() ? *mesh.world : *mesh.tensor;
  const Tensor all = squares(outer_, inner_squares_);
  if (owners.size() == 1) return all;
  const Tensor sum = kernels::norm_clip(all, 0).sum_squares().clone();
  owners.all_reduce(sum).wait();
  return sum;
}

void TrainStep::update() {
  norm_ = kernels::norm_clip(sum_squares(), session_.config.optimizer.grad_clip, optimizer_->skipped_steps());
  if (!shards_->gathers()) return optimizer_->update(norm_);
  optimizer_->update(norm_, true, [&] { shards_->begin_outer(*background_); });
  shards_->end_gather();
}

void TrainStep::run(const std::vector<data::Batch>& batches, int64_t step) {
  session_.model->set_training(true);
  adapt_model(batches.front(), step);
  count_targets(batches);
  optimizer_->prepare(learning_rate_at(step), step);

  const auto count = static_cast<int64_t>(batches.size());
  const comm::ProcessGroup& data = *session_.mesh.data;
  for (int64_t k = 0; k < count; ++k) {
    fill_inputs(batches[static_cast<size_t>(k)]);
    const int64_t micro_batch = step * count + k;
    fill_(current_random().step, static_cast<double>(carried_ ? micro_batch : micro_batch * data.size() + data.rank()));
    run_micro_batch(k == 0, k + 1 == count);
    Tensor loss = losses_.select(0, k);
    copy_(loss, micro_loss_);
  }
  const MemoryPool::Scope scope(pool_);
  if (use_graphs_ && runs_ == 1) {
    update_graph_ = std::make_unique<CapturedGraph>(session_.device);
    update_graph_->begin();
    update();
    update_graph_->end();
  }
  if (update_graph_)
    update_graph_->replay();
  else
    update();
  stale_ = true;
  comm::watch_device(session_.device, fmt::format("step {}", step));
  ++runs_;
}

StepReport TrainStep::report() const {
  comm::ProcessGroup& replicas = *session_.mesh.replicas;
  const int64_t n = losses_.size(0);
  Tensor all = losses_;
  if (replicas.size() > 1) {
    all = empty({2 * n * replicas.size()}, losses_.dtype(), losses_.device());
    replicas.all_gather(losses_, all).wait();
  }
  const auto losses = all.to_vector<double>();
  double sum = 0, auxiliary = 0;
  for (int64_t k = 0; k < n; ++k)  // in the order of the micro-batches, whatever the number of ranks
    for (int64_t r = 0; r < replicas.size(); ++r) {
      sum += losses[static_cast<size_t>(2 * (r * n + k))];
      auxiliary += losses[static_cast<size_t>(2 * (r * n + k) + 1)];
    }
  const auto values = norm_.values.to_vector<double>();
  return {sum / std::max(target_count_.item(), 1.0), values[0], values[2] == 0.0,
          has_auxiliary_ ? std::optional(auxiliary) : std::nullopt};
}

}  // namespace krait::train
