#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "core/option_reader.h"
#include "data/images.h"
#include "data/permutation.h"
#include "data/task.h"
#include "tests/data/temp_dir.h"
#include "tests/testing/catch.h"

using namespace krait;
using namespace krait::data;
using krait::testing::shared_data;
using krait::testing::TempDir;
using krait::testing::write_file;

namespace {

std::string be32(uint32_t value) {
  std::string out;
  for (int shift = 24; shift >= 0; shift -= 8) out.push_back(static_cast<char>(value >> shift & 0xFF));
  return out;
}
std::string idx(const std::vector<uint32_t>& shape, const std::string& values) {
  std::string out = {0, 0, 8, static_cast<char>(shape.size())};
  for (const uint32_t size : shape) out += be32(size);
  return out + values;
}

TaskPtr images(const std::map<std::string, std::string>& options) {
  ConfigNode node = ConfigNode::map();
  for (const auto& [key, value] : options) node.set(key, ConfigNode::scalar(value));
  OptionReader reader(node);
  TaskPtr task = make_task("image_sequence", reader);
  reader.finish();
  return task;
}

// Image i of n is all i, except for pixel p, which holds p modulo 256; its label is i modulo 10.
void write_mnist(const TempDir& dir, const std::string& part, int n, int side = 28) {
  std::string values, labels;
  for (int i = 0; i < n; ++i) {
    for (int p = 0; p < side * side; ++p) values.push_back(static_cast<char>(p == 0 ? i : p));
    labels.push_back(static_cast<char>(i % 10));
  }
  const auto count = static_cast<uint32_t>(n), edge = static_cast<uint32_t>(side);
  write_file(dir / (part + "-images-idx3-ubyte"), idx({count, edge, edge}, values));
  write_file(dir / (part + "-labels-idx1-ubyte"), idx({count}, labels));
}

}  // namespace

TEST_CASE("a permutation visits every place once and depends on its key") {
  for (const int64_t n : {1, 2, 3, 4, 5, 17, 64, 1000}) {
    std::set<int64_t> seen;
    for (int64_t i = 0; i < n; ++i) seen.insert(Permutation(n, 9)(i));
    CHECK(static_cast<int64_t>(seen.size()) == n);
    CHECK((*seen.begin() == 0 && *seen.rbegin() == n - 1));
  }
  int same = 0, fixed = 0;
  for (int64_t i = 0; i < 1000; ++i) {
    same += Permutation(1000, 1)(i) == Permutation(1000, 2)(i);
    fixed += Permutation(1000, 1)(i) == i;
  }
  CHECK(same < 10);
  CHECK(fixed < 10);
}

TEST_CASE("the fixed permutation is NumPy's, the bit reversal S4's") {
  const std::vector<int64_t> order = numpy_permutation(784, 92916);
  CHECK(std::vector<int64_t>(order.begin(), order.begin() + 12) == std::vector<int64_t>{319, 576, 323, 107, 355, 716, 197, 20, 625, 60, 443, 620});
  CHECK(std::set<int64_t>(order.begin(), order.end()).size() == 784);
  if (const std::string file = shared_data("mnist/pmnist_permutation_92916.txt"); !file.empty()) {
    std::ifstream in(file);
    std::vector<int64_t> expected;
    for (int64_t value = 0; in >> value;) expected.push_back(value);
    CHECK(order == expected);
  }
  const std::vector<int64_t> reversed = bit_reversal(784);
  CHECK(std::vector<int64_t>(reversed.begin(), reversed.begin() + 5) == std::vector<int64_t>{0, 512, 256, 768, 128});
  CHECK(std::set<int64_t>(reversed.begin(), reversed.end()).size() == 784);
  CHECK(bit_reversal(1) == std::vector<int64_t>{0});
}

