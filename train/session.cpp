#include "train/session.h"

#include <algorithm>
#include <cstdlib>

#include "core/comm/job.h"
#include "core/limits.h"
#include "core/parallel.h"
#include "kernels/logit_chunk.h"
#include "kernels/matmul.h"
#include "train/optimizer.h"
#include "train/parameter_shards.h"
#include "train/progress.h"

namespace krait::train {

layers::LanguageModel& Session::language_model(const char* purpose) {
  auto* lm = dynamic_cast<layers::LanguageModel*>(model.get());
  KRAIT_CHECK(lm, "{} needs a language model, but model.type is {}", purpose, config.model.type);
  return *lm;
}

namespace {

// The processes of one host share its processors, unless the launcher has bound each to its own. A config may come from a
// larger machine: more threads than processors are slower, but only very many of them keep the machine from other work.
int thread_count(const Config& config) {
  const int64_t threads = config.runtime.threads, most = std::max(64, 4 * processors());
  if (threads > most)
    config.fail("runtime.threads", fmt::format("found {}, but this process may use {} processors: {} threads at most",
                                               threads, processors(), most),
                "threads: 0 (one for each processor)");
  if (threads > 0 || comm::local_size() == 1 || std::getenv("OMP_NUM_THREADS")) return static_cast<int>(threads);
  set_num_threads(0);
  return std::clamp(processors() / comm::local_size(), 1, num_threads());
}

struct Held {
  std::string what;
  double bytes;
};

// ConfigError for `key` where all of `held`, in each of the processes that share the device, is more than it has.
void check_fits(const Config& config, const std::string& key, const std::string& whose, const std::vector<Held>& held, Device device,
                const std::string& advice) {
  const int processes = device.is_cpu() ? comm::local_size() : 1;
  const auto shown = [](double bytes) { return human_bytes(static_cast<int64_t>(std::min(bytes, 0x1p62))); };
  double sum = 0;
  std::string list;
  for (const Held& h : held) {
    sum += h.bytes;
    list += fmt::format("{}{} {}", list.empty() ? "" : ", ", h.what, shown(h.bytes));
  }
  const int64_t all = device_info(device).total_bytes;
  if (sum * processes <= static_cast<double>(all)) return;
  config.fail(key, fmt::format("{} take at least {}{} ({}), but {} has {}", whose, shown(sum),
                               processes > 1 ? fmt::format(" in each of {} processes", processes) : std::string(), list,
                               device.is_cpu() ? "this machine" : "the GPU", human_bytes(all)),
              advice);
}

// The least that a step holds beside parameters, when the head has its gradient: what each block was given, also where the
// block is computed again; of a language model the head's input and its gradient and a part of the logits.
std::vector<Held> activations(const Session& s, int64_t element) {
  const Config& c = s.config;
  const int64_t tokens = c.train.micro_batch_size * (c.data.context / c.parallelism.sequence);
  const double stream = static_cast<double>(tokens) * static_cast<double>(c.model.d_model * element);
  std::vector<Held> held{{fmt::format("inputs of {} layers", c.model.n_layers), stream * static_cast<double>(c.model.n_layers)}};
  if (c.model.type != "language_model") return held;
  const int64_t row_bytes = model_shape(c, s.data).vocab_size / c.parallelism.tensor * element;
  held.push_back({"the head's input and gradient", 2 * stream});
  held.push_back({"logits", static_cast<double>(kernels::logit_chunk_rows(tokens, row_bytes, s.device) * row_bytes)});
  return held;
}

// Before the parameters exist: what the system lends beyond its memory is called in later, by a kill, and first values of
// many parameters take hours. What is not counted here a run learns step by step.
void check_memory(const Session& s, const layers::StoreOptions& store) {
  const Config& c = s.config;
  const double n = static_cast<double>(parameter_count(*s.model)), wide = static_cast<double>(size_of(store.master));
  const double copy = store.compute == store.master ? 0 : static_cast<double>(size_of(store.compute));
  const std::string whose = human_count(n) + " parameters", smaller = "fewer layers (model.n_layers) or less width (model.d_model)";
  std::vector<Held> held{{"values", n * (wide + copy)}};
  if (s.device.is_cuda()) check_fits(c, "model", whose, {{"first values", n * wide}}, kCpu, smaller);
  if (!s.learns) return check_fits(c, "model", whose, held, s.device, smaller);
  if (c.parallelism.zero > 0) {  // whole at first
    held.push_back({"gradients", n * wide});
    check_fits(c, "model", whose, held, s.device, smaller);
  }
  const int states = states_per_parameter(optimizer_type_from_name(c.optimizer.type), c.optimizer.momentum);
  const ParameterBytes b = parameter_bytes(n, wide, copy, states, c.parallelism.zero, s.mesh.replicas->size());
  held = {{"values", b.values}, {"gradients", b.gradients}};
  if (b.state > 0) held.push_back({"state of " + c.optimizer.type, b.state});
  check_fits(c, "model", whose, held, s.device, smaller);
  for (Held& h : activations(s, size_of(store.compute))) held.push_back(std::move(h));
  check_fits(c, "train.micro_batch_size",
             fmt::format("{} parameters and {} sequences of {} tokens", human_count(n), c.train.micro_batch_size, c.data.context), held, s.device,
             "fewer, a shorter data.context, or a smaller model");
}

void check_state(const Config& config, const layers::Model& model, const comm::ProcessGroup& sequence) {
  const std::string kind = config.data.state == "carry" ? model.kind_without_stream() : "";
  if (!kind.empty())
    config.fail("data.state", fmt::format("found carry, but layer {} has no state of constant size to carry", kind),
                "state: reset, with eval.stride less than eval.context for a longer past");
  // A convolution's carried inputs lie in front of the first piece: the next one's must lie within it.
  const int64_t ranks = sequence.size(), length = config.data.context / ranks;
  if (config.data.state != "carry" || ranks == 1) return;
  for (const layers::LayerState& state : dynamic_cast<const layers::DecoderModel&>(model).decoder().initial_state(1, 1, DType::f32, kCpu).layers)
    if (const auto conv = state.tensors.find("conv"); conv != state.tensors.end() && conv->second.size(1) > length)
      config.fail("data.context", fmt::format("pieces of {} tokens (parallelism.sequence {}) are shorter than the {} before them that "
                                              "a convolution with a carried state looks back on", length, ranks, conv->second.size(1)),
                  fmt::format("{} or more, or data.state: reset", conv->second.size(1) * ranks));
}

}  // namespace

Device device_of(const RuntimeConfig& runtime) {
  if (runtime.device == "cpu") return kCpu;
  if (runtime.device == "auto" && cuda_device_count() == 0) return kCpu;
  return comm::local_cuda_device();
}

DType compute_dtype(const std::string& precision) {
  if (precision == "bf16") return DType::bf16;
  return precision == "fp64" ? DType::f64 : DType::f32;
}

layers::ModelShape model_shape(const Config& config, const DataSource& data) {
  layers::ModelShape shape;
  shape.context = config.data.context;
  if (config.data.task) {
    shape.vocab_size = config.data.task->shape().vocab_size;
    shape.input_features = config.data.task->shape().input_features;
  } else {
    shape.vocab_size = data.tokenizer->vocab_size();
  }
  if (config.model.vocab_size == 0 || shape.vocab_size == 0) return shape;
  if (config.model.vocab_size < shape.vocab_size)
    config.fail("model.vocab_size",
                fmt::format("{} is less than the {} tokens of the data", config.model.vocab_size, shape.vocab_size),
                fmt::format("{} or 0", shape.vocab_size));
  shape.vocab_size = config.model.vocab_size;
  return shape;
}

int64_t parameter_count(const layers::Model& local) {
  int64_t n = 0;
  for (const auto& p : local.parameters())
    for (const auto& part : p.data->parts) {
      const Shape& all = p.data->shape;
      n += layers::local_shape(all.ndim() == 0 ? all : all.with(0, part.rows), part.shard).numel();
    }
  return n;
}

DataSource open_data(const Config& config) {
  if (config.data.task) return {nullptr, nullptr, config.data.task->fetch_set().empty() ? "" : find_data_file(config)};
  const data::TokenStorePtr store = data::TokenStore::open(find_data_file(config));
  return {store, store->tokenizer(), ""};
}

data::TokensPtr split_of(const Config& config, const data::TokenStore& store, const std::string& key, const std::string& name) {
  if (!store.has_split(name)) {
    std::string known;
    for (const std::string& s : store.splits()) known += (known.empty() ? "" : ", ") + s;
    config.fail(key, fmt::format("found {}, but {} has: {}", name, store.path(), known), known);
  }
  return store.split(name);
}

void build_model(Session& s, const layers::ModelConfig& model) {
  const Config& config = s.config;
  CrossEntropyOptions loss;
  loss.label_smoothing = config.train.label_smoothing;
  loss.z_loss = config.train.z_loss;
  s.model = layers::make_model(model, model_shape(config, s.data), loss, {s.mesh.tensor, s.mesh.sequence});
  check_state(config, *s.model, *s.mesh.sequence);
  s.model->set_recompute(config.train.recompute == "block");
  s.model->set_auxiliary_scale(1.0 / static_cast<double>(s.micro_batches()));

  const DType compute = compute_dtype(config.runtime.precision), master = compute == DType::f64 ? DType::f64 : DType::f32;
  layers::StoreOptions store{.device = s.device, .master = master, .compute = compute, .seed = static_cast<uint64_t>(config.seed)};
  const int64_t ranks = s.mesh.replicas->size();
  if (ranks > 1 || config.parallelism.zero > 0)
    store.bucket = static_cast<int64_t>(config.parallelism.bucket_mb * 1048576.0) / size_of(master);
  if (ranks > 1 || config.parallelism.zero > 0) store.granule = ranks * 128;
  store.fp32_apart = config.parallelism.zero > 0;
  store.gradients = s.learns;
  check_memory(s, store);
  s.parameters = std::make_unique<layers::ParameterStore>(*s.model, store);
}

Session make_session(const Config& config, DataSource data, int64_t finished_steps, comm::Mesh mesh, bool learns) {
  Session s;
  s.learns = learns;
  s.config = config;
  s.data = std::move(data);
  s.mesh = std::move(mesh);
  s.device = device_of(config.runtime);
  set_num_threads(thread_count(config));
  kernels::set_tf32(config.runtime.tf32);
  build_model(s, layers::config_at_step(config.model, std::max<int64_t>(finished_steps - 1, 0)));
  return s;
}

layers::ModelInput model_input(const data::Batch& batch, Device device, const comm::ProcessGroup& sequence) {
  layers::ModelInput input;
  input.tokens = batch.tokens;
  input.inputs = batch.inputs;
  input.targets = batch.labels.defined() ? batch.labels : batch.values.defined() ? batch.values : batch.targets;
  input.lengths = batch.lengths;
  input.info = {batch.segments, batch.positions};
  input = layers::slice_sequence(input, sequence);
  for (Tensor* t : {&input.tokens, &input.inputs, &input.targets, &input.lengths, &input.info.segments, &input.info.positions})
    if (t->defined()) *t = t->to(device);
  return input;
}

std::vector<std::string> describe_session(Session& s) {
  const Config& c = s.config;
  std::vector<std::string> lines;
  const DeviceInfo info = device_info(s.device);
  lines.push_back(s.device.is_cpu() ? fmt::format("device: cpu, {} ({} threads)", info.name, num_threads())
                                    : fmt::format("device: {}, {}", s.device, info.name));
  const bool packed = c.data.documents == "pack";
  const DType compute = s.parameters->options().compute;
  for (const std::string& line :
       s.model->kernel_lines(c.train.micro_batch_size, c.data.context, compute, s.device, packed)) {
    if (c.runtime.require_fast && line.find("slow") != std::string::npos)
      c.fail("runtime.require_fast", fmt::format("a slow path would serve this run: {}", line), "require_fast: false");
    lines.push_back("kernel: " + line);
  }
  if (c.runtime.require_fast && s.device.is_cpu() && compute == DType::bf16)
    c.fail("runtime.require_fast", "bf16 on a CPU is converted to fp32 for every product", "precision: fp32");
  return lines;
}

double peak_flops(Device device, const std::string& precision, bool tf32) {
  if (device.is_cpu()) return 0;
  struct Peak {
    const char* name;
    double bf16, tf32, fp32;  // dense TFLOP/s of the vendor's data sheets
  };
  static constexpr Peak kPeaks[] = {{"H100 80GB HBM3", 989.4, 494.7, 66.9}, {"H200", 989.4, 494.7, 66.9},
                                    {"H100 PCIe", 756.0, 378.0, 51.2},      {"A100", 312.0, 156.0, 19.5},
                                    {"L40S", 362.0, 183.0, 91.6},           {"RTX 4090", 165.2, 82.6, 82.6}};
  const std::string name = device_info(device).name;
  for (const Peak& p : kPeaks)
    if (name.find(p.name) != std::string::npos && precision != "fp64")
      return 1e12 * (precision == "bf16" ? p.bf16 : tf32 ? p.tf32 : p.fp32);
  return 0;
}

}  // namespace krait::train
