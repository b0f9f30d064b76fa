#include "core/error.h"

namespace krait::core {

void throw_error(const std::string& message) { throw Error(message); }

void throw_assert(const char* expression, const std::string& message, const char* file, int line) {
  throw Error(fmt::format("internal error at {}:{}: {} does not hold. {} Please report it with the command you ran",
                          file, line, expression, message));
}

}  // namespace krait::core
