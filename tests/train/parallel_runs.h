#pragma once
#include <cmath>
#include <set>

#include "core/comm/job.h"
#include "tests/train/workplace.h"
#include "train/checkpoint.h"

// Whole runs of `krait train` under mpirun, and how two of them are compared.
namespace krait::testing {

inline bool has_mpi() { return comm::mpi_version() != "not in this build"; }

inline std::string mpirun(int ranks, const std::string& more = "") {
  return fmt::format("OMP_NUM_THREADS=1 mpirun --oversubscribe --allow-run-as-root --bind-to none -n {} {}", ranks, more);
}

/// On one rank the program itself.
inline Outcome train_on(int ranks, const std::string& arguments) {
  const TemporaryDirectory tmp;
  const int status = std::system(fmt::format("{} '{}' train {} > '{}' 2> '{}' < /dev/null", ranks > 1 ? mpirun(ranks) : "OMP_NUM_THREADS=1",
                                             krait_program(), arguments, tmp / "out", tmp / "err").c_str());
  REQUIRE(WIFEXITED(status));
  return {WEXITSTATUS(status), train::read_file(tmp / "out"), train::read_file(tmp / "err")};
}

/// A token store of uneven documents.
inline std::string document_store(const TemporaryDirectory& tmp) {
  std::string jsonl;
  const std::string text = sample_text(200);
  for (size_t at = 0, n = 10; at + n < text.size(); at += n, n = 5 + (at * 7) % 50)
    jsonl += nlohmann::json{{"text", text.substr(at, n)}}.dump() + "\n";
  write_text(tmp / "docs.jsonl", jsonl);
  const Outcome out = krait_command(fmt::format("data prepare {} -o {} --tokenizer char --valid 0.1 -q", tmp / "docs.jsonl", tmp / "docs.h5"));
  INFO(out.err);
  REQUIRE(out.status == 0);
  return tmp / "docs.h5";
}

/// Losses, norms and evaluations of every logged step.
inline void check_same_losses(const std::string& a, const std::string& b, double tolerance) {
  const auto x = metrics(a), y = metrics(b);
  REQUIRE(x.size() == y.size());
  for (size_t i = 0; i < x.size(); ++i)
    for (const char* key : {"step", "loss", "aux_loss", "grad_norm", "nll"}) {
      if (!x[i].contains(key)) continue;
      INFO(key << " at line " << i);
      CHECK(y[i].at(key).get<double>() == Approx(x[i].at(key).get<double>()).epsilon(tolerance));
    }
}

/// Every parameter of the last checkpoints; tolerance 0: every bit, of the optimizer's state too.
inline void check_same_parameters(const std::string& a, const std::string& b, double tolerance) {
  const auto last = [](const std::string& run) {
    const auto found = train::latest_checkpoint(run + "/checkpoints");
    REQUIRE(found);
    return train::CheckpointReader(found->path);
  };
  const train::CheckpointReader x = last(a), y = last(b);
  CHECK(x.step() == y.step());
  REQUIRE(x.names() == y.names());
  for (const std::string& name : x.names()) {
    if (tolerance > 0 && !name.starts_with("model.")) continue;
    const auto p = x.read(name).to_vector<double>(), q = y.read(name).to_vector<double>();
    REQUIRE(p.size() == q.size());
    double most = 0, difference = 0;
    for (size_t i = 0; i < p.size(); ++i) {
      most = std::max(most, std::abs(p[i]));
      difference = std::max(difference, std::abs(p[i] - q[i]));
    }
    INFO(name << ": differs by " << difference << " of " << most);
    CHECK(difference <= tolerance * most);
  }
}

}  // namespace krait::testing
