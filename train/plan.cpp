#include "train/plan.h"

#include <algorithm>
#include <cmath>

#include "kernels/logit_chunk.h"
#include "train/optimizer.h"
#include "train/parallelism.h"
#include "train/parameter_shards.h"
#include "train/plan_probe.h"
#include "train/session.h"

namespace krait::train {
namespace {

constexpr double kGiB = 1024.0 * 1024 * 1024;
constexpr double kMatmulWorkspace = 64.0 * 1024 * 1024;
constexpr double kOutsideGiB = 0.9;  // the CUDA context and the libraries, beside Krait's own allocations
constexpr double kOverlap = 0.6;     // of the backward pass, behind which gradients can be reduced

// The mesh, with the config's -1 filled in.
void lay_out(Plan& plan, const Config& config) {
  const ParallelismConfig& p = config.parallelism;
  plan.tensor = p.tensor;
  plan.sequence = p.sequence;
  const int64_t inner = p.tensor * p.sequence;
  if (plan.ranks % inner != 0)
    config.fail("parallelism.tensor", fmt::format("tensor {} x sequence {} does not divide {} ranks", p.tensor,
                                                  p.sequence, plan.ranks),
                fmt::format("--ranks {}", (plan.ranks / inner + 1) * inner));
  if (config.data.context % p.sequence != 0)
    config.fail("data.context", fmt::format("{} tokens cannot be cut into {} equal pieces (parallelism.sequence)", config.data.context, p.sequence),
                fmt::format("{}", (config.data.context / p.sequence + 1) * p.sequence));
  plan.data = p.data == -1 ? plan.ranks / inner : p.data;
  if (plan.data * inner != plan.ranks)
    config.fail("parallelism.data", fmt::format("data {} x sequence {} x tensor {} are {} ranks, but --ranks is {}",
                                                plan.data, p.sequence, p.tensor, plan.data * inner, plan.ranks),
                "data: -1");
  const int64_t of_all = config.train.micro_batch_size * config.data.context * plan.data;
  plan.zero = p.default_zero ? default_zero(config, plan.data * plan.sequence) : p.zero;
  plan.micro_batches = std::max<int64_t>(1, config.train.tokens_per_step / of_all);
  plan.tokens_per_step = plan.micro_batches * of_all;
  if (!config.train.default_tokens_per_step && plan.tokens_per_step != config.train.tokens_per_step)
    plan.warnings.push_back(fmt::format(
        "train.tokens_per_step {} is not a multiple of micro_batch_size {} x context {} x {} data ranks; planned with {}",
        config.train.tokens_per_step, config.train.micro_batch_size, config.data.context, plan.data,
        plan.tokens_per_step));
}

layers::ModelShape planned_shape(const Config& config) {
  // A plan needs no data where the config says what they would decide.
  if (!config.data.task && config.model.vocab_size > 0)
    return {.vocab_size = config.model.vocab_size, .input_features = 0, .context = config.data.context};
  return model_shape(config, open_data(config));
}

int states_of(const OptimizerConfig& c) { return states_per_parameter(optimizer_type_from_name(c.type), c.momentum); }

void count_memory(Plan& plan, const Config& config, const ModelCost& cost, int64_t vocab) {
  const double n = static_cast<double>(plan.parameters_per_rank), replicas = static_cast<double>(plan.data * plan.sequence);
  const bool rounded = config.runtime.precision == "bf16";
  const double wide = config.runtime.precision == "fp64" ? 8 : 4, compute = rounded ? 2 : 0;
  const ParameterBytes held = parameter_bytes(n, wide, compute, states_of(config.optimizer), plan.zero, plan.data * plan.sequence);
  plan.memory.weights = held.values;
  plan.memory.gradients = held.gradients;
  plan.memory.optimizer = held.state;
  // What ZeRO has whole for a while: gradients of the embedding, which are complete only at the end, and of the buckets
  // whose sums are under way; values of the buckets that are kept and of the one fetched ahead.
  const double embedding = static_cast<double>(vocab / plan.tensor * config.model.d_model);
  const double bucket = config.parallelism.bucket_mb * 1024 * 1024 / wide;
  if (plan.zero >= 2) plan.memory.gradients += std::min(n, embedding + 4 * bucket) * wide;
  if (plan.zero == 3) plan.memory.weights += std::min(n, embedding + 5 * bucket) * (rounded ? compute : wide);
  if (replicas > 1 && config.parallelism.reduce_dtype == "bfloat16" && plan.zero < 2)
    plan.memory.gradients += n * 2 * (plan.zero == 1 ? 1 + 1 / replicas : 1);  // what travels, and with ZeRO-1 what arrives

  const int64_t rows = config.train.micro_batch_size * config.data.context / plan.sequence;
  const double tokens = static_cast<double>(rows);
  double saved = cost.rest.saved_bytes, transient = cost.rest.transient_bytes, per_sequence = cost.rest.saved_per_sequence;
  for (int64_t i = 0; i < config.model.n_layers; ++i) {
    const PassCost& layer = cost.per_layer.at(config.model.kind_of(i));
    saved += layer.saved_bytes;
    per_sequence += layer.saved_per_sequence;
    transient = std::max(transient, layer.transient_bytes);
  }
  plan.memory.activations = tokens * saved + static_cast<double>(config.train.micro_batch_size) * per_sequence;
  const int64_t row_bytes = vocab / plan.tensor * (rounded ? 2 : static_cast<int64_t>(wide));
  const double logits = static_cast<double>(kernels::logit_chunk_rows(rows, row_bytes, cuda_device()) * row_bytes);
  // The head's logits and a layer's backward pass are not held at the same time.
  plan.memory.workspace = kMatmulWorkspace + std::max(logits, tokens * transient);
}

struct Link {
  double bytes_per_s, latency_s;
};
// Of a group whose members are `span` ranks of the job from first to last.
Link link_of(const Machine& m, int64_t span) {
  if (span <= m.gpus_per_node) return {m.link_gb_s * 1e9, m.link_latency_us * 1e-6};
  return {m.network_gb_s * 1e9, m.network_latency_us * 1e-6};
}

void count_computation(Plan& plan, const Config& config, const Machine& m, const layers::Model& whole) {
  const std::string rate = config.runtime.precision == "fp32" && config.runtime.tf32 ? "tf32" : config.runtime.precision;
  const auto found = m.matmul_tflops.find(rate);
  if (found == m.matmul_tflops.end())
    config.fail("runtime.precision", fmt::format("machine {} has no matmul_tflops for {}", m.name, rate));
  const double context = static_cast<double>(config.data.context);
  const double extra = 3 * whole.extra_flops_per_token(config.data.context);
  const double ranks = static_cast<double>(plan.tensor);
  double seconds = (plan.flops_per_token - extra) / (found->second * 1e12) / ranks;
  const double narrow = rate == "bf16" ? 1 : 2;
  const double scale = static_cast<double>(config.model.d_model) / 768 * narrow * m.layer_bandwidth_gb_s / m.bandwidth_gb_s;
  bool attends = false;
  const auto add = [&](const std::map<std::string, double>& rates, const std::string& kind) {
    const auto it = rates.find(kind);
    if (it != rates.end()) seconds += it->second * 1e-9 * scale / ranks;
  };
  const auto layer = [&](const std::string& kind) {
    add(m.layer_ns, kind);
    if (plan.sequence > 1) add(m.sequence_ns, kind);
  };
  for (int64_t i = 0; i < config.model.n_layers; ++i) {
    layer(config.model.kind_of(i));
    attends |= config.model.kind_of(i) == "attention";
    if (config.model.mlp.type != "none") layer("mlp");
  }
  layer("head");
  if (attends) seconds += extra / (m.attention_tflops * 1e12 / narrow) / ranks;
  if (config.train.recompute == "block") seconds *= 4.0 / 3;
  const double tokens = static_cast<double>(config.train.micro_batch_size) * context / static_cast<double>(plan.sequence);
  plan.compute_seconds = seconds * tokens * static_cast<double>(plan.micro_batches);
  // The update reads gradient, master and state and writes master, state, gradient and copy.
  const double owned = static_cast<double>(plan.parameters_per_rank) /
                       (plan.zero > 0 ? static_cast<double>(plan.data * plan.sequence) : 1);
  plan.compute_seconds += owned * (2 * (4 + 4 * states_of(config.optimizer)) + 6) / (m.bandwidth_gb_s * 1e9);
}

// Hidden behind computation, but for `alone` of the bytes that there is nothing to hide behind.
void add_traffic(Plan& plan, const char* what, const char* group, double calls, double bytes, const Link& link,
                 int64_t size, double hidden_behind, double alone = 0) {
  PlannedTraffic t{what, group, calls, bytes, 0, 0};
  t.seconds = bytes / link.bytes_per_s + calls * link.latency_s * std::log2(static_cast<double>(std::max<int64_t>(2, size)));
  t.exposed_seconds = std::max({0.0, t.seconds - hidden_behind, alone / link.bytes_per_s});
  plan.traffic.push_back(t);
}

void count_traffic(Plan& plan, const Config& config, const Machine& m, const ModelCost& cost, int64_t vocab) {
  const double n = static_cast<double>(plan.parameters_per_rank);
  const int64_t replicas = plan.data * plan.sequence;
  if (replicas > 1) {
    const Link link = link_of(m, plan.ranks);
    const double others = static_cast<double>(replicas - 1) / static_cast<double>(replicas);
    const double buckets = std::ceil(4 * n / (config.parallelism.bucket_mb * 1024 * 1024));
    const double hidden = kOverlap * 2.0 / 3 * plan.compute_seconds / static_cast<double>(plan.micro_batches);
    const double copy = config.runtime.precision == "bf16" ? 2 : 4;
    const double sum = config.parallelism.reduce_dtype == "bfloat16" ? 2 : 4;
    // The embedding's gradient is the backward pass's last. Its values are the forward pass's first: ZeRO-1 and 2 gather
    // them beside the update.
    const double last = others * static_cast<double>(vocab / plan.tensor * config.model.d_model);
    if (plan.zero == 0) {
      add_traffic(plan, "gradients, all-reduce", "data", buckets, 2 * others * sum * n, link, replicas, hidden, 2 * sum * last);
    } else {
      add_traffic(plan, "gradients, reduce-scatter", "data", buckets, others * sum * n, link, replicas, hidden, sum * last);
      const double passes = plan.zero == 3 ? 2.0 * static_cast<double>(plan.micro_batches) : 1.0;
      add_traffic(plan, "parameters, all-gather", "data", buckets * passes, passes * others * copy * n, link, replicas,
                  plan.zero == 3 ? hidden : hidden / 2, plan.zero == 3 ? copy * last : 0);
    }
  }
  const double tokens = static_cast<double>(config.train.micro_batch_size * config.data.context / plan.sequence);
  const double passes = static_cast<double>(plan.micro_batches);
  const auto inner = [&](const char* what, const char* group, int64_t size, int64_t span) {
    if (size == 1) return;
    Traffic sum;
    const auto add = [&](const PassCost& part) {
      const auto it = part.traffic.find(group);
      if (it == part.traffic.end()) return;
      sum.calls += it->second.calls;
      sum.bytes += it->second.bytes * tokens;
    };
    add(cost.rest);
    for (int64_t i = 0; i < config.model.n_layers; ++i) add(cost.per_layer.at(config.model.kind_of(i)));
    add_traffic(plan, what, group, sum.calls * passes, sum.bytes * passes, link_of(m, span), size, 0);
  };
  inner("activations of split layers", "tensor", plan.tensor, plan.tensor);
  inner("states, halos, keys and values", "sequence", plan.sequence, plan.sequence * plan.tensor);
}

}  // namespace

Planner::Planner(const Config& config, const Machine& machine) : config_(config), machine_(machine) {
  if (config.model.type != "language_model" && config.model.layers == std::vector<std::string>{"kan"})
    config.fail("model.layers", "a network of KAN layers has no blocks to plan with", "krait train: it takes seconds");
  shape_ = planned_shape(config);
  whole_ = layers::make_model(config.model, shape_);
}

const Planner::Split& Planner::split(int64_t tensor, int64_t sequence) {
  const auto found = splits_.find({tensor, sequence});
  if (found != splits_.end()) return found->second;
  Traffic ignored;
  const auto local = layers::make_model(config_.model, shape_, {}, simulated_parallel(tensor, sequence, &ignored, &ignored));
  return splits_[{tensor, sequence}] = {probe_model(config_, shape_, tensor, sequence), parameter_count(*local)};
}

double Planner::needed_gib(const Plan& plan) { return plan.memory.total() / kGiB + kOutsideGiB; }

Plan Planner::plan(const ParallelismConfig& mesh, int64_t ranks) {
  Config config = config_;
  config.parallelism = mesh;
  Plan plan;
  plan.ranks = ranks;
  lay_out(plan, config);
  const auto& [cost, parameters_per_rank] = split(plan.tensor, plan.sequence);
  for (const auto& p : whole_->parameters()) plan.parameters += p.data->shape.numel();
  plan.parameters_per_rank = parameters_per_rank;
  plan.flops_per_token = whole_->train_flops_per_token(config.data.context);
  count_memory(plan, config, cost, config.model.padded_vocab(shape_.vocab_size));
  count_computation(plan, config, machine_, *whole_);
  const double alone = plan.compute_seconds;
  count_traffic(plan, config, machine_, cost, config.model.padded_vocab(shape_.vocab_size));
  plan.step_seconds = plan.compute_seconds;
  for (const PlannedTraffic& t : plan.traffic) plan.step_seconds += t.exposed_seconds;
  plan.tokens_per_s = static_cast<double>(plan.tokens_per_step) / plan.step_seconds;
  plan.efficiency = alone / plan.step_seconds;
  const auto rate = machine_.matmul_tflops.find(config.runtime.precision);
  if (rate != machine_.matmul_tflops.end())
    plan.mfu = plan.tokens_per_s / static_cast<double>(ranks) * plan.flops_per_token / (rate->second * 1e12);
  if (needed_gib(plan) > machine_.memory_gb)
    plan.warnings.push_back(fmt::format(
        "out of memory: a rank needs {:.1f} GiB with the libraries, a {} has {:.0f}; lower train.micro_batch_size, set "
        "train.recompute: block, parallelism.zero: {}, or raise tensor or sequence",
        needed_gib(plan), machine_.name, machine_.memory_gb, std::min<int64_t>(3, plan.zero + 1)));
  return plan;
}

Plan make_plan(const Config& config, int64_t ranks, const Machine& machine) {
  return Planner(config, machine).plan(config.parallelism, ranks);
}

}  // namespace krait::train
