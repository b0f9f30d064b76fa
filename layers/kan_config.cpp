#include "layers/kan_config.h"

#include <charconv>

namespace krait::layers {

namespace {

int64_t integer_of(const ConfigNode& node, int64_t low, const char* what) {
  int64_t value = 0;
  const std::string text = node.is_scalar() ? node.text() : "";
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value < low || value > (1 << 30))
    node.fail(fmt::format("found {}, expected {} >= {}", node.describe(), what, low));
  return value;
}

// A list of [step, grid] with ascending steps.
std::vector<std::pair<int64_t, int64_t>> read_schedule(const ConfigNode& node) {
  std::vector<std::pair<int64_t, int64_t>> schedule;
  const std::string expected = "a list of [step, grid], such as [[0, 3], [1000, 5]]";
  if (!node.is_list()) node.fail(fmt::format("found {}, expected {}", node.describe(), expected));
  for (const ConfigNode& item : node.items()) {
    if (!item.is_list() || item.items().size() != 2)
      item.fail(fmt::format("found {}, expected {}", item.describe(), expected));
    const int64_t step = integer_of(item.items()[0], 0, "a step"), grid = integer_of(item.items()[1], 1, "a grid");
    if (!schedule.empty() && step <= schedule.back().first)
      item.fail(fmt::format("step {} does not come after step {}", step, schedule.back().first));
    schedule.emplace_back(step, grid);
  }
  return schedule;
}

}  // namespace

int64_t KanNetworkConfig::grid_at(int64_t step) const {
  int64_t now = grid;
  for (const auto& [from, intervals] : grid_schedule)
    if (step >= from) now = intervals;
  return now;
}

void read_kan_options(OptionReader& options, KanOptions& c) {
  options.read("grid", c.grid, between(1, 100'000));
  options.read("order", c.order, between(0, 15));
  options.read("range", c.range);
  if (!(c.range[0] < c.range[1]))
    options.fail("range", fmt::format("{} is not below {}", c.range[0], c.range[1]), "[-1, 1]");
  options.choice("init", c.init, {"krait", "paper", "pykan", "efficient"});
  options.read("base", c.base);
}

KanNetworkConfig read_kan_network_config(ConfigNode& section) {
  KanNetworkConfig c;
  OptionReader options(section);
  std::vector<std::string> widths;
  options.read("widths", widths);
  for (const ConfigNode& item : section.find("widths")->items()) c.widths.push_back(integer_of(item, 1, "a width"));
  if (const ConfigNode* schedule = options.find_section("grid_schedule")) c.grid_schedule = read_schedule(*schedule);
  const bool starts_there = !c.grid_schedule.empty() && c.grid_schedule.front().first == 0;
  if (starts_there && !options.given("grid")) c.grid = c.grid_schedule.front().second;
  read_kan_options(options, c);
  options.read("masked", c.masked);
  options.read("grid_eps", c.grid_eps, between(0, 1));
  {
    OptionReader own(options.section("regularization"));
    own.read("lambda", c.regularization.lambda, at_least(0));
    own.read("l1", c.regularization.l1, at_least(0));
    own.read("entropy", c.regularization.entropy, at_least(0));
    own.choice("reg", c.regularization.reg, {"activations", "weights"});
    own.finish();
  }
  {
    OptionReader own(options.section("grid_update"));
    own.read("interval", c.grid_update.interval, at_least(0));
    own.read("until", c.grid_update.until, at_least(0));
    own.finish();
  }
  {
    OptionReader own(options.section("prune"));
    own.read("step", c.prune.step, at_least(0));
    own.read("node", c.prune.node, at_least(0));
    own.read("edge", c.prune.edge, at_least(0));
    own.finish();
  }
  options.finish();
  return c;
}

}  // namespace krait::layers
