#pragma once
#include <cstdint>

// Names and numbers of the token store's file format, shared by its reader and writer.
namespace krait::data {

inline constexpr const char* kFormat = "krait.token_store";
inline constexpr int64_t kFormatVersion = 1;
inline constexpr const char* kTokenizer = "tokenizer";
inline constexpr const char* kTokens = "tokens";
inline constexpr const char* kDocuments = "documents";
inline constexpr int64_t kMaxShortVocabulary = 65536;  // ids above uint16 need uint32

/// Tokens in a chunk: a random crop reads and checks whole chunks, so they are small (128 KiB of uint16).
inline constexpr int64_t kTokensPerChunk = 65536;
inline constexpr int64_t kDocumentsPerChunk = 8192;

}  // namespace krait::data
