#include "data/formal_language.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "data/generated_task.h"
#include "data/task_kinds.h"

namespace krait::data {
namespace {

using Tokens = std::vector<int32_t>;
using Answers = std::vector<int64_t>;

void random_tokens(RandomStream& random, Tokens& tokens, int64_t vocabulary) {
  for (int32_t& token : tokens) token = static_cast<int32_t>(random.between(1, vocabulary));
}

// ---- regular languages: the answer is the state after each token

class Parity final : public Language {
 public:
  int64_t vocabulary() const override { return 2; }
  int64_t answers() const override { return 2; }
  void draw(RandomStream& random, Tokens& tokens) const override { random_tokens(random, tokens, 2); }
  void answer(const Tokens& tokens, Answers& out) const override {
    int64_t ones = 0;
    for (size_t i = 0; i < tokens.size(); ++i) out[i] = ones = (ones + tokens[i] - 1) % 2;
  }
};

class ModularAddition final : public Language {
 public:
  explicit ModularAddition(int64_t modulus) : m_(modulus) {}
  int64_t vocabulary() const override { return m_; }
  int64_t answers() const override { return m_; }
  void draw(RandomStream& random, Tokens& tokens) const override { random_tokens(random, tokens, m_); }
  void answer(const Tokens& tokens, Answers& out) const override {
    int64_t sum = 0;
    for (size_t i = 0; i < tokens.size(); ++i) out[i] = sum = (sum + tokens[i] - 1) % m_;
  }

 private:
  int64_t m_;
};

class CycleNavigation final : public Language {
 public:
  explicit CycleNavigation(int64_t modulus) : m_(modulus) {}
  int64_t vocabulary() const override { return 3; }
  int64_t answers() const override { return m_; }
  void draw(RandomStream& random, Tokens& tokens) const override { random_tokens(random, tokens, 3); }
  void answer(const Tokens& tokens, Answers& out) const override {
    int64_t place = 0;
    for (size_t i = 0; i < tokens.size(); ++i) out[i] = place = (place + tokens[i] - 2 + m_) % m_;
  }

 private:
  int64_t m_;
};

class EvenA final : public Language {
 public:
  int64_t vocabulary() const override { return 1; }
  int64_t answers() const override { return 2; }
  void draw(RandomStream&, Tokens& tokens) const override { std::fill(tokens.begin(), tokens.end(), 1); }
  void answer(const Tokens& tokens, Answers& out) const override {
    for (size_t i = 0; i < tokens.size(); ++i) out[i] = i % 2;
  }
};

// ---- arithmetic: digits 1 .. m, then + - *

class ModularArithmetic final : public Language {
 public:
  explicit ModularArithmetic(int64_t modulus) : m_(modulus) {}
  int64_t vocabulary() const override { return m_ + 3; }
  int64_t answers() const override { return m_; }
  std::pair<int64_t, int64_t> lengths() const override { return {2, 1}; }
  void draw(RandomStream& random, Tokens& tokens) const override {
    for (size_t i = 0; i < tokens.size(); ++i)
      tokens[i] = static_cast<int32_t>(i % 2 == 0 ? random.between(1, m_) : random.between(m_ + 1, m_ + 3));
  }
  void answer(const Tokens& tokens, Answers& out) const override {
    int64_t sum = 0, term = 0;  // of whole terms, and the product under way with its sign
    int64_t op = m_ + 1;
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (i % 2 == 1) {
        op = tokens[i];
        continue;
      }
      const int64_t digit = tokens[i] - 1;
      if (op == m_ + 3) {
        term = term * digit % m_;
      } else {
        sum = (sum + term) % m_;
        term = op == m_ + 1 ? digit : (m_ - digit) % m_;
      }
      out[i] = (sum + term) % m_;
    }
  }

 private:
  int64_t m_;
};

// ---- membership: half of the strings are members, the others differ from one in a place or in the counts

/// a^n b^n (letters 2) or a^n b^n c^n (letters 3), n >= 1.
class EqualBlocks final : public Language {
 public:
  explicit EqualBlocks(int64_t letters) : k_(letters) {}
  int64_t vocabulary() const override { return k_; }
  int64_t answers() const override { return 2; }
  std::pair<int64_t, int64_t> lengths() const override { return {k_, 0}; }

