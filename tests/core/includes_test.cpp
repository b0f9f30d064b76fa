// The rooms include only those that DESIGN.md allows: core <- kernels <- autograd <- layers <- train; data sees core.
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>

#include "tests/testing/catch.h"

namespace fs = std::filesystem;

namespace {

const std::map<std::string, std::set<std::string>> kMayInclude{
    {"core", {"core"}},
    {"kernels", {"core", "kernels"}},
    {"autograd", {"core", "kernels", "autograd"}},
    {"layers", {"core", "kernels", "autograd", "layers"}},
    {"data", {"core", "data"}},
    {"train", {"core", "kernels", "autograd", "layers", "data", "train"}}};

/// The includes of `text`, a file of `room`, that point the wrong way.
std::vector<std::string> wrong_includes(const std::string& room, const std::string& text) {
  static const std::regex include("#include \"([a-z_]+)/[^\"]*\"");
  std::vector<std::string> wrong;
  for (auto it = std::sregex_iterator(text.begin(), text.end(), include); it != std::sregex_iterator(); ++it)
    if (!kMayInclude.at(room).count((*it)[1])) wrong.push_back((*it)[0]);
  return wrong;
}

}  // namespace

TEST_CASE("no room includes a room above it") {
  int64_t files = 0;
  for (const auto& [room, allowed] : kMayInclude)
    for (const auto& entry : fs::recursive_directory_iterator(fs::path(KRAIT_TEST_SOURCE_DIR) / room)) {
      const std::string extension = entry.path().extension();
      if (extension != ".h" && extension != ".cpp" && extension != ".cu" && extension != ".cuh") continue;
      ++files;
      std::ifstream file(entry.path());
      const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
      for (const std::string& line : wrong_includes(room, text)) FAIL_CHECK(entry.path() << ": " << line);
    }
  CHECK(files > 100);
}

TEST_CASE("an include that points the wrong way is found") {
  CHECK(wrong_includes("core", "#include \"core/tensor.h\"\n#include \"layers/module.h\"\n").size() == 1);
  CHECK(wrong_includes("data", "#include \"train/config.h\"").size() == 1);
  CHECK(wrong_includes("train", "#include \"data/dataset.h\"").empty());
}
