#include "train/config.h"

#include <filesystem>

#include "layers/attention_config.h"
#include "tests/testing/catch.h"
#include "train/yaml.h"

using namespace krait;
using namespace krait::train;

namespace {

const char* const kSmall = R"(seed: 1
data: {path: a.h5, context: 64}
model:
  d_model: 128
  n_layers: 4
  attention: {n_heads: 4}
train: {steps: 100, micro_batch_size: 12}
)";

Config small(const std::vector<std::string>& overrides = {}) { return parse_config(kSmall, "exp.yaml", overrides); }

std::string error_with(const std::vector<std::string>& overrides) {
  return error_of([&] { small(overrides); });
}
std::string error_in(const std::string& yaml) {
  return error_of([&] { parse_config(yaml, "exp.yaml"); });
}
// kSmall with one text replaced by another.
std::string error_replacing(const std::string& text, const std::string& by) {
  std::string yaml = kSmall;
  const size_t at = yaml.find(text);
  REQUIRE(at != std::string::npos);
  return error_in(yaml.replace(at, text.size(), by));
}

}  // namespace

TEST_CASE("config: the example of the design reads") {
  const Config c = parse_config(R"(
name: gpt-shakespeare
seed: 1337
runtime: {device: auto, precision: bf16, deterministic: true, cuda_graphs: true, require_fast: false}
data:
  type: tokens
  path: data/shakespeare.h5
  context: 1024
  state: reset
  documents: pack
model:
  type: language_model
  d_model: 768
  n_layers: 24
  layers: [attention]
  attention: {n_heads: 12, n_kv_heads: 4, rope: true}
  mlp: {type: swiglu, ratio: 2.667}
  norm: rms
optimizer: {type: adamw, lr: 6e-4, betas: [0.9, 0.95], weight_decay: 0.1, grad_clip: 1.0}
lr_scheduler: {type: cosine, warmup_steps: 200, min_lr_ratio: 0.1}
train: {steps: 5000, tokens_per_step: 524288, micro_batch_size: 16}
eval: {interval: 250, split: valid, context: 1024, stride: 1024}
checkpoint: {interval: 1000, keep_latest: 2, keep_best: true, async: true}
logging: {interval: 10, tensorboard: true}
parallelism: {data: -1, tensor: 1, sequence: 1, zero: 1}
)", "exp.yaml");
  CHECK(c.name == "gpt-shakespeare");
  CHECK(c.optimizer.lr == 6e-4);
  CHECK(c.gradient_accumulation() == 32);
  CHECK(c.model.mlp.hidden == 2048);
  CHECK(c.parallelism.zero == 1);
  const layers::AttentionConfig a = [&] {
    ConfigNode section = c.model.options_of("attention");
    return layers::read_attention_config(section, c.model.d_model);
  }();
  CHECK(a.n_kv_heads == 4);
  CHECK(a.rotary_dim == 64);
}

TEST_CASE("config: defaults are filled in, derived values too") {
  const Config c = small();
  CHECK(c.name == "exp");
  CHECK(c.train.tokens_per_step == 12 * 64);
  CHECK(c.gradient_accumulation() == 1);
  CHECK(c.eval.context == 64);
  CHECK(c.eval.stride == 64);
  CHECK(c.model.mlp.hidden == 512);
  CHECK(c.total_steps() == 100);
  CHECK(small({"train.steps=0", "train.tokens=1000"}).total_steps() == 2);
  const auto dropout_of = [](const Config& config) { return config.model.options_of("attention").find("dropout")->text(); };
  CHECK(dropout_of(c) == "0");
  CHECK(dropout_of(small({"model.dropout=0.2"})) == "0.2");
  CHECK(dropout_of(small({"model.dropout=0.2", "model.attention.dropout=0.1"})) == "0.1");
}

