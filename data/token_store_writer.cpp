#include <map>

#include "core/error.h"
#include "data/hdf5.h"
#include "data/token_store.h"
#include "data/token_store_format.h"

namespace krait::data {
namespace {

struct SplitWriter {
  hdf5::Group group;
  hdf5::Dataset tokens, documents;
  std::vector<int32_t> token_buffer;
  std::vector<int64_t> document_buffer;
  TokenStoreWriter::SplitTotals totals;
  TextCounts counts;
  bool at_start = true;  // the next token begins a document

  void flush() {
    tokens.append(std::span<const int32_t>(token_buffer));
    documents.append(std::span<const int64_t>(document_buffer));
    token_buffer.clear();
    document_buffer.clear();
  }
};

}  // namespace

struct TokenStoreWriter::Impl {
  hdf5::File file;
  hdf5::Type type;
  int64_t vocab_size;
  std::map<std::string, SplitWriter> splits;

  SplitWriter& split(const std::string& name) {
    const auto it = splits.find(name);
    if (it != splits.end()) return it->second;
    SplitWriter& out = splits[name];
    out.group = file.create_group(name);
    out.tokens = out.group.create_dataset(kTokens, type, {0},
                                          {.chunk = {kTokensPerChunk}, .extendable = true, .checksum = true});
    out.documents = out.group.create_dataset(kDocuments, hdf5::Type::i64, {0},
                                             {.chunk = {kDocumentsPerChunk}, .extendable = true, .checksum = true});
    return out;
  }
};

TokenStoreWriter::TokenStoreWriter(const std::string& path, const Tokenizer& tokenizer, int32_t eos_id)
    : impl_(std::make_unique<Impl>()) {
  const int64_t vocab_size = tokenizer.vocab_size();
  KRAIT_CHECK(eos_id >= -1 && eos_id < vocab_size, "token store: eos_id {} is outside the vocabulary of {}", eos_id,
              vocab_size);
  impl_->file = hdf5::File::create(path);
  impl_->type = vocab_size > kMaxShortVocabulary ? hdf5::Type::u32 : hdf5::Type::u16;
  impl_->vocab_size = vocab_size;
  hdf5::File& file = impl_->file;
  file.set_attribute("format", kFormat);
  file.set_attribute("format_version", kFormatVersion);
  file.set_attribute("tokenizer", tokenizer.name());
  file.set_attribute("vocab_size", vocab_size);
  file.set_attribute("eos_id", int64_t{eos_id});
  file.set_attribute("created_by", "krait data prepare");
  file.write_bytes(kTokenizer, tokenizer.serialize());
}

TokenStoreWriter::~TokenStoreWriter() = default;

void TokenStoreWriter::begin_document(const std::string& split) {
  const auto it = impl_->splits.find(split);
  if (it != impl_->splits.end()) it->second.at_start = true;
}

void TokenStoreWriter::append(const std::string& name, std::span<const int32_t> ids) {
  if (ids.empty()) return;
  SplitWriter& split = impl_->split(name);
  if (split.at_start) {
    split.document_buffer.push_back(split.totals.tokens);
    ++split.totals.documents;
    split.at_start = false;
  }
  for (const int32_t id : ids)
    KRAIT_ASSERT(id >= 0 && id < impl_->vocab_size, "token {} of a vocabulary of {}", id, impl_->vocab_size);
  split.token_buffer.insert(split.token_buffer.end(), ids.begin(), ids.end());
  split.totals.tokens += static_cast<int64_t>(ids.size());
  if (static_cast<int64_t>(split.token_buffer.size()) >= 4 * kTokensPerChunk) split.flush();
}

TokenStoreWriter::SplitTotals TokenStoreWriter::totals(const std::string& split) const {
  const auto it = impl_->splits.find(split);
  return it == impl_->splits.end() ? SplitTotals{} : it->second.totals;
}

void TokenStoreWriter::set_counts(const std::string& name, const TextCounts& counts) {
  if (const auto it = impl_->splits.find(name); it != impl_->splits.end()) it->second.counts = counts;
}

void TokenStoreWriter::finish(const std::string& source, const std::string& source_sha256) {
  impl_->file.set_attribute("source", source);
  impl_->file.set_attribute("source_sha256", source_sha256);
  for (auto& [name, split] : impl_->splits) {
    split.flush();
    split.group.set_attribute("bytes", split.counts.bytes);
    split.group.set_attribute("characters", split.counts.characters);
    split.group.set_attribute("words", split.counts.words);
    split.group.set_attribute("lines", split.counts.lines);
  }
  impl_->splits.clear();
  impl_->file.close();
}

}  // namespace krait::data
