// Tasks other than text, as a user trains and evaluates them: classifiers, marked tokens, regressions.
#include "tests/train/workplace.h"

using namespace krait;
using namespace krait::testing;
using nlohmann::json;

namespace {

std::string config_of(const std::string& data, const std::string& model, const std::string& more = "") {
  return fmt::format(
      "name: task\nseed: 1\nruntime: {{device: cpu}}\ndata: {{{}}}\nmodel: {{{}, d_model: 32, n_layers: 2, "
      "mlp: {{type: swiglu}}}}\noptimizer: {{lr: 3e-3, weight_decay: 0.01}}\nlr_scheduler: {{warmup_steps: 10}}\n"
      "eval: {{micro_batch_size: 64}}\nlogging: {{interval: 50, tensorboard: false}}\n{}\n",
      data, model, more);
}

/// Trains, and evaluates the finished run on `split`.
json train_and_eval(const std::string& config, const std::string& split) {
  const TemporaryDirectory tmp;
  write_text(tmp / "task.yaml", config);
  const Outcome trained = krait_command(fmt::format("train {} --run-dir {}", tmp / "task.yaml", tmp / "run"));
  INFO(trained.out << trained.err);
  REQUIRE(trained.status == 0);
  const Outcome eval = krait_command(fmt::format("eval {} --split {} --json", tmp / "run", split));
  INFO(eval.err);
  REQUIRE(eval.status == 0);
  // What the run wrote about its last evaluation is what eval finds again.
  const json last = metrics(tmp / "run").back();
  const json again = json::parse(krait_command(fmt::format("eval {} --split valid --json", tmp / "run")).out);
  CHECK(again["nll"].get<double>() == Approx(last["nll"].get<double>()).epsilon(1e-6));
  return json::parse(eval.out);
}

}  // namespace

TEST_CASE("a classifier learns a formal language, with padded rows") {
  const json r = train_and_eval(config_of("type: formal_language, language: anbn, train_lengths: [2, 16], valid_examples: 200, test_examples: 200",
                                          "type: classifier, layers: [attention], attention: {n_heads: 2}",
                                          "train: {steps: 250, micro_batch_size: 32}"),
                                "test");
  CHECK(r["accuracy"].get<double>() > 0.9);
  CHECK(r["examples"].get<int64_t>() == 200);
}

TEST_CASE("a language model answers at marked positions") {
  const json r = train_and_eval(config_of("type: induction_heads, context: 8, vocab: 6, valid_examples: 200, test_examples: 200",
                                          "type: language_model, layers: [attention], attention: {n_heads: 2}",
                                          "train: {steps: 400, micro_batch_size: 32}"),
                                "test");
  CHECK(r["accuracy"].get<double>() > 0.6);  // guessing gives 0.2
}

TEST_CASE("a regressor learns the adding problem better than the mean") {
  const json r = train_and_eval(config_of("type: adding, context: 10, valid_examples: 200, test_examples: 200",
                                          "type: regressor, head: pooled, layers: [attention], attention: {n_heads: 2}",
                                          "train: {steps: 300, micro_batch_size: 32}"),
                                "test");
  CHECK(r["rmse"].get<double>() < 0.3);  // always saying 1 gives 0.41
}

TEST_CASE("what a task does not fit is refused with a way out") {
  const TemporaryDirectory tmp;
  const std::string model = "type: classifier, layers: [attention], attention: {n_heads: 2}";
  const auto error = [&](const std::string& data, const std::string& m, const std::string& more = "") {
    write_text(tmp / "task.yaml", config_of(data, m, "train: {steps: 50}\n" + more));
    const Outcome out = krait_command(fmt::format("train {} --run-dir {}", tmp / "task.yaml", tmp / "never"));
    CHECK(out.status == 2);
    CHECK_FALSE(std::filesystem::exists(tmp / "never"));
    return out.err;
  };
  CHECK(contains(error("type: listop", model), "try listops"));
  CHECK(contains(error("type: adding, context: 10", model), "data.type adding needs a regressor"));
  CHECK(contains(error("type: listops", model + ", n_classes: 7"), "found 7, but data.type listops has 10"));
  CHECK(contains(error("type: adding, documents: pack", model), "documents: unknown key"));
  CHECK(contains(error("type: image_sequence, dataset: mnist, path: nowhere", model), "no such file"));
  CHECK(contains(error("type: listops", model + ", position: learned"), "a classifier has no position embedding"));
  CHECK(contains(error("type: listops, split: valid", model), "data.split: found valid, but data.type listops trains on its split train"));
  write_text(tmp / "split.yaml", config_of("type: formal_language, language: parity, valid_examples: 8", "type: classifier, layers: [lstm]",
                                           "train: {steps: 2}"));
  const Outcome endless = krait_command(fmt::format("train {} --run-dir {} eval.split=train lr_scheduler.warmup_steps=1", tmp / "split.yaml", tmp / "run"));
  CHECK(endless.status == 2);
  CHECK(contains(endless.err, "eval.split: found train, expected valid or test"));
  REQUIRE(krait_command(fmt::format("train {} --run-dir {} lr_scheduler.warmup_steps=1", tmp / "split.yaml", tmp / "run")).status == 0);
  const Outcome eval = krait_command(fmt::format("eval {} --split train", tmp / "run"));
  CHECK(eval.status == 2);
  CHECK(contains(eval.err, "eval.split: found train, expected valid or test"));
}
