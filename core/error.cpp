#include "core/error.h"

#include <fmt/format.h>

// The formatters of Shape, DType and Device derive from this one and see only fmt/core.h, which declares it.
template auto fmt::formatter<fmt::string_view>::format(const fmt::string_view& text, fmt::format_context& ctx) const
    -> decltype(ctx.out());

namespace krait::core {

void throw_error(const std::string& message) { throw Error(message); }

void throw_assert(const char* expression, const std::string& message, const char* file, int line) {
  throw Error(fmt::format("internal error at {}:{}: {} does not hold. {} Please report it with the command you ran",
                          file, line, expression, message));
}

}  // namespace krait::core
