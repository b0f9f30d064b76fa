// The examples of the generated tasks against rules written a second time, and against known statistics.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "core/option_reader.h"
#include "data/formal_language.h"
#include "data/functions.h"
#include "data/pathfinder.h"
#include "data/task.h"
#include "tests/testing/catch.h"

using namespace krait;
using namespace krait::data;

namespace {

DatasetPtr train_set(const std::string& name, const std::map<std::string, std::string>& options, int64_t batch) {
  ConfigNode node = ConfigNode::map();
  for (const auto& [key, value] : options) node.set(key, ConfigNode::scalar(value));
  OptionReader reader(node);
  const TaskPtr task = make_task(name, reader);
  reader.finish();
  return task->split("train", batch, 11);
}

struct Row {
  std::vector<int64_t> tokens, targets;
};
std::vector<Row> rows_of(const Batch& batch) {
  const auto tokens = batch.tokens.to_vector<int64_t>();
  const auto targets = batch.targets.defined() ? batch.targets.to_vector<int64_t>() : std::vector<int64_t>(tokens.size(), kIgnore);
  const int64_t l = batch.tokens.size(1);
  std::vector<Row> rows;
  for (int64_t i = 0; i < batch.tokens.size(0); ++i)
    rows.push_back({{tokens.begin() + i * l, tokens.begin() + (i + 1) * l}, {targets.begin() + i * l, targets.begin() + (i + 1) * l}});
  return rows;
}

// The value of a ListOps sequence, with a stack of open lists.
int64_t list_value(const std::vector<int64_t>& tokens) {
  std::vector<std::vector<int64_t>> open{{}};
  std::vector<int64_t> operators;
  for (const int64_t token : tokens) {
    if (token >= 1 && token <= 10) {
      open.back().push_back(token - 1);
    } else if (token >= 11 && token <= 14) {
      operators.push_back(token);
      open.emplace_back();
    } else if (token == 15) {
      std::vector<int64_t> list = open.back();
      open.pop_back();
      std::sort(list.begin(), list.end());
      const size_t n = list.size();
      int64_t value = 0;
      if (operators.back() == 11) value = list[0];
      if (operators.back() == 12) value = list[n - 1];
      if (operators.back() == 13) value = static_cast<int64_t>(n % 2 ? static_cast<double>(list[n / 2]) : (list[n / 2 - 1] + list[n / 2]) / 2.0);
      if (operators.back() == 14) value = std::accumulate(list.begin(), list.end(), int64_t{0}) % 10;
      operators.pop_back();
      open.back().push_back(value);
    } else {
      break;  // the end
    }
  }
  return operators.empty() && open.size() == 1 && open[0].size() == 1 ? open[0][0] : -1;
}

}  // namespace

TEST_CASE("selective copying asks for the tokens in order and spreads them over all places") {
  std::vector<int> used(60, 0), tokens(8, 0);
  for (int64_t step = 0; step < 30; ++step)
    for (const Row& row : rows_of(train_set("selective_copying", {{"context", "64"}, {"n_tokens", "4"}, {"vocab", "8"}}, 32)->get(step))) {
      std::vector<int64_t> seen;
      for (size_t i = 0; i < 60; ++i) {
        REQUIRE((row.tokens[i] >= 0 && row.tokens[i] <= 6));
        REQUIRE(row.targets[i] == kIgnore);
        if (row.tokens[i] == 0) continue;
        seen.push_back(row.tokens[i]);
        ++used[i];
        ++tokens[static_cast<size_t>(row.tokens[i])];
      }
      REQUIRE(seen == std::vector<int64_t>(row.targets.begin() + 60, row.targets.end()));
      REQUIRE(std::all_of(row.tokens.begin() + 60, row.tokens.end(), [](int64_t t) { return t == 7; }));
    }
  // 960 rows of 4 tokens: 64 a place, 640 a token; five standard deviations.
  for (const int count : used) CHECK(std::abs(count - 64) < 40);
  for (size_t t = 1; t < 7; ++t) CHECK(std::abs(tokens[t] - 640) < 125);
}

