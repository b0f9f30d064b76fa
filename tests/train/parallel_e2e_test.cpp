// Jobs of several processes as mpirun starts them. That they learn what one process learns: tests/parallel/training_test.
#include "tests/train/parallel_runs.h"
#include "train/config.h"

using namespace krait;
using namespace krait::testing;
namespace fs = std::filesystem;

namespace {

std::string lm(const std::string& family) { return fmt::format("{}/configs/lm/{}.yaml", KRAIT_TEST_SOURCE_DIR, family); }

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

}  // namespace

TEST_CASE("parallelism: auto explains its choice and leaves the mesh in the run's config") {
  if (!has_mpi()) return;
  const TemporaryDirectory tmp;
  const std::string store = document_store(tmp), settings = options(store);
  check_run(lm("transformer"), tmp / "1", 1, settings);
  const Outcome out = train_on(2, fmt::format("{} --run-dir {} {} parallelism=auto", lm("transformer"), tmp / "2", settings));
  INFO(out.out << out.err);
  REQUIRE(out.status == 0);
  CHECK(contains(out.out, "parallelism: auto, on cpu with"));
  CHECK(contains(out.out, "chosen: the fastest that fits"));
  check_same_losses(tmp / "1", tmp / "2", 1e-5);
  check_same_parameters(tmp / "1", tmp / "2", 1e-5);
  const train::Config config = train::load_config(tmp / "2/config.yaml");
  CHECK_FALSE(config.parallelism.automatic);
  CHECK(config.parallelism.data * config.parallelism.sequence * config.parallelism.tensor == 2);
  const Outcome none = train_on(2, fmt::format("{} --run-dir {} {} parallelism=auto train.micro_batch_size=4000000 train.tokens_per_step=96000000",
                                               lm("transformer"), tmp / "never", settings));
  CHECK(none.status == 2);
  CHECK(contains(none.err, "auto found no way to lay out 2 ranks in"));
  CHECK_FALSE(fs::exists(tmp / "never"));
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
  CHECK(contains(refused.err, "micro_batch_size x data ranks and parallelism.tensor must stay what they were"));
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
      {"data.state=carry data.documents=ignore model.layers=[s4]", "s4 trains with a carried state in its diagonal form alone"},
      {"data.state=carry data.documents=ignore model.layers=[mamba] model.mamba.d_conv=16 parallelism.sequence=2",
       "pieces of 12 tokens (parallelism.sequence 2) are shorter than the 15 before them"},
      {"runtime.deterministic=strict parallelism.reduce_dtype=bfloat16", "sums in bfloat16 depend on the number of ranks"},
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
