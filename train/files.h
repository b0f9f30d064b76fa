#pragma once
#include <cstdint>
#include <source_location>
#include <string>
#include <string_view>

#include "core/error.h"

/// Files that survive a kill at any instant: written beside, synced, renamed.
namespace krait::train {

/// Throws Error "<what>: <strerror(errno)>" when a POSIX call returned a negative value; returns it otherwise.
int64_t check_posix(int64_t result, std::string_view what,
                    std::source_location where = std::source_location::current());

/// Owns an open file.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  FileDescriptor(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
  /// open(2) with O_CLOEXEC; throws with the path.
  static FileDescriptor open(const std::string& path, int flags, int mode = 0644);
  FileDescriptor(FileDescriptor&& other) noexcept;
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  ~FileDescriptor();
  int get() const { return fd_; }
  const std::string& path() const { return path_; }
  void write_all(std::string_view bytes) const;
  void sync() const;
  /// Closes and reports a failure that only shows now.
  void close();

 private:
  int fd_ = -1;
  std::string path_;
};

std::string read_file(const std::string& path);
/// Either the old content or the new one is there at any instant, also after a power cut.
void write_file_atomic(const std::string& path, std::string_view content);
/// Makes names created in or renamed into a directory permanent.
void sync_directory(const std::string& path);

/// A file that only grows, one record a call. A record is written by one write(2); a record that did not fit on the
/// disk is taken back before the error is thrown, so that the file stays readable.
class AppendFile {
 public:
  AppendFile() = default;
  explicit AppendFile(const std::string& path);
  void append(std::string_view record);

 private:
  FileDescriptor file_;
};

}  // namespace krait::train
