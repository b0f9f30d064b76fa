#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "data/generated_task.h"
#include "data/task_kinds.h"

// Tasks of remembering: selective copying, induction heads, multi-query associative recall. All have targets at
// marked positions of a token sequence, and the answer is never shown.
namespace krait::data {
namespace {

using Kind = TaskShape::Kind;

TaskShape token_shape(int64_t vocab, int64_t context) {
  return {.kind = Kind::token_targets, .vocab_size = vocab, .n_classes = vocab, .context = context, .eval_context = context};
}

/// Selective copying (Gu & Dao 2023, section 4.1.1): `n` tokens at random places among noise, then n markers, at which
/// they are to be repeated in order. Ids: 0 noise, 1 .. vocab - 2 tokens, vocab - 1 the marker.
class SelectiveCopying final : public Generator {
 public:
  SelectiveCopying(int64_t n, int64_t vocab) : n_(n), vocab_(vocab) {}
  void generate(Split, RandomStream& random, ExampleRow& row) const override {
    const int64_t outputs = static_cast<int64_t>(row.tokens.size()) - n_;
    for (int64_t placed = 0; placed < n_;) {
      int32_t& place = row.tokens[static_cast<size_t>(random.below(outputs))];
      if (place != 0) continue;
      place = static_cast<int32_t>(random.between(1, vocab_ - 2));
      ++placed;
    }
    auto target = row.targets.begin() + outputs;
    for (int64_t i = 0; i < outputs; ++i)
      if (const int32_t token = row.tokens[static_cast<size_t>(i)]) *target++ = token;
    std::fill(row.tokens.begin() + outputs, row.tokens.end(), static_cast<int32_t>(vocab_ - 1));
  }

 private:
  int64_t n_, vocab_;
};

/// Induction heads (Gu & Dao 2023, section 4.1.2): random tokens; a special one (id vocab - 1) at a random place and at
/// the end, where the token that followed it is asked for.
class InductionHeads final : public Generator {
 public:
  explicit InductionHeads(int64_t vocab) : vocab_(vocab) {}
  void generate(Split, RandomStream& random, ExampleRow& row) const override {
    const auto special = static_cast<int32_t>(vocab_ - 1);
    const auto l = static_cast<int64_t>(row.tokens.size());
    for (int32_t& token : row.tokens) token = static_cast<int32_t>(random.below(vocab_ - 1));
    const auto place = static_cast<size_t>(random.below(l - 2));
    row.tokens[place] = row.tokens.back() = special;
    row.targets.back() = row.tokens[place + 1];
  }

 private:
  int64_t vocab_;
};

struct MqarOptions {
  int64_t context = 64, vocab = 8192, n_pairs = 4;
  double power = 0.01;
  bool random_fill = true;
};

/// Multi-query associative recall (Arora et al. 2023, "Zoology", appendix): n_pairs keys and values side by side, then
/// each key again at distance 2 x (gap drawn with weight x^(power - 1)), where its value is the target.
/// Keys: ids 1 .. vocab / 2 - 1, values vocab / 2 .. vocab - 1. Places between queries: random ids, or 0.
class Mqar final : public Generator {
 public:
  explicit Mqar(const MqarOptions& options) : o_(options) {}
  void generate(Split, RandomStream& random, ExampleRow& row) const override {
    const auto n = static_cast<size_t>(o_.n_pairs);
    const std::vector<int32_t> keys = distinct(random, 1, o_.vocab / 2 - 1);
    const std::vector<int32_t> values = distinct(random, o_.vocab / 2, o_.vocab - 1);
    const std::vector<int64_t> gaps = draw_gaps(random);
    for (size_t i = 0; i < n; ++i) {
      row.tokens[2 * i] = keys[i];
      row.tokens[2 * i + 1] = values[i];
    }
    for (size_t i = 0; i < n; ++i) {
      const size_t place = 2 * n + 2 * static_cast<size_t>(gaps[i]);
      row.tokens[place] = keys[i];
      row.targets[place] = values[i];
    }
    if (!o_.random_fill) return;
    for (size_t i = 2 * n; i < row.tokens.size(); ++i)
      if (row.tokens[i] == 0) row.tokens[i] = static_cast<int32_t>(random.below(o_.vocab));
  }

