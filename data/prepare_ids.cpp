#include "data/prepare_ids.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "core/error.h"
#include "data/prepare_files.h"
#include "data/progress.h"
#include "data/sha256.h"
#include "data/token_store.h"

namespace krait::data {
namespace {

int64_t size_of_file(const TextInput& file) {
  std::error_code error;
  const auto size = std::filesystem::file_size(file.path, error);
  KRAIT_CHECK(!error, "{}: {}", file.shown, error.message());
  return static_cast<int64_t>(size);
}

/// Reads files of ids one after the other; documents end with the id `eos`, and with the file.
class IdReader {
 public:
  IdReader(const PrepareOptions& o, int64_t eos, const std::string& label, int64_t total_bytes)
      : width_(bytes_of_id(o.format)), skip_(o.skip_bytes), eos_(eos), format_(o.format), progress_(label, total_bytes, o.quiet) {}

  /// piece(ids, file, index of the first in the file): some ids of one document; end(): of a document that is not empty.
  template <class Piece, class End>
  void read(const std::vector<TextInput>& files, Piece piece, End end) {
    for (const TextInput& file : files) {
      const int64_t size = size_of_file(file);
      KRAIT_CHECK(size > skip_, "{}: {} bytes, no ids{}", file.shown, size, skip_ > 0 ? fmt::format(" behind the first {}", skip_) : "");
      KRAIT_CHECK((size - skip_) % width_ == 0,
                  "{}: {} bytes are not whole ids of {} bytes; is it cut short, of another --format than {}, or has it a header (--skip-bytes)?",
                  file.shown, size - skip_, width_, format_);
      std::ifstream in(file.path, std::ios::binary);
      const auto take = [&](int64_t n) {
        throw_if_interrupted();
        bytes_.resize(static_cast<size_t>(n));
        in.read(bytes_.data(), n);
        KRAIT_CHECK(in, "{}: cannot be read: {}", file.shown, errno ? std::strerror(errno) : "it became shorter");
        hash_.update(bytes_);
        progress_.advance(n);
      };
      for (int64_t left = skip_; left > 0; left -= static_cast<int64_t>(bytes_.size())) take(std::min<int64_t>(left, 1 << 20));
      bool open = false;
      for (int64_t at = 0, n = (size - skip_) / width_; at < n;) {
        take(std::min<int64_t>(n - at, 1 << 18) * width_);
        const std::vector<uint32_t> ids = decoded();
        for (auto first = ids.begin(); first != ids.end();) {
          auto last = eos_ < 0 ? ids.end() : std::find(first, ids.end(), static_cast<uint32_t>(eos_));
          const bool ends = last != ids.end();
          if (ends) ++last;
          piece(std::span(first, last), file, at + (first - ids.begin()));
          open = !ends;
          if (ends) end();
          first = last;
        }
        at += static_cast<int64_t>(ids.size());
      }
      if (open) end();
    }
  }
  std::string sha256() { return hash_.hex(); }  // of all files, headers too
  void finish() { progress_.finish(); }

