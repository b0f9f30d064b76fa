#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace krait::data {

/// A file of a data set as it is used, and where it lies in the downloaded archive.
struct FetchMember {
  std::string name;         // below the set's folder
  std::string inside;       // path in the archive; empty where the download is one packed or plain file
  std::string sha256 = "";  // empty: not known apart from the archive's
  int64_t bytes = 0;        // 0: not known
};
/// One download.
struct FetchSource {
  std::string file;  // its name, also in mirrors
  std::vector<std::string> urls;
  std::string sha256 = "";
  int64_t bytes = 0;
  enum class Pack : uint8_t { none, gzip, zip, tar_gz } pack = Pack::none;
  std::vector<FetchMember> members;
};
struct FetchSet {
  std::string name, folder, terms;
  std::vector<FetchSource> sources;
};
/// mnist, cifar10, shakespeare, wikitext-2, wikitext-103.
const std::vector<FetchSet>& fetch_sets();
const FetchSet& find_fetch_set(const std::string& name);

struct FetchOptions {
  std::string directory;  // files go to directory/<folder>; empty: KRAIT_DATA_DIR, or data
  /// A directory, or a URL without the file name, used instead of the public sources. A directory may hold the
  /// downloads or the unpacked files (plain or .gz), in itself or in <folder>.
  std::string mirror;
  bool quiet = false;
};
struct FetchedFile {
  std::string path, sha256;
  int64_t bytes = 0;
  bool verified = false;  // against a known checksum, its own or the archive's
  bool was_there = false;
};

/// Downloads with curl (or wget), checks the SHA-256, unpacks with gzip, unzip or tar, and gives the files their names
/// when they are complete. An interrupted download stays as <file>.part and is resumed by the next call.
std::vector<FetchedFile> fetch(const FetchSet& set, const FetchOptions& options);

/// Lines for people: every file with its size and checksum, and what to do next.
std::string to_string(const FetchSet& set, const std::vector<FetchedFile>& files);

}  // namespace krait::data
