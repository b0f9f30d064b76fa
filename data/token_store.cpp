#include "data/token_store.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>

#include "core/error.h"
#include "data/documents.h"
#include "data/hdf5.h"
#include "data/text_counts.h"
#include "data/token_store_format.h"

namespace krait::data {
namespace {

class MemoryTokens final : public Tokens {
 public:
  MemoryTokens(std::vector<int32_t> ids, std::vector<int64_t> documents, TextCounts counts, std::string where)
      : ids_(std::move(ids)), documents_(std::move(documents)), counts_(counts), where_(std::move(where)) {}
  int64_t size() const override { return static_cast<int64_t>(ids_.size()); }
  void read(int64_t offset, std::span<int32_t> out) const override {
    KRAIT_ASSERT(offset >= 0 && offset + static_cast<int64_t>(out.size()) <= size());
    std::copy_n(ids_.begin() + offset, out.size(), out.begin());
  }
  std::span<const int64_t> documents() const override { return documents_; }
  const TextCounts& counts() const override { return counts_; }
  std::string where() const override { return where_; }

 private:
  std::vector<int32_t> ids_;
  std::vector<int64_t> documents_;
  TextCounts counts_;
  std::string where_;
};

void check_documents(std::span<const int64_t> starts, int64_t size, const std::string& where) {
  KRAIT_CHECK(starts.empty() == (size == 0) && (starts.empty() || starts[0] == 0),
              "{}: the first document does not start at token 0; prepare the data again", where);
  for (size_t i = 0; i < starts.size(); ++i) {
    KRAIT_CHECK(i == 0 || starts[i] > starts[i - 1],
                "{}: document {} starts at {}, not after document {} at {}; prepare the data again", where, i,
                starts[i], i - 1, starts[i - 1]);
    KRAIT_CHECK(starts[i] < size, "{}: document {} starts at {}, but there are {} tokens; prepare the data again",
                where, i, starts[i], size);
  }
}

// One split of a file. Ids keep their stored type in memory.
template <class Stored>
class StoreTokens final : public Tokens {
 public:
  StoreTokens(std::shared_ptr<const hdf5::File> file, const hdf5::Group& group, std::string where, int64_t vocab_size,
              int64_t max_memory_bytes)
      : file_(std::move(file)), set_(group.dataset(kTokens)), where_(std::move(where)), vocab_size_(vocab_size) {
    use_memory_ = size() * static_cast<int64_t>(sizeof(Stored)) <= max_memory_bytes;
    const hdf5::Dataset documents = group.dataset(kDocuments);
    KRAIT_CHECK(documents.type() == hdf5::Type::i64 && documents.shape().size() == 1,
                "{}: expected document offsets of int64 in one dimension, found {}; prepare the data again",
                documents.where(), hdf5::name_of(documents.type()));
    documents_ = documents.read<int64_t>();
    check_documents(documents_, size(), where_);
    counts_ = {group.int_attribute("bytes"), group.int_attribute("characters"), group.int_attribute("words"),
               group.int_attribute("lines")};
    KRAIT_CHECK(counts_.bytes >= 0 && counts_.characters >= 0 && counts_.words >= 0 && counts_.lines >= 0,
                "{}: negative counts of bytes, characters, words or lines; prepare the data again", where_);
  }

  int64_t size() const override { return set_.rows(); }

  void read(int64_t offset, std::span<int32_t> out) const override {
    KRAIT_ASSERT(offset >= 0 && offset + static_cast<int64_t>(out.size()) <= size());
    if (use_memory_) {
      load();
      std::copy_n(memory_.begin() + offset, out.size(), out.begin());
      return;
    }
    std::vector<Stored> ids(out.size());
    fetch(offset, ids);
    std::copy(ids.begin(), ids.end(), out.begin());
  }

  std::span<const int64_t> documents() const override { return documents_; }
  const TextCounts& counts() const override { return counts_; }
  std::string where() const override { return where_; }

 private:
  void fetch(int64_t offset, std::vector<Stored>& ids) const {
    set_.read_rows(offset, static_cast<int64_t>(ids.size()), std::span<Stored>(ids));
    const auto most = std::max_element(ids.begin(), ids.end());
    KRAIT_CHECK(most == ids.end() || static_cast<int64_t>(*most) < vocab_size_,
                "{}: token {} at position {} is outside the vocabulary of {}; prepare the data again", where_, *most,
                offset + (most - ids.begin()), vocab_size_);
  }

  void load() const {
    if (loaded_.load(std::memory_order_acquire)) return;
    const std::lock_guard lock(load_mutex_);
    if (loaded_.load(std::memory_order_relaxed)) return;
    memory_.resize(static_cast<size_t>(size()));
    fetch(0, memory_);
    loaded_.store(true, std::memory_order_release);
  }