TEST_CASE("induction heads and associative recall ask for what stood behind the same token before") {
  for (const Row& row : rows_of(train_set("induction_heads", {{"context", "30"}}, 64)->get(0))) {
    REQUIRE(row.tokens.back() == 15);
    const auto first = std::find(row.tokens.begin(), row.tokens.end(), 15);
    REQUIRE(first + 1 < row.tokens.end() - 1);
    REQUIRE(row.targets.back() == *(first + 1));
    REQUIRE(std::count(row.tokens.begin(), row.tokens.end(), 15) == 2);
    REQUIRE(std::count(row.targets.begin(), row.targets.end(), kIgnore) == 29);
  }
  for (const Row& row : rows_of(train_set("mqar", {{"context", "64"}, {"vocab", "256"}, {"n_pairs", "8"}}, 64)->get(0))) {
    std::map<int64_t, int64_t> pairs;
    for (size_t i = 0; i < 16; i += 2) {
      REQUIRE((row.tokens[i] >= 1 && row.tokens[i] < 128));
      REQUIRE((row.tokens[i + 1] >= 128 && row.tokens[i + 1] < 256));
      pairs[row.tokens[i]] = row.tokens[i + 1];
    }
    REQUIRE(pairs.size() == 8);
    std::set<int64_t> asked;
    for (size_t i = 0; i < 64; ++i) {
      if (row.targets[i] == kIgnore) continue;
      REQUIRE((i >= 16 && i % 2 == 0));
      REQUIRE(pairs.at(row.tokens[i]) == row.targets[i]);
      asked.insert(row.tokens[i]);
    }
    REQUIRE(asked.size() == 8);
  }
}

TEST_CASE("mqar asks soon after the pairs, with the weight x^(a - 1)") {
  // Gap x of 1..28 is asked for with about the weight 1/x: the first place far more often than the last.
  std::vector<int> asked(64, 0);
  const DatasetPtr set = train_set("mqar", {{"context", "64"}, {"vocab", "64"}, {"n_pairs", "1"}}, 500);
  for (int64_t step = 0; step < 4; ++step)
    for (const Row& row : rows_of(set->get(step)))
      for (size_t i = 0; i < 64; ++i) asked[i] += row.targets[i] != kIgnore;
  double total = 0;
  for (int x = 1; x <= 31; ++x) total += std::pow(x, 0.01 - 1);
  CHECK(asked[2] / 2000.0 == Approx(1 / total).margin(0.05));
  CHECK(asked[4] / 2000.0 == Approx(std::pow(2, 0.01 - 1) / total).margin(0.04));
}

TEST_CASE("ListOps has right answers and the statistics of the Long Range Arena's rules") {
  constexpr int64_t kTrees = 5000;
  const DatasetPtr set = train_set("listops", {}, 500);
  std::array<double, 10> classes{};
  std::array<double, 17> tokens{};
  std::vector<int64_t> lengths;
  for (int64_t step = 0; step < kTrees / 500; ++step) {
    const Batch batch = set->get(step);
    const auto labels = batch.labels.to_vector<int64_t>(), ends = batch.lengths.to_vector<int64_t>();
    const auto rows = rows_of(batch);
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto& row = rows[i].tokens;
      REQUIRE(list_value(row) == labels[i]);
      const int64_t length = ends[i] - 1;
      REQUIRE((length > 500 && length < 2000));
      REQUIRE(row[static_cast<size_t>(length)] == 16);
      REQUIRE(std::all_of(row.begin() + ends[i], row.end(), [](int64_t t) { return t == 0; }));
      lengths.push_back(length);
      ++classes[static_cast<size_t>(labels[i])];
      for (int64_t t = 0; t < length; ++t) ++tokens[static_cast<size_t>(row[static_cast<size_t>(t)])];
    }
  }
  constexpr double kClasses[] = {16.8, 8.9, 7.5, 8.0, 9.0, 8.9, 7.7, 7.1, 9.0, 17.2};
  for (size_t c = 0; c < 10; ++c) CHECK(100 * classes[c] / kTrees == Approx(kClasses[c]).margin(1.0));
  std::sort(lengths.begin(), lengths.end());
  const double total = static_cast<double>(std::accumulate(lengths.begin(), lengths.end(), int64_t{0}));
  CHECK(total / kTrees == Approx(1035).margin(20));
  CHECK(static_cast<double>(lengths[kTrees / 2]) == Approx(954).margin(25));
  CHECK(static_cast<double>(lengths[kTrees / 10]) == Approx(576).margin(12));
  CHECK(static_cast<double>(lengths[kTrees * 9 / 10]) == Approx(1648).margin(30));
  for (size_t t = 1; t <= 10; ++t) CHECK(100 * tokens[t] / total == Approx(7.15).margin(0.15));
  for (size_t t = 11; t <= 14; ++t) CHECK(100 * tokens[t] / total == Approx(3.55).margin(0.1));
  CHECK(100 * tokens[15] / total == Approx(14.2).margin(0.1));
}