TEST_CASE("IDX files are read, and damaged ones refused") {
  const TempDir dir;
  const IdxArray array = read_idx(write_file(dir / "a", idx({2, 3}, "abcdef")));
  CHECK(array.shape == std::vector<int64_t>{2, 3});
  CHECK(array.bytes == std::vector<uint8_t>{'a', 'b', 'c', 'd', 'e', 'f'});
  const auto refused = [&](const std::string& bytes, const std::string& part) {
    const std::string message = error_of([&] { read_idx(write_file(dir / "b", bytes)); });
    INFO(message);
    CHECK(contains(message, dir / "b" + ": "));
    CHECK(contains(message, part));
  };
  refused("", "not an IDX file");
  refused("\x89PNG....", "begins with 89 50 4e 47, expected 00 00 08");
  refused(idx({2, 3}, "").substr(0, 9), "cut short inside its header");
  refused(idx({2, 3}, "abcde"), "holds 5 values where its header (2 x 3) promises 6; it is cut short");
  refused(idx({2, 3}, "abcdefg"), "holds 7 values");
  refused(idx({0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF}, "a"), "more than 2^40 values");
  CHECK(contains(error_of([&] { read_idx(dir / "none"); }), "none"));
}

TEST_CASE("MNIST as a sequence: splits, orders, values") {
  const TempDir dir;
  write_mnist(dir, "train", 100);
  write_mnist(dir, "t10k", 7);
  const TaskPtr task = images({});
  CHECK(task->fetch_set() == "mnist");
  CHECK(task->shape().context == 784);
  const std::string path = dir.path().string();
  const auto shown = [&](const DatasetPtr& set, int64_t steps) {
    std::multiset<int> list;
    for (int64_t step = 0; step < steps; ++step) {
      const Batch batch = set->get(step);
      const auto inputs = batch.inputs.to_vector<double>();
      const auto labels = batch.labels.to_vector<int64_t>();
      for (int64_t row = 0; row < batch.n_rows; ++row) {
        const auto image = static_cast<int>(std::lround(inputs[static_cast<size_t>(row * 784)] * 255));
        REQUIRE(labels[static_cast<size_t>(row)] == image % 10);
        REQUIRE(inputs[static_cast<size_t>(row * 784 + 255)] == 1.0);
        list.insert(image);
      }
    }
    return list;
  };
  const auto train = shown(task->split("train", 9, 0, path), 10), valid = shown(task->split("valid", 4, 0, path), 3);
  CHECK(std::set<int>(train.begin(), train.end()).size() == 90);
  CHECK(valid.size() == 10);
  for (const int image : valid) CHECK(train.count(image) == 0);
  CHECK(shown(task->split("valid", 10, 5, path), 1) == valid);  // the same for every seed
  CHECK(shown(task->split("test", 4, 0, path), 2) == std::multiset<int>{0, 1, 2, 3, 4, 5, 6});
  CHECK(task->split("test", 4, 0, path)->total_targets() == 7);
  CHECK(task->split("test", 4, 0, path)->get(1).labels.to_vector<int64_t>() == std::vector<int64_t>{4, 5, 6, kIgnore});
  CHECK(images({{"test_examples", "3"}})->split("test", 4, 0, path)->total_targets() == 3);
  CHECK(task->split("test", 1000, 0, path)->get(0).labels.numel() == 7);  // no rows without an example

  for (const std::string order : {"fixed", "bitreversal"}) {
    const auto expected = order == "fixed" ? numpy_permutation(784, 92916) : bit_reversal(784);
    const auto inputs = images({{"permuted", order}})->split("test", 1, 0, path)->get(3).inputs.to_vector<double>();
    for (size_t t = 0; t < 784; ++t) REQUIRE(std::lround(inputs[t] * 255) == (expected[t] == 0 ? 3 : expected[t] % 256));
  }
  const Batch tokens = images({{"inputs", "tokens"}})->split("test", 1, 0, path)->get(3);
  CHECK(tokens.tokens.to_vector<int>()[300] == 300 % 256);

  CHECK(contains(error_of([&] { images({{"valid_share", "0"}})->split("valid", 1, 0, path); }), "split valid of 100 images is empty"));
  CHECK(contains(error_of([&] { task->split("test", 1, 0, dir / "none"); }), "krait data fetch mnist"));
  write_mnist(dir, "t10k", 7, 32);
  CHECK(contains(error_of([&] { task->split("test", 1, 0, path); }), "holds (7, 32, 32) values, expected images of 28 x 28"));
  write_mnist(dir, "t10k", 7);
  write_file(dir / "t10k-labels-idx1-ubyte", idx({7}, "\x01\x02\x03\x0b\x01\x02\x03"));
  CHECK(contains(error_of([&] { task->split("test", 1, 0, path); }), "label 11 of image 3 is not below 10"));
  write_file(dir / "t10k-labels-idx1-ubyte", idx({6}, "\x01\x02\x03\x01\x01\x02"));
  CHECK(contains(error_of([&] { task->split("test", 1, 0, path); }), "holds (6) labels for the 7 images"));
}

