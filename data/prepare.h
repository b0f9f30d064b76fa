#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace krait::data {

/// `krait data prepare`: text to a token store.
struct PrepareOptions {
  /// Files, directories (all regular files below, sorted by path) or "-" for standard input.
  std::vector<std::string> inputs;
  std::string output;      // the .h5 file; written beside itself first, then renamed
  bool overwrite = false;  // else an existing output is an error

  /// auto (*.jsonl and *.ndjson are JSON lines, else text) | text | jsonl | uint16 | uint32: token ids, little-endian
  std::string format = "auto";
  std::string field = "text";   // of a JSON line
  /// A line that ends a document of a text file; "" for one document a file. \f, \n, \t, \\ and \xHH are understood.
  std::string document_separator;

  std::string tokenizer = "byte";  // byte | char | sentencepiece | ids (of uint16 and uint32)
  /// A token store whose tokenizer is used instead: for further data for an existing model.
  std::string tokenizer_from;
  std::optional<int64_t> vocab_size;         // sentencepiece: 8192 by default; ids: the largest one and 1
  int64_t eos_id = -1;                       // ids: the one that ends a document; -1: a document is a file
  int64_t skip_bytes = 0;                    // ids: a header in front of each file
  std::string model = "unigram";             // sentencepiece: unigram | bpe
  bool byte_fallback = true;                 // sentencepiece
  int64_t sample_bytes = int64_t{16} << 20;  // sentencepiece: about so much of the training split is trained on
  /// End every document with the tokenizer's eos. Default: when there are several documents or JSON lines.
  std::optional<bool> eos;

  /// Shares held out. Several documents: each document by a hash of its index and the seed, at least one document a
  /// share. One document: cut by position (bytes for the byte tokenizer, else characters), train first, test last.
  std::optional<double> valid;  // default 0.1, or 0 with valid_files
  double test = 0.0;
  uint64_t seed = 0;
  std::vector<std::string> valid_files, test_files;  // taken whole; instead of a share

  bool quiet = false;  // no progress on stderr
};

struct SplitSummary {
  std::string name;  // "train", "valid", "test"
  int64_t documents = 0, tokens = 0;
  int64_t bytes = 0, characters = 0, words = 0, lines = 0;  // of the source text, without separators
};

struct PrepareSummary {
  std::string output, tokenizer, sha256;
  int64_t vocab_size = 0, eos_id = -1;
  int64_t wanted_vocab = 0;  // a small text gives sentencepiece less than was asked for
  int64_t file_bytes = 0;
  double seconds = 0;
  std::vector<SplitSummary> splits;  // those that are not empty, train first
};

/// Memory stays constant (about 100 MB at most) for any input, except for sentencepiece's training sample.
/// An error or a signal leaves no output and no temporary file; an existing output stays as it was.
PrepareSummary prepare(const PrepareOptions& options);

/// Several lines for people: a table of the splits, the vocabulary, the time.
std::string to_string(const PrepareSummary& summary);

}  // namespace krait::data
