#include "train/ablation_report.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "core/device.h"
#include "train/build_info.h"
#include "train/config.h"
#include "train/run_directory.h"
#include "train/svg_plot.h"

namespace krait::train {

namespace {

std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? "\"\"" : std::string(1, c);
  return quoted + "\"";
}

std::string number(double value) { return fmt::format("{}", value); }

// Of a group: mean ± standard deviation of the finished seeds.
std::string mean_text(const GroupResult& g) {
  if (g.values.empty()) return "no finished run";
  return g.values.size() == 1 ? fmt::format("{:.4f}", g.mean()) : fmt::format("{:.4f} ± {:.4f}", g.mean(), g.deviation());
}

std::vector<const GroupResult*> best_first(const Ablation& a, const std::vector<GroupResult>& groups) {
  std::vector<const GroupResult*> order;
  for (const GroupResult& g : groups) order.push_back(&g);
  std::stable_sort(order.begin(), order.end(), [&](const GroupResult* x, const GroupResult* y) {
    if (x->values.empty() || y->values.empty()) return !x->values.empty() && y->values.empty();
    return a.higher_is_better() ? x->mean() > y->mean() : x->mean() < y->mean();
  });
  return order;
}

// Mean over the seeds of a group at every step that all of them evaluated, with the spread between them.
PlotLine curve_of(const Ablation& a, const std::vector<VariantResult>& results, const std::string& group) {
  PlotLine line{group, {}, {}, {}, {}};
  std::map<int64_t, std::vector<double>> at;
  size_t runs = 0;
  for (size_t i = 0; i < results.size(); ++i) {
    if (a.variants[i].group() != group || results[i].curve.empty()) continue;
    ++runs;
    for (const CurvePoint& p : results[i].curve) at[p.step].push_back(p.value);
  }
  for (const auto& [step, values] : at) {
    if (values.size() != runs) continue;
    GroupResult g;
    g.values = values;
    line.x.push_back(static_cast<double>(step));
    line.y.push_back(g.mean());
    line.low.push_back(*std::min_element(values.begin(), values.end()));
    line.high.push_back(*std::max_element(values.begin(), values.end()));
  }
  return line;
}

std::string claim_html(const Ablation& a, const std::vector<ClaimCheck>& checks) {
  if (!a.claim) return "";
  const bool holds = !checks.empty() && std::all_of(checks.begin(), checks.end(), [](const ClaimCheck& c) { return c.holds; });
  const bool fails = std::any_of(checks.begin(), checks.end(), [](const ClaimCheck& c) { return c.decided && !c.holds; });
  std::string html = fmt::format("<h2>Claim</h2><p>{} <b class=\"{}\">{}</b></p><ul>", html_escape(a.claim->text),
                                 holds ? "yes" : fails ? "no" : "", holds ? "Holds." : fails ? "Does not hold." : "Open.");
  for (const ClaimCheck& c : checks) html += "<li>" + html_escape(c.text) + "</li>";
  return html + "</ul>\n";
}

std::string table_html(const Ablation& a, const std::vector<GroupResult>& groups, const std::vector<VariantResult>& results) {
  std::string html = "<h2>Results</h2><table><tr>";
  for (const std::string& key : a.varied) html += "<th>" + html_escape(key) + "</th>";
  html += fmt::format("<th>{} ({})</th><th>seeds</th><th>parameters</th><th>time, s</th></tr>\n", a.metric, a.select);
  for (const GroupResult* g : best_first(a, groups)) {
    html += "<tr>";
    for (const auto& setting : g->settings) html += "<td>" + html_escape(setting.second) + "</td>";
    double parameters = 0, seconds = 0;
    for (size_t i = 0; i < results.size(); ++i) {
      if (a.variants[i].group() != g->group || !results[i].metric) continue;
      const auto& n = results[i].numbers;
      parameters = n.count("parameters") ? n.at("parameters") : 0;
      seconds += (n.count("wall_time_s") ? n.at("wall_time_s") : 0) / static_cast<double>(g->values.size());
    }
    html += fmt::format("<td>{}</td><td>{} of {}</td><td>{:.0f}</td><td>{:.1f}</td></tr>\n", mean_text(*g), g->values.size(),
                        g->runs, parameters, seconds);
  }
  return html + "</table>\n";
}

// What each variant changes in its base config, from the complete configs.
std::string differences_html(const Ablation& a) {
  std::string html = "<h2>Config differences</h2><dl>";
  std::set<std::string> done;
  for (const Variant& v : a.variants) {
    if (!done.insert(v.group()).second) continue;
    html += "<dt>" + html_escape(v.group()) + "</dt><dd>against " + html_escape(v.base) + ":<br>";
    for (const std::string& line : config_differences(load_config(v.base).tree, load_config(v.base, v.overrides).tree))
      if (line.rfind("seed:", 0) != 0) html += "<code>" + html_escape(line) + "</code><br>";
    html += "</dd>\n";
  }
  return html + "</dl>\n";
}

std::string failures_html(const Ablation& a, const std::vector<VariantResult>& results) {
  std::string items;
  for (size_t i = 0; i < results.size(); ++i)
    if (results[i].status != "finished")
      items += fmt::format("<li>{}: {} {}</li>", html_escape(a.variants[i].name), results[i].status, html_escape(results[i].error));
  return items.empty() ? "" : "<h2>Runs without a result</h2><ul>" + items + "</ul>\n";
}

constexpr const char* kStyle =
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}th,td{border:1px solid #ccc;padding:.3em .7em;text-align:left}"
    "th{background:#f3f3f3}.yes{color:#00734f}.no{color:#b03a00}code{background:#f6f6f6}dt{font-weight:bold;margin-top:.6em}";

}  // namespace

