// Every config that is shipped: each can be read, and each family's language model and classifier trains, evaluates
// and generates for a few steps.
#include <set>

#include "tests/train/workplace.h"
#include "train/ablation.h"
#include "train/config.h"
#include "train/yaml.h"

using namespace krait;
using namespace krait::testing;
using nlohmann::json;
namespace fs = std::filesystem;

namespace {

std::vector<std::string> yaml_files(const std::string& directory) {
  std::vector<std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(std::string(KRAIT_TEST_SOURCE_DIR "/") + directory))
    if (entry.path().extension() == ".yaml") files.push_back(entry.path().string());
  std::sort(files.begin(), files.end());
  REQUIRE_FALSE(files.empty());
  return files;
}

bool is_ablation(const std::string& file) { return train::read_yaml_file(file).find("vary") != nullptr; }

/// A token store of two splits of the same little text.
std::string token_store(const TemporaryDirectory& tmp) {
  write_text(tmp / "text.txt", sample_text(120));
  const Outcome out = krait_command(
      fmt::format("data prepare {} -o {} --tokenizer char --valid 0.1 -q", tmp / "text.txt", tmp / "tokens.h5"));
  INFO(out.err);
  REQUIRE(out.status == 0);
  return tmp / "tokens.h5";
}

double nll_of(const std::string& run, const std::string& options) {
  const Outcome out = krait_command(fmt::format("eval {} --json {}", run, options));
  INFO(out.err);
  REQUIRE(out.status == 0);
  return json::parse(out.out)["nll"];
}

}  // namespace

TEST_CASE("every config and every ablation that is shipped can be read") {
  for (const std::string& file : yaml_files("configs")) {
    INFO(file);
    if (is_ablation(file)) {
      CHECK_FALSE(train::load_ablation(file).variants.empty());
    } else {
      // What asks for a GPU is read on any machine.
      const std::string text = train::read_file(file);
      CHECK_FALSE(train::load_config(file, {"runtime.device=cpu"}).model.layers.empty());
    }
  }
}

TEST_CASE("every family's language model trains, evaluates, streams and generates") {
  const TemporaryDirectory tmp;
  const std::string store = token_store(tmp);
  for (const std::string& file : yaml_files("configs/lm")) {
    INFO(file);
    const std::string run = tmp / fs::path(file).stem().string();
    const Outcome trained = krait_command(fmt::format(
        "train {} --run-dir {} runtime.device=cpu data.path={} data.context=24 train.steps=3 train.micro_batch_size=2 "
        "lr_scheduler.warmup_steps=1 eval.interval=0 checkpoint.interval=0 logging.interval=1 logging.tensorboard=false",
        file, run, store));
    INFO(trained.out << trained.err);
    REQUIRE(trained.status == 0);
    const Outcome text = krait_command(fmt::format("generate {} --prompt 'the ' --max-tokens 12 --seed 7", run));
    INFO(text.err);
    CHECK(text.status == 0);
    CHECK(text.out.size() == 4 + 12 + 1);

    const train::Config config = train::load_config(file, {"runtime.device=cpu"});
    const std::set<std::string> kinds(config.model.layers.begin(), config.model.layers.end());
    if (kinds.count("attention")) {  // its cache would grow with the text
      const Outcome refused = krait_command(fmt::format("eval {} data.state=carry", run));
      CHECK(refused.status == 2);
      CHECK(contains(refused.err, "layer attention has no state of constant size to carry"));
      continue;
    }
    // Streaming in odd pieces is the same as one long window.
    const double whole = nll_of(run, "eval.context=250 eval.stride=250 eval.micro_batch_size=1 eval.max_tokens=250");
    const double streamed = nll_of(run, "data.state=carry eval.context=37 eval.stride=37 eval.micro_batch_size=1 eval.max_tokens=250");
    CHECK(streamed == Approx(whole).epsilon(2e-4));
  }
}

