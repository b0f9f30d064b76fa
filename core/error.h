#pragma once
#include <fmt/core.h>

#include <source_location>
#include <stdexcept>
#include <string>

namespace krait {
inline namespace core {

/// A failure with a message that a user can act on. Bad input and failed library calls throw it.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An error in a config, an override or the command line: the process exits with status 2.
class ConfigError : public Error {
 public:
  using Error::Error;
};

[[noreturn]] void throw_error(const std::string& message);
[[noreturn]] void throw_assert(const char* expression, const std::string& message, const char* file, int line);

}  // namespace core
}  // namespace krait

/// For what a caller can get wrong: throws krait::Error with the formatted message.
#define KRAIT_CHECK(condition, ...)                           \
  do {                                                        \
    if (!(condition)) [[unlikely]]                            \
      ::krait::core::throw_error(::fmt::format(__VA_ARGS__)); \
  } while (false)

/// For our own mistakes: names the expression and the place.
#define KRAIT_ASSERT(condition, ...)                                                                 \
  do {                                                                                               \
    if (!(condition)) [[unlikely]]                                                                   \
      ::krait::core::throw_assert(#condition, ::fmt::format("" __VA_ARGS__), __FILE__, __LINE__);    \
  } while (false)