  void draw(RandomStream& random, Tokens& tokens) const override {
    const auto l = static_cast<int64_t>(tokens.size());
    for (int64_t i = 0; i < l; ++i) tokens[static_cast<size_t>(i)] = static_cast<int32_t>(1 + i * k_ / l);
    if (random.coin()) return;
    const auto place = [&] { return static_cast<size_t>(random.below(l)); };
    switch (random.below(3)) {
      case 0: {  // another letter
        int32_t& token = tokens[place()];
        token = static_cast<int32_t>(1 + (token - 1 + random.between(1, k_ - 1)) % k_);
        return;
      }
      case 1: {  // two letters change places
        size_t i = 0, j = 0;
        while (tokens[i] == tokens[j]) i = place(), j = place();
        std::swap(tokens[i], tokens[j]);
        return;
      }
      default: {  // blocks of other lengths
        std::array<int64_t, 2> cuts{};
        const auto equal = [&] { return cuts[0] == l / k_ && (k_ == 2 || cuts[1] == 2 * l / k_); };
        do {
          cuts = {random.between(0, l), k_ == 2 ? l : random.between(0, l)};
          if (cuts[0] > cuts[1]) std::swap(cuts[0], cuts[1]);
        } while (equal());
        for (int64_t i = 0; i < l; ++i) tokens[static_cast<size_t>(i)] = 1 + (i >= cuts[0]) + (i >= cuts[1]);
      }
    }
  }

  void answer(const Tokens& tokens, Answers& out) const override {
    std::array<int64_t, 3> counts{};
    bool sorted = true;
    for (size_t i = 0; i < tokens.size(); ++i) {
      sorted = sorted && (i == 0 || tokens[i] >= tokens[i - 1]);
      ++counts[static_cast<size_t>(tokens[i] - 1)];
      out[i] = sorted && counts[0] == counts[1] && (k_ == 2 || counts[1] == counts[2]);
    }
  }

 private:
  int64_t k_;
};

/// Balanced brackets of k kinds: opening 1 .. k, closing k + 1 .. 2 k.
class Dyck final : public Language {
 public:
  explicit Dyck(int64_t kinds) : k_(kinds) {}
  int64_t vocabulary() const override { return 2 * k_; }
  int64_t answers() const override { return 2; }
  std::pair<int64_t, int64_t> lengths() const override { return {2, 0}; }

  // Uniform over the balanced strings of the length: with r tokens to come at height h, one opens with probability
  // (h + 2) (r - h) / (2 r (h + 1)), the share of completions that begin so.
  void draw(RandomStream& random, Tokens& tokens) const override {
    Tokens open;
    for (size_t i = 0; i < tokens.size(); ++i) {
      const auto r = static_cast<double>(tokens.size() - i), h = static_cast<double>(open.size());
      if (random.unit() < (h + 2) * (r - h) / (2 * r * (h + 1))) {
        open.push_back(static_cast<int32_t>(random.between(1, k_)));
        tokens[i] = open.back();
      } else {
        tokens[i] = static_cast<int32_t>(open.back() + k_);
        open.pop_back();
      }
    }
    if (random.coin()) return;
    int32_t& token = tokens[static_cast<size_t>(random.below(static_cast<int64_t>(tokens.size())))];
    token = static_cast<int32_t>(1 + (token - 1 + random.between(1, 2 * k_ - 1)) % (2 * k_));
  }

  void answer(const Tokens& tokens, Answers& out) const override {
    Tokens open;
    bool valid = true;
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] <= k_) {
        open.push_back(tokens[i]);
      } else if (valid) {
        valid = !open.empty() && open.back() + k_ == tokens[i];
        if (valid) open.pop_back();
      }
      out[i] = valid && open.empty();
    }
  }

 private:
  int64_t k_;
};

// ---- the task

struct Lengths {
  int64_t first = 1, last = 1;  // multiples of `step` plus `offset` in between are used
  int64_t step = 1, offset = 0;
  int64_t smallest() const { return first + ((offset - first) % step + step) % step; }
  int64_t count() const { return smallest() > last ? 0 : (last - smallest()) / step + 1; }
};

