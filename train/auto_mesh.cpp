#include "train/auto_mesh.h"

#include <algorithm>
#include <set>
#include <sstream>

#include "core/comm/job.h"
#include "train/agreement.h"
#include "train/parallelism.h"
#include "train/progress.h"
#include "train/session.h"

namespace krait::train {
namespace {

constexpr double kAsFast = 0.005;  // predictions closer than this are the same
constexpr int64_t kMostPieces = 64;  // of a sequence

// "file.yaml:3:5: key: message\n  try ..." -> "key: message"
std::string reason_of(const std::exception& e) {
  std::string text = e.what();
  text = text.substr(0, text.find('\n'));
  const size_t place = text.find(": ");
  const bool has_place = place != std::string::npos && text.find_first_of(":'") < place;
  return has_place ? text.substr(place + 2) : text;
}

std::vector<int64_t> divisors(int64_t n, int64_t most) {
  std::vector<int64_t> all;
  for (int64_t d = 1; d <= std::min(n, most); ++d)
    if (n % d == 0) all.push_back(d);
  return all;
}

std::vector<int64_t> zero_levels(const Config& config, int64_t replicas, bool adapts) {
  if (replicas == 1 || config.runtime.strict || adapts) return {0};
  if (config.train.recompute != "block") return {0, 1, 2};
  return {0, 1, 2, 3};
}

bool better(const MeshCandidate& a, const MeshCandidate& b) {
  if (a.refusal.empty() != b.refusal.empty()) return a.refusal.empty();
  if (!a.refusal.empty()) return false;
  if (a.fits != b.fits) return a.fits;
  return a.fits ? a.tokens_per_s > b.tokens_per_s : a.gib < b.gib;
}

int64_t pieces(const MeshCandidate& c) { return c.mesh.tensor * c.mesh.sequence; }

// Of those as fast as the first, the one that splits least goes to the front.
void prefer_simple(std::vector<MeshCandidate>& all) {
  if (all.empty() || !all.front().fits) return;
  const double fastest = all.front().tokens_per_s;
  auto best = all.begin();
  for (auto it = all.begin(); it != all.end() && it->fits && it->tokens_per_s >= (1 - kAsFast) * fastest; ++it)
    if (std::pair(pieces(*it), it->mesh.zero) < std::pair(pieces(*best), best->mesh.zero)) best = it;
  std::rotate(all.begin(), best, best + 1);
}

}  // namespace

MeshChoice choose_mesh(const Config& config, const Launch& launch, const Machine& machine) {
  MeshChoice choice;
  const int64_t ranks = launch.world_size;
  if (is_kan_network(config)) {  // too small to plan, or to split
    MeshCandidate only;
    only.mesh = config.parallelism;
    only.mesh.automatic = false;
    only.mesh.data = ranks;
    only.fits = true;
    choice.candidates.push_back(only);
    return choice;
  }
  Planner planner(config, machine);
  for (const int64_t tensor : divisors(ranks, machine.gpus_per_node))
    for (const int64_t sequence : divisors(ranks / tensor, kMostPieces))
      for (const int64_t zero : zero_levels(config, ranks / tensor, planner.model().adapts())) {
        MeshCandidate c;
        c.mesh = config.parallelism;
        c.mesh.automatic = false;
        c.mesh.data = ranks / tensor / sequence;
        c.mesh.sequence = sequence;
        c.mesh.tensor = tensor;
        c.mesh.zero = zero;
        c.mesh.default_zero = false;
        try {
          Config trained = config;
          trained.parallelism = c.mesh;
          fit_to_ranks(trained, launch);
          const Plan plan = planner.plan(c.mesh, ranks);
          c.gib = Planner::needed_gib(plan);
          c.fits = c.gib <= (1 - MeshChoice::kReserve) * machine.memory_gb;
          c.step_seconds = plan.step_seconds;
          c.tokens_per_s = plan.tokens_per_s;
          for (const PlannedTraffic& t : plan.traffic) c.exposed_seconds += t.exposed_seconds;
        } catch (const Error& e) {
          c.refusal = reason_of(e);
        }
        const bool refused = !c.refusal.empty();
        choice.candidates.push_back(std::move(c));
        if (refused) break;  // at every ZeRO level
      }
  std::stable_sort(choice.candidates.begin(), choice.candidates.end(), better);
  prefer_simple(choice.candidates);
  return choice;
}

std::string explain(const MeshChoice& choice, const Config& config, const Machine& machine) {
  std::string out = fmt::format("parallelism: auto, on {} with {:.1f} GiB for each rank ({:.0f} % kept free); as krait plan predicts\n",
                                machine.name, machine.memory_gb, 100 * MeshChoice::kReserve);
  if (is_kan_network(config)) return out + "  a network of KAN layers is too small to split: data ranks alone\n";
  out += fmt::format("  {:>6} {:>8} {:>6} {:>4} {:>10} {:>10} {:>10}\n", "data", "sequence", "tensor", "zero", "memory", "step", "tokens/s");
  std::set<std::pair<int64_t, int64_t>> shown;  // of a mesh that is not chosen one level of ZeRO is enough
  const MeshCandidate& best = choice.candidates.front();
  for (const MeshCandidate& c : choice.candidates) {
    const ParallelismConfig& m = c.mesh;
    const bool first = shown.insert({m.sequence, m.tensor}).second;
    const bool of_best = m.sequence == best.mesh.sequence && m.tensor == best.mesh.tensor;
    if (!first && !of_best) continue;
    if (!c.refusal.empty()) {
      out += fmt::format("  {:>6} {:>8} {:>6} {:>4} {}\n", m.data, m.sequence, m.tensor, "", c.refusal);
      continue;
    }
    std::string verdict;
    const double slower = 100 * (1 - c.tokens_per_s / best.tokens_per_s);
    if (!c.fits) verdict = fmt::format("does not fit: {:.1f} GiB too much", c.gib - (1 - MeshChoice::kReserve) * machine.memory_gb);
    else if (&c == &best) verdict = "chosen: the fastest that fits";
    else if (slower < 100 * kAsFast) verdict = "as fast, but splits more";
    else verdict = fmt::format("{:.1f} % slower, {:.2f} ms of a step wait for other ranks", slower, 1e3 * c.exposed_seconds);
    out += fmt::format("  {:>6} {:>8} {:>6} {:>4} {:>6.2f} GiB {:>7.2f} ms {:>10} {}\n", m.data, m.sequence, m.tensor, m.zero, c.gib,
                       1e3 * c.step_seconds, human_count(c.tokens_per_s), verdict);
  }
  if (config.train.recompute != "block") out += "  zero 3 needs train.recompute: block\n";
  return out;
}

void use_mesh(Config& config, const ParallelismConfig& mesh) {
  config.parallelism = mesh;
  config.parallelism.automatic = false;
  OptionReader section(*config.tree.find("parallelism"));
  section.resolve("data", mesh.data);
  section.resolve("sequence", mesh.sequence);
  section.resolve("tensor", mesh.tensor);
  section.resolve("zero", mesh.zero);
}

void settle_mesh(Config& config, const Launch& launch, comm::ProcessGroup& world) {
  if (!config.parallelism.automatic) return;
  ParallelismConfig mesh = config.parallelism;
  std::string chosen;
  if (world.rank() == 0) {
    const Machine machine = this_machine(device_of(config.runtime), comm::local_size());
    const MeshChoice choice = choose_mesh(config, launch, machine);
    fmt::print("{}", explain(choice, config, machine));
    if (!choice.found()) {
      const bool refused = choice.candidates.front().gib == 0;
      config.fail("parallelism",
                  refused ? fmt::format("auto found no way to lay out {} ranks (see above)", launch.world_size)
                          : fmt::format("auto found no way to lay out {} ranks in {:.1f} GiB each: the smallest needs {:.1f}", launch.world_size,
                                        (1 - MeshChoice::kReserve) * machine.memory_gb, choice.candidates.front().gib),
                  refused ? "another number of ranks" : "a smaller train.micro_batch_size, train.recompute: block, or more ranks");
    }
    const ParallelismConfig& m = choice.mesh();
    chosen = fmt::format("{} {} {} {}", m.data, m.sequence, m.tensor, m.zero);
  }
  chosen = from_rank(world, 0, chosen);
  std::istringstream(chosen) >> mesh.data >> mesh.sequence >> mesh.tensor >> mesh.zero;
  use_mesh(config, mesh);
}

}  // namespace krait::train
