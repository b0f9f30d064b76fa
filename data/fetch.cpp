#include "data/fetch.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "core/error.h"
#include "data/child_process.h"
#include "data/prepare_files.h"
#include "data/progress.h"
#include "data/sha256.h"

namespace krait::data {
namespace {

namespace fs = std::filesystem;

bool is_file(const fs::path& path) {
  std::error_code ignored;
  return fs::is_regular_file(path, ignored);
}

int64_t size_of(const fs::path& path) {
  std::error_code error;
  const auto size = fs::file_size(path, error);
  return error ? 0 : static_cast<int64_t>(size);
}

bool is_url(const std::string& place) { return place.find("://") != std::string::npos; }

void make_directories(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  KRAIT_CHECK(!error, "{}: cannot create the directory: {}", path.string(), error.message());
}

// A directory for what is being unpacked, beside its goal, so that renaming is possible.
class ScratchDirectory {
 public:
  explicit ScratchDirectory(const fs::path& parent) {
    std::string name = (parent / ".unpack-XXXXXX").string();
    KRAIT_CHECK(::mkdtemp(name.data()), "{}: cannot create: {}", name, std::strerror(errno));
    path_ = name;
  }
  ~ScratchDirectory() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  ScratchDirectory(const ScratchDirectory&) = delete;
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

void check_sha256(const fs::path& path, const std::string& found, const std::string& expected, const std::string& advice) {
  KRAIT_CHECK(found == expected, "{}: SHA-256 is {}, expected {}; {}", path.string(), found, expected, advice);
}

void publish(const fs::path& from, const fs::path& to) {
  make_directories(to.parent_path());
  const int fd = ::open(from.c_str(), O_RDONLY | O_CLOEXEC);
  const bool synced = fd >= 0 && ::fsync(fd) == 0;
  if (fd >= 0) ::close(fd);
  KRAIT_CHECK(synced, "{}: cannot be written: {}", from.string(), std::strerror(errno));
  KRAIT_CHECK(::rename(from.c_str(), to.c_str()) == 0, "{}: cannot be renamed to {}: {}", from.string(), to.string(),
              std::strerror(errno));
}

// gzip -dc, or a plain copy.
void unpack_file(const fs::path& from, const fs::path& to, bool packed) {
  make_directories(to.parent_path());
  std::ofstream out(to, std::ios::binary);
  const auto write = [&](std::string_view piece) {
    out.write(piece.data(), static_cast<std::streamsize>(piece.size()));
    KRAIT_CHECK(out, "{}: cannot be written: {}", to.string(), std::strerror(errno));
  };
  if (packed) {
    const ProcessResult result = run_process({"gzip", "-dc", "--", from.string()}, write, throw_if_interrupted);
    KRAIT_CHECK(result.status == 0, "{}: gzip cannot unpack it: {}", from.string(), result.errors);
  } else {
    std::ifstream in(from, std::ios::binary);
    KRAIT_CHECK(in, "{}: {}", from.string(), std::strerror(errno));
    std::vector<char> buffer(size_t{1} << 20);
    while (in.read(buffer.data(), static_cast<std::streamsize>(buffer.size())), in.gcount() > 0) {
      throw_if_interrupted();
      write({buffer.data(), static_cast<size_t>(in.gcount())});
    }
    KRAIT_CHECK(in.eof(), "{}: cannot be read: {}", from.string(), std::strerror(errno));
  }
  out.close();
  KRAIT_CHECK(out, "{}: cannot be written: {}", to.string(), std::strerror(errno));
}

void unpack_archive(const FetchSource& source, const fs::path& archive, const fs::path& into) {
  std::vector<std::string> command;
  if (source.pack == FetchSource::Pack::zip) command = {"unzip", "-q", "-o", archive.string()};
  else command = {"tar", "--no-same-owner", "-xzf", archive.string(), "-C", into.string()};
  for (const FetchMember& member : source.members) command.push_back(member.inside);
  if (source.pack == FetchSource::Pack::zip) command.insert(command.end(), {"-d", into.string()});
  const ProcessResult result = run_process(command, [](std::string_view) {}, throw_if_interrupted);
  KRAIT_CHECK(result.status == 0, "{}: {} cannot unpack it: {}", archive.string(), command[0], result.errors);
}

// ---- downloading

struct Transfer {
  bool ok = false;
  bool stale = false;  // what was there before cannot be continued
  std::string errors;
};

Transfer transfer(const std::string& url, const fs::path& part, int64_t total, const std::string& label, bool quiet) {
  std::vector<std::string> command;
  const bool curl = has_program("curl");
  if (curl) {
    command = {"curl", "--fail", "--location", "--silent", "--show-error", "--proto", "=http,https,file", "--connect-timeout", "20",
               "--speed-limit", "100", "--speed-time", "60", "--retry", "2", "--continue-at", "-", "--output", part.string(), "--url", url};
  } else {
    KRAIT_CHECK(has_program("wget"), "downloading needs the program curl or wget; install one, or use --mirror DIR");
    command = {"wget", "--quiet", "--continue", "--timeout=60", "--tries=3", "-O", part.string(), "--", url};
  }
  int64_t seen = size_of(part);
  const bool resumed = seen > 0;
  Progress progress(label, total, quiet);
  progress.advance(seen);
  const auto tick = [&] {
    const int64_t now = size_of(part);
    progress.advance(now - seen);
    seen = now;
    try {
      throw_if_interrupted();
    } catch (const Error&) {
      throw_error(fmt::format("interrupted; {} is kept, and the same command goes on from there", part.string()));
    }
  };
  const ProcessResult result = run_process(command, [](std::string_view) {}, tick);
  tick();
  progress.finish();
  Transfer done{result.status == 0, false, result.errors};
  while (!done.errors.empty() && done.errors.back() == '\n') done.errors.pop_back();
  if (const size_t line = done.errors.rfind('\n'); line != std::string::npos) done.errors.erase(0, line + 1);  // of the last try
  if (done.errors.empty()) done.errors = fmt::format("{} ended with status {}", command[0], result.status);
  // curl: 22 HTTP error (416 when there is nothing to continue), 33 no ranges, 36 cannot resume. wget: 8.
  const int s = result.status;
  done.stale = resumed && (curl ? s == 22 || s == 33 || s == 36 : s == 8);
  return done;
}

class Fetcher {
 public:
  Fetcher(const FetchSet& set, const FetchOptions& options) : set_(set), options_(options) {
    std::string directory = options.directory;
    const char* variable = std::getenv("KRAIT_DATA_DIR");
    if (directory.empty()) directory = variable && *variable ? variable : "data";
    if (directory.starts_with('-')) directory.insert(0, "./");  // no option of the programs that are called
    goal_ = fs::path(directory) / set.folder;
  }

