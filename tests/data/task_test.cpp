#include "data/task.h"

#include <algorithm>
#include <map>
#include <set>

#include "core/option_reader.h"
#include "tests/testing/catch.h"

using namespace krait;
using namespace krait::data;
using Kind = TaskShape::Kind;

namespace {

ConfigNode section(const std::map<std::string, std::string>& options) {
  ConfigNode node = ConfigNode::map();
  node.set_path("data");
  for (const auto& [key, value] : options) node.set(key, ConfigNode::scalar(value));
  return node;
}

TaskPtr task(const std::string& name, const std::map<std::string, std::string>& options = {}) {
  ConfigNode node = section(options);
  OptionReader reader(node);
  TaskPtr made = make_task(name, reader);
  reader.finish();
  return made;
}

std::string refusal(const std::string& name, const std::map<std::string, std::string>& options) {
  try {
    task(name, options);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "accepted";
}

void expect(const std::string& message, const std::vector<std::string>& parts) {
  INFO(message);
  for (const std::string& part : parts) CHECK(contains(message, part));
}

bool same(const Tensor& a, const Tensor& b) {
  if (a.defined() != b.defined()) return false;
  return !a.defined() || (a.shape() == b.shape() && a.to_vector<double>() == b.to_vector<double>());
}

bool same(const Batch& a, const Batch& b) {
  return a.n_targets == b.n_targets && a.n_rows == b.n_rows && same(a.tokens, b.tokens) && same(a.targets, b.targets) &&
         same(a.inputs, b.inputs) && same(a.labels, b.labels) && same(a.values, b.values) && same(a.lengths, b.lengths);
}

struct Small {
  std::string name;
  std::map<std::string, std::string> options;
};
const std::vector<Small> kGenerated = {
    {"selective_copying", {{"context", "64"}, {"n_tokens", "5"}, {"vocab", "9"}}},
    {"induction_heads", {{"context", "20"}}},
    {"mqar", {{"context", "32"}, {"vocab", "64"}}},
    {"listops", {{"context", "64"}, {"min_length", "10"}, {"max_length", "60"}, {"train_examples", "40"}}},
    {"pathfinder", {{"contour_length", "5"}, {"train_examples", "0"}}},
    {"formal_language", {{"language", "dyck"}, {"eval_lengths_", ""}}},
    {"formal_language", {{"language", "modular_arithmetic"}, {"supervise", "every"}}},
    {"adding", {{"context", "30"}}},
    {"function", {{"function", "exp_sin"}}},
};

std::vector<Small> generated() {
  std::vector<Small> list = kGenerated;
  for (Small& item : list) {
    item.options.erase("eval_lengths_");
    item.options["valid_examples"] = "20";
  }
  return list;
}

}  // namespace

TEST_CASE("a task's batch depends on seed, split and step alone, not on the ranks") {
  for (const Small& item : generated()) {
    INFO(item.name);
    const TaskPtr one = task(item.name, item.options), two = task(item.name, item.options);
    const DatasetPtr train = one->split("train", 12, 5);
    CHECK(train->steps() == -1);
    CHECK(train->context() == one->shape().context);
    const Batch batch = train->get(3);
    CHECK(same(batch, two->split("train", 12, 5)->get(3)));
    CHECK_FALSE(same(batch, train->get(4)));
    CHECK_FALSE(same(batch, two->split("train", 12, 6)->get(3)));
    CHECK(same(one->split("valid", 12, 5)->get(1), two->split("valid", 12, 6)->get(1)));
    CHECK_FALSE(same(one->split("valid", 12, 5)->get(0), one->split("test", 12, 5)->get(0)));
    for (const int64_t world : {2, 3}) {
      int64_t targets = 0;
      for (int64_t rank = 0; rank < world; ++rank) {
        const Batch part = train->get(3, rank, world);
        const int64_t n = 12 / world;
        targets += part.n_targets;
        for (const auto field : {&Batch::tokens, &Batch::targets, &Batch::inputs, &Batch::labels, &Batch::values, &Batch::lengths})
          if ((batch.*field).defined()) CHECK(same(part.*field, (batch.*field).slice(0, rank * n, (rank + 1) * n)));
      }
      CHECK(targets == batch.n_targets);
    }
  }
}

TEST_CASE("a task's batch has the fields of its shape") {
  for (const Small& item : generated()) {
    INFO(item.name);
    const TaskPtr made = task(item.name, item.options);
    const TaskShape& shape = made->shape();
    const Batch batch = made->split("train", 3, 0)->get(0);
    CHECK(batch.tokens.defined() == (shape.vocab_size > 0));
    CHECK(batch.inputs.defined() == (shape.input_features > 0));
    CHECK((shape.vocab_size > 0) != (shape.input_features > 0));
    CHECK(batch.targets.defined() == (shape.kind == Kind::token_targets));
    CHECK(batch.labels.defined() == (shape.kind == Kind::labels));
    CHECK(batch.values.defined() == (shape.kind == Kind::values));
    CHECK(batch.lengths.defined() == shape.variable_length);
    CHECK(batch.resets.to_vector<int>() == std::vector<int>{1, 1, 1});
    if (batch.inputs.defined()) CHECK(batch.inputs.shape() == Shape{3, shape.context, shape.input_features});
    if (batch.tokens.defined())
      for (const int64_t token : batch.tokens.to_vector<int64_t>()) REQUIRE((token >= 0 && token < shape.vocab_size));
    const Tensor& classes = shape.kind == Kind::labels ? batch.labels : batch.targets;
    if (classes.defined())
      for (const int64_t label : classes.to_vector<int64_t>()) REQUIRE(((label >= 0 && label < shape.n_classes) || label == kIgnore));
  }
}

TEST_CASE("a held-out split goes once through its examples and marks the rows that fill it up") {
  for (const Small& item : generated()) {
    INFO(item.name);
    const DatasetPtr valid = task(item.name, item.options)->split("valid", 6, 1);
    REQUIRE(valid->steps() == 4);
    int64_t rows = 0, targets = 0;
    for (int64_t step = 0; step < 4; ++step) {
      const Batch batch = valid->get(step);
      rows += batch.n_rows;
      targets += batch.n_targets;
    }
    CHECK(rows == 20);
    CHECK(targets == valid->total_targets());
    const Batch last = valid->get(3), behind = valid->get(3, 2, 3);  // 2 examples, 4 rows of filling
    CHECK(last.n_rows == 2);
    CHECK(behind.n_rows == 0);
    CHECK(behind.n_targets == 0);
    if (last.labels.defined()) {
      const auto labels = last.labels.to_vector<int64_t>();
      CHECK(std::count(labels.begin(), labels.end(), kIgnore) == 4);
    }
    if (last.lengths.defined()) CHECK(last.lengths.to_vector<int>()[5] == 1);
    CHECK_THROWS(valid->get(4));
  }
}

TEST_CASE("a finite training set shows every example once in each pass, in another order each time") {
  const TaskPtr listops = task("listops", {{"context", "64"}, {"min_length", "10"}, {"max_length", "60"}, {"train_examples", "40"}});
  const DatasetPtr train = listops->split("train", 8, 3);
  std::vector<std::vector<int64_t>> passes[2];
  for (int64_t step = 0; step < 10; ++step) {
    const auto tokens = train->get(step).tokens.to_vector<int64_t>();
    for (int64_t row = 0; row < 8; ++row) passes[step / 5].emplace_back(tokens.begin() + row * 64, tokens.begin() + (row + 1) * 64);
  }
  CHECK(passes[0] != passes[1]);
  for (auto& pass : passes) std::sort(pass.begin(), pass.end());
  CHECK(passes[0] == passes[1]);
  CHECK(std::set<std::vector<int64_t>>(passes[0].begin(), passes[0].end()).size() == 40);
  auto other = listops->split("train", 8, 4)->get(0).tokens.to_vector<int64_t>();
  CHECK(other != train->get(0).tokens.to_vector<int64_t>());  // the order is the seed's, the examples are not
  other.resize(64);
  CHECK(std::binary_search(passes[0].begin(), passes[0].end(), other));
}

TEST_CASE("a task's options are refused with the place and what is possible") {
  expect(refusal("selective_copying", {{"n_token", "3"}}), {"data.n_token: unknown key; did you mean n_tokens?"});
  expect(refusal("selective_copying", {{"context", "20"}, {"n_tokens", "11"}}), {"data.n_tokens: 11 tokens", "10 or less"});
  expect(refusal("mqar", {{"n_pairs", "17"}}), {"do not fit into data.context 64", "16 or less"});
  expect(refusal("mqar", {{"vocab", "8"}}), {"vocab: 10"});
  expect(refusal("listops", {{"context", "1024"}}), {"data.max_length", "1024 or less"});
  expect(refusal("listops", {{"min_length", "1999"}}), {"hardly any tree"});
  expect(refusal("listops", {{"max_depth", "3"}}), {"too rare"});
  expect(refusal("pathfinder", {{"context", "100"}}), {"data.context: found 100, but rows of this task have 1024"});
  expect(refusal("pathfinder", {{"seed_distance", "8"}}), {"7 or less"});
  expect(refusal("formal_language", {{"language", "dick"}}), {"dyck"});
  expect(refusal("formal_language", {{"language", "parity"}, {"modulus", "3"}}), {"data.modulus: unknown key"});
  expect(refusal("function", {}), {"data.function: is required and missing"});
  expect(refusal("function", {{"function", "bessel_x"}}), {"bessel"});
  expect(refusal("image_sequence", {{"dataset", "cifar10"}, {"inputs", "tokens"}}), {"gray: true"});
  expect(refusal("image_sequence", {{"dataset", "mnist"}, {"gray", "true"}}), {"data.gray: unknown key"});
  ConfigNode node = section({});
  OptionReader reader(node);
  expect(error_of([&] { make_task("copying", reader); }), {"'copying' is unknown", "selective_copying"});
  expect(error_of([] { task("adding")->split("dev", 1, 0); }), {"split 'dev' is unknown; choose train, valid or test"});
}
