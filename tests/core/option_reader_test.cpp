#include "core/option_reader.h"

#include "tests/testing/catch.h"

using namespace krait;

namespace {

ConfigNode written(const std::string& key, ConfigNode value, ConfigNode into = ConfigNode::map()) {
  value.set_mark({std::make_shared<std::string>("exp.yaml"), 3, 5});
  into.set(key, std::move(value));
  return into;
}

}  // namespace

TEST_CASE("option reader: defaults are written back and marked as such") {
  ConfigNode node = written("heads", ConfigNode::scalar("4"));
  OptionReader options(node);
  int64_t heads = 8, window = 0;
  double eps = 1e-5;
  bool bias = true;
  std::vector<std::string> layers{"attention"};
  options.read("eps", eps, above(0));
  options.read("heads", heads, at_least(1));
  options.read("window", window);
  options.read("bias", bias);
  options.read("layers", layers);
  options.finish();
  CHECK(heads == 4);
  CHECK(options.given("heads"));
  CHECK_FALSE(options.given("window"));
  REQUIRE(node.entries().size() == 5);
  CHECK(node.entries().front().first == "eps");  // in the order of reading
  CHECK(node.find("eps")->text() == "1e-05");
  CHECK(node.find("layers")->items().at(0).path() == "layers[0]");
}

TEST_CASE("option reader: references to sections survive later reads") {
  ConfigNode node = ConfigNode::map();
  OptionReader options(node);
  ConfigNode& section = options.section("attention");
  int64_t value = 1;
  for (int i = 0; i < 40; ++i) options.read(fmt::format("option{}", i), value);
  OptionReader inner(section);
  inner.read("n_heads", value);
  inner.finish();
  options.finish();
  CHECK(node.find("attention")->find("n_heads")->path() == "attention.n_heads");
}

TEST_CASE("option reader: messages name place, key, found and expected") {
  const auto integer = [](ConfigNode value, Range range) {
    return error_of([&] {
      ConfigNode node = written("k", std::move(value));
      OptionReader options(node);
      int64_t x = 0;
      options.read("k", x, range);
    });
  };
  CHECK(integer(ConfigNode::scalar("abc"), {}) == "exp.yaml:3:5: k: found string 'abc', expected an integer");
  CHECK(integer(ConfigNode::scalar("1.5"), {}) == "exp.yaml:3:5: k: found 1.5, expected an integer");
  CHECK(integer(ConfigNode::scalar("4", true), {}) == "exp.yaml:3:5: k: found string '4', expected an integer");
  CHECK(integer(ConfigNode::scalar("0"), at_least(1)) == "exp.yaml:3:5: k: found 0, expected an integer >= 1");
  CHECK(integer(ConfigNode::scalar("9"), between(0, 3)) == "exp.yaml:3:5: k: found 9, expected an integer in [0, 3]");
  CHECK(integer(ConfigNode::list(), {}) == "exp.yaml:3:5: k: found a list, expected an integer");
  CHECK(integer(ConfigNode(), {}) == "exp.yaml:3:5: k: found nothing, expected an integer");
  CHECK(integer(ConfigNode::scalar("99999999999999999999"), {}) ==
        "exp.yaml:3:5: k: found 99999999999999999999, expected an integer");

  const auto number = [](const std::string& text, Range range) {
    return error_of([&] {
      ConfigNode node = written("k", ConfigNode::scalar(text));
      OptionReader options(node);
      double x = 0;
      options.read("k", x, range);
    });
  };
  CHECK(number(".nan", {}) == "exp.yaml:3:5: k: found .nan, expected a number");
  CHECK(number("nan", {}) == "exp.yaml:3:5: k: found nan, expected a number");
  CHECK(number("1", below_one()) == "exp.yaml:3:5: k: found 1, expected a number in [0, 1)");
  CHECK(number("0", above(0)) == "exp.yaml:3:5: k: found 0, expected a number > 0");
}

TEST_CASE("option reader: unknown keys get the nearest valid name") {
  ConfigNode node = written("weigth_decay", ConfigNode::scalar("0.1"));
  OptionReader options(node);
  double lr = 1e-3, weight_decay = 0;
  options.read("lr", lr);
  options.read("weight_decay", weight_decay);
  CHECK(error_of([&] { options.finish(); }) ==
        "exp.yaml:3:5: weigth_decay: unknown key; did you mean weight_decay?\n       valid keys: lr, weight_decay");
}

TEST_CASE("option reader: a required key that was misspelt is named as misspelt") {
  ConfigNode node = written("pth", ConfigNode::scalar("x"));
  OptionReader options(node);
  CHECK(error_of([&] { options.require("path"); }) == "exp.yaml:3:5: pth: unknown key; did you mean path?");
}

TEST_CASE("option reader: choices suggest the nearest") {
  ConfigNode node = written("type", ConfigNode::scalar("adam"));
  OptionReader options(node);
  std::string type = "adamw";
  CHECK(error_of([&] { options.choice("type", type, {"adamw", "sgd", "lion"}); }) ==
        "exp.yaml:3:5: type: found 'adam', expected one of adamw, sgd, lion\n       try adamw");
}

TEST_CASE("nearest name: near slips only") {
  const std::vector<std::string> names{"lr", "betas", "eps", "weight_decay"};
  CHECK(nearest_name("beta", names) == "betas");
  CHECK(nearest_name("wieght_decay", names) == "weight_decay");
  CHECK(nearest_name("rl", names) == "lr");
  CHECK(nearest_name("xyzzy", names).empty());
}