TEST_CASE("formal languages: every prefix has the right answer") {
  const auto check = [](const std::string& name, const std::vector<int32_t>& tokens, const std::vector<int64_t>& expected) {
    INFO(name);
    std::vector<int64_t> answers(tokens.size(), kIgnore);
    make_language(name, 5, 2)->answer(tokens, answers);
    CHECK(answers == expected);
  };
  check("parity", {1, 2, 2, 1, 2}, {0, 1, 0, 0, 1});
  check("modular_addition", {4, 5, 1, 3}, {3, 2, 2, 4});
  check("cycle_navigation", {1, 2, 3, 3, 1}, {4, 4, 0, 1, 0});
  check("even_a", {1, 1, 1}, {0, 1, 0});
  const int64_t none = kIgnore;
  check("modular_arithmetic", {3, 6, 4, 8, 5, 7, 2}, {2, none, 0, none, 4, none, 3});  // 2 + 3 * 4 - 1 mod 5
  check("modular_arithmetic", {2, 7, 4, 8, 3}, {1, none, 3, none, 0});                // 1 - 3 * 2 mod 5
  check("anbn", {1, 1, 2, 2, 1}, {0, 0, 0, 1, 0});
  check("anbn", {2, 1}, {0, 0});
  check("anbncn", {1, 2, 3, 3}, {0, 0, 1, 0});
  check("anbncn", {1, 3, 2}, {0, 0, 0});
  check("dyck", {1, 2, 4, 3, 1, 4, 3}, {0, 0, 0, 1, 0, 0, 0});
  check("dyck", {3, 1}, {0, 0});
}

TEST_CASE("formal languages: strings have the lengths asked for and balanced answers") {
  for (const std::string& name : language_names()) {
    INFO(name);
    const std::map<std::string, std::string> options{{"language", name}};
    const DatasetPtr set = train_set("formal_language", options, 2000);
    const Batch batch = set->get(0);
    const auto labels = batch.labels.to_vector<int64_t>(), lengths = batch.lengths.to_vector<int64_t>();
    const std::set<int64_t> different(lengths.begin(), lengths.end());
    CHECK(*different.begin() >= 1);
    CHECK(*different.rbegin() <= 40);
    CHECK(different.size() >= 13);
    std::map<int64_t, int> counts;
    for (const int64_t label : labels) ++counts[label];
    const auto classes = static_cast<double>(make_language(name, 5, 2)->answers());
    CHECK(static_cast<double>(counts.size()) == classes);
    if (name == "modular_arithmetic") continue;  // products favour 0
    for (const auto& [label, count] : counts) CHECK(count / 2000.0 == Approx(1 / classes).margin(0.06));
    // Negatives are real ones: recomputed from the tokens.
    const auto rows = rows_of(batch);
    for (size_t i = 0; i < 200; ++i) {
      std::vector<int32_t> tokens(rows[i].tokens.begin(), rows[i].tokens.begin() + lengths[i]);
      std::vector<int64_t> answers(tokens.size(), kIgnore);
      make_language(name, 5, 2)->answer(tokens, answers);
      REQUIRE(answers.back() == labels[i]);
      REQUIRE(std::all_of(tokens.begin(), tokens.end(), [](int32_t t) { return t > 0; }));
    }
  }
}

