#include "train/plan_probe.h"

#include <set>

#include "core/memory_probe.h"
#include "core/random.h"
#include "train/session.h"

namespace krait::train {
namespace {

comm::GroupPtr simulated_group(const std::string& name, int64_t rank, int64_t size, Traffic* traffic);

class SimulatedGroup final : public comm::ProcessGroup {
 public:
  SimulatedGroup(const std::string& name, int rank, int size, Traffic* traffic)
      : ProcessGroup(rank, size, name), traffic_(traffic), others_(static_cast<double>(size - 1) / size) {}

  comm::Work all_reduce(Tensor t, comm::Reduce) override { return sent(2 * others_ * bytes(t)); }
  comm::Work all_gather(const Tensor&, Tensor whole) override { return received(whole, others_ * bytes(whole)); }
  comm::Work reduce_scatter(const Tensor& whole, Tensor piece) override {
    return received(piece, others_ * bytes(whole));
  }
  comm::Work all_to_all(const Tensor& send, Tensor receive) override {
    return received(receive, others_ * bytes(send));
  }
  comm::Work broadcast(Tensor t, int) override { return sent(others_ * bytes(t)); }
  comm::Work exchange(const Tensor& send, int, Tensor receive, int) override {
    if (receive.defined()) zero_(receive);
    return sent(send.defined() ? bytes(send) : 0);
  }
  void barrier() override {}
  comm::GroupPtr split(int, const std::string& name) override { return simulated_group(name, rank(), size(), traffic_); }

 private:
  static double bytes(const Tensor& t) { return static_cast<double>(t.numel() * size_of(t.dtype())); }
  comm::Work sent(double count) {
    traffic_->calls += 1;
    traffic_->bytes += count;
    return {};
  }
  comm::Work received(Tensor& t, double count) {
    zero_(t);
    return sent(count);
  }
  Traffic* traffic_;
  double others_;
};

comm::GroupPtr simulated_group(const std::string& name, int64_t rank, int64_t size, Traffic* traffic) {
  if (size == 1) return comm::single_group(name);
  return std::make_shared<SimulatedGroup>(name, static_cast<int>(rank), static_cast<int>(size), traffic);
}

// Totals of one pass over a model of a few layers.
struct Pass {
  double saved = 0, transient = 0;
  Traffic tensor, sequence;
};

constexpr int64_t kProbeVocab = 64;  // the head's logits are counted apart

layers::ModelInput probe_input(const Config& config, const layers::ModelShape& shape, int64_t rows, int64_t length) {
  layers::ModelInput in;
  const bool language = config.model.type == "language_model";
  if (shape.vocab_size > 0)
    in.tokens = zeros({rows, length}, DType::i32, kCpu);
  else
    in.inputs = zeros({rows, length, shape.input_features}, DType::f32, kCpu);
  if (language)
    in.targets = zeros({rows, length}, DType::i64, kCpu);
  else if (config.model.type == "classifier")
    in.targets = zeros({rows}, DType::i64, kCpu);
  else
    in.targets = zeros({rows, config.model.n_classes}, DType::f32, kCpu);
  if (config.data.documents == "pack") {
    in.info.segments = zeros({rows, length}, DType::i32, kCpu);
    in.info.positions = zeros({rows, length}, DType::i32, kCpu);
  }
  return in;
}

Pass run_pass(const Config& config, layers::ModelShape shape, const std::string& kind, int64_t layers, int64_t rows,
              int64_t length, int64_t tensor, int64_t sequence) {
  Pass out;
  layers::ModelConfig model_config = config.model;
  model_config.layers = {kind};
  model_config.n_layers = layers;
  model_config.max_positions = std::max(model_config.max_positions, length * sequence);
  if (shape.vocab_size > 0) shape.vocab_size = kProbeVocab * tensor;
  const auto model = layers::make_model(model_config, shape, {},
                                        simulated_parallel(tensor, sequence, &out.tensor, &out.sequence));
  model->set_recompute(config.train.recompute == "block");
  const DType compute = compute_dtype(config.runtime.precision);
  const layers::ParameterStore store(
      *model, {.device = kCpu, .master = compute == DType::f64 ? DType::f64 : DType::f32, .compute = compute});
  model->set_training(true);
  const layers::ModelInput input = probe_input(config, shape, rows, length);
  RandomSource& random = current_random();
  random.step = zeros({}, DType::i64, kCpu);
  MemoryProbe probe;
  {
    const layers::ModelLoss loss = model->loss(input, {});
    out.saved = static_cast<double>(probe.held());
    probe.reset_peak();
    backward(loss.loss);
  }
  out.transient = std::max(0.0, static_cast<double>(probe.peak()) - out.saved);
  return out;
}

double slope(double at_short, double at_long, double length) { return std::max(0.0, (at_long - at_short) / length); }

// Per token, from passes at a length and at twice that.
PassCost per_token(const Pass& at_short, const Pass& at_long, double length) {
  PassCost cost;
  cost.saved_bytes = slope(at_short.saved, at_long.saved, length);
  cost.transient_bytes = slope(at_short.transient, at_long.transient, length);
  const auto traffic = [&](const char* name, const Traffic& a, const Traffic& b) {
    if (b.calls > 0) cost.traffic[name] = {b.calls, slope(a.bytes, b.bytes, length)};
  };
  traffic("tensor", at_short.tensor, at_long.tensor);
  traffic("sequence", at_short.sequence, at_long.sequence);
  return cost;
}

// a - b, nothing below zero.
PassCost minus(PassCost a, const PassCost& b) {
  a.saved_bytes = std::max(0.0, a.saved_bytes - b.saved_bytes);
  a.saved_per_sequence = std::max(0.0, a.saved_per_sequence - b.saved_per_sequence);
  for (auto& [name, t] : a.traffic)
    if (const auto it = b.traffic.find(name); it != b.traffic.end())
      t = {std::max(0.0, t.calls - it->second.calls), std::max(0.0, t.bytes - it->second.bytes)};
  return a;
}

}  // namespace

layers::Parallel simulated_parallel(int64_t tensor, int64_t sequence, Traffic* of_tensor, Traffic* of_sequence) {
  return {simulated_group("tensor", 0, tensor, of_tensor), simulated_group("sequence", sequence - 1, sequence, of_sequence)};
}

ModelCost probe_model(const Config& config, const layers::ModelShape& shape, int64_t tensor, int64_t sequence) {
  ModelCost cost;
  const int64_t local = std::max<int64_t>(1, shape.context / sequence);
  const int64_t length = std::min<int64_t>(config.model.d_model > 2048 ? 128 : 256, std::max<int64_t>(1, local / 2));
  const std::set<std::string> kinds(config.model.layers.begin(), config.model.layers.end());
  for (const std::string& kind : kinds) {
    const auto at = [&](int64_t layers) {
      const auto run = [&](int64_t rows, int64_t l) { return run_pass(config, shape, kind, layers, rows, l, tensor, sequence); };
      const Pass twice = run(1, 2 * length);
      PassCost of = per_token(run(1, length), twice, static_cast<double>(length));
      // As many tokens in two sequences as in one of twice the length.
      if (sequence > 1) of.saved_per_sequence = std::max(0.0, run(2, length).saved - twice.saved);
      return of;
    };
    const PassCost two = at(2), three = at(3);
    cost.per_layer[kind] = minus(three, two);
    cost.per_layer[kind].transient_bytes = three.transient_bytes;
    cost.rest = minus(minus(two, cost.per_layer[kind]), cost.per_layer[kind]);
    cost.rest.transient_bytes = 0;
  }
  return cost;
}

}  // namespace krait::train