TEST_CASE("config: the resolved config reads to itself") {
  for (const std::vector<std::string>& overrides :
       {std::vector<std::string>{}, {"name='123'", "data.path=\"a b: c#.h5\"", "model.position=learned"},
        {"model.layers=attention", "model.mlp={type: swiglu}", "optimizer.lr=1e-10", "train.recompute=true"},
        {"optimizer={type: lion}", "model.attention={alibi: true, n_kv_heads: 2}", "seed=1152921504606846975"}}) {
    const Config c = small(overrides);
    const Config again = parse_config(c.to_yaml(), "config.yaml");
    CHECK(again.to_yaml() == c.to_yaml());
    CHECK(again.name == c.name);
    CHECK(again.data.path == c.data.path);
    CHECK(again.seed == c.seed);
    CHECK(again.optimizer.betas == c.optimizer.betas);
    CHECK(again.model.max_positions == c.model.max_positions);
  }
}

TEST_CASE("config: overrides beat the file; maps merge, the rest is replaced") {
  const Config c = small({"optimizer.lr=3e-4", "train={micro_batch_size: 6}", "model.attention.n_heads=8", "train.steps=7"});
  CHECK(c.optimizer.lr == 3e-4);
  CHECK(c.train.micro_batch_size == 6);
  CHECK(c.train.steps == 7);
  CHECK(c.model.options_of("attention").find("n_heads")->text() == "8");
  CHECK(error_with({"train.steps"}) == "override 'train.steps': expected key.path=value");
  CHECK(error_with({"=5"}) == "override '=5': expected key.path=value");
  CHECK(error_with({"train..steps=5"}) == "override 'train..steps=5': the key path has an empty part");
  CHECK(error_with({"train.steps=[1"}) == "override 'train.steps=[1': the value is not valid YAML");
  CHECK(error_with({"train.steps=abc"}) ==
        "override 'train.steps=abc': train.steps: found string 'abc', expected an integer >= 0");
  CHECK(error_with({"seed.x=1"}) == "override 'seed.x=1': seed: found a map, expected an integer >= 0");
  CHECK(contains(error_with({"trian.steps=5"}), "override 'trian.steps=5': trian: unknown key; did you mean train?"));
}

TEST_CASE("config: unknown keys are named with place, nearest name and the valid ones") {
  CHECK(error_in("data: {path: a}\nmodel: {d_model: 8, n_layers: 1, attention: {n_heads: 1}}\ntrain: {steps: 1}\n"
                 "optimizer:\n  lr: 1e-3\n  weigth_decay: 0.1\n") ==
        "exp.yaml:6:3: optimizer.weigth_decay: unknown key; did you mean weight_decay?\n"
        "       valid keys: betas, decay_embeddings, eps, grad_clip, lr, momentum, type, weight_decay");
  CHECK(contains(error_replacing("n_heads: 4", "n_haeds: 4"),
                 "exp.yaml:6:15: model.attention.n_haeds: unknown key; did you mean n_heads?"));
  CHECK(contains(error_replacing("model:", "modle:"), "exp.yaml:3:1: modle: unknown key; did you mean model?"));
  CHECK(contains(error_replacing("d_model: 128", "d_modle: 128"),
                 "exp.yaml:4:3: model.d_modle: unknown key; did you mean d_model?"));
  CHECK(contains(error_with({"xyzzy=1"}), "override 'xyzzy=1': xyzzy: unknown key\n       valid keys: checkpoint, data,"));
}

