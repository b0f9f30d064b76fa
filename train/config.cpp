#include "train/config.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "core/device.h"
#include "train/yaml.h"

namespace krait::train {
namespace {

void read_deterministic(ConfigNode& section, OptionReader& options, RuntimeConfig& c) {
  const ConfigNode* node = section.is_map() ? section.find("deterministic") : nullptr;
  c.strict = node && node->is_scalar() && node->text() == "strict";
  std::string strict = "strict";
  if (c.strict) return options.read("deterministic", strict);
  if (node && node->describe().starts_with("string"))
    node->fail(fmt::format("found {}, expected true, false or strict", node->describe()));
  options.read("deterministic", c.deterministic);
}

void read_runtime(ConfigNode& section, RuntimeConfig& c) {
  OptionReader options(section);
  options.choice("device", c.device, {"auto", "cpu", "cuda"});
  options.choice("precision", c.precision, {"fp32", "bf16", "fp64"});
  read_deterministic(section, options, c);
  options.read("cuda_graphs", c.cuda_graphs);
  options.read("require_fast", c.require_fast);
  options.read("tf32", c.tf32);
  options.read("threads", c.threads, at_least(0));
  options.finish();
  if (c.device == "cuda" && !built_with_cuda()) {
    options.fail("device", "found cuda, but this build has no CUDA", "device: cpu, or build with -DKRAIT_CUDA=ON");
  }
  if (c.device == "cuda" && cuda_device_count() == 0) {
    options.fail("device", "found cuda, but this machine has no usable CUDA device", "device: auto");
  }
}

// How to come by what data.path names.
std::string data_advice(const DataConfig& c, const std::string& path) {
  return c.task ? "krait data fetch " + c.task->fetch_set() : fmt::format("krait data prepare TEXT -o {}", path);
}

void read_data(ConfigNode& section, DataConfig& c) {
  OptionReader options(section);
  std::vector<std::string> types{"tokens"};
  types.insert(types.end(), data::task_names().begin(), data::task_names().end());
  options.choice("type", c.type, types);
  const bool tokens = c.type == "tokens";
  if (!tokens) c.task = data::make_task(c.type, options);
  const bool files = tokens || !c.task->fetch_set().empty();
  if (files) options.read("path", c.path);
  if (files && options.given("path") && c.path.empty()) options.fail("path", "found an empty string, expected a file");
  options.read("split", c.split);
  if (!tokens && c.split != "train")  // the others end after one pass
    options.fail("split", fmt::format("found {}, but data.type {} trains on its split train", c.split, c.type), "split: train");
  if (tokens) {
    options.read("context", c.context, between(1, int64_t{1} << 30));
    options.choice("state", c.state, {"reset", "carry", "tbptt"});
    options.choice("documents", c.documents, {"ignore", "pack"});
  } else {
    c.context = c.task->shape().context;
  }
  options.finish();
  if (files && c.path.empty()) {
    const std::string path = tokens ? "data/mine.h5" : "data/" + c.task->fetch_set();
    options.fail("path", "is required and missing", fmt::format("path: {}, after {}", path, data_advice(c, path)));
  }
  if (c.state == "tbptt") c.state = "carry";
}

void read_optimizer(ConfigNode& section, OptimizerConfig& c) {
  OptionReader options(section);
  options.choice("type", c.type, {"adamw", "sgd", "lion"});
  if (c.type == "lion" && !options.given("betas")) c.betas = {0.9, 0.99};
  options.read("lr", c.lr, above(0));
  options.read("betas", c.betas, below_one());
  options.read("eps", c.eps, above(0));
  options.read("weight_decay", c.weight_decay, at_least(0));
  options.read("decay_embeddings", c.decay_embeddings);
  options.read("momentum", c.momentum, below_one());
  options.read("grad_clip", c.grad_clip, at_least(0));
  options.finish();
}

void read_scheduler(ConfigNode& section, SchedulerConfig& c) {
  OptionReader options(section);
  options.choice("type", c.type, {"cosine", "wsd", "linear", "constant"});
  options.read("warmup_steps", c.warmup_steps, at_least(0));
  options.read("min_lr_ratio", c.min_lr_ratio, between(0, 1));
  options.read("decay_ratio", c.decay_ratio, between(0, 1));
  options.choice("decay_shape", c.decay_shape, {"sqrt", "linear"});
  options.finish();
}

void read_train(ConfigNode& section, TrainConfig& c) {
  OptionReader options(section);
  options.read("steps", c.steps, at_least(0));
  options.read("tokens", c.tokens, at_least(0));
  options.read("tokens_per_step", c.tokens_per_step, at_least(0));
  options.read("micro_batch_size", c.micro_batch_size, between(1, 1 << 24));
  options.choice("recompute", c.recompute, {"none", "block"}, "none", "block");
  options.read("label_smoothing", c.label_smoothing, below_one());
  options.read("z_loss", c.z_loss, at_least(0));
  options.finish();
  if (c.steps > 0 && c.tokens > 0) {
    options.fail("tokens", fmt::format("{} tokens and {} steps (train.steps) both set the length", c.tokens, c.steps),
                 "leaving one out");
  }
  if (c.steps == 0 && c.tokens == 0) options.fail("steps", "is required and missing (or train.tokens)", "steps: 1000");
}

void read_eval(ConfigNode& section, EvalConfig& c, const Config& config) {
  OptionReader options(section);
  c.context = config.data.context;
  c.micro_batch_size = config.train.micro_batch_size;
  options.read("interval", c.interval, at_least(0));
  options.read("split", c.split);
  if (config.data.task) {  // a pass over the split's examples: no windows
    if (c.split != "valid" && c.split != "test")  // training examples come without an end
      options.fail("split", fmt::format("found {}, expected valid or test for data.type {}", c.split, config.data.type), "split: valid");
    options.read("micro_batch_size", c.micro_batch_size, between(1, 1 << 24));
    options.finish();
    c.context = c.stride = config.data.task->shape().eval_context;
    return;
  }
  options.read("context", c.context, between(1, int64_t{1} << 30));
  c.stride = c.context;
  options.read("stride", c.stride, at_least(1));
  options.read("max_tokens", c.max_tokens, at_least(0));
  options.read("micro_batch_size", c.micro_batch_size, between(1, 1 << 24));
  options.finish();
  if (c.stride > c.context) {
    options.fail("stride", fmt::format("{} is longer than eval.context {}: tokens between windows would not be counted",
                                       c.stride, c.context),
                 fmt::format("{} (no overlap) or {} (half)", c.context, std::max<int64_t>(1, c.context / 2)));
  }
}

void read_checkpoint(ConfigNode& section, CheckpointConfig& c) {
  OptionReader options(section);
  options.read("interval", c.interval, at_least(0));
  options.read("keep_latest", c.keep_latest, at_least(1));
  options.read("keep_best", c.keep_best);
  options.read("async", c.async);
  options.finish();
}

void read_logging(ConfigNode& section, LoggingConfig& c) {
  OptionReader options(section);
  options.read("interval", c.interval, at_least(1));
  options.read("tensorboard", c.tensorboard);
  options.finish();
}

void read_parallelism(ConfigNode& section, ParallelismConfig& c) {
  if (section.is_scalar()) {
    if (section.text() != "auto") section.fail(fmt::format("found {}, expected auto or a map of options", section.describe()), "parallelism: auto");
    c.automatic = true;
    ConfigNode empty = ConfigNode::map();
    empty.set_mark(section.mark());
    empty.set_path(section.path());
    section = std::move(empty);
  }
  c.default_zero = !c.automatic && !section.find("zero");
  OptionReader options(section);
  constexpr double kMostRanks = 1 << 20;  // the product of three fits into 64 bits
  options.read("data", c.data, between(-1, kMostRanks));
  options.read("tensor", c.tensor, between(1, kMostRanks));
  options.read("sequence", c.sequence, between(1, kMostRanks));
  options.read("zero", c.zero, between(0, 3));
  options.read("bucket_mb", c.bucket_mb, above(0));
  options.choice("reduce_dtype", c.reduce_dtype, {"float32", "bfloat16"});
  options.read("multiprocessors", c.multiprocessors, between(0, 128));
  options.read("copy_engines", c.copy_engines);
  options.finish();
  if (c.data == 0) options.fail("data", "found 0, expected -1 or a number of ranks", "data: -1");
}

/// What the data give must be what the model learns.
void check_answers(Config& c, OptionReader& options) {
  using Kind = data::TaskShape::Kind;
  const Kind kind = c.data.task ? c.data.task->shape().kind : Kind::token_targets;
  const std::string wanted = kind == Kind::labels ? "classifier" : kind == Kind::values ? "regressor" : "language_model";
  if (c.model.type != wanted)
    c.fail("model.type", fmt::format("found {}, but data.type {} needs a {}", c.model.type, c.data.type, wanted),
           "type: " + wanted);
  if (kind == Kind::values)
    for (const auto& [key, value] : {std::pair{"label_smoothing", c.train.label_smoothing}, {"z_loss", c.train.z_loss}})
      if (value > 0) c.fail(fmt::format("train.{}", key), fmt::format("found {}, but a regressor has no probabilities of labels", value), "0");
  if (kind == Kind::token_targets) return;
  const int64_t classes = c.data.task->shape().n_classes;
  if (c.model.n_classes != 0 && c.model.n_classes != classes)
    c.fail("model.n_classes", fmt::format("found {}, but data.type {} has {}", c.model.n_classes, c.data.type, classes),
           "leaving it out");
  c.model.n_classes = classes;
  OptionReader model(options.section("model"));
  if (c.data.task->shape().vocab_size == 0 && c.model.d_model > 0) {  // values reach the layers through a linear map
    const double asked = model.given("embedding_dropout") ? c.model.embedding_dropout : 0;
    // Equal to dropout: what config.yaml of runs says whose files left it out and that are older than this check.
    if (asked > 0 && asked != c.model.dropout)
      c.fail("model.embedding_dropout", fmt::format("found {}, but the inputs of data.type {} are values, which have no embedding",
                                                    asked, c.data.type), "leaving it out; model.dropout acts in the layers");
    c.model.embedding_dropout = 0;
    model.resolve("embedding_dropout", int64_t{0});
  }
  model.resolve("n_classes", classes);
  c.model.section = options.section("model");
}

void check_lengths(Config& c, OptionReader& options) {
  // The product of what one micro-batch needs, guarded against overflow by the ranges above.
  const int64_t micro = c.train.micro_batch_size * c.data.context;
  if (c.train.tokens_per_step == 0) {
    c.train.tokens_per_step = micro;
    c.train.default_tokens_per_step = true;
    OptionReader(options.section("train")).resolve("tokens_per_step", micro);
  }
  const int64_t wanted = c.train.tokens_per_step;
  if (wanted % micro != 0) {
    const int64_t below = wanted / micro * micro, above = below + micro;
    c.fail("train.tokens_per_step",
           fmt::format("{} is not a multiple of {} (micro_batch_size {} x context {})", wanted, micro,
                       c.train.micro_batch_size, c.data.context),
           below > 0 ? fmt::format("{} or {}", below, above) : fmt::format("{}", above));
  }
  const int64_t steps = c.total_steps();
  if (c.lr_scheduler.warmup_steps > steps) {
    c.fail("lr_scheduler.warmup_steps", fmt::format("{} is more than the {} steps of the run", c.lr_scheduler.warmup_steps, steps),
           fmt::format("{} or less", std::max<int64_t>(steps / 10, 1)));
  }
  if (c.model.position == "learned" && c.model.type == "language_model") {
    const int64_t longest = std::max(c.data.context, c.eval.context);
    if (c.model.max_positions == 0) {
      c.model.max_positions = longest;
      OptionReader(options.section("model")).resolve("max_positions", longest);
      c.model.section = options.section("model");
    }
    const bool by_data = c.data.context > c.model.max_positions;
    if (by_data || c.eval.context > c.model.max_positions) {
      c.fail(by_data ? "data.context" : "eval.context",
             fmt::format("{} is more than the {} learned positions (model.max_positions)", longest, c.model.max_positions),
             fmt::format("model.max_positions={}", longest));
    }
  }
}

}  // namespace

std::string Config::to_yaml() const { return train::to_yaml(tree); }

void Config::fail(const std::string& path, const std::string& message, const std::string& suggestion) const {
  // The deepest part of the path that exists gives the place.
  const ConfigNode* node = &tree;
  size_t begin = 0;
  while (begin <= path.size()) {
    const size_t end = std::min(path.find('.', begin), path.size());
    const ConfigNode* next = node->find(std::string_view(path).substr(begin, end - begin));
    if (!next) break;
    node = next;
    begin = end + 1;
  }
  ConfigNode at = ConfigNode();
  at.set_mark(node->mark());
  at.set_path(path);
  at.fail(message, suggestion);
}

Config config_from_tree(ConfigNode tree) {
  Config c;
  c.tree = std::move(tree);
  OptionReader options(c.tree);
  if (const SourceMark mark = c.tree.mark(); mark.source) {
    c.name = std::filesystem::path(*mark.source).stem().string();
  }
  options.read("name", c.name);
  const auto unfit = [](char ch) { return ch == '/' || static_cast<unsigned char>(ch) < 0x20; };
  if (c.name.empty() || c.name[0] == '.' || std::any_of(c.name.begin(), c.name.end(), unfit)) {
    options.fail("name", fmt::format("found '{}', expected a name that can be part of a directory's", ConfigNode::of(c.name).shown()));
  }
  options.read("seed", c.seed, at_least(0));
  // All sections are named before any is read: a misspelt section is reported as such, not as a missing key.
  ConfigNode& runtime = options.section("runtime");
  ConfigNode& data = options.section("data");
  ConfigNode& model = options.section("model");
  ConfigNode& optimizer = options.section("optimizer");
  ConfigNode& lr_scheduler = options.section("lr_scheduler");
  ConfigNode& train = options.section("train");
  ConfigNode& eval = options.section("eval");
  ConfigNode& checkpoint = options.section("checkpoint");
  ConfigNode& logging = options.section("logging");
  ConfigNode& parallelism = options.section("parallelism");
  options.finish();
  read_runtime(runtime, c.runtime);
  read_data(data, c.data);
  c.model = layers::read_model_config(model);
  read_optimizer(optimizer, c.optimizer);
  read_scheduler(lr_scheduler, c.lr_scheduler);
  read_train(train, c.train);
  read_eval(eval, c.eval, c);
  read_checkpoint(checkpoint, c.checkpoint);
  read_logging(logging, c.logging);
  read_parallelism(parallelism, c.parallelism);
  check_answers(c, options);
  check_lengths(c, options);
  if (c.data.state == "carry" && c.train.recompute == "block")
    c.fail("train.recompute", "block cannot be used with data.state: carry", "recompute: none");
  return c;
}

namespace {

Config finish_config(ConfigNode tree, const std::vector<std::string>& overrides) {
  for (const std::string& assignment : overrides) apply_override(tree, assignment);
  return config_from_tree(std::move(tree));
}

}  // namespace

Config load_config(const std::string& file, const std::vector<std::string>& overrides) {
  return finish_config(read_yaml_file(file), overrides);
}

Config parse_config(const std::string& yaml, const std::string& source, const std::vector<std::string>& overrides) {
  ConfigNode tree = parse_yaml(yaml, source);
  tree.set_mark({std::make_shared<const std::string>(source), 0, 0});
  return finish_config(std::move(tree), overrides);
}

std::string find_data_file(const Config& config) {
  namespace fs = std::filesystem;
  const fs::path path = config.data.path;
  std::vector<fs::path> places;
  if (const char* directory = std::getenv("KRAIT_DATA_DIR"); directory && *directory && path.is_relative()) {
    places.push_back(fs::path(directory) / path);
    places.push_back(fs::path(directory) / path.filename());
  }
  places.push_back(path);
  std::string tried;
  for (const fs::path& place : places) {
    std::error_code error;
    if (fs::exists(place, error)) return place.string();
    tried += (tried.empty() ? "" : ", ") + place.string() + (error ? " (" + error.message() + ")" : "");
  }
  // A run's relative path was relative to where it was started.
  std::error_code none;
  const std::string from = path.is_relative() ? fmt::format(" (from {})", fs::current_path(none).string()) : "";
  config.fail("data.path", fmt::format("no such file: {}{}", tried, from),
              data_advice(config.data, path.string()) + ", or another data.path");
}

}  // namespace krait::train
