#pragma once
#include <csignal>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "data/documents.h"

// The files around `prepare`: signals, inputs, the output that appears whole or not at all.
namespace krait::data {

/// While it lives, SIGINT, SIGTERM and SIGHUP set a flag instead of ending the process, so that temporary files are
/// removed on the way out.
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;

 private:
  struct sigaction old_[3];
};
/// Throws Error when a signal came.
void throw_if_interrupted();

/// Finds the input files. What is not a regular file (standard input, a pipe) is copied to a temporary file first,
/// since the text is read more than once; the copies go with this object.
class InputFiles {
 public:
  explicit InputFiles(std::filesystem::path spool_directory) : directory_(std::move(spool_directory)) {}
  ~InputFiles();
  InputFiles(const InputFiles&) = delete;
  std::vector<TextInput> find(const std::vector<std::string>& names, const std::string& format);
  const std::vector<std::string>& paths() const { return paths_; }
  int64_t total_bytes() const;

 private:
  std::string spool(const std::string& path, const std::string& shown);
  std::filesystem::path directory_;
  std::vector<std::string> paths_, spooled_;
};

/// The output under a temporary name beside it, renamed by publish() and removed by the destructor otherwise.
class OutputFile {
 public:
  OutputFile(const std::string& path, bool overwrite);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  const std::string& temporary() const { return temporary_; }
  std::filesystem::path directory() const;
  void refuse_inputs(const std::vector<std::string>& inputs) const;
  /// Writes the file through to the disk and gives it its name. Returns its size.
  int64_t publish();

 private:
  std::string path_, temporary_;
  bool overwrite_;
};

/// \n, \t, \f, \r, \0, \\ and \xHH; throws ConfigError for anything else behind a backslash.
std::string unescape(std::string_view text);

}  // namespace krait::data
