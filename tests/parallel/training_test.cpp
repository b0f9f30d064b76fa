// One rank = N ranks: whole runs of every family on every kind of mesh give the losses and parameters of one process.
// The ranks of the program stand for jobs of one, two and four processes, several at a time, so that none must be started.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <sstream>

#include "tests/parallel/world.h"
#include "tests/train/parallel_runs.h"
#include "train/agreement.h"
#include "train/commands.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

/// A directory that all ranks see.
class SharedDirectory {
 public:
  SharedDirectory() {
    if (world()->rank() == 0) own_.emplace();
    path_ = train::from_rank(*world(), 0, own_ ? own_->path() : "");
  }
  ~SharedDirectory() { world()->barrier(); }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::optional<TemporaryDirectory>& owner() const { return own_; }

 private:
  std::optional<TemporaryDirectory> own_;
  std::string path_;
};

std::string shared_store(const SharedDirectory& tmp) {
  if (tmp.owner()) document_store(*tmp.owner());
  world()->barrier();
  return tmp / "docs.h5";
}

std::string config_of(const std::string& name) { return fmt::format("{}/configs/{}.yaml", KRAIT_TEST_SOURCE_DIR, name); }

std::vector<std::string> words(const std::string& text) {
  std::istringstream in(text);
  std::vector<std::string> all;
  for (std::string word; in >> word;) all.push_back(word);
  return all;
}

/// Standard output to nowhere: what runs print is not looked at here.
class Quiet {
 public:
  Quiet() : kept_(::dup(1)) {
    std::fflush(stdout);
    std::FILE* null = std::fopen("/dev/null", "w");
    ::dup2(::fileno(null), 1);
    std::fclose(null);
  }
  ~Quiet() {
    std::fflush(stdout);
    ::dup2(kept_, 1);
    ::close(kept_);
  }

 private:
  int kept_;
};

/// `krait train` by the processes of a group, as if they were a job.
void train_run(const comm::GroupPtr& job, const std::string& config, const std::string& run, const std::string& settings,
               bool resume = false) {
  INFO(config << " on " << job->size() << " ranks: " << settings);
  const Quiet quiet;
  const train::Launch launch{job->rank(), job->size(), job->rank(), job->size() == 1 ? "" : "mpirun (Open MPI)"};
  REQUIRE_NOTHROW(train::run_train({config_of(config), words(settings), run, resume}, launch, job));
  job->barrier();  // the first rank publishes the last checkpoint
}

/// Jobs of n ranks, as many as there is room for; null for a rank without one (n does not divide the ranks).
struct Jobs {
  explicit Jobs(int n) : count(world()->size() / n), own(world()->rank() / n) {
    job = n == 1 ? comm::single_group("world") : world()->split(own, "world");
  }
  /// f(item) for each, by one of the jobs.
  template <class Items, class F>
  void each(const Items& items, F f) const {
    for (size_t i = 0; i < items.size(); ++i)
      if (static_cast<int>(i) % count == own) f(items[i]);
    world()->barrier();
  }
  int count, own;
  comm::GroupPtr job;
};

std::vector<std::string> families() {
  std::vector<std::string> all;
  for (const auto& entry : fs::directory_iterator(std::string(KRAIT_TEST_SOURCE_DIR) + "/configs/lm"))
    all.push_back("lm/" + entry.path().stem().string());
  std::sort(all.begin(), all.end());
  return all;
}

// As few layers as show every kind of the config's pattern, and two of them.
int64_t layers_of(const std::string& family) { return family == "lm/hybrid" ? 4 : family == "lm/xlstm" ? 8 : 2; }

/// What the runs of a test share: documents packed, dropout, clipping, several micro-batches in a step. eps keeps
/// Adam from turning the rounding of a gradient near zero into a step of full size.
std::string options(const std::string& store, const std::string& family, const std::string& more = "") {
  return fmt::format("runtime.device=cpu data.path={} model.n_layers={} data.context=24 data.documents=pack model.dropout=0.1 "
                     "train.steps=5 train.micro_batch_size=2 train.tokens_per_step=192 lr_scheduler.warmup_steps=1 "
                     "optimizer.eps=1e-3 eval.interval=3 eval.micro_batch_size=2 eval.max_tokens=100 checkpoint.interval=0 "
                     "checkpoint.keep_best=false logging.interval=1 logging.tensorboard=false {}",
                     store, layers_of(family), more);
}

