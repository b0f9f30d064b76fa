#include "data/prepare_files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/error.h"

namespace krait::data {
namespace {

namespace fs = std::filesystem;

constexpr int kSignals[] = {SIGINT, SIGTERM, SIGHUP};
volatile std::sig_atomic_t interrupted_by = 0;

void note_signal(int signal) { interrupted_by = signal; }

// A file descriptor that is closed with its scope.
struct Descriptor {
  int fd;
  explicit Descriptor(int descriptor) : fd(descriptor) {}
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
  Descriptor(const Descriptor&) = delete;
};

bool is_json_lines(const std::string& path, const std::string& format) {
  const std::string extension = fs::path(path).extension().string();
  return format == "jsonl" || (format == "auto" && (extension == ".jsonl" || extension == ".ndjson"));
}

bool is_hidden(const fs::path& path) { return path.filename().string().starts_with('.'); }

std::vector<std::string> files_below(const std::string& directory) {
  std::vector<std::string> out;
  std::error_code error;
  for (auto it = fs::recursive_directory_iterator(directory, error); !error && it != fs::recursive_directory_iterator();
       it.increment(error)) {
    if (is_hidden(it->path())) {
      if (it->is_directory()) it.disable_recursion_pending();
    } else if (it->is_regular_file()) {
      out.push_back(it->path().string());
    }
  }
  KRAIT_CHECK(!error, "{}: cannot be read: {}", directory, error.message());
  KRAIT_CHECK(!out.empty(), "{}: the directory holds no files", directory);
  std::sort(out.begin(), out.end());
  return out;
}

}  // namespace

InterruptGuard::InterruptGuard() {
  interrupted_by = 0;
  struct sigaction action = {};
  action.sa_handler = note_signal;
  sigemptyset(&action.sa_mask);
  for (size_t i = 0; i < 3; ++i) {
    const int status = ::sigaction(kSignals[i], nullptr, &old_[i]);
    KRAIT_ASSERT(status == 0, "{}", std::strerror(errno));
    if (old_[i].sa_handler != SIG_IGN) ::sigaction(kSignals[i], &action, nullptr);  // nohup stays in force
  }
}

InterruptGuard::~InterruptGuard() {
  for (size_t i = 0; i < 3; ++i) ::sigaction(kSignals[i], &old_[i], nullptr);
}

void throw_if_interrupted() {
  KRAIT_CHECK(interrupted_by == 0, "interrupted ({}); nothing was written", strsignal(interrupted_by));
}

InputFiles::~InputFiles() {
  for (const std::string& path : spooled_) ::unlink(path.c_str());
}

std::string InputFiles::spool(const std::string& path, const std::string& shown) {
  const Descriptor in(path == "-" ? ::dup(STDIN_FILENO) : ::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  KRAIT_CHECK(in.fd >= 0, "{}: cannot be opened: {}", shown, std::strerror(errno));
  std::string name = (directory_ / ".krait-input-XXXXXX").string();
  const Descriptor out(::mkstemp(name.data()));
  KRAIT_CHECK(out.fd >= 0, "{}: cannot be created: {}", name, std::strerror(errno));
  spooled_.push_back(name);
  std::vector<char> buffer(size_t{1} << 20);
  for (;;) {
    throw_if_interrupted();
    const ssize_t n = ::read(in.fd, buffer.data(), buffer.size());
    if (n < 0 && errno == EINTR) continue;
    KRAIT_CHECK(n >= 0, "{}: cannot be read: {}", shown, std::strerror(errno));
    if (n == 0) return name;
    for (ssize_t done = 0; done < n;) {
      const ssize_t written = ::write(out.fd, buffer.data() + done, static_cast<size_t>(n - done));
      if (written < 0 && errno == EINTR) continue;
      KRAIT_CHECK(written > 0, "{}: cannot keep {} there for the second reading: {}", name, shown,
                  std::strerror(errno));
      done += written;
    }
  }
}

std::vector<TextInput> InputFiles::find(const std::vector<std::string>& names, const std::string& format) {
  std::vector<TextInput> out;
  const auto add = [&](const std::string& path, const std::string& shown) {
    out.push_back({path, shown, is_json_lines(shown, format)});
    paths_.push_back(path);
  };
  for (const std::string& name : names) {
    if (name == "-") {
      add(spool(name, "standard input"), "standard input");
      continue;
    }
    std::error_code error;
    const auto status = fs::status(name, error);
    KRAIT_CHECK(fs::exists(status), "{}: {}", name,
                status.type() == fs::file_type::not_found ? "no such file or directory" : "cannot be read: " + error.message());
    if (fs::is_directory(status)) {
      for (const std::string& file : files_below(name)) add(file, file);
    } else {
      add(fs::is_regular_file(status) ? name : spool(name, name), name);
    }
  }
  return out;
}

int64_t InputFiles::total_bytes() const {
  int64_t total = 0;
  for (const std::string& path : paths_) {
    std::error_code error;
    const auto size = fs::file_size(path, error);
    KRAIT_CHECK(!error, "{}: {}", path, error.message());
    total += static_cast<int64_t>(size);
  }
  return total;
}

OutputFile::OutputFile(const std::string& path, bool overwrite) : path_(path), overwrite_(overwrite) {
  KRAIT_CHECK(!fs::is_directory(path), "{}: is a directory; give the name of the file to write", path);
  KRAIT_CHECK(overwrite || !fs::exists(path), "{}: exists already; choose another name, or replace it with --overwrite",
              path);
  std::error_code error;
  fs::create_directories(directory(), error);
  KRAIT_CHECK(!error, "{}: cannot create the directory: {}", directory().string(), error.message());
  // Hidden: the output may lie in a directory of inputs, and would be read while it grows.
  temporary_ = (directory() / fmt::format(".{}.partial-{}", fs::path(path).filename().string(), ::getpid())).string();
  const Descriptor probe(::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  KRAIT_CHECK(probe.fd >= 0, "{}: cannot be created: {}", temporary_, std::strerror(errno));
}

OutputFile::~OutputFile() {
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

fs::path OutputFile::directory() const {
  const fs::path parent = fs::path(path_).parent_path();
  return parent.empty() ? fs::path(".") : parent;
}

void OutputFile::refuse_inputs(const std::vector<std::string>& inputs) const {
  for (const std::string& input : inputs) {
    std::error_code ignored;
    KRAIT_CHECK(!fs::equivalent(input, path_, ignored), "{}: is both input and output", path_);
  }
}

int64_t OutputFile::publish() {
  const Descriptor file(::open(temporary_.c_str(), O_RDONLY | O_CLOEXEC));
  KRAIT_CHECK(file.fd >= 0 && ::fsync(file.fd) == 0, "{}: cannot be written: {}", temporary_, std::strerror(errno));
  struct stat status;
  KRAIT_CHECK(::fstat(file.fd, &status) == 0, "{}: {}", temporary_, std::strerror(errno));
  // Without --overwrite a file that appeared meanwhile is kept: link fails where rename would replace.
  if (overwrite_) {
    KRAIT_CHECK(::rename(temporary_.c_str(), path_.c_str()) == 0, "{}: cannot be renamed to {}: {}", temporary_, path_,
                std::strerror(errno));
    temporary_.clear();
  } else if (::link(temporary_.c_str(), path_.c_str()) != 0) {
    KRAIT_CHECK(errno != EEXIST, "{}: was created by somebody else meanwhile; it was kept", path_);
    KRAIT_CHECK(::rename(temporary_.c_str(), path_.c_str()) == 0, "{}: cannot be renamed to {}: {}", temporary_, path_,
                std::strerror(errno));  // a file system without links
    temporary_.clear();
  }
  return status.st_size;
}

std::string unescape(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\\') {
      out.push_back(text[i]);
      continue;
    }
    constexpr std::string_view kLetters = "ntfr0\\", kMeanings("\n\t\f\r\0\\", 6);
    const char letter = i + 1 < text.size() ? text[i + 1] : '\0';
    if (const size_t known = kLetters.find(letter); known != std::string_view::npos) {
      out.push_back(kMeanings[known]);
      ++i;
      continue;
    }
    const std::string_view digits = letter == 'x' ? text.substr(i + 2, 2) : "";
    const bool good =
        digits.size() == 2 && digits.find_first_not_of("0123456789abcdefABCDEF") == std::string_view::npos;
    if (!good)
      throw ConfigError(
          fmt::format("document separator '{}': after a backslash comes n, t, f, r, 0, a backslash or xHH", text));
    out.push_back(static_cast<char>(std::stoi(std::string(digits), nullptr, 16)));
    i += 3;
  }
  return out;
}

}  // namespace krait::data
