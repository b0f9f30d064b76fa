#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace krait::data {

struct TextInput {
  std::string path;
  std::string shown;  // the name in messages: differs for standard input
  bool json_lines = false;
};

/// Where a piece of text came from, for messages.
struct Place {
  const TextInput* input = nullptr;
  int64_t byte = 0;  // of the file, of the piece's first byte; -1 when a JSON line was decoded
  int64_t line = 0;  // of the file, from 1; JSON lines only
  /// "a.txt: byte 17" or "a.jsonl:3", `ahead` bytes into the piece.
  std::string str(int64_t ahead = 0) const;
};

/// Receives documents in pieces: text(), text(), ..., end_document(). Pieces are not empty, at most about 4 MiB (a JSON
/// line comes whole), and end at a line end, or at least at the end of a UTF-8 character.
class DocumentSink {
 public:
  virtual ~DocumentSink() = default;
  virtual void text(std::string_view piece, const Place& place) = 0;
  virtual void end_document() = 0;
  /// Every byte of the files, before the text made from it.
  virtual void raw(std::string_view bytes) = 0;
};

/// Throws when a file's first bytes are those of gzip, zip, xz, zstd or bzip2: as text they would be noise.
void check_not_compressed(std::string_view head, const std::string& shown);

struct DocumentFormat {
  std::string field = "text";  // of JSON lines
  std::string separator;       // a line of text files that ends a document; "": one document a file
};

/// Reads the files once, in order, in constant memory. Documents without text are left out.
void read_documents(const std::vector<TextInput>& inputs, const DocumentFormat& format, DocumentSink& sink);

}  // namespace krait::data
