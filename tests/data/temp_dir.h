#pragma once
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

namespace krait::testing {

/// A new directory, removed with all that is in it.
class TempDir {
 public:
  TempDir() {
    std::string name = (std::filesystem::temp_directory_path() / "krait-data-XXXXXX").string();
    if (!::mkdtemp(name.data())) std::abort();
    path_ = name;
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline std::string write_file(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

inline std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// A file of ../shared/data, or "" where the checkout has none.
inline std::string shared_data(const std::string& name) {
  const char* set = std::getenv("KRAIT_DATA_DIR");
  for (const std::string& dir : {std::string(set ? set : ""), std::string(KRAIT_TEST_SOURCE_DIR) + "/../shared/data"})
    if (!dir.empty() && std::filesystem::exists(dir + "/" + name)) return dir + "/" + name;
  return {};
}

}  // namespace krait::testing
