#include "tests/train/krait_command.h"

using namespace krait;
using namespace krait::testing;

TEST_CASE("krait data fetch: refuses unknown sets and says what a mirror lacks") {
  const TemporaryDirectory tmp;
  const Outcome unknown = krait_command("data fetch imagenet");
  CHECK(unknown.status == 2);
  CHECK(contains(unknown.err, "imagenet"));
  const Outcome empty = krait_command(fmt::format("data fetch shakespeare --mirror '{}' -o '{}'", tmp / ".", tmp / "out"));
  CHECK(empty.status == 1);
  CHECK(contains(empty.err, "holds neither input.txt nor input.txt"));
  CHECK_FALSE(std::filesystem::exists(tmp / "out/tinyshakespeare"));
}