 private:
  // n_pairs different ids of [first, last], in random order: the start of a Fisher-Yates shuffle.
  std::vector<int32_t> distinct(RandomStream& random, int64_t first, int64_t last) const {
    std::vector<int32_t> ids(static_cast<size_t>(last - first + 1));
    std::iota(ids.begin(), ids.end(), static_cast<int32_t>(first));
    for (int64_t i = 0; i < o_.n_pairs; ++i)
      std::swap(ids[static_cast<size_t>(i)], ids[static_cast<size_t>(random.between(i, static_cast<int64_t>(ids.size()) - 1))]);
    ids.resize(static_cast<size_t>(o_.n_pairs));
    return ids;
  }

  // Weighted drawing without replacement: the smallest of exponential times with rates of the weights.
  std::vector<int64_t> draw_gaps(RandomStream& random) const {
    const int64_t space = (o_.context - 2 * o_.n_pairs) / 2;
    std::vector<std::pair<double, int64_t>> times(static_cast<size_t>(space));
    for (int64_t x = 0; x < space; ++x)
      times[static_cast<size_t>(x)] = {-std::log(1.0 - random.unit()) * std::pow(static_cast<double>(x + 1), 1.0 - o_.power), x};
    std::partial_sort(times.begin(), times.begin() + o_.n_pairs, times.end());
    std::vector<int64_t> gaps;
    for (int64_t i = 0; i < o_.n_pairs; ++i) gaps.push_back(times[static_cast<size_t>(i)].second);
    return gaps;
  }

  MqarOptions o_;
};

}  // namespace

TaskPtr make_selective_copying(OptionReader& options) {
  int64_t context = 4096, n_tokens = 16, vocab = 16;
  ExampleCounts counts;
  options.read("context", context, between(2, kMaxContext));
  options.read("n_tokens", n_tokens, between(1, kMaxContext));
  options.read("vocab", vocab, between(3, 1 << 20));
  read_counts(options, counts);
  if (2 * n_tokens > context) {
    options.fail("n_tokens", fmt::format("{} tokens and as many places for the answer do not fit into data.context {}", n_tokens, context),
                 fmt::format("{} or less", context / 2));
  }
  return generated_task("selective_copying", token_shape(vocab, context), counts, std::make_shared<SelectiveCopying>(n_tokens, vocab));
}

TaskPtr make_induction_heads(OptionReader& options) {
  int64_t context = 256, vocab = 16;
  ExampleCounts counts;
  options.read("context", context, between(3, kMaxContext));
  options.read("vocab", vocab, between(2, 1 << 20));
  read_counts(options, counts);
  return generated_task("induction_heads", token_shape(vocab, context), counts, std::make_shared<InductionHeads>(vocab));
}

TaskPtr make_mqar(OptionReader& options) {
  MqarOptions o;
  ExampleCounts counts;
  options.read("context", o.context, between(4, kMaxContext));
  options.read("vocab", o.vocab, between(4, 1 << 20));
  options.read("n_pairs", o.n_pairs, between(1, kMaxContext));
  options.read("power", o.power, between(0, 100));
  options.read("random_fill", o.random_fill);
  read_counts(options, counts);
  if (4 * o.n_pairs > o.context) {
    options.fail("n_pairs", fmt::format("{} pairs and their queries do not fit into data.context {}", o.n_pairs, o.context),
                 fmt::format("{} or less, or context: {}", o.context / 4, 4 * o.n_pairs));
  }
  if (o.n_pairs > o.vocab / 2 - 1) {
    options.fail("n_pairs", fmt::format("{} pairs need as many keys, and a vocabulary of {} has {}", o.n_pairs, o.vocab, o.vocab / 2 - 1),
                 fmt::format("vocab: {}", 2 * o.n_pairs + 2));
  }
  return generated_task("mqar", token_shape(o.vocab, o.context), counts, std::make_shared<Mqar>(o));
}

}  // namespace krait::data