TEST_CASE("config: wrong types and impossible values") {
  CHECK(error_replacing("steps: 100", "steps: abc") ==
        "exp.yaml:7:9: train.steps: found string 'abc', expected an integer >= 0");
  CHECK(error_replacing("steps: 100", "steps: '100'") ==
        "exp.yaml:7:9: train.steps: found string '100', expected an integer >= 0");
  CHECK(error_replacing("steps: 100", "steps: [1]") == "exp.yaml:7:9: train.steps: found a list, expected an integer >= 0");
  CHECK(error_replacing("steps: 100", "steps:") == "exp.yaml:7:9: train.steps: found nothing, expected an integer >= 0");
  CHECK(error_replacing("train: {steps: 100, micro_batch_size: 12}", "train: 5") ==
        "exp.yaml:7:1: train: found 5, expected a map of options");
  CHECK(error_with({"optimizer.lr=.nan"}) ==
        "override 'optimizer.lr=.nan': optimizer.lr: found .nan, expected a number > 0");
  CHECK(error_with({"optimizer.lr=.inf"}) ==
        "override 'optimizer.lr=.inf': optimizer.lr: found .inf, expected a number > 0");
  CHECK(error_with({"optimizer.lr=-1"}) == "override 'optimizer.lr=-1': optimizer.lr: found -1, expected a number > 0");
  CHECK(error_with({"optimizer.betas=[0.9]"}) ==
        "override 'optimizer.betas=[0.9]': optimizer.betas: found a list of 1, expected a list of 2 numbers in [0, 1)");
  CHECK(error_with({"optimizer.betas=[0.9, 1]"}) ==
        "override 'optimizer.betas=[0.9, 1]': optimizer.betas[1]: found 1, expected a number in [0, 1)");
  CHECK(error_with({"runtime.deterministic=yes"}) ==
        "override 'runtime.deterministic=yes': runtime.deterministic: found string 'yes', expected true, false or strict");
  CHECK(error_with({"runtime.precision=fp23"}) ==
        "override 'runtime.precision=fp23': runtime.precision: found 'fp23', expected one of fp32, bf16, fp64\n"
        "       try fp32");
  CHECK(error_with({"lr_scheduler.min_lr_ratio=1.5"}) ==
        "override 'lr_scheduler.min_lr_ratio=1.5': lr_scheduler.min_lr_ratio: found 1.5, expected a number in [0, 1]");
  const std::string unknown_layer = error_with({"model.layers=[atention]"});
  CHECK(contains(unknown_layer, "override 'model.layers=[atention]': model.layers[0]: found 'atention', expected a layer name: attention"));
  CHECK(contains(unknown_layer, "\n       try attention"));
  CHECK(error_with({"model.layers=[]"}) ==
        "override 'model.layers=[]': model.layers: found an empty list, expected at least one layer name");
  CHECK(error_with({"model.attention.dropout=-1"}) ==
        "override 'model.attention.dropout=-1': model.attention.dropout: found -1, expected a number in [0, 1)");
  CHECK(error_with({"model.dropout=1"}) == "override 'model.dropout=1': model.dropout: found 1, expected a number in [0, 1)");
  CHECK(contains(error_with({"name=a/b"}), "name: found 'a/b', expected a name"));
}

TEST_CASE("config: what is required and missing") {
  const std::string path = "data.path: is required and missing\n       try path: ";
  CHECK(error_in("") == "exp.yaml: " + path + "data/mine.h5, after krait data prepare TEXT -o data/mine.h5");
  CHECK(error_replacing("path: a.h5, ", "") == "exp.yaml:2:1: " + path + "data/mine.h5, after krait data prepare TEXT -o data/mine.h5");
  CHECK(contains(error_replacing("path: a.h5, ", "pth: a.h5, "), "data.pth: unknown key; did you mean path?"));
  CHECK(error_in("data: {type: image_sequence, dataset: cifar10}") == "exp.yaml:1:1: " + path + "data/cifar10, after krait data fetch cifar10");
  CHECK(error_replacing("  n_layers: 4\n", "") == "exp.yaml:3:1: model.n_layers: is required and missing");
  CHECK(error_replacing("steps: 100, ", "") ==
        "exp.yaml:7:1: train.steps: is required and missing (or train.tokens)\n       try steps: 1000");
}

