#include <algorithm>
#include <array>
#include <vector>

#include "core/random.h"
#include "data/images.h"
#include "data/permutation.h"
#include "data/task_kinds.h"

namespace krait::data {
namespace {

struct ImageOptions {
  std::string dataset = "mnist", permuted = "none", inputs = "values";
  bool gray = false;
  double valid_share = 0.1;
  int64_t train = 0, valid = 0, test = 0;  // examples used of each split; 0: all
  bool mnist() const { return dataset == "mnist"; }
  int64_t pixels() const { return mnist() ? 784 : 1024; }
  int64_t channels() const { return mnist() || gray ? 1 : 3; }
};

/// Pixels row by row, or in the order of one fixed permutation (step t shows pixel order[t]).
class ImageExamples final : public ExampleSet {
 public:
  ImageExamples(Images images, std::vector<int64_t> members, const ImageOptions& o)
      : images_(std::move(images)), members_(std::move(members)) {
    if (o.permuted == "fixed") order_ = numpy_permutation(images_.pixels, 92916);
    else if (o.permuted == "bitreversal") order_ = bit_reversal(images_.pixels);
    for (int64_t c = 0; c < images_.channels; ++c)
      for (int v = 0; v < 256; ++v) level_[static_cast<size_t>(c)][static_cast<size_t>(v)] = normalised(o, c, v);
  }
  int64_t size() const override { return static_cast<int64_t>(members_.size()); }

  void fill(int64_t index, ExampleRow& row) const override {
    const int64_t image = members_[static_cast<size_t>(index)], channels = images_.channels;
    const uint8_t* values = images_.values.data() + image * images_.pixels * channels;
    row.label = images_.labels[static_cast<size_t>(image)];
    for (int64_t t = 0; t < images_.pixels; ++t) {
      const uint8_t* pixel = values + (order_.empty() ? t : order_[static_cast<size_t>(t)]) * channels;
      if (!row.tokens.empty()) {
        row.tokens[static_cast<size_t>(t)] = pixel[0];
        continue;
      }
      for (int64_t c = 0; c < channels; ++c)
        row.inputs[static_cast<size_t>(t * channels + c)] = level_[static_cast<size_t>(c)][pixel[c]];
    }
  }

 private:
  // MNIST in [0, 1]; CIFAR-10 with the mean and standard deviation of its training set.
  static float normalised(const ImageOptions& o, int64_t channel, int value) {
    constexpr double kMean[] = {0.4914, 0.4822, 0.4465}, kStd[] = {0.247, 0.243, 0.261};
    if (o.mnist()) return static_cast<float>(value / 255.0);
    if (o.gray) return static_cast<float>((value - 122.6) / 61.0);
    return static_cast<float>((value / 255.0 - kMean[channel]) / kStd[channel]);
  }

  Images images_;
  std::vector<int64_t> members_, order_;
  std::array<std::array<float, 256>, 3> level_{};
};

/// Held out: a random share of the training images, the same for every seed of a run.
class ImageSequence final : public Task {
 public:
  ImageSequence(const ImageOptions& options, const TaskShape& shape) : Task("image_sequence", shape), o_(options) {}
  std::string fetch_set() const override { return o_.dataset; }

 protected:
  ExampleSetPtr examples(Split split, uint64_t, const std::string& directory) const override {
    const bool train_file = split != Split::test;
    Images images = o_.mnist() ? read_mnist(directory, train_file) : read_cifar10(directory, train_file, o_.gray);
    const int64_t n = images.size();
    KRAIT_CHECK(n > 0, "{}: no images", directory);
    const auto held_out = static_cast<int64_t>(o_.valid_share * static_cast<double>(n));
    const int64_t first = split == Split::train ? held_out : 0, last = split == Split::valid ? held_out : n;
    const Permutation order(n, random_key(42, "data.valid"));
    std::vector<int64_t> members;
    for (int64_t i = first; i < last; ++i) members.push_back(train_file ? order(i) : i);
    const int64_t limit = split == Split::train ? o_.train : split == Split::valid ? o_.valid : o_.test;
    if (limit > 0 && limit < static_cast<int64_t>(members.size())) members.resize(static_cast<size_t>(limit));
    KRAIT_CHECK(!members.empty(), "{}: split {} of {} images is empty (data.valid_share {})", directory, name_of(split), n, o_.valid_share);
    return std::make_shared<ImageExamples>(std::move(images), std::move(members), o_);
  }

 private:
  ImageOptions o_;
};

}  // namespace

TaskPtr make_image_sequence(OptionReader& options) {
  ImageOptions o;
  options.choice("dataset", o.dataset, {"mnist", "cifar10"});
  if (!o.mnist()) options.read("gray", o.gray);
  options.choice("permuted", o.permuted, {"none", "fixed", "bitreversal"});
  options.choice("inputs", o.inputs, {"values", "tokens"});
  options.read("valid_share", o.valid_share, below_one());
  options.read("train_examples", o.train, at_least(0));
  options.read("valid_examples", o.valid, at_least(0));
  options.read("test_examples", o.test, at_least(0));
  read_fixed_context(options, o.pixels());
  const bool tokens = o.inputs == "tokens";
  if (tokens && o.channels() > 1) {
    options.fail("inputs", "a pixel of three colours is not a token", "gray: true, or inputs: values");
  }
  return std::make_shared<ImageSequence>(
      o, TaskShape{.kind = TaskShape::Kind::labels, .vocab_size = tokens ? 256 : 0, .input_features = tokens ? 0 : o.channels(),
                   .n_classes = 10, .context = o.pixels(), .eval_context = o.pixels()});
}

}  // namespace krait::data
