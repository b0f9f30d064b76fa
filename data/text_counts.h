#pragma once
#include <string_view>

#include "data/token_store.h"

namespace krait::data {

/// Counts text that arrives in pieces. Words are runs without ASCII white space, lines are newlines, as `wc` counts;
/// characters are the bytes that do not continue a UTF-8 code point.
class TextCounter {
 public:
  void add(std::string_view text) {
    counts_.bytes += static_cast<int64_t>(text.size());
    for (const char c : text) {
      const bool space = c == ' ' || (c >= '\t' && c <= '\r');
      counts_.words += !space && !in_word_;
      counts_.lines += c == '\n';
      counts_.characters += (static_cast<unsigned char>(c) & 0xC0u) != 0x80u;
      in_word_ = !space;
    }
  }
  /// The next piece begins a new text: a word does not continue.
  void end_text() { in_word_ = false; }
  const TextCounts& counts() const { return counts_; }

 private:
  TextCounts counts_;
  bool in_word_ = false;
};

}  // namespace krait::data