std::string results_csv(const Ablation& a, const std::vector<VariantResult>& results) {
  static const char* const kNumbers[] = {"steps", "final_loss", "parameters", "wall_time_s", "tokens_per_s", "peak_mem_bytes"};
  std::string csv = "run";
  for (const auto& setting : a.variants.front().settings) csv += "," + csv_field(setting.first);
  csv += fmt::format(",status,{}_{}", a.select, a.metric);
  for (const char* name : kNumbers) csv += std::string(",") + name;
  csv += ",run_dir,error\n";
  for (size_t i = 0; i < results.size(); ++i) {
    const VariantResult& r = results[i];
    csv += csv_field(a.variants[i].name);
    for (const auto& setting : a.variants[i].settings) csv += "," + csv_field(setting.second);
    csv += "," + r.status + "," + (r.metric ? number(*r.metric) : "");
    for (const char* name : kNumbers) csv += "," + (r.numbers.count(name) ? number(r.numbers.at(name)) : std::string());
    csv += "," + csv_field(r.run_dir) + "," + csv_field(r.error) + "\n";
  }
  return csv;
}

std::string results_table(const Ablation& a, const std::vector<GroupResult>& groups) {
  size_t width = 10;
  for (const GroupResult& g : groups) width = std::max(width, g.group.size());
  std::string text = fmt::format("{:<{}}  {} ({})\n", "variant", width, a.metric, a.select);
  for (const GroupResult* g : best_first(a, groups))
    text += fmt::format("{:<{}}  {}  ({} of {} runs)\n", g->group, width, mean_text(*g), g->values.size(), g->runs);
  return text;
}

std::string report_html(const Ablation& a, const std::vector<VariantResult>& results, const std::string& command) {
  const std::vector<GroupResult> groups = group_results(a, results);
  std::vector<PlotLine> curves;
  for (const GroupResult& g : groups) curves.push_back(curve_of(a, results, g.group));
  std::string html = fmt::format("<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{0}</title><style>{1}</style>\n<h1>{0}</h1>\n",
                                 html_escape(a.name), kStyle);
  html += claim_html(a, check_claim(a, groups));
  html += table_html(a, groups, results);
  html += "<h2>Learning curves</h2><p>Mean over seeds; the band spans the lowest and the highest seed.</p>\n" +
          svg_plot(curves, "step", a.metric);
  html += failures_html(a, results) + differences_html(a);
  html += fmt::format("<h2>Made by</h2><p><code>{}</code>, krait {} (git {}), {}.</p></html>\n", html_escape(command), kVersion,
                      git_revision(), html_escape(device_info(cuda_device_count() > 0 ? cuda_device() : kCpu).name));
  return html;
}

}  // namespace krait::train
