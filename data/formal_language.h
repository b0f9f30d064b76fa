#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "data/random_stream.h"

namespace krait::data {

/// A formal language as a task (Deletang et al. 2022, "Neural Networks and the Chomsky Hierarchy"). Tokens are
/// 1 .. vocabulary(); 0 is padding. Every prefix has an answer: the state of an automaton, the value of an expression,
/// or 1 for members of the language and 0 for others.
class Language {
 public:
  virtual ~Language() = default;
  virtual int64_t vocabulary() const = 0;
  virtual int64_t answers() const = 0;
  /// Lengths that strings have: multiples of .first plus .second.
  virtual std::pair<int64_t, int64_t> lengths() const { return {1, 0}; }
  /// A random string of the given length. Membership: half of them are members.
  virtual void draw(RandomStream& random, std::vector<int32_t>& tokens) const = 0;
  /// The answers after each token; kIgnore, which they hold before, where the prefix has none.
  virtual void answer(const std::vector<int32_t>& tokens, std::vector<int64_t>& answers) const = 0;
};

/// parity (of ones; ids 1, 2 are the bits 0, 1), modular_addition (ids 1 .. m are 0 .. m - 1), modular_arithmetic
/// (digits, then + - *; * binds stronger), cycle_navigation (-1, stay, +1 on a cycle of m), even_a ((aa)*), anbn,
/// anbncn, dyck.
const std::vector<std::string>& language_names();
std::shared_ptr<const Language> make_language(const std::string& name, int64_t modulus, int64_t kinds);

}  // namespace krait::data
