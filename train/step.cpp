#include "train/step.h"

#include <algorithm>
#include <map>
#include <set>

#include "core/random.h"
#include "kernels/accumulate.h"

namespace krait::train {

ParameterGroup group_of(const layers::ParameterOptions& parameter, const OptimizerConfig& config) {
  if (!parameter.trainable) return {0, 0};
  const bool decays = parameter.embedding ? config.decay_embeddings : parameter.decay;
  return {parameter.lr_scale, decays ? config.weight_decay : 0.0};
}

namespace {

std::vector<kernels::SegmentSpec> segments_of(const layers::ParameterStore& store, const OptimizerConfig& config) {
  std::vector<kernels::SegmentSpec> segments;
  for (const auto& e : store.entries()) {
    const ParameterGroup group = group_of(e.options, config);
    segments.push_back({e.offset, e.length, group.lr_scale, group.weight_decay});
  }
  return segments;
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
  build_optimizer();
  const layers::ParameterStore& store = *session.parameters;
  const DType wide = accum_dtype(store.options().compute);
  target_count_ = zeros({}, DType::f32, session.device);
  loss_sum_ = zeros({}, wide, session.device);
  if (session.config.data.state == "carry")
    carried_ = std::make_unique<CarriedState>(dynamic_cast<layers::DecoderModel&>(*session.model).decoder(),
                                              session.config.train.micro_batch_size,
                                              session.config.data.context, store.options().compute, session.device);
  RandomSource& random = current_random();
  random.seed = static_cast<uint64_t>(session.config.seed);
  random.step = zeros({}, DType::i64, session.device);
}

void TrainStep::build_optimizer() {
  layers::ParameterStore& store = *session_.parameters;
  const OptimizerConfig& config = session_.config.optimizer;
  optimizer_ = std::make_unique<Optimizer>(optimizer_options(config), store.master(), store.grad(), store.compute(),
                                           segments_of(store, config));
}

// What the model wants to change between steps: values, or its shapes, with the optimizer's state kept by name.
void TrainStep::adapt_model(const data::Batch& batch, int64_t step) {
  if (!session_.model->adapts()) return;
  const layers::ModelInput samples = to_device(batch, session_.device);
  if (session_.model->resize_due(step)) {
    const layers::Resized resized = session_.model->resize(step, samples, *session_.parameters);
    const std::unique_ptr<layers::ParameterStore> old = std::move(session_.parameters);
    const std::unique_ptr<Optimizer> old_optimizer = std::move(optimizer_);
    build_model(session_, resized.config);
    layers::set_masters(*session_.parameters, resized.parameters);
    build_optimizer();
    micro_graph_.reset();
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
  session_.model->before_step(step, samples, *session_.parameters);
}

TrainStep::~TrainStep() {
  // The graphs' memory may go only when the device has finished with it.
  try {
    synchronize(session_.device);
  } catch (const Error&) {  // the failure has been reported where it happened
  }
}

void TrainStep::fill_inputs(const data::Batch& batch) {
  const layers::ModelInput host = to_device(batch, kCpu);
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

void TrainStep::micro_step() {
  layers::DecoderState state;
  if (carried_) {
    state = carried_->begin();
    input_.state = &state;
  }
  const layers::ModelLoss out = session_.model->loss(input_, target_count_);
  input_.state = nullptr;
  backward(out.loss);
  if (carried_) carried_->keep(state);
  kernels::accumulate(loss_sum_, out.loss_sum.view(loss_sum_.shape()));
}

void TrainStep::update() {
  norm_ = kernels::grad_norm(session_.parameters->grad(), session_.config.optimizer.grad_clip,
                             optimizer_->skipped_steps());
  optimizer_->update(norm_);
}

void TrainStep::run(const std::vector<data::Batch>& batches, int64_t step) {
  int64_t targets = 0;
  for (const data::Batch& b : batches) targets += b.n_targets;
  session_.model->set_training(true);
  adapt_model(batches.front(), step);
  fill_(target_count_, static_cast<double>(targets));
  zero_(loss_sum_);
  optimizer_->prepare(learning_rate_at(step), step);

  const bool capture = use_graphs_ && runs_ == 1;  // the first run has made every lazy table, plan and workspace
  for (size_t i = 0; i < batches.size(); ++i) {
    fill_inputs(batches[i]);
    fill_(current_random().step, static_cast<double>(step * static_cast<int64_t>(batches.size()) +
                                                     static_cast<int64_t>(i)));
    const MemoryPool::Scope scope(pool_);
    if (capture && i == 0) {
      micro_graph_ = std::make_unique<CapturedGraph>(session_.device);
      micro_graph_->begin();
      micro_step();
      micro_graph_->end();
    }
    if (micro_graph_)
      micro_graph_->replay();
    else
      micro_step();
  }
  const MemoryPool::Scope scope(pool_);
  if (capture) {
    update_graph_ = std::make_unique<CapturedGraph>(session_.device);
    update_graph_->begin();
    update();
    update_graph_->end();
  }
  if (update_graph_)
    update_graph_->replay();
  else
    update();
  ++runs_;
}

StepReport TrainStep::report() const {
  const auto values = norm_.values.to_vector<double>();
  return {loss_sum_.item() / std::max(target_count_.item(), 1.0), values[0], values[2] == 0.0};
}

}  // namespace krait::train
