#include <algorithm>
#include <vector>

#include "data/generated_task.h"
#include "data/task_kinds.h"

namespace krait::data {
namespace {

struct ListOpsOptions {
  int64_t context = 2048, min_length = 500, max_length = 2000, max_depth = 10, max_args = 10;
};

// Ids: 0 padding, 1..10 the digits, 11..14 operators, 15 the closing bracket, 16 the end.
enum : int32_t { kDigit0 = 1, kMin = 11, kMax, kMed, kSum, kClose, kEnd, kVocabulary };

constexpr int64_t kAttempts = 1'000'000;  // with usual options a hundred would do

/// ListOps (Nangia & Bowman 2018, with the sizes of the Long Range Arena): a nested list of MIN, MAX, MED (median; of
/// an even count the mean of the middle two, truncated) and SM (sum modulo 10) over digits; the class is its value.
/// Trees are drawn until one has min_length < length < max_length; the end token follows.
class ListOps final : public Generator {
 public:
  explicit ListOps(const ListOpsOptions& options) : o_(options) {}
  int64_t grain() const override { return 4; }

  void generate(Split, RandomStream& random, ExampleRow& row) const override {
    std::vector<int32_t> tokens;
    int64_t value = -1, attempts = 0;
    do {
      KRAIT_CHECK(++attempts <= kAttempts, "listops: no tree of {} to {} tokens was found in {} attempts; lower min_length or max_args, or raise max_length",
                  o_.min_length + 1, o_.max_length - 1, kAttempts);
      tokens.clear();
      value = tree(1, random, tokens);
    } while (value < 0 || static_cast<int64_t>(tokens.size()) <= o_.min_length);
    tokens.push_back(kEnd);
    std::copy(tokens.begin(), tokens.end(), row.tokens.begin());
    row.length = static_cast<int32_t>(tokens.size());
    row.label = value;
  }

 private:
  // Appends the tree's tokens and returns its value; -1 when it becomes too long, and the whole is drawn again.
  int64_t tree(int64_t depth, RandomStream& random, std::vector<int32_t>& tokens) const {
    if (static_cast<int64_t>(tokens.size()) >= o_.max_length) return -1;
    if (depth >= o_.max_depth || random.unit() > 0.25) {
      const int64_t digit = random.below(10);
      tokens.push_back(static_cast<int32_t>(kDigit0 + digit));
      return digit;
    }
    const auto op = static_cast<int32_t>(random.between(kMin, kSum));
    const int64_t n = random.between(2, o_.max_args);
    tokens.push_back(op);
    std::vector<int64_t> arguments(static_cast<size_t>(n));
    for (int64_t& argument : arguments)
      if ((argument = tree(depth + 1, random, tokens)) < 0) return -1;
    tokens.push_back(kClose);
    if (static_cast<int64_t>(tokens.size()) >= o_.max_length) return -1;
    return evaluate(op, arguments);
  }

  static int64_t evaluate(int32_t op, std::vector<int64_t>& arguments) {
    std::sort(arguments.begin(), arguments.end());
    const size_t n = arguments.size();
    switch (op) {
      case kMin: return arguments.front();
      case kMax: return arguments.back();
      case kMed: return (arguments[(n - 1) / 2] + arguments[n / 2]) / 2;
      default: break;
    }
    int64_t sum = 0;
    for (const int64_t argument : arguments) sum += argument;
    return sum % 10;
  }

  ListOpsOptions o_;
};

}  // namespace

TaskPtr make_listops(OptionReader& options) {
  ListOpsOptions o;
  ExampleCounts counts{.train = 96000, .valid = 2000, .test = 2000};
  options.read("context", o.context, between(1, kMaxContext));
  options.read("min_length", o.min_length, at_least(0));
  options.read("max_length", o.max_length, between(2, kMaxContext));
  options.read("max_depth", o.max_depth, between(1, 1000));
  options.read("max_args", o.max_args, between(2, 1000));
  read_counts(options, counts);
  if (o.max_length > o.context) {
    options.fail("max_length", fmt::format("trees of up to {} tokens and the end token do not fit into data.context {}", o.max_length - 1, o.context),
                 fmt::format("{} or less, or a longer context", o.context));
  }
  if (o.max_length < 4 * (o.min_length / 3) || o.max_length < o.min_length + 2) {
    options.fail("min_length", fmt::format("{} is too near to max_length {}: hardly any tree lies between", o.min_length, o.max_length),
                 fmt::format("{} or less", o.max_length * 3 / 4 - 2));
  }
  // A tree of depth d holds at most about max_args^(d - 1) digits, and typically (0.25 x mean arguments)^(d - 1).
  double typical = 1, largest = 1;
  for (int64_t depth = 1; depth < o.max_depth; ++depth) {
    typical *= 0.25 * 0.5 * static_cast<double>(o.max_args + 2);
    largest *= static_cast<double>(o.max_args);
  }
  if (o.min_length > 0 && (largest < static_cast<double>(o.min_length) || 100 * typical < static_cast<double>(o.min_length))) {
    options.fail("min_length", fmt::format("trees of more than {} tokens are too rare with max_depth {} and max_args {}", o.min_length, o.max_depth, o.max_args),
                 "a smaller min_length, or deeper trees");
  }
  const TaskShape shape{.kind = TaskShape::Kind::labels, .vocab_size = kVocabulary, .n_classes = 10, .context = o.context,
                        .eval_context = o.context, .variable_length = true};
  return generated_task("listops", shape, counts, std::make_shared<ListOps>(o));
}

}  // namespace krait::data