  std::vector<FetchedFile> run() {
    make_directories(goal_);
    std::vector<FetchedFile> files;
    try {
      for (const FetchSource& source : set_.sources)
        if (!all_there(source, files)) one(source, files);
    } catch (...) {
      std::error_code kept;
      fs::remove(goal_, kept);  // when nothing is in it
      throw;
    }
    return files;
  }

 private:
  // What is there already, with the right size and checksum as far as they are known, is not fetched again.
  bool all_there(const FetchSource& source, std::vector<FetchedFile>& files) const {
    std::vector<FetchedFile> found;
    for (const FetchMember& member : source.members) {
      const fs::path path = goal_ / member.name;
      if (!is_file(path) || (member.bytes > 0 && size_of(path) != member.bytes)) return false;
      FetchedFile file{path.string(), sha256_file(path.string()), size_of(path), !member.sha256.empty(), true};
      if (file.verified && file.sha256 != member.sha256) return false;
      found.push_back(file);
    }
    files.insert(files.end(), found.begin(), found.end());
    return true;
  }

  void one(const FetchSource& source, std::vector<FetchedFile>& files) const {
    const bool local = !options_.mirror.empty() && !is_url(options_.mirror);
    if (!local) {
      const fs::path part = goal_ / (source.file + ".part");
      download(source, part);
      unpack(source, part, files);
      std::error_code ignored;
      fs::remove(part, ignored);
    } else if (const fs::path archive = in_mirror(source.file); !archive.empty()) {
      unpack(source, archive, files);
    } else {
      copy_members(source, files);
    }
  }

  // A file of the mirror directory, in itself or in the set's folder; empty when there is none.
  fs::path in_mirror(const std::string& name) const {
    for (const fs::path& place : {fs::path(options_.mirror) / name, fs::path(options_.mirror) / set_.folder / name})
      if (is_file(place)) return place;
    return {};
  }

  void copy_members(const FetchSource& source, std::vector<FetchedFile>& files) const {
    const ScratchDirectory scratch(goal_);
    for (const FetchMember& member : source.members) {
      fs::path from = in_mirror(member.name);
      const bool packed = from.empty();
      if (packed) from = in_mirror(member.name + ".gz");
      KRAIT_CHECK(!from.empty(), "{}: holds neither {} nor {} (plain or .gz), in itself or in {}/", options_.mirror,
                  source.file, member.name, set_.folder);
      unpack_file(from, scratch.path() / member.name, packed);
    }
    publish_members(source, scratch.path(), false, options_.mirror, files);
  }

  void download(const FetchSource& source, const fs::path& part) const {
    std::vector<std::string> urls = source.urls;
    if (!options_.mirror.empty()) {
      std::string base = options_.mirror;
      while (base.ends_with('/')) base.pop_back();
      urls = {base + "/" + source.file, base + "/" + set_.folder + "/" + source.file};
    }
    if (is_file(part) && !source.sha256.empty() && sha256_file(part.string()) == source.sha256) return;
    std::string failures;
    for (const std::string& url : urls) {
      Transfer done = transfer(url, part, source.bytes, set_.name, options_.quiet);
      if (done.stale) {
        std::error_code ignored;
        fs::remove(part, ignored);
        done = transfer(url, part, source.bytes, set_.name, options_.quiet);
      }
      if (done.ok && source.sha256.empty()) return;
      if (done.ok) {
        const std::string found = sha256_file(part.string());
        if (found == source.sha256) return;
        std::error_code ignored;
        fs::remove(part, ignored);  // continuing would keep the damage
        done.errors = fmt::format("SHA-256 is {}, expected {}; what came was removed", found, source.sha256);
      }
      failures += fmt::format("\n  {}: {}", url, done.errors);
    }
    throw_error(fmt::format("{}: could not be downloaded:{}\n       try again later (a part that came is continued), or fetch {} on a "
                            "machine with a connection and give its directory: krait data fetch {} --mirror DIR",
                            source.file, failures, source.file, set_.name));
  }

  void unpack(const FetchSource& source, const fs::path& archive, std::vector<FetchedFile>& files) const {
    if (!source.sha256.empty())
      check_sha256(archive, sha256_file(archive.string()), source.sha256, "it is damaged or another version; nothing was changed");
    const ScratchDirectory scratch(goal_);
    if (source.pack == FetchSource::Pack::none || source.pack == FetchSource::Pack::gzip) {
      unpack_file(archive, scratch.path() / source.members.front().name, source.pack == FetchSource::Pack::gzip);
    } else {
      unpack_archive(source, archive, scratch.path());
      for (const FetchMember& member : source.members) {
        KRAIT_CHECK(is_file(scratch.path() / member.inside), "{}: does not hold {}", archive.string(), member.inside);
        const fs::path target = scratch.path() / member.name;
        make_directories(target.parent_path());
        if (member.inside != member.name) fs::rename(scratch.path() / member.inside, target);
      }
    }
    publish_members(source, scratch.path(), !source.sha256.empty(), archive.string(), files);
  }

  // All of them are checked before the first gets its name.
  void publish_members(const FetchSource& source, const fs::path& scratch, bool archive_verified, const std::string& origin,
                       std::vector<FetchedFile>& files) const {
    std::vector<FetchedFile> made;
    for (const FetchMember& member : source.members) {
      const fs::path path = scratch / member.name;
      FetchedFile file{(goal_ / member.name).string(), sha256_file(path.string()), size_of(path), archive_verified || !member.sha256.empty(), false};
      if (!member.sha256.empty())
        check_sha256(origin + ": " + member.name, file.sha256, member.sha256, "it is damaged or another version; nothing was changed");
      KRAIT_CHECK(member.bytes == 0 || file.bytes == member.bytes, "{}: {}: {} bytes, expected {}", origin, member.name, file.bytes, member.bytes);
      made.push_back(file);
    }
    for (size_t i = 0; i < made.size(); ++i) publish(scratch / source.members[i].name, made[i].path);
    files.insert(files.end(), made.begin(), made.end());
  }

  const FetchSet& set_;
  const FetchOptions& options_;
  fs::path goal_;
};

}  // namespace

std::vector<FetchedFile> fetch(const FetchSet& set, const FetchOptions& options) {
  const InterruptGuard guard;
  return Fetcher(set, options).run();
}

std::string to_string(const FetchSet& set, const std::vector<FetchedFile>& files) {
  std::string text;
  for (const FetchedFile& file : files) {
    text += fmt::format("{}  {}  {}{}\n", file.path, human_bytes(file.bytes),
                        file.verified ? "sha256 ok" : "no checksum is known; sha256 " + file.sha256,
                        file.was_there ? "  (was there)" : "");
  }
  text += fmt::format("terms: {}\n", set.terms);
  if (files.empty()) return text;
  const std::string& first = files.front().path;
  const std::string directory = fs::path(first).parent_path().string();
  if (set.name == "shakespeare") text += fmt::format("next: krait data prepare {} -o data/shakespeare_char.h5 --tokenizer char\n", first);
  if (set.name == "mnist") text += fmt::format("next: krait train configs/smnist_s4d.yaml data.path={}\n", directory);
  if (set.name.starts_with("wikitext"))
    text += fmt::format("next: krait data prepare {0}/wiki.train.tokens --valid-file {0}/wiki.valid.tokens --test-file {0}/wiki.test.tokens "
                        "-o data/{1}.h5 --tokenizer sentencepiece\n", directory, set.name);
  return text;
}

}  // namespace krait::data