TEST_CASE("every family's classifier trains and evaluates") {
  const TemporaryDirectory tmp;
  for (const std::string& file : yaml_files("configs/classifier")) {
    INFO(file);
    const Outcome out = krait_command(fmt::format(
        "train {} --run-dir {} runtime.device=cpu data.context=40 data.min_length=5 data.max_length=40 data.valid_examples=20 "
        "train.steps=3 train.micro_batch_size=4 lr_scheduler.warmup_steps=1 eval.interval=0 eval.micro_batch_size=10 "
        "logging.interval=1 logging.tensorboard=false",
        file, tmp / fs::path(file).stem().string()));
    INFO(out.out << out.err);
    CHECK(out.status == 0);
    CHECK(contains(out.out, "accuracy"));
  }
}

TEST_CASE("state carried from window to window: a resumed run equals one that was never stopped") {
  const TemporaryDirectory tmp;
  const std::string store = token_store(tmp);
  const std::string config = std::string(KRAIT_TEST_SOURCE_DIR) + "/configs/lm/mamba.yaml";
  const std::string options = fmt::format(
      "runtime.device=cpu data.path={} data.context=16 data.state=carry model.n_layers=2 train.steps=20 train.micro_batch_size=3 "
      "lr_scheduler.warmup_steps=1 eval.interval=10 checkpoint.interval=10 checkpoint.keep_latest=3 logging.interval=1 logging.tensorboard=false",
      store);
  REQUIRE(krait_command(fmt::format("train {} --run-dir {} {}", config, tmp / "a", options)).status == 0);
  REQUIRE(krait_command(fmt::format("train {} --run-dir {} {}", config, tmp / "b", options)).status == 0);
  fs::remove_all(tmp / "b/checkpoints/step-00000020");
  const Outcome resumed = krait_command(fmt::format("train {} --run-dir {} {} --resume", config, tmp / "b", options));
  INFO(resumed.out << resumed.err);
  REQUIRE(resumed.status == 0);
  CHECK(contains(resumed.out, "resumed after step 10"));
  CHECK(losses(tmp / "b") == losses(tmp / "a"));
  // It is the carried state that makes the difference.
  std::string fresh = options;
  fresh.replace(fresh.find("data.state=carry"), 16, "data.state=reset");
  REQUIRE(krait_command(fmt::format("train {} --run-dir {} {}", config, tmp / "c", fresh)).status == 0);
  CHECK(losses(tmp / "c") != losses(tmp / "a"));
}

TEST_CASE("a KAN's grids follow the data and are refined, weak edges go; a resumed run equals one that was never stopped") {
  const TemporaryDirectory tmp;
  const std::string config = std::string(KRAIT_TEST_SOURCE_DIR) + "/configs/kan_function.yaml";
  const std::string options =
      "train.steps=60 train.micro_batch_size=200 checkpoint.interval=15 eval.interval=15 lr_scheduler.warmup_steps=5 logging.interval=1 "
      "'model.kan.grid_schedule=[[0, 3], [20, 5], [40, 10]]' model.kan.grid_update.until=15 model.kan.prune.step=35 "
      "model.kan.prune.edge=0.05";
  const Outcome trained = krait_command(fmt::format("train {} --run-dir {} {}", config, tmp / "a", options));
  INFO(trained.out << trained.err);
  REQUIRE(trained.status == 0);
  CHECK(contains(trained.out, "of 15 edges and"));
  const auto whole = losses(tmp / "a");
  for (const char* last : {"15", "30", "45"}) {  // before, between and after the refinements
    const std::string run = tmp / (std::string("b") + last);
    fs::copy(tmp / "a", run, fs::copy_options::recursive | fs::copy_options::copy_symlinks);
    for (const auto& entry : fs::directory_iterator(run + "/checkpoints"))
      if (entry.path().filename().string() > fmt::format("step-000000{}", last)) fs::remove_all(entry.path());
    const Outcome resumed = krait_command(fmt::format("train {} --run-dir {} {} --resume", config, run, options));
    INFO(resumed.out << resumed.err);
    REQUIRE(resumed.status == 0);
    CHECK(contains(resumed.out, fmt::format("resumed after step {}", last)));
    CHECK(losses(run) == whole);
  }
  const json eval = json::parse(krait_command("eval " + (tmp / "a") + " --json").out);
  CHECK(eval["rmse"].get<double>() < 1.0);
}
