#include "train/ablation.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "core/option_reader.h"
#include "train/config.h"
#include "train/files.h"
#include "train/yaml.h"

namespace krait::train {

namespace fs = std::filesystem;

namespace {

// A value on one line, as it would be written after "key=".
std::string one_line(const ConfigNode& node) {
  if (node.is_scalar()) return node.quoted() ? nlohmann::json(node.text()).dump() : node.text();
  std::string text;
  if (node.is_list()) {
    for (const ConfigNode& item : node.items()) text += (text.empty() ? "" : ", ") + one_line(item);
    return "[" + text + "]";
  }
  for (const auto& [key, value] : node.entries()) text += (text.empty() ? "" : ", ") + key + ": " + one_line(value);
  return node.is_map() ? "{" + text + "}" : "null";
}

// "a.b: 1" and "a: {b: 1}" are the same setting.
void flatten(const ConfigNode& node, const std::string& path, std::vector<std::pair<std::string, const ConfigNode*>>& out) {
  for (const auto& [key, value] : node.entries()) {
    const std::string full = path.empty() ? key : path + "." + key;
    if (value.is_map())
      flatten(value, full, out);
    else
      out.emplace_back(full, &value);
  }
}

std::string last_part(const std::string& key) { return key.substr(key.rfind('.') + 1); }

// Fit for a directory's name.
std::string file_name_of(const std::string& value) {
  std::string out;
  for (const char c : value) {
    const bool plain = (std::isalnum(static_cast<unsigned char>(c)) != 0) || c == '.' || c == '_' || c == '+';
    if (plain) out += c;
    else if (!out.empty() && out.back() != '-') out += '-';
  }
  while (!out.empty() && out.back() == '-') out.pop_back();
  return out.empty() ? "none" : out.substr(0, 60);
}

struct Axis {
  std::string key, label;
  std::vector<std::string> values;
};

std::vector<Axis> read_axes(const OptionReader& options, const ConfigNode& vary) {
  std::vector<std::pair<std::string, const ConfigNode*>> entries;
  flatten(vary, "", entries);
  if (entries.empty()) options.fail("vary", "is required and missing", "vary: {seed: [1, 2, 3]}");
  std::vector<Axis> axes;
  for (const auto& [key, node] : entries) {
    if (!node->is_list() || node->items().empty())
      node->fail(fmt::format("found {}, expected a list of values to try", node->describe()), key + ": [1, 2]");
    Axis axis{key, last_part(key), {}};
    for (const ConfigNode& item : node->items()) {
      std::string value = one_line(item);
      if (std::find(axis.values.begin(), axis.values.end(), value) != axis.values.end())
        item.fail(fmt::format("{} is there twice", value));
      axis.values.push_back(std::move(value));
    }
    axes.push_back(std::move(axis));
  }
  for (Axis& axis : axes) {
    const auto same = std::count_if(axes.begin(), axes.end(), [&](const Axis& a) { return last_part(a.key) == last_part(axis.key); });
    if (same > 1) axis.label = axis.key;
  }
  return axes;
}

// What the values are called in the names of directories: 1 and -1 must not share one.
std::vector<std::string> value_names(const std::vector<std::string>& shown) {
  std::vector<std::string> names;
  for (const std::string& value : shown) {
    const std::string plain = file_name_of(value);
    std::string name = plain;
    for (int n = 2; std::find(names.begin(), names.end(), name) != names.end(); ++n) name = fmt::format("{}-{}", plain, n);
    names.push_back(std::move(name));
  }
  return names;
}

std::vector<Variant> grid_of(const std::vector<Axis>& axes, const std::string& base, const std::vector<std::string>& fixed) {
  std::vector<Variant> variants{{"", {}, base, fixed}};
  for (const Axis& axis : axes) {
    std::vector<std::string> shown = axis.values;
    if (axis.key == "base") {  // by its short name, where that is its own
      for (std::string& value : shown) value = fs::path(value).stem().string();
      if (std::set<std::string>(shown.begin(), shown.end()).size() < shown.size()) shown = axis.values;
    }
    const std::vector<std::string> names = value_names(shown);
    std::vector<Variant> longer;
    for (const Variant& v : variants) {
      for (size_t i = 0; i < shown.size(); ++i) {
        const std::string& value = axis.values[i];
        Variant next = v;
        next.name += (next.name.empty() ? "" : ",") + axis.label + "=" + names[i];
        next.settings.emplace_back(axis.key, shown[i]);
        if (axis.key == "base")
          next.base = value;
        else
          next.overrides.push_back(axis.key + "=" + value);
        longer.push_back(std::move(next));
      }
    }
    variants = std::move(longer);
  }
  return variants;
}

Claim read_claim(ConfigNode& section, const std::vector<Axis>& axes) {
  Claim claim;
  OptionReader options(section);
  for (const char* name : {"text", "key", "better", "than"}) options.require(name);
  options.read("text", claim.text);
  options.read("key", claim.key);
  options.read("better", claim.better);
  options.read("than", claim.than);
  options.read("margin", claim.margin, at_least(0));
  options.finish();
  const auto axis = std::find_if(axes.begin(), axes.end(), [&](const Axis& a) { return a.key == claim.key; });
  if (axis == axes.end()) options.fail("key", fmt::format("{} is not varied", claim.key));
  std::vector<std::string> named = claim.than;
  named.push_back(claim.better);
  for (const std::string& value : named)
    if (std::find(axis->values.begin(), axis->values.end(), value) == axis->values.end())
      options.fail("than", fmt::format("'{}' is not among the values of {}", value, claim.key), nearest_name(value, axis->values));
  return claim;
}

}  // namespace

std::string Variant::group() const {
  std::string text;
  for (const auto& [key, value] : settings)
    if (key != "seed") text += (text.empty() ? "" : ", ") + last_part(key) + "=" + value;
  return text.empty() ? "base" : text;
}

Ablation load_ablation(const std::string& file) {
  ConfigNode tree = read_yaml_file(file);
  Ablation a;
  OptionReader options(tree);
  a.name = fs::path(file).stem().string();
  options.read("name", a.name);
  std::string base;
  options.read("base", base);
  const ConfigNode& set = options.section("set");
  const ConfigNode& vary = options.section("vary");
  options.choice("metric", a.metric, {"nll", "ppl", "bpb", "accuracy", "rmse"});
  options.choice("select", a.select, {"final", "best"});
  ConfigNode* claim = options.find_section("claim");
  options.finish();
  // Config files stand relative to this one.
  const auto config_file = [&](const std::string& name) {
    const fs::path path = fs::path(name).is_relative() ? fs::path(file).parent_path() / name : fs::path(name);
    if (!fs::exists(path)) options.fail("base", fmt::format("no such file: {}", path.lexically_normal().string()));
    return path.lexically_normal().string();
  };

  std::vector<std::pair<std::string, const ConfigNode*>> fixed_entries;
  flatten(set, "", fixed_entries);
  std::vector<std::string> fixed;
  for (const auto& [key, node] : fixed_entries) fixed.push_back(key + "=" + one_line(*node));
  std::vector<Axis> axes = read_axes(options, vary);
  bool bases_vary = false;
  for (Axis& axis : axes) {
    if (axis.key != "seed") a.varied.push_back(axis.key);
    if (axis.key != "base") continue;
    bases_vary = true;
    for (std::string& value : axis.values) value = config_file(value);
  }
  if (base.empty() && !bases_vary) options.fail("base", "is required and missing (or vary.base)");
  a.variants = grid_of(axes, base.empty() ? "" : config_file(base), fixed);
  for (const Variant& v : a.variants) load_config(v.base, v.overrides);  // every config is right before anything runs
  if (claim) a.claim = read_claim(*claim, axes);
  return a;
}

VariantResult read_variant_result(const Ablation& ablation, const std::string& run_dir) {
  VariantResult r;
  r.run_dir = run_dir;
  const std::string summary_file = run_dir + "/summary.json";
  if (fs::exists(summary_file)) {
    const auto summary = nlohmann::json::parse(read_file(summary_file), nullptr, false);
    if (summary.is_object()) {
      r.status = summary.value("status", "failed");
      const auto& eval = summary[ablation.select == "best" ? "best_eval" : "final_eval"];
      // An interrupted run has no result yet.
      if (r.status == "finished" && eval.is_object() && eval.contains(ablation.metric) && eval[ablation.metric].is_number())
        r.metric = eval[ablation.metric].get<double>();
      for (const char* name : {"steps", "final_loss", "parameters", "wall_time_s", "tokens_per_s", "peak_mem_bytes"})
        if (summary.contains(name) && summary[name].is_number()) r.numbers[name] = summary[name].get<double>();
    }
  }
  std::ifstream lines(run_dir + "/metrics.jsonl");
  for (std::string line; std::getline(lines, line);) {
    const auto m = nlohmann::json::parse(line, nullptr, false);
    if (m.is_object() && m.contains("split") && m.contains(ablation.metric) && m[ablation.metric].is_number())
      r.curve.push_back({m["step"].get<int64_t>(), m[ablation.metric].get<double>()});
  }
  return r;
}

double GroupResult::mean() const {
  double sum = 0;
  for (const double v : values) sum += v;
  return values.empty() ? std::nan("") : sum / static_cast<double>(values.size());
}

double GroupResult::deviation() const {
  if (values.size() < 2) return 0;
  double sum = 0;
  for (const double v : values) sum += (v - mean()) * (v - mean());
  return std::sqrt(sum / static_cast<double>(values.size() - 1));
}

std::vector<GroupResult> group_results(const Ablation& ablation, const std::vector<VariantResult>& results) {
  std::vector<GroupResult> groups;
  for (size_t i = 0; i < results.size(); ++i) {
    const Variant& v = ablation.variants[i];
    auto at = std::find_if(groups.begin(), groups.end(), [&](const GroupResult& g) { return g.group == v.group(); });
    if (at == groups.end()) {
      GroupResult fresh;
      fresh.group = v.group();
      for (const auto& setting : v.settings)
        if (setting.first != "seed") fresh.settings.push_back(setting);
      at = groups.insert(groups.end(), std::move(fresh));
    }
    ++at->runs;
    if (results[i].metric) at->values.push_back(*results[i].metric);
  }
  return groups;
}

std::vector<ClaimCheck> check_claim(const Ablation& ablation, const std::vector<GroupResult>& groups) {
  std::vector<ClaimCheck> checks;
  if (!ablation.claim) return checks;
  const Claim& claim = *ablation.claim;
  // The settings of a group with the claim's key left out, and the value of that key.
  const auto split = [&](const GroupResult& g) {
    std::pair<std::string, std::string> rest_and_value;
    for (const auto& [key, value] : g.settings) {
      if (key == claim.key) rest_and_value.second = value;
      else rest_and_value.first += (rest_and_value.first.empty() ? "" : ", ") + last_part(key) + "=" + value;
    }
    return rest_and_value;
  };
  for (const GroupResult& good : groups) {
    const auto [rest, value] = split(good);
    if (value != claim.better) continue;
    for (const GroupResult& other : groups) {
      const auto [other_rest, other_value] = split(other);
      if (other_rest != rest || std::find(claim.than.begin(), claim.than.end(), other_value) == claim.than.end()) continue;
      const double gain = (good.mean() - other.mean()) * (ablation.higher_is_better() ? 1 : -1);
      ClaimCheck check;
      const auto results = static_cast<int64_t>(good.values.size() + other.values.size()), runs = good.runs + other.runs;
      check.decided = results == runs;
      check.holds = check.decided && gain >= claim.margin;
      const std::string verdict = !check.decided ? fmt::format("open, {} of {} runs have a result", results, runs)
                                  : check.holds  ? "holds"
                                                 : "does not hold";
      const std::string where = rest.empty() ? "" : rest + ": ";
      check.text = good.values.empty() || other.values.empty()
                       ? fmt::format("{}{} against {}: {}", where, value, other_value, verdict)
                       : fmt::format("{}{}: {:.4f} against {} {:.4f}: better by {:.4f}, {:.4f} needed: {}", where, value,
                                     good.mean(), other_value, other.mean(), gain, claim.margin, verdict);
      checks.push_back(std::move(check));
    }
  }
  return checks;
}

}  // namespace krait::train