TEST_CASE("formal languages: longer strings are held out where asked for") {
  ConfigNode node = ConfigNode::map();
  ConfigNode list = ConfigNode::list();
  list.append(ConfigNode::of(int64_t{41}));
  list.append(ConfigNode::of(int64_t{100}));
  node.set("eval_lengths", list);
  OptionReader reader(node);
  const TaskPtr task = make_task("formal_language", reader);
  reader.finish();
  CHECK(task->shape().context == 40);
  CHECK(task->shape().eval_context == 100);
  const Batch batch = task->split("test", 100, 0)->get(0);
  CHECK(batch.tokens.shape() == Shape{100, 100});
  const auto lengths = batch.lengths.to_vector<int>();
  CHECK(*std::min_element(lengths.begin(), lengths.end()) >= 41);
  CHECK(*std::max_element(lengths.begin(), lengths.end()) > 90);
}

TEST_CASE("the adding problem's target is the sum of the two marked numbers, one in each half") {
  const Batch batch = train_set("adding", {{"context", "31"}}, 200)->get(0);
  const auto inputs = batch.inputs.to_vector<double>(), values = batch.values.to_vector<double>();
  for (size_t row = 0; row < 200; ++row) {
    double sum = 0;
    std::vector<int> marks;
    for (int i = 0; i < 31; ++i) {
      const double* at = inputs.data() + (row * 31 + static_cast<size_t>(i)) * 2;
      REQUIRE((at[0] >= 0 && at[0] < 1));
      if (at[1] == 0) continue;
      marks.push_back(i);
      sum += at[0];
    }
    REQUIRE((marks.size() == 2 && marks[0] < 15 && marks[1] >= 15));
    REQUIRE(values[row] == Approx(sum).margin(1e-6));
  }
}

TEST_CASE("functions have known values and are finite over their ranges") {
  const auto at = [](const char* name, std::vector<double> v) { return find_function(name).f(v.data()); };
  CHECK(at("bessel", {0.05}) == Approx(0.7651976865579666));  // J0(1)
  CHECK(at("exp_sin", {0.5, 1}) == Approx(std::exp(2.0)));
  CHECK(at("four_sines", {1, 0.5, 0, 0}) == Approx(std::exp(0.5 * std::sin(1.25 * M_PI))));
  CHECK(at("hundred_sines", std::vector<double>(100, 1.0)) == Approx(std::exp(1.0)));
  CHECK(at("bessel_j", {0.5, 2}) == Approx(std::sqrt(1 / M_PI) * std::sin(2.0)));
  CHECK(at("elliptic_f", {1.2, 0}) == Approx(1.2));
  CHECK(at("elliptic_e", {1.2, 1}) == Approx(std::sin(1.2)));
  CHECK(at("harmonic_2_0", {0, 0}) == Approx(std::sqrt(5 / (4 * M_PI))));
  CHECK(at("feynman_i_10_7", {2, 3, 5}) == Approx(2.5));
  CHECK(at("feynman_i_8_4", {0, 0, 3, 4}) == Approx(5));
  for (const FunctionSpec& spec : functions()) {
    INFO(spec.name);
    const Batch batch = train_set("function", {{"function", spec.name}}, 3000)->get(0);
    CHECK(batch.inputs.shape() == Shape{3000, 1, spec.n_inputs()});
    const auto inputs = batch.inputs.to_vector<double>(), values = batch.values.to_vector<double>();
    CHECK(*std::min_element(inputs.begin(), inputs.end()) >= -1);
    CHECK(*std::max_element(inputs.begin(), inputs.end()) <= 1);
    double square = 0;
    for (size_t i = 0; i < 3000; ++i) {
      REQUIRE(values[i] == Approx(spec(inputs.data() + i * static_cast<size_t>(spec.n_inputs()))).epsilon(1e-6));
      square += values[i] * values[i];
    }
    CHECK((square > 1e-3 && square / 3000 < 1e8));
    for (const double end : {-1.0, 1.0}) {
      const std::vector<double> corner(static_cast<size_t>(spec.n_inputs()), end);
      CHECK(std::isfinite(spec(corner.data())));
    }
  }
}

