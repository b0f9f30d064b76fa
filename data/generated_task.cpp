#include "data/generated_task.h"

namespace krait::data {
namespace {

class GeneratedExamples final : public ExampleSet {
 public:
  GeneratedExamples(std::shared_ptr<const Generator> generator, Split split, int64_t size, uint64_t key)
      : generator_(std::move(generator)), split_(split), size_(size), key_(key) {}
  int64_t size() const override { return size_; }
  int64_t grain() const override { return generator_->grain(); }
  void fill(int64_t index, ExampleRow& row) const override {
    RandomStream random(key_, index);
    generator_->generate(split_, random, row);
  }

 private:
  std::shared_ptr<const Generator> generator_;
  Split split_;
  int64_t size_;
  uint64_t key_;
};

class GeneratedTask final : public Task {
 public:
  GeneratedTask(const std::string& name, const TaskShape& shape, const ExampleCounts& counts,
                std::shared_ptr<const Generator> generator)
      : Task(name, shape), counts_(counts), generator_(std::move(generator)) {}

 protected:
  ExampleSetPtr examples(Split split, uint64_t seed, const std::string&) const override {
    const bool endless = split == Split::train && counts_.train == 0;
    const int64_t size = split == Split::train ? counts_.train : split == Split::valid ? counts_.valid : counts_.test;
    const uint64_t key = random_key(endless ? seed : 0, fmt::format("data.{}.{}{}", name(), name_of(split), endless ? "" : ".set"));
    return std::make_shared<GeneratedExamples>(generator_, split, endless ? -1 : size, key);
  }

 private:
  ExampleCounts counts_;
  std::shared_ptr<const Generator> generator_;
};

}  // namespace

void read_counts(OptionReader& options, ExampleCounts& counts) {
  options.read("train_examples", counts.train, between(0, 1e12));
  options.read("valid_examples", counts.valid, between(1, 1e12));
  options.read("test_examples", counts.test, between(1, 1e12));
}

TaskPtr generated_task(const std::string& name, const TaskShape& shape, const ExampleCounts& counts,
                       std::shared_ptr<const Generator> generator) {
  return std::make_shared<GeneratedTask>(name, shape, counts, std::move(generator));
}

}  // namespace krait::data