struct MeshRow {
  std::string name;
  int ranks;
  std::string settings;
  std::vector<std::string> only = {};  // empty: every family
  double losses = 1e-5, parameters = 1e-5;
};
const std::vector<MeshRow> kMeshes{
    {"data 2", 2, "data.context=23 train.tokens_per_step=184 eval.context=31 eval.stride=17 parallelism.zero=0"},
    {"data 4", 4, "", {"lm/mamba2", "lm/moe"}},
    {"tensor 2", 2, "parallelism.tensor=2"},
    {"sequence 2", 2, "parallelism.sequence=2"},
    {"sequence 4", 4, "parallelism.sequence=4", {"lm/transformer", "lm/slstm", "lm/gru", "lm/s4", "lm/mamba", "lm/moe"}},
    {"data 2 x sequence 2", 4, "parallelism.sequence=2 parallelism.data=2", {"lm/transformer", "lm/lstm", "lm/s4d", "lm/gated_cnn", "lm/kan"}},
    {"tensor 2 x sequence 2", 4, "parallelism.tensor=2 parallelism.sequence=2"},
    {"data 2 x tensor 2, zero 1", 4, "parallelism.tensor=2 parallelism.zero=1", {"lm/transformer", "lm/moe"}},
    {"zero 1", 2, "parallelism.zero=1 parallelism.bucket_mb=0.05", {"lm/transformer", "lm/mamba2"}},
    {"zero 2", 2, "parallelism.zero=2 parallelism.bucket_mb=0.05", {"lm/transformer", "lm/moe"}},
    {"zero 3", 4, "parallelism.zero=3 parallelism.bucket_mb=0.05 train.recompute=block", {"lm/transformer", "lm/mamba2"}},
    {"data 2, sums in bf16", 2, "parallelism.zero=0 parallelism.reduce_dtype=bfloat16 parallelism.bucket_mb=0.05", {"lm/transformer"}, 1e-4, 5e-3},
    {"zero 1, sums in bf16", 2, "parallelism.reduce_dtype=bfloat16 parallelism.zero=1 parallelism.bucket_mb=0.05", {"lm/mamba"}, 1e-4, 5e-3},
    {"zero 2, sums in bf16", 4, "parallelism.reduce_dtype=bfloat16 parallelism.zero=2 parallelism.multiprocessors=0", {"lm/transformer"}, 1e-4, 5e-3},
};

}  // namespace

TEST_CASE("every family on every mesh: losses, auxiliary losses and parameters are those of one process") {
  if (world()->size() != 4) return;
  const SharedDirectory tmp;
  const std::string store = shared_store(tmp);
  const Jobs ones(1), twos(2), fours(4);
  const auto bare = [](const MeshRow& row) { return row.settings.substr(0, row.settings.find("parallelism.")); };
  const auto one = [&](const std::string& family, const MeshRow& row) {
    return tmp / fmt::format("{}-1{}", family.substr(3), bare(row).empty() ? "" : "-odd");
  };
  std::vector<std::pair<std::string, const MeshRow*>> references;
  std::set<std::string> named;
  for (const MeshRow& row : kMeshes)
    for (const std::string& family : row.only.empty() ? families() : row.only)
      if (row.settings.find("recompute") == std::string::npos && named.insert(one(family, row)).second) references.push_back({family, &row});
  ones.each(references, [&](const auto& r) { train_run(ones.job, r.first, one(r.first, *r.second), options(store, r.first, bare(*r.second))); });

  for (const MeshRow& row : kMeshes) {
    const Jobs& jobs = row.ranks == 2 ? twos : fours;
    jobs.each(row.only.empty() ? families() : row.only, [&](const std::string& family) {
      INFO(family << ", " << row.name);
      const std::string many = tmp / fmt::format("many-{}", jobs.own);
      train_run(jobs.job, family, many, options(store, family, row.settings));
      if (jobs.job->rank() == 0) {
        check_same_losses(one(family, row), many, row.losses);
        check_same_parameters(one(family, row), many, row.parameters);
        fs::remove_all(many);
      }
      jobs.job->barrier();
    });
  }
}

TEST_CASE("deterministic: strict gives the same bits on 1, 2 and 4 ranks, also when resumed on others") {
  if (world()->size() != 4) return;
  const SharedDirectory tmp;
  const std::string store = shared_store(tmp);
  const std::vector<std::string> three{"lm/transformer", "lm/mamba2", "lm/moe"};
  const auto settings = [&](const std::string& family) {
    return options(store, family, "runtime.deterministic=strict checkpoint.interval=3 checkpoint.keep_latest=4");
  };
  const auto run = [&](const std::string& family, int ranks) { return tmp / fmt::format("{}-{}", family.substr(3), ranks); };
  std::map<int, Jobs> jobs;
  for (const int ranks : {1, 2, 4}) {
    jobs.emplace(ranks, ranks);
    jobs.at(ranks).each(three, [&](const std::string& f) { train_run(jobs.at(ranks).job, f, run(f, ranks), settings(f)); });
  }
  for (const std::string& family : three)
    for (const int ranks : {2, 4}) {
      INFO(family << " on " << ranks);
      CHECK(losses(run(family, ranks)) == losses(run(family, 1)));
      check_same_parameters(run(family, 1), run(family, ranks), 0);
    }
  world()->barrier();
  const std::string moe = "lm/moe";
  for (const auto& [before, after] : {std::pair{2, 1}, {2, 4}, {4, 2}}) {
    const std::string resumed = tmp / fmt::format("{}-{}", before, after);
    if (world()->rank() == 0) {
      fs::copy(run(moe, before), resumed, fs::copy_options::recursive | fs::copy_options::copy_symlinks);
      fs::remove_all(resumed + "/checkpoints/step-00000005");
    }
    world()->barrier();
    if (jobs.at(after).own == 0) train_run(jobs.at(after).job, moe, resumed, settings(moe), true);
    world()->barrier();
    CHECK(losses(resumed) == losses(run(moe, 1)));
    check_same_parameters(run(moe, 1), resumed, 0);
  }
}

