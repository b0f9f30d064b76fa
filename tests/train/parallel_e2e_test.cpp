// One rank = N ranks: whole runs under mpirun give the losses and parameters of one process.
#include "tests/train/parallel_runs.h"
#include "train/config.h"

using namespace krait;
using namespace krait::testing;
namespace fs = std::filesystem;

namespace {

std::string lm(const std::string& family) { return fmt::format("{}/configs/lm/{}.yaml", KRAIT_TEST_SOURCE_DIR, family); }

std::vector<std::string> families() {
  std::vector<std::string> all;
  for (const auto& entry : fs::directory_iterator(std::string(KRAIT_TEST_SOURCE_DIR) + "/configs/lm"))
    all.push_back(entry.path().stem().string());
  std::sort(all.begin(), all.end());
  return all;
}

/// What the runs of a test share: documents packed, dropout, clipping, several micro-batches in a step. eps keeps
/// Adam from turning the rounding of a gradient near zero into a step of full size.
std::string options(const std::string& store, const std::string& more = "") {
  return fmt::format("runtime.device=cpu data.path={} data.context=24 data.documents=pack model.dropout=0.1 train.steps=5 "
                     "train.micro_batch_size=2 train.tokens_per_step=192 lr_scheduler.warmup_steps=1 optimizer.eps=1e-3 "
                     "eval.interval=3 eval.micro_batch_size=2 eval.max_tokens=200 checkpoint.interval=0 logging.interval=1 "
                     "logging.tensorboard=false {}",
                     store, more);
}

void check_run(const std::string& config, const std::string& run, int ranks, const std::string& settings) {
  const Outcome out = train_on(ranks, fmt::format("{} --run-dir {} {}", config, run, settings));
  INFO(config << " on " << ranks << " ranks: " << settings << "\n" << out.out << out.err);
  REQUIRE(out.status == 0);
}

/// A mesh, and the families that have a form for it. Families are added here as they learn to be split.
struct MeshRow {
  std::string name;
  int ranks;
  std::string settings;
  std::vector<std::string> only;  // empty: every family
  double tolerance = 1e-5;
};
const std::vector<MeshRow>& mesh_table() {
  static const std::vector<MeshRow> table{
      {"data 2", 2, "data.context=23 train.tokens_per_step=184 eval.context=31 eval.stride=17", {}},
      {"data 4", 4, "", {"mamba2", "moe"}},
      {"tensor 2", 2, "parallelism.tensor=2", {}},
      {"sequence 2", 2, "parallelism.sequence=2", {}},
      {"sequence 4", 4, "parallelism.sequence=4", {"transformer", "slstm", "gru", "s4", "mamba", "moe"}},
      {"data 2 x sequence 2", 4, "parallelism.sequence=2 parallelism.data=2", {"transformer", "lstm", "s4d", "gated_cnn", "kan"}},
      {"tensor 2 x sequence 2", 4, "parallelism.tensor=2 parallelism.sequence=2", {}},
      {"data 2 x tensor 2, zero 1", 4, "parallelism.tensor=2 parallelism.zero=1", {"transformer"}},
      {"zero 1", 2, "parallelism.zero=1 parallelism.bucket_mb=0.05", {"transformer", "mamba2"}},
      {"zero 2", 2, "parallelism.zero=2 parallelism.bucket_mb=0.05", {"transformer", "moe"}},
      {"zero 3", 4, "parallelism.zero=3 parallelism.bucket_mb=0.05 train.recompute=block", {"transformer", "mamba2"}},
  };
  return table;
}

std::vector<std::string> of_row(const MeshRow& row) { return row.only.empty() ? families() : row.only; }

}  // namespace

TEST_CASE("every family on every mesh: losses and parameters are those of one process") {
  if (!has_mpi()) return;
  const TemporaryDirectory tmp;
  const std::string store = document_store(tmp);
  std::set<std::string> made;  // runs of one process, shared by the rows with the same settings
  for (const MeshRow& row : mesh_table())
    for (const std::string& family : of_row(row)) {
      INFO(family << ", " << row.name);
      const std::string bare = row.settings.substr(0, row.settings.find("parallelism."));
      const std::string one = tmp / fmt::format("{}-1{}", family, bare.empty() ? "" : "-odd"), many = tmp / "many";
      if (made.insert(one).second) check_run(lm(family), one, 1, options(store, bare));
      check_run(lm(family), many, row.ranks, options(store, row.settings));
      check_same_losses(one, many, row.tolerance);
      check_same_parameters(one, many, row.tolerance);
      fs::remove_all(many);
    }
}