class FormalLanguage final : public Generator {
 public:
  FormalLanguage(std::shared_ptr<const Language> language, Lengths train, Lengths eval, bool every)
      : language_(std::move(language)), train_(train), eval_(eval), every_(every) {}

  void generate(Split split, RandomStream& random, ExampleRow& row) const override {
    const Lengths& lengths = split == Split::train ? train_ : eval_;
    const auto l = static_cast<size_t>(lengths.smallest() + lengths.step * random.below(lengths.count()));
    Tokens tokens(l);
    Answers answers(l, kIgnore);
    language_->draw(random, tokens);
    language_->answer(tokens, answers);
    std::copy(tokens.begin(), tokens.end(), row.tokens.begin());
    row.length = static_cast<int32_t>(l);
    if (every_) std::copy(answers.begin(), answers.end(), row.targets.begin());
    else row.label = answers.back();
  }

 private:
  std::shared_ptr<const Language> language_;
  Lengths train_, eval_;
  bool every_;
};

Lengths read_lengths(OptionReader& options, const std::string& name, const Language& language, std::array<double, 2> range) {
  options.read(name, range, between(1, kMaxContext));
  Lengths lengths{static_cast<int64_t>(range[0]), static_cast<int64_t>(range[1])};
  std::tie(lengths.step, lengths.offset) = language.lengths();
  if (static_cast<double>(lengths.first) != range[0] || static_cast<double>(lengths.last) != range[1] || range[0] > range[1]) {
    options.fail(name, fmt::format("found [{}, {}], expected two integers, the shortest and the longest", range[0], range[1]), "[1, 40]");
  }
  if (lengths.count() == 0) {
    options.fail(name, fmt::format("the language has no string of {} to {} tokens", lengths.first, lengths.last),
                 fmt::format("[{}, {}]", lengths.first, lengths.smallest()));
  }
  return lengths;
}

}  // namespace

const std::vector<std::string>& language_names() {
  static const std::vector<std::string> names{"parity", "modular_addition", "modular_arithmetic", "cycle_navigation",
                                              "even_a", "anbn", "anbncn", "dyck"};
  return names;
}

std::shared_ptr<const Language> make_language(const std::string& name, int64_t modulus, int64_t kinds) {
  if (name == "parity") return std::make_shared<Parity>();
  if (name == "modular_addition") return std::make_shared<ModularAddition>(modulus);
  if (name == "modular_arithmetic") return std::make_shared<ModularArithmetic>(modulus);
  if (name == "cycle_navigation") return std::make_shared<CycleNavigation>(modulus);
  if (name == "even_a") return std::make_shared<EvenA>();
  if (name == "anbn") return std::make_shared<EqualBlocks>(2);
  if (name == "anbncn") return std::make_shared<EqualBlocks>(3);
  if (name == "dyck") return std::make_shared<Dyck>(kinds);
  throw_error(fmt::format("formal language '{}' is unknown", name));
}

TaskPtr make_formal_language(OptionReader& options) {
  std::string name = "parity", supervise = "end";
  int64_t modulus = 5, kinds = 2;
  ExampleCounts counts;
  options.choice("language", name, language_names());
  options.choice("supervise", supervise, {"end", "every"});
  if (name.starts_with("modular") || name == "cycle_navigation") options.read("modulus", modulus, between(2, 10000));
  if (name == "dyck") options.read("kinds", kinds, between(1, 10000));
  const auto language = make_language(name, modulus, kinds);
  const Lengths train = read_lengths(options, "train_lengths", *language, {1, 40});
  const Lengths eval = read_lengths(options, "eval_lengths", *language,
                                    {static_cast<double>(train.first), static_cast<double>(train.last)});
  read_fixed_context(options, train.last);
  read_counts(options, counts);
  const bool every = supervise == "every";
  TaskShape shape{.context = train.last, .eval_context = eval.last, .variable_length = true};
  shape.kind = every ? TaskShape::Kind::token_targets : TaskShape::Kind::labels;
  shape.vocab_size = std::max(language->vocabulary() + 1, every ? language->answers() : 0);
  shape.n_classes = every ? shape.vocab_size : language->answers();
  return generated_task("formal_language", shape, counts, std::make_shared<FormalLanguage>(language, train, eval, every));
}

}  // namespace krait::data
