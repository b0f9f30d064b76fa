#include "train/run_directory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <ctime>
#include <filesystem>
#include <set>

#include "train/yaml.h"

namespace krait::train {
namespace fs = std::filesystem;
namespace {

/// True when the directory holds nothing but what a process that was killed at its very start leaves.
bool is_untouched(const std::string& path) {
  std::error_code error;
  const fs::directory_iterator entries(path, error);
  if (error) throw Error(fmt::format("{}: cannot be read: {}", path, error.message()));
  for (const fs::directory_entry& entry : entries) {
    const std::string name = entry.path().filename().string();
    if (name != ".lock" && !name.starts_with("config.yaml.tmp")) return false;
  }
  return true;
}

std::string make_default_directory(const std::string& name) {
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  localtime_r(&now, &local);
  char stamp[32];
  std::strftime(stamp, sizeof stamp, "%Y%m%d-%H%M%S", &local);
  fs::create_directories("runs");
  const std::string stem = fmt::format("runs/{}-{}", name, stamp);
  for (int i = 1;; ++i) {
    const std::string path = i == 1 ? stem : fmt::format("{}-{}", stem, i);
    if (::mkdir(path.c_str(), 0755) == 0) return path;
    if (errno != EEXIST) check_posix(-1, path + ": cannot be made");
  }
}

}  // namespace

RunDirectory RunDirectory::create(const std::string& path, const std::string& name, bool resume) {
  if (path.empty()) {
    if (resume) throw ConfigError("--resume: which run? Give its directory\n       try --run-dir DIR --resume");
    RunDirectory run(make_default_directory(name), false);
    run.lock();
    return run;
  }
  std::error_code error;
  if (fs::exists(path, error) && !fs::is_directory(path, error)) {
    throw ConfigError(fmt::format("--run-dir: {} is not a directory", path));
  }
  const bool existed = fs::is_directory(path, error);
  if (existed && !is_untouched(path)) {
    const bool is_run = fs::exists(path + "/config.yaml");
    if (!is_run) {
      throw ConfigError(fmt::format("--run-dir: {} holds other files and no run (no config.yaml)\n       try an empty or new directory", path));
    }
    if (!resume) {
      throw ConfigError(fmt::format("--run-dir: {} already holds a run\n       try --resume to continue it, or another directory", path));
    }
  }
  if (!existed && (fs::create_directories(path, error), error)) {
    throw Error(fmt::format("{}: cannot be made: {}", path, error.message()));
  }
  RunDirectory run(fs::path(path).lexically_normal().string(), false);
  run.lock();
  run.has_run_ = fs::exists(run.config_file());
  return run;
}

RunDirectory RunDirectory::open(const std::string& path) {
  std::error_code error;
  if (fs::is_regular_file(path, error)) throw ConfigError(path + ": is a file, expected the directory of a run");
  if (!fs::is_directory(path, error)) {
    const bool unreadable = error && error != std::errc::no_such_file_or_directory;
    throw ConfigError(path + ": " + (unreadable ? "cannot be read: " + error.message() : "no such run directory"));
  }
  const bool is_run = fs::exists(path + "/config.yaml", error);
  if (error) throw ConfigError(fmt::format("{}/config.yaml: cannot be read: {}", path, error.message()));
  if (!is_run) throw ConfigError(path + ": holds no run (no config.yaml)");
  return RunDirectory(fs::path(path).lexically_normal().string(), true);
}

FileDescriptor lock_directory(const std::string& directory, std::string_view doing) {
  const std::string file = directory + "/.lock";
  FileDescriptor lock = FileDescriptor::open(file, O_RDWR | O_CREAT);
  if (::flock(lock.get(), LOCK_EX | LOCK_NB) < 0) {
    if (errno != EWOULDBLOCK) check_posix(-1, file + ": cannot be locked");
    std::string owner = read_file(file);
    if (!owner.empty()) owner = " (" + owner + ")";
    throw Error(fmt::format("{}: another process{} is {} in this directory\n       try another --run-dir, or wait for it", directory,
                            owner, doing));
  }
  check_posix(::ftruncate(lock.get(), 0), file + ": cannot be written");
  lock.write_all(fmt::format("pid {}", ::getpid()));
  return lock;
}

namespace {

void compare(const ConfigNode* before, const ConfigNode* after, const std::string& path, std::vector<std::string>& out) {
  if (before && after && before->is_map() && after->is_map()) {
    std::set<std::string> keys;
    for (const auto& [key, value] : before->entries()) keys.insert(key);
    for (const auto& [key, value] : after->entries()) keys.insert(key);
    for (const std::string& key : keys) compare(before->find(key), after->find(key), path.empty() ? key : path + "." + key, out);
    return;
  }
  const auto text = [](const ConfigNode* node) {
    if (!node) return std::string("(none)");
    ConfigNode wrapped = ConfigNode::list();
    wrapped.append(*node);
    std::string yaml = to_yaml(wrapped);  // "[value]\n": on one line, whatever it is
    return yaml.substr(1, yaml.size() - 3);
  };
  const std::string a = text(before), b = text(after);
  if (a != b) out.push_back(fmt::format("{}: {} -> {}", path, a, b));
}

}  // namespace

std::vector<std::string> config_differences(const ConfigNode& before, const ConfigNode& after) {
  std::vector<std::string> differences;
  compare(&before, &after, "", differences);
  return differences;
}

}  // namespace krait::train