  std::shared_ptr<const hdf5::File> file_;  // keeps set_ open
  hdf5::Dataset set_;
  std::string where_;
  int64_t vocab_size_;
  std::vector<int64_t> documents_;
  TextCounts counts_;
  bool use_memory_;
  mutable std::mutex load_mutex_;
  mutable std::atomic<bool> loaded_ = false;
  mutable std::vector<Stored> memory_;
};

TokensPtr open_split(std::shared_ptr<const hdf5::File> file, const std::string& name, int64_t vocab_size,
                     const StoreOptions& options) {
  const hdf5::Group group = file->group(name);
  const hdf5::Dataset tokens = group.dataset(kTokens);
  const hdf5::Type expected = vocab_size > kMaxShortVocabulary ? hdf5::Type::u32 : hdf5::Type::u16;
  KRAIT_CHECK(tokens.type() == expected && tokens.shape().size() == 1,
              "{}: expected {} in one dimension (vocabulary {}), found {} in {}; prepare the data again, or write it as "
              "data/token_store.h describes",
              tokens.where(), hdf5::name_of(expected), vocab_size, hdf5::name_of(tokens.type()), tokens.shape().size());
  const std::string where = fmt::format("{}: split {}", file->file(), name);
  if (expected == hdf5::Type::u16)
    return std::make_shared<StoreTokens<uint16_t>>(std::move(file), group, where, vocab_size, options.max_memory_bytes);
  return std::make_shared<StoreTokens<uint32_t>>(std::move(file), group, where, vocab_size, options.max_memory_bytes);
}

}  // namespace

int64_t Tokens::document_of(int64_t position) const {
  const auto starts = documents();
  return std::upper_bound(starts.begin(), starts.end(), position) - starts.begin() - 1;
}

TokensPtr tokens_in_memory(std::vector<int32_t> ids, std::vector<int64_t> documents, TextCounts counts,
                           std::string where) {
  if (documents.empty() && !ids.empty()) documents = {0};
  check_documents(documents, static_cast<int64_t>(ids.size()), where);
  return std::make_shared<MemoryTokens>(std::move(ids), std::move(documents), counts, std::move(where));
}

TokensPtr encode_text(std::string_view text, const Tokenizer& tokenizer, const std::string& where) {
  check_not_compressed(text, where);
  TextCounter counter;
  counter.add(text);
  try {
    return tokens_in_memory(tokenizer.encode(text), {}, tokenizer.has_text() ? counter.counts() : TextCounts(), where);
  } catch (const Error& error) {
    throw Error(fmt::format("{}: {}", where, error.what()));
  }
}

TokenStorePtr TokenStore::open(const std::string& path, const StoreOptions& options) {
  auto file = std::make_shared<const hdf5::File>(
      hdf5::File::open(path, "a token store, which `krait data prepare` makes from text"));
  KRAIT_CHECK(file->has_attribute("format") && file->string_attribute("format") == kFormat,
              "{}: is an HDF5 file but not a token store; `krait data prepare` makes one from text, data/token_store.h describes them", path);
  const int64_t version = file->int_attribute("format_version");
  KRAIT_CHECK(version == kFormatVersion, "{}: format version {}, this build reads {}; prepare the data again", path,
              version, kFormatVersion);
  auto store = std::make_shared<TokenStore>();
  store->path_ = path;
  store->source_ = file->string_attribute("source");
  store->source_sha256_ = file->string_attribute("source_sha256");
  store->created_by_ = file->string_attribute("created_by");
  store->tokenizer_ = load_tokenizer(file->read_bytes(kTokenizer), path + ": /tokenizer");
  const int64_t vocab_size = file->int_attribute("vocab_size");
  KRAIT_CHECK(file->string_attribute("tokenizer") == store->tokenizer_->name() && vocab_size == store->vocab_size(),
              "{}: the attributes say tokenizer {} with a vocabulary of {}, the tokenizer itself is {} with {}; "
              "prepare the data again",
              path, file->string_attribute("tokenizer"), vocab_size, store->tokenizer_->name(), store->vocab_size());
  const int64_t eos = file->int_attribute("eos_id");
  KRAIT_CHECK(eos >= -1 && eos < vocab_size, "{}: eos_id {} is outside the vocabulary of {}; prepare the data again",
              path, eos, vocab_size);
  store->eos_id_ = static_cast<int32_t>(eos);
  for (const std::string& name : file->names())
    if (name != kTokenizer) store->splits_[name] = open_split(file, name, vocab_size, options);
  KRAIT_CHECK(!store->splits_.empty(), "{}: holds no split; prepare the data again", path);
  return store;
}

std::vector<std::string> TokenStore::splits() const {
  std::vector<std::string> out;
  for (const char* name : {"train", "valid", "test"})
    if (has_split(name)) out.emplace_back(name);
  for (const auto& [name, tokens] : splits_)
    if (std::find(out.begin(), out.end(), name) == out.end()) out.push_back(name);
  return out;
}

bool TokenStore::has_split(std::string_view name) const { return splits_.find(name) != splits_.end(); }

TokensPtr TokenStore::split(const std::string& name) const {
  const auto it = splits_.find(name);
  if (it != splits_.end()) return it->second;
  std::string known;
  for (const std::string& other : splits()) known += (known.empty() ? "" : ", ") + other;
  throw_error(fmt::format("{}: there is no split '{}'; it has {}", path_, name, known));
}

}  // namespace krait::data