TEST_CASE("Pathfinder's labels say whether the discs are on one curve, and curves keep apart") {
  const PathfinderOptions o = pathfinder_options(32);
  const auto apart = [](Point a, Point b) { return std::hypot(a.x - b.x, a.y - b.y); };
  const auto points = [](const Paddle& p) {
    std::vector<Point> list;
    for (int i = 0; i <= 8; ++i) list.push_back({p.tip.x + (p.end.x - p.tip.x) * i / 8, p.tip.y + (p.end.y - p.tip.y) * i / 8});
    return list;
  };
  constexpr int kImages = 300;
  int connected = 0;
  double distractors = 0;
  for (int i = 0; i < kImages; ++i) {
    RandomStream random(5, i);
    const PathfinderImage image = draw_pathfinder(o, random);
    connected += image.connected;
    distractors += static_cast<double>(image.curves.size()) - 2;
    for (size_t c = 0; c < image.curves.size(); ++c) {
      REQUIRE(image.curves[c].size() == (c < 2 ? 14u : 4u));
      for (size_t p = 0; p < image.curves[c].size(); ++p) {
        const Paddle& paddle = image.curves[c][p];
        REQUIRE(apart(paddle.tip, paddle.end) == Approx(2));
        if (p > 0) REQUIRE(apart(image.curves[c][p - 1].end, paddle.tip) <= 2.001);
        for (const Point at : {paddle.tip, paddle.end})
          REQUIRE((at.x >= 1 && at.y >= 1 && at.x <= 30 && at.y <= 30));
        for (size_t other = 0; other < c; ++other)
          for (const Paddle& q : image.curves[other])
            for (const Point a : points(paddle))
              for (const Point b : points(q)) REQUIRE(apart(a, b) > 0.99);
      }
    }
    REQUIRE(apart(image.curves[0][0].tip, image.curves[1][0].tip) == Approx(7));
    const size_t origin = apart(image.markers[0], image.curves[0][0].tip) < 1e-9 ? 0 : 1;
    REQUIRE(apart(image.markers[0], image.curves[origin][0].tip) < 1e-9);
    const size_t end = apart(image.markers[1], image.curves[0].back().end) < 1e-9 ? 0 : 1;
    REQUIRE(apart(image.markers[1], image.curves[end].back().end) < 1e-9);
    REQUIRE(image.connected == (origin == end));
    for (const Point marker : image.markers)
      REQUIRE(image.pixels[static_cast<size_t>(std::lround(marker.y) * 32 + std::lround(marker.x))] == 255);
  }
  CHECK(connected / double{kImages} == Approx(0.5).margin(0.1));
  CHECK(distractors / kImages > 1);
}

TEST_CASE("Pathfinder's images differ, and larger ones can be drawn") {
  const Batch batch = train_set("pathfinder", {}, 8)->get(0);
  const auto inputs = batch.inputs.to_vector<double>();
  CHECK(*std::min_element(inputs.begin(), inputs.end()) == -1);
  CHECK(*std::max_element(inputs.begin(), inputs.end()) == 1);
  for (const int64_t size : {16, 64, 128}) {
    PathfinderOptions o = pathfinder_options(size);
    if (size == 16) o.contour_length = 3, o.seed_distance = 3;
    RandomStream random(1, size);
    const PathfinderImage image = draw_pathfinder(o, random);
    CHECK(image.pixels.size() == static_cast<size_t>(size * size));
    CHECK(static_cast<int64_t>(image.curves[1].size()) == o.contour_length);
  }
  PathfinderOptions impossible = pathfinder_options(16);
  impossible.seed_distance = 3;
  impossible.contour_length = 60;
  RandomStream random(1, 0);
  CHECK(contains(error_of([&] { draw_pathfinder(impossible, random); }), "lower contour_length"));
}
