#include "train/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

namespace krait::train {

int64_t check_posix(int64_t result, std::string_view what, std::source_location) {
  if (result < 0) throw Error(fmt::format("{}: {}", what, std::strerror(errno)));
  return result;
}

FileDescriptor FileDescriptor::open(const std::string& path, int flags, int mode) {
  const auto fd = check_posix(::open(path.c_str(), flags | O_CLOEXEC, mode), path + ": cannot be opened");
  return {static_cast<int>(fd), path};
}

FileDescriptor::FileDescriptor(FileDescriptor&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), path_(std::move(other.path_)) {}

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(path_, other.path_);
  return *this;
}

FileDescriptor::~FileDescriptor() {
  if (fd_ >= 0) ::close(fd_);
}

void FileDescriptor::write_all(std::string_view bytes) const {
  while (!bytes.empty()) {
    const ssize_t written = ::write(fd_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    check_posix(written, path_ + ": cannot be written");
    bytes.remove_prefix(static_cast<size_t>(written));
  }
}

void FileDescriptor::sync() const { check_posix(::fsync(fd_), path_ + ": cannot be written to the disk"); }

void FileDescriptor::close() {
  if (fd_ >= 0) check_posix(::close(std::exchange(fd_, -1)), path_ + ": cannot be written");
}

std::string read_file(const std::string& path) {
  const FileDescriptor file = FileDescriptor::open(path, O_RDONLY);
  std::string content;
  char buffer[1 << 16];
  while (true) {
    const ssize_t count = ::read(file.get(), buffer, sizeof buffer);
    if (count < 0 && errno == EINTR) continue;
    check_posix(count, path + ": cannot be read");
    if (count == 0) return content;
    content.append(buffer, static_cast<size_t>(count));
  }
}

void write_file_atomic(const std::string& path, std::string_view content) {
  const std::string temporary = fmt::format("{}.tmp{}", path, ::getpid());
  try {
    FileDescriptor file = FileDescriptor::open(temporary, O_WRONLY | O_CREAT | O_TRUNC);
    file.write_all(content);
    file.sync();
    file.close();
    check_posix(::rename(temporary.c_str(), path.c_str()), path + ": cannot be replaced");
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  sync_directory(std::filesystem::path(path).parent_path().string());
}

void sync_directory(const std::string& path) {
  const FileDescriptor directory = FileDescriptor::open(path.empty() ? "." : path, O_RDONLY | O_DIRECTORY);
  // Some network file systems cannot; they order renames themselves.
  if (::fsync(directory.get()) < 0 && errno != EINVAL) check_posix(-1, path + ": cannot be written to the disk");
}

AppendFile::AppendFile(const std::string& path) : file_(FileDescriptor::open(path, O_WRONLY | O_CREAT | O_APPEND)) {}

void AppendFile::append(std::string_view record) {
  struct stat before {};
  check_posix(::fstat(file_.get(), &before), file_.path() + ": cannot be read");
  try {
    file_.write_all(record);
  } catch (...) {
    if (::ftruncate(file_.get(), before.st_size) < 0) errno = 0;  // the first error is the one to report
    throw;
  }
}

}  // namespace krait::train
