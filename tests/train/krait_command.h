#pragma once
#include <sys/wait.h>

#include <cstdlib>
#include <string>

#include "tests/testing/catch.h"
#include "tests/train/temporary_directory.h"
#include "train/files.h"

namespace krait::testing {

struct Outcome {
  int status = 0;
  std::string out, err;
};

/// The program under test: KRAIT_BIN, or the one of this build.
inline std::string krait_program() {
  const char* bin = std::getenv("KRAIT_BIN");
  return bin ? bin : KRAIT_TEST_BINARY_DIR "/krait";
}

/// Runs the krait command as a user does: a process of its own, in the shell.
inline Outcome krait_command(const std::string& arguments) {
  const TemporaryDirectory tmp;
  const int status = std::system(
      fmt::format("'{}' {} > '{}' 2> '{}' < /dev/null", krait_program(), arguments, tmp / "out", tmp / "err").c_str());
  REQUIRE(WIFEXITED(status));
  return {WEXITSTATUS(status), train::read_file(tmp / "out"), train::read_file(tmp / "err")};
}

}  // namespace krait::testing