TEST_CASE("config: combinations that cannot be name both values and a way out") {
  CHECK(error_with({"model.attention.n_heads=5"}) ==
        "override 'model.attention.n_heads=5': model.attention.n_heads: 5 heads do not divide the width 128 (d_model)\n"
        "       try 2, 4 or 8");
  CHECK(error_replacing("attention: {n_heads: 4}", "attention: {n_heads: 12, n_kv_heads: 5}") ==
        "exp.yaml:6:15: model.attention.n_heads: 12 heads do not divide the width 128 (d_model)\n       try 4, 8 or 16");
  CHECK(error_replacing("n_heads: 4", "n_heads: 8, n_kv_heads: 3") ==
        "exp.yaml:6:27: model.attention.n_kv_heads: 3 key/value heads do not divide the 8 query heads (n_heads)\n"
        "       try 1, 2 or 4");
  CHECK(error_replacing("n_heads: 4", "n_heads: 128") ==
        "exp.yaml:6:15: model.attention.n_heads: 128 heads of 1 channels: rope turns pairs and needs an even number\n"
        "       try 32 or 64");
  CHECK(error_replacing("n_heads: 4", "n_heads: 4, rotary_dim: 33") ==
        "exp.yaml:6:27: model.attention.rotary_dim: found 33, expected an even number up to the head width 32 "
        "(d_model 128 / n_heads 4)");
  CHECK(error_replacing("steps: 100", "steps: 100, tokens_per_step: 1000") ==
        "exp.yaml:7:21: train.tokens_per_step: 1000 is not a multiple of 768 (micro_batch_size 12 x context 64)\n"
        "       try 768 or 1536");
  CHECK(error_replacing("steps: 100", "steps: 100, tokens: 1000") ==
        "exp.yaml:7:21: train.tokens: 1000 tokens and 100 steps (train.steps) both set the length\n"
        "       try leaving one out");
  const std::string regressor = "data: {type: function, function: exp_sin}\nmodel: {type: regressor, layers: [kan], kan: {widths: [5]}}\ntrain: {steps: 1, label_smoothing: 0.1}\n";
  CHECK(error_of([&] { parse_config(regressor, "exp.yaml"); }) ==
        "exp.yaml:3:19: train.label_smoothing: found 0.1, but a regressor has no probabilities of labels\n       try 0");
  const auto pixels = [](const std::string& options) {
    return parse_config("data: {type: image_sequence, path: data/mnist}\nmodel: {type: classifier, d_model: 8, n_layers: 1, layers: [s4d], dropout: 0.1" +
                        options + "}\ntrain: {steps: 1, micro_batch_size: 1}\n", "exp.yaml");
  };
  CHECK(error_of([&] { pixels(", embedding_dropout: 0.2"); }) ==
        "exp.yaml:2:81: model.embedding_dropout: found 0.2, but the inputs of data.type image_sequence are values, which have no "
        "embedding\n       try leaving it out; model.dropout acts in the layers");
  for (const char* options : {"", ", embedding_dropout: 0", ", embedding_dropout: 0.1"}) {  // the last: config.yaml of earlier runs
    const Config c = pixels(options);
    CHECK(c.model.embedding_dropout == 0.0);
    CHECK(contains(c.to_yaml(), "embedding_dropout: 0\n"));
  }
  CHECK(error_with({"lr_scheduler.warmup_steps=200"}) ==
        "override 'lr_scheduler.warmup_steps=200': lr_scheduler.warmup_steps: 200 is more than the 100 steps of the run\n"
        "       try 10 or less");
  CHECK(error_with({"eval.stride=65"}) ==
        "override 'eval.stride=65': eval.stride: 65 is longer than eval.context 64: tokens between windows would not be "
        "counted\n       try 64 (no overlap) or 32 (half)");
  CHECK(error_with({"parallelism.data=0"}) ==
        "override 'parallelism.data=0': parallelism.data: found 0, expected -1 or a number of ranks\n"
        "       try data: -1");
  CHECK(error_with({"model.position=learned", "model.max_positions=32"}) ==
        "exp.yaml:2:20: data.context: 64 is more than the 32 learned positions (model.max_positions)\n"
        "       try model.max_positions=64");
  CHECK(contains(error_with({"model.type=classifier"}), "model.type: found classifier, but data.type tokens needs a language_model"));
  CHECK(contains(error_with({"model.layers=[attention, attention, attention, attention, attention]"}),
                 "a pattern of 5 layers does not fit into n_layers 4"));
}

