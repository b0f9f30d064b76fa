#pragma once
// One include for Catch2 v2 (Debian 12) and v3 (Ubuntu 24.04).
#if KRAIT_CATCH_MAJOR >= 3
#include <catch2/catch_approx.hpp>
#include <catch2/catch_message.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
using Catch::Approx;
#else
#include <catch2/catch.hpp>
#endif

#include <string>

/// Runs `code`, expects a krait::Error, returns its message. Tests compare message text.
template <class F>
std::string error_of(F&& code);

#include "core/error.h"
template <class F>
std::string error_of(F&& code) {
  try {
    code();
  } catch (const krait::Error& e) {
    return e.what();
  }
  FAIL("expected an error");
  return {};
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }
