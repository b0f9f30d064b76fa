#include "train/parallelism.h"

#include "layers/s4_config.h"

namespace krait::train {

namespace {

// What training with a carried state cannot do; layers that have none are refused where the model is built.
void check_carried(const Config& config) {
  if (config.data.state != "carry") return;
  for (const std::string& kind : config.model.layers) {
    if (kind != "s4" && kind != "s4d") continue;
    ConfigNode options = config.model.options_of(kind);
    if (layers::read_s4_config(options, kind, config.model.d_model).form != "diagonal")
      config.fail("data.state", fmt::format("found carry, but {} trains with a carried state in its diagonal form alone", kind),
                  "state: reset, or model.layers: [s4d]");
  }
}

MeshShape mesh_shape(const Config& config, const Launch& launch) {
  const ParallelismConfig& p = config.parallelism;
  const int64_t world = launch.world_size, model = p.tensor * p.sequence;
  const std::string started =
      launch.launcher.empty() ? std::string("this process runs alone") : fmt::format("{} started {}", launch.launcher, world);
  const auto command = [](int64_t n) { return fmt::format("mpirun -n {} krait train ...", n); };
  if (world % model != 0)
    config.fail(p.tensor > 1 ? "parallelism.tensor" : "parallelism.sequence",
                fmt::format("tensor {} x sequence {} = {} ranks do not divide the job's: {}", p.tensor, p.sequence, model, started),
                fmt::format("{}, or smaller sizes", command((world / model + 1) * model)));
  if (p.data > 0 && p.data * model != world)
    config.fail("parallelism.data",
                fmt::format("data {} x sequence {} x tensor {} = {} ranks, but {}", p.data, p.sequence, p.tensor, p.data * model, started),
                fmt::format("data: -1, or {}", command(p.data * model)));
  return {world / model, p.sequence, p.tensor};
}

void fit_step(Config& c, int64_t data_ranks) {
  const int64_t micro = c.train.micro_batch_size * c.data.context, wanted = c.train.tokens_per_step;
  if (c.train.default_tokens_per_step) {
    c.train.tokens_per_step = micro * data_ranks;
    OptionReader(*c.tree.find("train")).resolve("tokens_per_step", c.train.tokens_per_step);
    return;
  }
  const int64_t unit = micro * data_ranks;
  if (wanted % unit == 0) return;
  const int64_t below = wanted / unit * unit;
  std::string advice = below > 0 ? fmt::format("{} or {}", below, below + unit) : fmt::format("{}", unit);
  const int64_t rows = wanted / (c.data.context * data_ranks);  // the largest micro-batch that would do
  for (int64_t b = std::min(rows, c.train.micro_batch_size); b >= 1; --b)
    if (wanted % (b * c.data.context * data_ranks) == 0) {
      advice += fmt::format(", or train.micro_batch_size={}", b);
      break;
    }
  c.fail("train.tokens_per_step",
         fmt::format("{} is not a multiple of {} (micro_batch_size {} x context {} x {} data ranks)", wanted, unit,
                     c.train.micro_batch_size, c.data.context, data_ranks),
         advice);
}

}  // namespace

bool is_kan_network(const Config& config) {
  return config.model.type != "language_model" && config.model.layers == std::vector<std::string>{"kan"};
}

int64_t default_zero(const Config& config, int64_t replicas) {
  return replicas > 1 && !config.runtime.strict && !is_kan_network(config) ? 1 : 0;
}

MeshShape fit_to_ranks(Config& config, const Launch& launch) {
  check_carried(config);
  const MeshShape shape = mesh_shape(config, launch);
  fit_step(config, shape.data);
  if (config.parallelism.default_zero) {
    config.parallelism.zero = default_zero(config, shape.data * shape.sequence);
    OptionReader(*config.tree.find("parallelism")).resolve("zero", config.parallelism.zero);
  }
  if (config.data.context % shape.sequence != 0)
    config.fail("data.context",
                fmt::format("{} tokens cannot be cut into {} equal pieces (parallelism.sequence)", config.data.context, shape.sequence),
                fmt::format("{}", (config.data.context / shape.sequence + 1) * shape.sequence));
  if (config.eval.context % shape.sequence != 0)
    config.fail("eval.context",
                fmt::format("{} tokens cannot be cut into {} equal pieces (parallelism.sequence)", config.eval.context, shape.sequence),
                fmt::format("{}", (config.eval.context / shape.sequence + 1) * shape.sequence));
  if (config.runtime.strict && config.parallelism.zero > 0)
    config.fail("parallelism.zero", fmt::format("zero {} cannot be used with runtime.deterministic: strict", config.parallelism.zero),
                "zero: 0");
  if (config.runtime.strict && config.parallelism.reduce_dtype != "float32")
    config.fail("parallelism.reduce_dtype", "sums in bfloat16 depend on the number of ranks (runtime.deterministic: strict)",
                "reduce_dtype: float32");
  if (config.parallelism.zero == 3 && config.train.recompute != "block")
    config.fail("parallelism.zero", "zero 3 keeps the parameters of one block at a time, which needs blocks that are computed again",
                "train.recompute: block, or zero: 2");
  return shape;
}

std::string describe(const MeshShape& s, const Launch& launch) {
  return fmt::format("{}: {} ranks = data {} x sequence {} x tensor {}", launch.launcher, launch.world_size, s.data,
                     s.sequence, s.tensor);
}

}  // namespace krait::train