TEST_CASE("config: a missing data file names where it was looked for") {
  const Config c = small({"data.path=no/such.h5"});
  CHECK(error_of([&] { find_data_file(c); }) ==
        "override 'data.path=no/such.h5': data.path: no such file: no/such.h5 (from " +
            std::filesystem::current_path().string() + ")\n"
        "       try krait data prepare TEXT -o no/such.h5, or another data.path");
  const std::string images = "data: {type: image_sequence, path: no/such}\nmodel: {type: classifier, d_model: 8, n_layers: 1, layers: [lstm]}\n"
                             "train: {steps: 1}\n";
  CHECK(contains(error_of([&] { find_data_file(parse_config(images, "exp.yaml")); }), "\n       try krait data fetch mnist, or another data.path"));
}

TEST_CASE("yaml: what is not one plain document is refused") {
  CHECK(error_in("a: 1\na: 2\n") == "exp.yaml:2:1: duplicate key 'a'; it was first given at line 1");
  CHECK(error_in("a: {b: 1,\n    b: 2}\n") == "exp.yaml:2:5: duplicate key 'b'; it was first given at line 1");
  CHECK(contains(error_in("a: 1\n---\nb: 2\n"), "a second YAML document begins here; a config is one document"));
  CHECK(contains(error_in("a: [1, 2\n"), "exp.yaml:2:1: not valid YAML: "));
  CHECK(contains(error_in("a: *nothing\n"), "not valid YAML: "));
  for (const char* text : {"a:\n  b: 1\n\tc: 2\n", "a:\n  d: {e: 1,\n  f: 2}\n\tc: 2\n  g: 3\n"}) {
    const std::string error = error_in(text);
    INFO(error);
    CHECK(contains(error, ":1: not valid YAML: a tab in front; indent with spaces"));
  }
  CHECK(error_in("a:\r\n  b:\t[1, 2,\r\n# x\r\n\t3]\r\n  c: 4\r\na: 1\r\n") == "exp.yaml:6:1: duplicate key 'a'; it was first given at line 1");
  CHECK(error_in("a: !!int 5\n") == "exp.yaml:1:4: found tag tag:yaml.org,2002:int, expected a plain value");
  CHECK(error_in("[a, b]: 1\n") == "exp.yaml:1:1: a key must be a plain word");
  CHECK(error_in("name: \"a\xC3(\"\n") == "exp.yaml: byte 8: 0xC3 is not UTF-8");
  CHECK(contains(error_in("- 1\n"), "found a list, expected a map"));
  CHECK(contains(error_of([] { read_yaml_file("/no/such.yaml"); }), "/no/such.yaml: cannot be read: No such file"));
  CHECK(error_of([] { read_yaml_file("/tmp"); }) == "/tmp: is a directory, expected a YAML file");
  CHECK(contains(error_of([] { read_yaml_file("/proc/self/exe"); }), "expected a YAML config"));
}

TEST_CASE("yaml: aliases that double at every line are refused, not expanded") {
  std::string bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 12; ++i) {
    bomb += fmt::format("a{0}: &a{0} [*a{1}, *a{1}, *a{1}, *a{1}, *a{1}, *a{1}, *a{1}, *a{1}, *a{1}, *a{1}]\n", i, i - 1);
  }
  CHECK(contains(error_in(bomb), "more than 100000 values: not a config"));
  CHECK(contains(error_in(std::string(100'000, '[')), "exp.yaml:"));
}

TEST_CASE("yaml: text with every kind of character writes and reads to itself") {
  for (const std::string text : {"", "a: b", "# no", "\"q\"", "'", "back\\slash", "line\nline", "tab\t", "null", "true",
                                 "1e3", "~", "-", "---", "...", " lead", "trail ", "é 漢", "\x01", "{", "a,b", "*x", "&y", "%", "@"}) {
    ConfigNode map = ConfigNode::map();
    map.set("k", ConfigNode::of(text));
    ConfigNode list = ConfigNode::list();
    list.append(ConfigNode::of(text));
    map.set("l", list);
    const ConfigNode again = parse_yaml(to_yaml(map), "t");
    INFO(to_yaml(map));
    REQUIRE(again.find("k"));
    CHECK(again.find("k")->is_scalar());
    CHECK(again.find("k")->text() == text);
    CHECK(again.find("l")->items().at(0).text() == text);
  }
}