TEST_CASE("deterministic: strict gives the same bits on 1, 2 and 4 ranks, also when resumed on others") {
  if (!has_mpi()) return;
  const TemporaryDirectory tmp;
  const std::string store = document_store(tmp);
  const std::string settings = options(store, "runtime.deterministic=strict checkpoint.interval=3 checkpoint.keep_latest=4");
  for (const char* family : {"transformer", "mamba2", "moe"}) {
    INFO(family);
    const auto run = [&](int ranks) { return tmp / fmt::format("{}-{}", family, ranks); };
    for (const int ranks : {1, 2, 4}) check_run(lm(family), run(ranks), ranks, settings);
    for (const int ranks : {2, 4}) {
      CHECK(losses(run(ranks)) == losses(run(1)));
      check_same_parameters(run(1), run(ranks), 0);
    }
    if (family != std::string("moe")) continue;
    for (const auto& [before, after] : {std::pair{2, 1}, {2, 4}, {4, 2}}) {
      const std::string resumed = tmp / fmt::format("{}-{}-{}", family, before, after);
      fs::copy(run(before), resumed, fs::copy_options::recursive | fs::copy_options::copy_symlinks);
      fs::remove_all(resumed + "/checkpoints/step-00000005");
      check_run(lm(family), resumed, after, settings + " --resume");
      CHECK(losses(resumed) == losses(run(1)));
      check_same_parameters(run(1), resumed, 0);
    }
  }
}

TEST_CASE("the state that rows carry on is kept per rank, and resumed on another number of ranks") {
  if (!has_mpi()) return;
  const TemporaryDirectory tmp;
  const std::string store = document_store(tmp);
  const std::string settings = options(store, "data.state=carry data.documents=ignore checkpoint.interval=3 checkpoint.keep_latest=4");
  check_run(lm("mamba"), tmp / "1", 1, settings + " train.micro_batch_size=4");
  check_run(lm("mamba"), tmp / "2", 2, settings + " train.micro_batch_size=2");
  check_same_losses(tmp / "1", tmp / "2", 1e-5);
  check_same_parameters(tmp / "1", tmp / "2", 1e-5);
  fs::remove_all(tmp / "2/checkpoints/step-00000005");
  fs::copy(tmp / "2", tmp / "3", fs::copy_options::recursive | fs::copy_options::copy_symlinks);
  check_run(lm("mamba"), tmp / "2", 1, settings + " train.micro_batch_size=4 --resume");
  check_same_losses(tmp / "1", tmp / "2", 1e-5);
  const Outcome refused = train_on(1, fmt::format("{} --run-dir {} {} train.micro_batch_size=2 --resume", lm("mamba"), tmp / "3", settings));
  CHECK(refused.status == 1);
  CHECK(contains(refused.err, "micro_batch_size x data ranks must stay what they were"));
}

TEST_CASE("sizes that do not fit the ranks are explained once, and nothing is written") {
  if (!has_mpi()) return;
  const TemporaryDirectory tmp;
  const std::string store = document_store(tmp);
  const std::vector<std::pair<std::string, std::string>> cases{
      {"parallelism.data=3", "data 3 x sequence 1 x tensor 1 = 3 ranks, but mpirun (Open MPI) started 2"},
      {"parallelism.tensor=4", "do not divide the job's: mpirun (Open MPI) started 2"},
      {"train.tokens_per_step=144", "144 is not a multiple of 96 (micro_batch_size 2 x context 24 x 2 data ranks)"},
      {"parallelism.sequence=2 data.context=25 train.tokens_per_step=50", "25 tokens cannot be cut into 2 equal pieces"},
      {"optimizer.weigth_decay=0.1", "unknown key; did you mean weight_decay?"}};
  for (const auto& [override, message] : cases) {
    const Outcome out = train_on(2, fmt::format("{} --run-dir {} {}", lm("transformer"), tmp / "never", options(store, override)));
    INFO(out.err);
    CHECK(out.status == 2);
    CHECK(contains(out.err, message));
    CHECK(out.err.find("error: ") == out.err.rfind("error: "));
    CHECK_FALSE(fs::exists(tmp / "never"));
  }
}
