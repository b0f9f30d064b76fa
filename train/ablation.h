#pragma once
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/config_node.h"

namespace krait::train {

/// What an ablation claims of its result, in words and as a comparison that can fail:
///   claim: {text: "...", key: model.s4.init, better: legs, than: [random, random_diagonal], margin: 0.02}
/// For every setting of the other varied keys, the mean over seeds of `better` must beat that of each `than` by the
/// margin, in the metric's own units and direction.
struct Claim {
  std::string text, key, better;
  std::vector<std::string> than;
  double margin = 0;
};

/// One run of the grid.
struct Variant {
  std::string name;  // of its directory: "init=legs,freeze=A-B,seed=1"
  std::vector<std::pair<std::string, std::string>> settings;  // varied key -> value in YAML, in the file's order
  std::string base;                    // config file
  std::vector<std::string> overrides;  // what krait train is given: the fixed settings, then these
  /// The settings without the seed: runs that differ in the seed alone are put together.
  std::string group() const;
};

/// An ablation file: a base config, what varies, the metric, the claim.
///   name: hippo-smnist
///   base: smnist.yaml                   # relative to this file; or vary: {base: [a.yaml, b.yaml]}
///   set: {train.steps: 500}             # fixed changes to the base
///   vary: {model.s4.init: [legs, random], model.s4.freeze: [[], [A, B]], seed: [1, 2, 3]}
///   metric: accuracy                    # accuracy | nll | ppl | bpb | rmse
///   select: final                       # final | best evaluation of a run
///   claim: {...}
struct Ablation {
  std::string name, metric = "nll", select = "final";
  std::vector<std::string> varied;  // keys, in the file's order, without the seed
  std::vector<Variant> variants;
  std::optional<Claim> claim;
  bool higher_is_better() const { return metric == "accuracy"; }
};

/// Reads the file and checks every variant's config. ConfigError with the place of what is wrong.
Ablation load_ablation(const std::string& file);

/// One evaluation on a learning curve.
struct CurvePoint {
  int64_t step = 0;
  double value = 0;
};

/// What became of a variant.
struct VariantResult {
  std::string status = "not run";  // finished | failed | interrupted | not run
  std::string error;               // the last line of a failed run's log
  std::optional<double> metric;
  std::map<std::string, double> numbers;  // of summary.json: final_loss, steps, parameters, wall_time_s, ...
  std::vector<CurvePoint> curve;          // metric at each evaluation
  std::string run_dir, log;
};

/// Mean and spread of a group over its finished seeds.
struct GroupResult {
  std::string group;
  std::vector<std::pair<std::string, std::string>> settings;  // without the seed
  std::vector<double> values;
  int64_t runs = 0;  // asked for
  double mean() const;
  double deviation() const;  // sample standard deviation; 0 for one value
};
std::vector<GroupResult> group_results(const Ablation& ablation, const std::vector<VariantResult>& results);

/// One comparison of the claim: "freeze=[A, B]: legs: 0.981 against random 0.942: better by 0.039, 0.02 needed: holds".
struct ClaimCheck {
  std::string text;
  bool decided = false;  // once all of its runs have ended with a result
  bool holds = false;
};
std::vector<ClaimCheck> check_claim(const Ablation& ablation, const std::vector<GroupResult>& groups);

/// Reads what a run left: summary.json and the evaluations in metrics.jsonl.
VariantResult read_variant_result(const Ablation& ablation, const std::string& run_dir);

}  // namespace krait::train