TEST_CASE("CIFAR-10 from its binary batches, in colour and grey") {
  const TempDir dir;
  std::filesystem::create_directories(dir / "cifar-10-batches-bin");
  std::string record(1, '\x06');
  record += std::string(1024, '\x64') + std::string(1024, '\x32') + std::string(1023, '\x0a') + '\x14';
  for (const char* name : {"data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"})
    write_file(dir / ("cifar-10-batches-bin/" + std::string(name) + ".bin"), record + record + record);
  const std::string path = dir.path().string();
  const Batch batch = images({{"dataset", "cifar10"}})->split("test", 2, 0, path)->get(1);
  CHECK(batch.n_rows == 1);
  CHECK(batch.inputs.shape() == Shape{2, 1024, 3});
  CHECK(batch.labels.to_vector<int64_t>() == std::vector<int64_t>{6, kIgnore});
  const auto values = batch.inputs.to_vector<double>();
  CHECK(values[0] == Approx((100 / 255.0 - 0.4914) / 0.247));
  CHECK(values[1] == Approx((50 / 255.0 - 0.4822) / 0.243));
  CHECK(values[3 * 1023 + 2] == Approx((20 / 255.0 - 0.4465) / 0.261));
  const auto gray = images({{"dataset", "cifar10"}, {"gray", "true"}})->split("test", 1, 0, path)->get(0).inputs.to_vector<double>();
  CHECK(gray.size() == 1024);
  CHECK(gray[0] == Approx((60 - 122.6) / 61.0));  // 29.9 + 29.35 + 1.14
  CHECK(images({{"dataset", "cifar10"}})->split("valid", 1, 0, path)->total_targets() == 1);
  write_file(dir / "cifar-10-batches-bin/data_batch_3.bin", record + record.substr(5));
  CHECK(contains(error_of([&] { images({{"dataset", "cifar10"}})->split("train", 1, 0, path); }), "not whole records of 3073"));
  std::filesystem::remove(dir / "cifar-10-batches-bin/data_batch_3.bin");
  CHECK(contains(error_of([&] { images({{"dataset", "cifar10"}})->split("train", 1, 0, path); }), "krait data fetch cifar10"));
}

TEST_CASE("the real MNIST, packed as it is distributed") {
  const std::string directory = shared_data("mnist");
  if (directory.empty()) return;
  const Images train = read_mnist(directory, true);
  CHECK(train.size() == 60000);
  CHECK(std::vector<int>(train.labels.begin(), train.labels.begin() + 10) == std::vector<int>{5, 0, 4, 1, 9, 2, 1, 3, 1, 4});
  double sum = 0;
  for (const uint8_t value : train.values) sum += value;
  CHECK(sum / 255 / static_cast<double>(train.values.size()) == Approx(0.13066).epsilon(1e-4));
  CHECK(images({})->split("test", 100, 0, directory)->total_targets() == 10000);
}
