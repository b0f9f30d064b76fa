#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "data/tokenizer.h"

namespace krait::data {

/// Counts of the text that tokens were made from: for bits per byte and word perplexity.
struct TextCounts {
  int64_t bytes = 0, characters = 0, words = 0, lines = 0;
};

/// A sequence of token ids with document boundaries. Reading is safe from several threads.
class Tokens {
 public:
  virtual ~Tokens() = default;
  virtual int64_t size() const = 0;
  /// Tokens [offset, offset + out.size()), which must exist.
  virtual void read(int64_t offset, std::span<int32_t> out) const = 0;
  /// Where documents start: 0 first, strictly increasing, all below size(). Empty only when size() is 0.
  virtual std::span<const int64_t> documents() const = 0;
  virtual const TextCounts& counts() const = 0;
  /// The file and the split, for messages: "data/a.h5: split valid".
  virtual std::string where() const = 0;
  /// Index of the document that holds the token at `position`.
  int64_t document_of(int64_t position) const;
};
using TokensPtr = std::shared_ptr<const Tokens>;

/// A text as one document, held in memory: evaluation of a plain text file.
TokensPtr encode_text(std::string_view text, const Tokenizer& tokenizer, const std::string& where);
/// Tokens held in memory. `documents` as Tokens::documents(); empty means one document.
TokensPtr tokens_in_memory(std::vector<int32_t> ids, std::vector<int64_t> documents = {}, TextCounts counts = {},
                           std::string where = "memory");

struct StoreOptions {
  /// Splits of up to so many bytes are read to memory when first used; larger ones are read as needed.
  int64_t max_memory_bytes = int64_t{512} << 20;
};

/// A token store (HDF5):
///   /                attributes (int64 and strings) format "krait.token_store", format_version 1, tokenizer "byte" | "char" |
///                    "sentencepiece" | "ids", vocab_size, eos_id (the id at the end of every document, -1 for none), source,
///                    source_sha256, created_by
///   /tokenizer       uint8: Tokenizer::serialize(). "krait-tokenizer 1 byte\neos 0\n" is 256 byte values (eos 1: and id 256,
///                    the end of a document); "krait-tokenizer 1 char\neos 0\n" and the characters in the order of their
///                    code points, as UTF-8; "krait-tokenizer 1 sentencepiece\n" and the bytes of a .model file;
///                    "krait-tokenizer 1 ids\nvocab_size 50257\neos -1\n" are ids without their tokenizer
///   /<split>/tokens  uint16 (uint32 when vocab_size > 65536), one-dimensional; written in chunks with Fletcher-32 checksums
///   /<split>/documents  int64 offsets of the documents' first tokens: 0, then increasing
///   /<split>         attributes (int64) bytes, characters, words, lines of the source text, 0 where unknown
/// for splits train, valid, test. A store that another program writes (h5py, say) needs all of this but chunks and checksums.
/// Opening checks everything but the tokens; those are checked (checksum, id range) as they are read.
class TokenStore {
 public:
  static std::shared_ptr<const TokenStore> open(const std::string& path, const StoreOptions& options = {});
  const std::string& path() const { return path_; }
  std::vector<std::string> splits() const;  // train, valid, test: those that exist
  bool has_split(std::string_view name) const;
  /// Throws with the names that exist.
  TokensPtr split(const std::string& name) const;
  const TokenizerPtr& tokenizer() const { return tokenizer_; }
  int64_t vocab_size() const { return tokenizer_->vocab_size(); }
  int32_t eos_id() const { return eos_id_; }
  const std::string& source() const { return source_; }
  const std::string& source_sha256() const { return source_sha256_; }
  const std::string& created_by() const { return created_by_; }

 private:
  std::string path_, source_, source_sha256_, created_by_;
  TokenizerPtr tokenizer_;
  int32_t eos_id_ = -1;
  std::map<std::string, TokensPtr, std::less<>> splits_;
};
using TokenStorePtr = std::shared_ptr<const TokenStore>;

/// Writes a token store piece by piece. The file is complete only after finish().
class TokenStoreWriter {
 public:
  TokenStoreWriter(const std::string& path, const Tokenizer& tokenizer, int32_t eos_id);
  ~TokenStoreWriter();
  /// Starts a document of the split at its present end; a document without tokens is forgotten.
  void begin_document(const std::string& split);
  void append(const std::string& split, std::span<const int32_t> ids);
  struct SplitTotals {
    int64_t tokens = 0, documents = 0;
  };
  SplitTotals totals(const std::string& split) const;
  void set_counts(const std::string& split, const TextCounts& counts);
  void finish(const std::string& source, const std::string& source_sha256);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace krait::data
