#include "train/bench_models.h"

#include <algorithm>
#include <map>

#include "core/random.h"
#include "data/task.h"

namespace krait::train::bench {

namespace {

/// Random features and labels: what a classifier of sequences learns here.
class RandomExamples final : public data::ExampleSet {
 public:
  explicit RandomExamples(int64_t classes) : classes_(classes) {}
  int64_t size() const override { return -1; }
  void fill(int64_t index, data::ExampleRow& row) const override {
    const auto word = [&](size_t i) { return philox(11, static_cast<uint64_t>(index), i / 4).word[i % 4]; };
    for (size_t i = 0; i < row.inputs.size(); ++i) row.inputs[i] = 2 * uniform_from_bits(word(i)) - 1;
    row.label = static_cast<int64_t>(word(row.inputs.size() + 4)) % classes_;
  }

 private:
  int64_t classes_;
};

class RandomTask final : public data::Task {
 public:
  RandomTask(int64_t features, int64_t context, int64_t classes)
      : Task("random", {.kind = data::TaskShape::Kind::labels, .input_features = features, .n_classes = classes,
                        .context = context, .eval_context = context}) {}

 protected:
  data::ExampleSetPtr examples(data::Split, uint64_t, const std::string&) const override {
    return std::make_shared<RandomExamples>(shape().n_classes);
  }
};

struct Base {
  const char* model;
  const char* precision;  // on CUDA; fp32 on a CPU
  int64_t features = 0;   // of a classifier's inputs; 0: a language model
  const char* optimizer = "{type: adamw, lr: 6e-4, betas: [0.9, 0.95], weight_decay: 0.1, grad_clip: 1.0}";
};

constexpr const char* kVocab = "vocab_size: 50257, pad_vocab_multiple: 128, tie_embeddings: true";

const std::map<std::string, Base>& bases() {
  static const std::string vocab = kVocab;
  static const std::map<std::string, std::string> texts{
      {"gpt2-124m", "{type: language_model, d_model: 768, n_layers: 12, layers: [attention], attention: {n_heads: 12, rope: "
                    "false, bias: true}, mlp: {type: gelu_tanh, ratio: 4, bias: true}, norm: layer, position: learned, " + vocab + "}"},
      {"llama-124m", "{type: language_model, d_model: 768, n_layers: 12, layers: [attention], attention: {n_heads: 12, rope: "
                     "true}, mlp: {type: swiglu, ratio: 2.667}, norm: rms, " + vocab + "}"},
      {"mamba-130m", "{type: language_model, d_model: 768, n_layers: 24, layers: [mamba], mamba: {d_state: 16, expand: 2, "
                     "d_conv: 4}, mlp: {type: none}, norm: rms, " + vocab + "}"},
      {"mamba2-130m", "{type: language_model, d_model: 768, n_layers: 24, layers: [mamba2], mamba2: {d_state: 128, head_dim: "
                      "64, expand: 2, d_conv: 4, chunk_size: 256}, mlp: {type: none}, norm: rms, " + vocab + "}"},
      {"xlstm-125m", "{type: language_model, d_model: 768, n_layers: 24, layers: ['xlstm[7:1]'], mlstm: {n_heads: 4}, slstm: "
                     "{n_heads: 4}, mlp: {type: none}, norm: layer_1p, init: xlstm, " + vocab + "}"},
      {"lstm-2x1024", "{type: language_model, d_model: 1024, n_layers: 2, layers: [lstm], mlp: {type: none}, norm: rms, "
                      "vocab_size: 10000, tie_embeddings: true}"},
      {"s4d-24x768", "{type: language_model, d_model: 768, n_layers: 24, layers: [s4d], s4d: {d_state: 64}, mlp: {type: none}, "
                     "norm: rms, " + vocab + "}"},
      {"s4-24x768", "{type: language_model, d_model: 768, n_layers: 24, layers: [s4], s4: {d_state: 64}, mlp: {type: none}, "
                    "norm: rms, " + vocab + "}"},
      {"gru-2x1024", "{type: language_model, d_model: 1024, n_layers: 2, layers: [gru], mlp: {type: none}, norm: rms, "
                     "vocab_size: 10000, tie_embeddings: true}"},
      {"linear-24x768", "{type: language_model, d_model: 768, n_layers: 24, layers: [linear_attention], linear_attention: {gate: "
                        "true}, mlp: {type: none}, norm: rms, " + vocab + "}"},
      {"gated-cnn-24x768", "{type: language_model, d_model: 768, n_layers: 24, layers: [gated_cnn], mlp: {type: none}, norm: "
                           "layer, norm_eps: 1e-6, " + vocab + "}"},
      {"s4d-classifier", "{type: classifier, d_model: 256, n_layers: 4, layers: [s4d], s4d: {d_state: 64, init: legs}, mlp: "
                         "{type: none}, norm: layer, norm_position: post, head: pooled, dropout: 0.1}"},
      {"s4-classifier", "{type: classifier, d_model: 256, n_layers: 4, layers: [s4], s4: {d_state: 64, init: legs}, mlp: "
                        "{type: none}, norm: layer, norm_position: post, head: pooled, dropout: 0.1}"},
      {"kan-256", "{type: classifier, layers: [kan], kan: {widths: [256, 256], order: 3, grid: 5}}"},
      {"char-gpt", "{type: language_model, d_model: 128, n_layers: 4, layers: [attention], attention: {n_heads: 4, rope: true}, "
                   "mlp: {type: gelu_tanh, ratio: 4}, norm: layer, tie_embeddings: true, vocab_size: 65}"},
      {"llama-small", "{type: language_model, d_model: 256, n_layers: 4, layers: [attention], attention: {n_heads: 4, rope: "
                      "true}, mlp: {type: swiglu}, norm: rms, tie_embeddings: true, vocab_size: 4096}"},
      {"mamba-small", "{type: language_model, d_model: 128, n_layers: 4, layers: [mamba], mlp: {type: none}, norm: rms, "
                      "tie_embeddings: true, vocab_size: 65}"},
      {"mamba2-small", "{type: language_model, d_model: 128, n_layers: 4, layers: [mamba2], mamba2: {d_state: 64, head_dim: 32, "
                       "chunk_size: 64}, mlp: {type: none}, norm: rms, tie_embeddings: true, vocab_size: 65}"},
      {"xlstm-small", "{type: language_model, d_model: 128, n_layers: 8, layers: ['xlstm[7:1]'], mlstm: {n_heads: 4}, slstm: "
                      "{n_heads: 4}, mlp: {type: none}, norm: layer_1p, init: xlstm, tie_embeddings: true, vocab_size: 65}"},
      {"s4d-small", "{type: classifier, d_model: 64, n_layers: 4, layers: [s4d], s4d: {d_state: 64, init: legs}, mlp: {type: "
                    "none}, norm: layer, norm_position: post, head: pooled, dropout: 0.1}"},
      {"kan-small", "{type: classifier, layers: [kan], kan: {widths: [64], order: 3, grid: 5}}"},
  };
  static const std::map<std::string, Base> all = [] {
    std::map<std::string, Base> m;
    for (const auto& [name, text] : texts) m[name] = {text.c_str(), "bf16"};
    for (const char* name : {"s4d-classifier", "s4-classifier", "s4d-small"}) m[name].features = 3;
    m["kan-256"].features = 256;
    m["kan-small"].features = 784;
    for (auto& [name, base] : m)
      if (base.features > 0) base.precision = "fp32, tf32: true";
    return m;
  }();
  return all;
}

}  // namespace

const std::vector<BenchModel>& bench_models() {
  // Goals: 600k, 540k, 320k, 380k, 250k tokens/s; 10000 and 7500 samples/s; 0.9 ms.
  static const std::vector<BenchModel> models{
      {"gpt2-124m B16 T1024", "gpt2-124m", 16, 1024, true, 27.3},
      {"gpt2-124m B64 T1024", "gpt2-124m", 64, 1024, true, 109.2},
      {"llama-124m B16 T2048", "llama-124m", 16, 2048, true, 60.7},
      {"mamba-130m B32 T2048", "mamba-130m", 32, 2048, true, 204.8},
      {"mamba2-130m B32 T2048", "mamba2-130m", 32, 2048, true, 172.5},
      {"xlstm-125m B8 T2048", "xlstm-125m", 8, 2048, true, 65.5},
      {"s4d-classifier B64 L1024", "s4d-classifier", 64, 1024, true, 6.4},
      {"s4-classifier B64 L1024", "s4-classifier", 64, 1024, true, 8.53},
      {"kan-256 B4096", "kan-256", 4096, 1, true, 0.9},
      {"lstm-2x1024 B64 T256", "lstm-2x1024", 64, 256, true},
      {"char-gpt B12 T64", "char-gpt", 12, 64, false},
      {"llama-small B4 T256", "llama-small", 4, 256, false},
      {"mamba-small B8 T128", "mamba-small", 8, 128, false},
      {"mamba2-small B8 T128", "mamba2-small", 8, 128, false},
      {"xlstm-small B8 T128", "xlstm-small", 8, 128, false},
      {"s4d-small B8 L784", "s4d-small", 8, 784, false},
      {"kan-small B64", "kan-small", 64, 1, false},
  };
  return models;
}

Config bench_config(const BenchModel& model, Device device, const std::vector<std::string>& extra) {
  const Base& base = bases().at(model.base);
  const bool classifier = base.features > 0;
  const std::string yaml = fmt::format(
      "name: {}\nseed: 1\nruntime: {{device: {}, precision: {}}}\ndata: {}\nmodel: {}\noptimizer: {}\n"
      "lr_scheduler: {{type: constant}}\ntrain: {{steps: 1000000, micro_batch_size: {}}}\n",
      model.base, device.is_cpu() ? "cpu" : "cuda", device.is_cpu() ? "fp32" : base.precision,
      classifier ? "{type: listops, context: 128, min_length: 20, max_length: 128}" : fmt::format("{{type: tokens, path: random, context: {}}}", model.context),
      base.model, base.optimizer, model.batch);
  Config config = parse_config(yaml, "bench " + model.name, extra);
  if (classifier) {
    config.model.n_classes = 10;
    config.data.task = std::make_shared<RandomTask>(base.features, model.context, 10);
    config.data.context = config.eval.context = model.context;
    config.train.tokens_per_step = model.batch * model.context;
  }
  return config;
}

Session bench_session(const Config& config) {
  if (config.data.task) return make_session(config, {nullptr, nullptr, ""});
  if (config.model.vocab_size >= 256) return make_session(config, {nullptr, data::make_byte_tokenizer(false), ""});
  std::vector<char32_t> alphabet;
  for (int64_t i = 0; i < config.model.vocab_size; ++i) alphabet.push_back(static_cast<char32_t>(U'!' + i));
  return make_session(config, {nullptr, data::make_char_tokenizer(std::move(alphabet), false), ""});
}

data::Batch random_batch(const Config& config, int64_t step) {
  const int64_t b = config.train.micro_batch_size, l = config.data.context;
  if (config.data.task) return config.data.task->split("train", b, 1)->get(step);
  data::Batch batch;
  batch.step = step;
  batch.tokens = empty({b, l}, DType::i32, kCpu);
  batch.targets = empty({b, l}, DType::i64, kCpu);
  batch.resets = ones({b}, DType::boolean, kCpu);
  batch.n_targets = b * l;
  batch.n_rows = b;
  const auto vocab = static_cast<uint32_t>(config.model.vocab_size);
  for (int64_t i = 0; i < b * l; ++i) {
    const Philox r = philox(13, static_cast<uint64_t>(i), static_cast<uint64_t>(step));
    batch.tokens.data<int32_t>()[i] = static_cast<int32_t>(r.word[0] % vocab);
    batch.targets.data<int64_t>()[i] = static_cast<int64_t>(r.word[1] % vocab);
  }
  return batch;
}

}  // namespace krait::train::bench