TEST_CASE("the state that rows carry on goes with every axis, and is resumed on other data and sequence ranks") {
  const SharedDirectory tmp;
  const std::string store = shared_store(tmp);
  const auto settings = [&](const std::string& family, int64_t rows, const std::string& mesh) {
    return options(store, family, fmt::format("data.state=carry data.documents=ignore model.dropout=0 train.micro_batch_size={} "
                                              "checkpoint.interval=3 checkpoint.keep_latest=4 {}", rows, mesh));
  };
  struct Row {
    std::string family, mesh;
    int64_t rows;  // of a data rank
  };
  const std::vector<Row> of_two{{"lm/mamba", "parallelism.tensor=2", 4}, {"lm/mamba", "parallelism.sequence=2", 4},
                                {"lm/mamba2", "parallelism.sequence=2", 4}, {"lm/mlstm", "parallelism.tensor=2", 4},
                                {"lm/gated_cnn", "parallelism.sequence=2", 4}, {"lm/lstm", "parallelism.tensor=2", 4},
                                {"lm/s4d", "parallelism.tensor=2", 4}, {"lm/slstm", "parallelism.tensor=2", 4},
                                {"lm/lstm", "parallelism.sequence=2", 4}, {"lm/s4d", "parallelism.sequence=2", 4},
                                {"lm/slstm", "parallelism.sequence=2", 4}};
  const std::vector<Row> of_four{{"lm/mamba2", "parallelism.tensor=2 parallelism.sequence=2", 4},
                                 {"lm/mamba2", "parallelism.tensor=2 parallelism.data=2", 2},
                                 {"lm/linear_attention", "parallelism.data=2 parallelism.sequence=2", 2}};
  const std::vector<Row>& rows = world()->size() == 2 ? of_two : of_four;
  const Jobs ones(1), all(world()->size());
  for (const Row& row : rows) {
    INFO(row.family << " " << row.mesh);
    const std::string one = tmp / (row.family.substr(3) + "-1"), many = tmp / "many";
    if (ones.own == 0 && !fs::exists(one)) train_run(ones.job, row.family, one, settings(row.family, 4, ""));
    world()->barrier();
    train_run(all.job, row.family, many, settings(row.family, row.rows, row.mesh));
    check_same_losses(one, many, 1e-5);
    check_same_parameters(one, many, 1e-5);
    world()->barrier();
    if (world()->rank() == 0) fs::remove_all(many + "/checkpoints/step-00000005");
    world()->barrier();
    train_run(all.job, row.family, many, settings(row.family, row.rows, row.mesh), true);
    check_same_losses(one, many, 1e-5);
    if (row.mesh == "parallelism.sequence=2") {  // resumed on one rank
      world()->barrier();
      if (world()->rank() == 0) fs::remove_all(many + "/checkpoints/step-00000005");
      if (ones.own == 0) train_run(ones.job, row.family, many, settings(row.family, 4, ""), true);
      world()->barrier();
      check_same_losses(one, many, 1e-5);
    }
    world()->barrier();
    if (world()->rank() == 0) fs::remove_all(many);
    world()->barrier();
  }
}

TEST_CASE("a KAN is pruned and laid on new grids alike by several data ranks; its regularisation is one rank's") {
  const SharedDirectory tmp;
  // A grid update at steps 0, 2 and 4, pruning before step 5, a finer grid from step 6 on.
  const std::string settings =
      "runtime.device=cpu model.kan.grid_update.interval=2 model.kan.grid_update.until=6 model.kan.grid_schedule=[[0,3],[6,5]] "
      "model.kan.prune.step=5 model.kan.prune.edge=3e-2 model.kan.regularization.lambda=1e-3 train.steps=9 "
      "train.tokens_per_step=200 train.micro_batch_size=50 lr_scheduler.warmup_steps=1 eval.interval=4 eval.micro_batch_size=200 "
      "checkpoint.interval=0 logging.interval=1 data.train_examples=400";
  const Jobs ones(1), all(world()->size());
  if (ones.own == 0) train_run(ones.job, "kan_function", tmp / "one", settings);
  world()->barrier();
  train_run(all.job, "kan_function", tmp / "many", settings);
  for (const auto& line : metrics(tmp / "one"))
    if (!line.contains("split")) CHECK(line.contains("aux_loss"));
  check_same_losses(tmp / "one", tmp / "many", 1e-9);
  check_same_parameters(tmp / "one", tmp / "many", 1e-7);
}

}  // namespace krait
