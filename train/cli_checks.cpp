#include "train/cli_checks.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <charconv>
#include <cmath>
#include <functional>

#include "core/config_node.h"

namespace krait::train::cli {
namespace {

CLI::Validator number(const std::string& expected, const std::function<bool(double)>& holds) {
  return {[=](std::string& text) -> std::string {
            double value = 0;
            const char* const end = text.data() + text.size();
            const auto [stop, error] = std::from_chars(text.data() + text.starts_with('+'), end, value);
            if (error == std::errc() && stop == end && std::isfinite(value) && holds(value)) return {};
            return fmt::format("found {}, expected {}", text, expected);
          },
          ""};
}

}  // namespace

CLI::Validator positive() {
  return number("a number > 0", [](double x) { return x > 0; });
}

CLI::Validator not_negative() {
  return number("a number >= 0", [](double x) { return x >= 0; });
}

CLI::Validator from_to(double low, double high) {
  return number(fmt::format("a number from {} to {}", low, high), [=](double x) { return x >= low && x <= high; });
}

CLI::Validator one_of(std::vector<std::string> names) {
  const std::string list = fmt::format("{}", fmt::join(names, ", "));
  return {[=](std::string& text) -> std::string {
            for (const std::string& name : names)
              if (name == text) return {};
            const std::string near = nearest_name(text, names);
            return fmt::format("found {}, expected one of {}{}", text, list, near.empty() ? "" : "; did you mean " + near + "?");
          },
          "{" + list + "}"};
}

}  // namespace krait::train::cli
