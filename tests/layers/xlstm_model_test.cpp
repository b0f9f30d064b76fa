#include <cmath>

#include "autograd/elementwise.h"
#include "layers/model.h"
#include "layers/xlstm_init.h"
#include "tests/testing/tensors.h"

namespace krait::layers {

namespace {

constexpr int64_t kVocab = 301, kWidth = 64, kLayers = 4, kLength = 13;

ConfigNode text(const std::string& value) { return ConfigNode::of(value); }

ConfigNode section_of(const std::string& layers, const std::string& mlp = "none") {
  ConfigNode section = ConfigNode::map(), options = ConfigNode::map(), heads = ConfigNode::map();
  options.set("type", text(mlp));
  heads.set("n_heads", ConfigNode::of(int64_t{2}));
  section.set("d_model", ConfigNode::of(kWidth));
  section.set("n_layers", ConfigNode::of(kLayers));
  section.set("layers", text(layers));
  for (const char* kind : {"mlstm", "mlstm_large", "slstm"}) section.set(kind, heads);
  section.set("mlp", options);
  section.set("tie_embeddings", ConfigNode::of(false));
  section.set("pad_vocab_multiple", ConfigNode::of(int64_t{16}));
  return section;
}

struct TestModel {
  explicit TestModel(ConfigNode section, Device device = kCpu)
      : config(read_model_config(section)), model(config, {.vocab_size = kVocab, .context = kLength}),
        store(model, {.device = device, .master = DType::f64, .compute = DType::f64, .seed = 5}) {}
  double std_of(const std::string& name) {
    double sum = 0;
    const std::vector<double> values = store.named_master(name).to_vector<double>();
    for (const double x : values) sum += x * x;
    return std::sqrt(sum / static_cast<double>(values.size()));
  }
  ModelConfig config;
  LanguageModel model;
  ParameterStore store;
};

}  // namespace

TEST_CASE("init xlstm: \"small\" for embedding, head and maps inside, \"wang\" into the residual stream") {
  const double small = std::sqrt(2.0 / (5.0 * 64)), wang = 2.0 / (4 * 8.0);
  CHECK(small_std(kWidth) == Approx(small));
  CHECK(wang_std(kLayers, kWidth) == Approx(wang));
  ConfigNode section = section_of("xlstm[1:1]"), large = section_of("mlstm_large", "swiglu");
  section.set("init", text("xlstm"));
  large.set("init", text("xlstm"));
  TestModel first(section), seven(large);
  for (const char* name : {"embedding.weight", "lm_head.weight", "layers.0.proj_up.weight", "layers.1.zgate.weight",
                           "layers.1.ffn.proj_up.weight"})
    CHECK(first.std_of(name) == Approx(small).epsilon(0.05));
  for (const char* name : {"layers.0.proj_down.weight", "layers.3.ffn.proj_down.weight"})
    CHECK(first.std_of(name) == Approx(wang).epsilon(0.05));
  for (const char* name : {"embedding.weight", "lm_head.weight", "layers.0.mlstm_layer.q.weight",
                           "layers.1.gate.weight", "layers.1.up.weight"})
    CHECK(seven.std_of(name) == Approx(small).epsilon(0.05));
  for (const char* name : {"layers.0.mlstm_layer.out_proj.weight", "layers.3.down.weight"})
    CHECK(seven.std_of(name) == Approx(wang).epsilon(0.05));
}

TEST_CASE("without init xlstm, embedding and head stay as configured; init_std given beside it holds") {
  TestModel plain(section_of("xlstm[1:1]"));
  CHECK(plain.std_of("embedding.weight") == Approx(0.02).epsilon(0.05));
  CHECK(plain.std_of("lm_head.weight") == Approx(0.02).epsilon(0.05));
  CHECK(plain.std_of("layers.0.proj_up.weight") == Approx(small_std(kWidth)).epsilon(0.05));  // the layer's own
  ConfigNode section = section_of("mlstm_large", "swiglu");
  section.set("init", text("xlstm"));
  section.set("init_std", ConfigNode::of(0.3));
  TestModel given(section);
  CHECK(given.std_of("embedding.weight") == Approx(0.3).epsilon(0.05));
  CHECK(given.std_of("layers.1.up.weight") == Approx(0.3).epsilon(0.05));
  CHECK(given.std_of("layers.1.down.weight") == Approx(wang_std(kLayers, kWidth)).epsilon(0.05));
}

TEST_CASE("a resolved xlstm config gives the same model again") {
  ConfigNode section = section_of("xlstm[1:1]");
  section.set("init", text("xlstm"));
  section.set("logit_cap", ConfigNode::of(30.0));
  TestModel once(section);
  CHECK(once.config.section.find("init_std")->text() == fmt::format("{}", small_std(kWidth)));
  TestModel again(once.config.section);
  CHECK(again.config.init_std == once.config.init_std);
  CHECK(again.config.residual_std() == once.config.residual_std());
  CHECK(again.config.logit_cap == 30.0);
  CHECK(relative_error(again.store.master(), once.store.master()) == 0.0);
}

TEST_CASE("the sLSTM's feed-forward takes its width from hidden, or from ratio up to a multiple of 64") {
  const auto hidden = [](const std::string& option, const std::string& value) {
    ConfigNode section = section_of("slstm");
    section.find("slstm")->set(option, ConfigNode::scalar(value));
    TestModel t(section);
    return t.store.named_master("layers.0.ffn.proj_down.weight").size(1);
  };
  CHECK(hidden("ratio", "1.3") == 128);
  CHECK(hidden("hidden", "12") == 12);
  CHECK(hidden("hidden", "0") == 128);
}

TEST_CASE("capped logits: loss, evaluation, generation and predictions agree") {
  ConfigNode section = section_of("mlstm_large", "swiglu"), capped_section = section;
  section.set("init_std", ConfigNode::of(1.0));
  capped_section.set("init_std", ConfigNode::of(1.0));
  capped_section.set("logit_cap", ConfigNode::of(2.5));
  TestModel raw(section), capped(capped_section);
  ModelInput input;
  input.tokens = random_integers({2, kLength}, {0, kVocab}, 1);
  input.targets = random_integers({2, kLength}, {0, kVocab}, 2);
  input.targets.data<int64_t>()[3] = -100;
  const NoGrad guard;
  const Tensor logits = capped.model.logits(input).data().contiguous();
  const Tensor expected = (2.5 * tanh(raw.model.logits(input) / 2.5)).data();
  CHECK(relative_error(logits, expected) < 1e-13);
  CHECK(relative_error(logits, raw.model.logits(input).data()) > 0.1);

  std::vector<double> nll;
  double sum = 0;
  for (int64_t i = 0; i < 2 * kLength; ++i) {
    const double* row = logits.data<double>() + i * kVocab;
    const int64_t y = input.targets.data<int64_t>()[i];
    double z = 0;
    for (int64_t j = 0; j < kVocab; ++j) z += std::exp(row[j]);
    sum += nll.emplace_back(y < 0 ? 0.0 : std::log(z) - row[y]);
  }
  CHECK(relative_error(capped.model.token_nll(input), from_vector(nll).view({2, kLength})) < 1e-12);
  CHECK(capped.model.loss(input, {}).loss.data().item() == Approx(sum / (2 * kLength - 1)).epsilon(1e-12));

  DecoderState state = capped.model.initial_state(2, kLength, capped.store.options());
  CHECK(relative_error(capped.model.next_logits(input.tokens, state), logits.select(1, kLength - 1)) < 1e-10);
  const Tensor rows = from_vector<int64_t>({0, 5, 17});
  const auto predicted = [&](TestModel& t) { return t.model.answers(input, rows, rows).likeliest.to_vector<int64_t>(); };
  CHECK(predicted(capped) == predicted(raw));
}

TEST_CASE("a logit cap is refused where no language model caps") {
  ConfigNode section = section_of("slstm");
  section.set("type", text("classifier"));
  section.set("logit_cap", ConfigNode::of(30.0));
  CHECK(contains(error_of([&] { read_model_config(section); }), "only a language model caps its logits"));
  ConfigNode negative = section_of("slstm");
  negative.set("logit_cap", ConfigNode::of(-1.0));
  CHECK(contains(error_of([&] { read_model_config(negative); }), ">= 0"));
}

}  // namespace krait::layers
