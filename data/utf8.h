#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace krait::data::utf8 {

/// One code point at the start of a text: its value and how many bytes it takes.
/// size 0: the bytes are not UTF-8 (overlong forms, surrogates and values above U+10FFFF included).
struct CodePoint {
  char32_t value = 0;
  size_t size = 0;
};
CodePoint first(std::string_view text);

void append(std::string& out, char32_t code_point);
/// "'é' (U+00E9)"; control characters without the quotes.
std::string describe(char32_t code_point);

/// Position of the first byte that is not part of valid UTF-8; npos when all is valid.
size_t find_invalid(std::string_view text);
/// Length of the longest prefix that does not end inside a code point. Invalid bytes count as complete.
size_t complete_prefix(std::string_view text);
/// Code points in valid text: bytes that do not continue one.
int64_t count(std::string_view text);
/// Bytes of the first n code points (all of the text when it has fewer).
size_t prefix_of(std::string_view text, int64_t n);

}  // namespace krait::data::utf8