 private:
  std::vector<uint32_t> decoded() const {
    std::vector<uint32_t> ids(bytes_.size() / static_cast<size_t>(width_));
    const auto* byte = reinterpret_cast<const unsigned char*>(bytes_.data());
    for (uint32_t& id : ids) {
      id = 0;
      for (int64_t i = 0; i < width_; ++i) id |= uint32_t{*byte++} << (8 * i);
    }
    return ids;
  }
  int64_t width_, skip_, eos_;
  std::string format_, bytes_;
  Sha256 hash_;
  Progress progress_;
};

struct Counted {
  int64_t documents = 0, tokens = 0;
};

}  // namespace

int64_t bytes_of_id(const std::string& format) { return format == "uint16" ? 2 : format == "uint32" ? 4 : 0; }

void store_ids(PrepareSummary& summary, const PrepareOptions& o, const std::vector<IdSource>& sources, double valid,
               const TokenizerPtr& given, int64_t total_bytes, const std::string& path, const std::string& source_names) {
  const int64_t eos = given ? given->eos_id() : o.eos_id;
  const int64_t limit = given ? given->vocab_size() : o.vocab_size.value_or(kMaxVocabulary);
  std::vector<Counted> counted(sources.size());
  int64_t largest = eos, odd = 0;  // odd: ids other than 0 at every second place
  IdReader check(o, eos, "reading", total_bytes);
  for (size_t i = 0; i < sources.size(); ++i)
    check.read(
        sources[i].files,
        [&](std::span<const uint32_t> ids, const TextInput& file, int64_t at) {
          for (size_t k = 0; k < ids.size(); ++k) {
            const int64_t id = ids[k], index = at + static_cast<int64_t>(k);
            KRAIT_CHECK(id < limit, "{}: id {} at place {} (byte {}) is not below the vocabulary of {}{}", file.shown, id, index,
                        o.skip_bytes + index * bytes_of_id(o.format), limit, given ? " of " + o.tokenizer_from : "");
            largest = std::max(largest, id);
            odd += index % 2 == 1 && id != 0;
          }
          counted[i].tokens += static_cast<int64_t>(ids.size());
        },
        [&] { ++counted[i].documents; });
  check.finish();
  if (o.format == "uint16" && odd == 0 && counted[0].tokens > 16)
    std::fputs("warning: every second id is 0: is this --format uint32?\n", stderr);

  const TokenizerPtr tokenizer = given ? given : make_ids_tokenizer(o.vocab_size.value_or(largest + 1), eos);
  summary.tokenizer = tokenizer->name();
  summary.vocab_size = summary.wanted_vocab = tokenizer->vocab_size();
  summary.eos_id = eos;
  summary.sha256 = check.sha256();
  TokenStoreWriter writer(path, *tokenizer, static_cast<int32_t>(eos));
  IdReader encode(o, eos, "writing", total_bytes);
  for (size_t i = 0; i < sources.size(); ++i) {
    const Counted& all = counted[i];
    const SourcePlan plan(sources[i].whole, all.documents, all.tokens, valid, o.test, o.seed);
    int64_t document = 0, position = 0;
    std::vector<int32_t> ids;
    encode.read(
        sources[i].files,
        [&](std::span<const uint32_t> piece, const TextInput& file, int64_t) {
          while (!piece.empty()) {
            const Split split = plan.cuts() ? plan.at(position) : plan.of(document);
            size_t take = piece.size();
            if (plan.cuts()) take = std::min(take, static_cast<size_t>(std::max<int64_t>(plan.end(split) - position, 0)));
            KRAIT_CHECK(take > 0 && *std::max_element(piece.begin(), piece.end()) < tokenizer->vocab_size(),
                        "{}: changed while it was read; try again", file.shown);
            ids.assign(piece.begin(), piece.begin() + static_cast<int64_t>(take));
            writer.append(name_of(split), ids);
            position += static_cast<int64_t>(take);
            piece = piece.subspan(take);
          }
        },
        [&] { writer.begin_document(name_of(plan.cuts() ? Split::train : plan.of(document++))); });
    KRAIT_CHECK(position == all.tokens, "the input changed while it was read ({} ids, then {}); try again", all.tokens, position);
  }
  encode.finish();
  for (int s = 0; s < kSplits; ++s) {
    const std::string name = name_of(static_cast<Split>(s));
    if (const auto totals = writer.totals(name); totals.tokens > 0) summary.splits.push_back({.name = name, .documents = totals.documents, .tokens = totals.tokens});
  }
  KRAIT_CHECK(!summary.splits.empty() && summary.splits[0].name == "train", "{}: too few ids to train on ({})", sources[0].files[0].shown,
              counted[0].tokens);
  writer.finish(source_names, summary.sha256);
}

}  // namespace krait::data
