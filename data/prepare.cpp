#include "data/prepare.h"

#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <map>
#include <set>
#include <utility>

#include "core/error.h"
#include "core/parallel.h"
#include "core/random.h"
#include "data/documents.h"
#include "data/prepare_files.h"
#include "data/prepare_ids.h"
#include "data/progress.h"
#include "data/sha256.h"
#include "data/split_plan.h"
#include "data/text_counts.h"
#include "data/token_store.h"
#include "data/tokenizer.h"
#include "data/utf8.h"

namespace krait::data {
namespace {

namespace fs = std::filesystem;

// The inputs of one option. Those of --valid-file and --test-file belong to one split as a whole.
struct Source {
  std::vector<TextInput> files;
  Split whole = Split::train;
  int64_t documents = 0;
  TextCounts counts;
};

class Pass : public DocumentSink {
 public:
  Pass(const std::string& label, int64_t total_bytes, bool quiet) : progress_(label, total_bytes, quiet) {}
  void raw(std::string_view bytes) override {
    throw_if_interrupted();
    progress_.advance(static_cast<int64_t>(bytes.size()));
  }
  void finish() { progress_.finish(); }

 private:
  Progress progress_;
};

// First pass: how much there is, of which characters; refuses text the tokenizer cannot take.
class Scan final : public Pass {
 public:
  Scan(const std::string& tokenizer, int64_t total_bytes, bool quiet)
      : Pass("reading", total_bytes, quiet), alphabet_wanted_(tokenizer == "char"), tokenizer_(tokenizer) {}

  void raw(std::string_view bytes) override {
    Pass::raw(bytes);
    hash_.update(bytes);
  }
  void text(std::string_view piece, const Place& place) override {
    counter_.add(piece);
    if (tokenizer_ == "byte") return;
    const size_t bad = utf8::find_invalid(piece);
    KRAIT_CHECK(
        bad == std::string_view::npos,
        "{}: 0x{:02X} is not UTF-8, which the {} tokenizer needs; convert the text (iconv), or use the byte tokenizer",
        place.str(static_cast<int64_t>(bad)), static_cast<unsigned char>(piece[bad]), tokenizer_);
    if (!alphabet_wanted_) return;
    for (size_t at = 0; at < piece.size();) {
      const utf8::CodePoint c = utf8::first(piece.substr(at));
      if (c.value < 128)
        ascii_[c.value] = true;
      else
        others_.insert(c.value);
      at += c.size;
    }
  }
  void end_document() override {
    ++documents_;
    counter_.end_text();
  }

  std::vector<char32_t> alphabet() const {
    std::vector<char32_t> out;
    for (char32_t c = 0; c < 128; ++c)
      if (ascii_[c]) out.push_back(c);
    out.insert(out.end(), others_.begin(), others_.end());
    return out;
  }
  /// Documents and counts since the last call.
  void take(Source& source) {
    source.documents = std::exchange(documents_, 0);
    source.counts = std::exchange(counter_, {}).counts();
  }
  std::string sha256() { return hash_.hex(); }

 private:
  bool alphabet_wanted_;
  std::string tokenizer_;
  TextCounter counter_;
  int64_t documents_ = 0;
  Sha256 hash_;
  std::vector<bool> ascii_ = std::vector<bool>(128, false);
  std::set<char32_t> others_;
};

// Deals the text of one source out to the splits.
class Dealer : public Pass {
 public:
  using Pass::Pass;
  virtual void text_of(Split split, std::string_view piece, const Place& place) = 0;
  virtual void end_of(Split split) = 0;

  /// How the next source is dealt. A single document is cut in bytes or characters.
  void begin_source(const Source& source, const PrepareOptions& options, double valid, bool bytes) {
    document_ = position_ = 0;
    in_bytes_ = bytes;
    plan_ = SourcePlan(source.whole, source.documents, bytes ? source.counts.bytes : source.counts.characters, valid, options.test, options.seed);
  }

  void text(std::string_view piece, const Place& place) final {
    if (!plan_.cuts()) return text_of(plan_.of(document_), piece, place);
    Place at = place;
    while (!piece.empty()) {
      const Split split = plan_.at(position_);
      const int64_t room = plan_.end(split) - position_;
      const size_t take = in_bytes_ ? std::min(piece.size(), static_cast<size_t>(std::max<int64_t>(room, 0)))
                                    : utf8::prefix_of(piece, room);
      if (take == 0) return;  // the file grew: found by the caller's counts
      const std::string_view part = piece.substr(0, take);
      text_of(split, part, at);
      position_ += in_bytes_ ? static_cast<int64_t>(take) : utf8::count(part);
      if (position_ >= plan_.end(split)) end_of(split);
      piece.remove_prefix(take);
      if (at.byte >= 0) at.byte += static_cast<int64_t>(take);
    }
  }
  void end_document() final {
    if (!plan_.cuts()) end_of(plan_.of(document_));
    ++document_;
  }

 private:
  SourcePlan plan_;
  bool in_bytes_ = false;
  int64_t document_ = 0, position_ = 0;
};

// Lines of the training split for SentencePiece: all, or an even sample of about `wanted` bytes.
class SampleLines final : public Dealer {
 public:
  SampleLines(int64_t total_bytes, bool quiet, int64_t train_bytes, int64_t wanted, uint64_t seed)
      : Dealer("sampling", total_bytes, quiet),
        key_(random_key(seed, "data.sample")),
        share_(static_cast<double>(wanted) / static_cast<double>(std::max<int64_t>(train_bytes, 1))) {}
  void text_of(Split split, std::string_view piece, const Place&) override {
    if (split != Split::train) return;
    while (!piece.empty()) {
      const size_t newline = std::min(piece.find('\n'), piece.size());
      const size_t part = utf8::complete_prefix(piece.substr(0, std::min<size_t>(newline, 8192)));
      if (part > 0 && uniform_from_bits(philox(key_, static_cast<uint64_t>(line_++), 0).word[0]) < share_)
        lines_.emplace_back(piece.substr(0, part));
      piece.remove_prefix(std::min(piece.size(), part == newline ? newline + 1 : part));
    }
  }
  void end_of(Split) override {}
  const std::vector<std::string>& lines() const { return lines_; }

 private:
  uint64_t key_;
  double share_;
  int64_t line_ = 0;
  std::vector<std::string> lines_;
};

// Last pass: tokens to the store.
class Encode final : public Dealer {
 public:
  Encode(int64_t total_bytes, bool quiet, const Tokenizer& tokenizer, int32_t eos, TokenStoreWriter& writer)
      : Dealer("encoding", total_bytes, quiet), tokenizer_(tokenizer), eos_(eos), writer_(writer) {}
  void text_of(Split split, std::string_view piece, const Place& place) override {
    counter(split).add(piece);
    for (const std::vector<int32_t>& ids : encode(piece, place)) writer_.append(name_of(split), ids);
  }
  void end_of(Split split) override {
    counter(split).end_text();
    if (eos_ >= 0) writer_.append(name_of(split), std::span(&eos_, 1));
    writer_.begin_document(name_of(split));
  }
  const TextCounts& counts(Split split) const { return counters_[static_cast<size_t>(split)].counts(); }

 private:
  TextCounter& counter(Split split) { return counters_[static_cast<size_t>(split)]; }

  // Lines do not depend on each other, so that blocks of lines are encoded in parallel.
  std::vector<std::vector<int32_t>> encode(std::string_view piece, const Place& place) const {
    std::vector<std::string_view> blocks;
    std::vector<size_t> starts;
    const size_t block = std::max(size_t{1} << 17, piece.size() / static_cast<size_t>(num_threads()) + 1);
    for (size_t at = 0; at < piece.size();) {
      const size_t newline = at + block < piece.size() ? piece.find('\n', at + block) : std::string_view::npos;
      const size_t end = newline == std::string_view::npos ? piece.size() : newline + 1;
      blocks.push_back(piece.substr(at, end - at));
      starts.push_back(at);
      at = end;
    }
    std::vector<std::vector<int32_t>> ids(blocks.size());
    parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t first, int64_t last) {
      for (auto i = static_cast<size_t>(first); i < static_cast<size_t>(last); ++i) {
        try {
          ids[i] = tokenizer_.encode(blocks[i]);
        } catch (const Error& error) {
          throw Error(fmt::format("{} and following: {}", place.str(static_cast<int64_t>(starts[i])), error.what()));
        }
      }
    });
    return ids;
  }

  const Tokenizer& tokenizer_;
  int32_t eos_;
  TokenStoreWriter& writer_;
  TextCounter counters_[kSplits];
};

void check_options(const PrepareOptions& o) {
  const auto check = [](bool good, const std::string& message) {
    if (!good) throw ConfigError("data prepare: " + message);
  };
  check(!o.inputs.empty(), "no input; give text files, directories, or - for standard input");
  check(!o.output.empty(), "no output file");
  check(o.tokenizer == "byte" || o.tokenizer == "char" || o.tokenizer == "sentencepiece" || o.tokenizer == "ids",
        fmt::format("unknown tokenizer '{}'; choose byte, char, sentencepiece or ids", o.tokenizer));
  const bool ids = bytes_of_id(o.format) > 0;
  check(o.format == "auto" || o.format == "text" || o.format == "jsonl" || ids,
        fmt::format("unknown format '{}'; choose auto, text, jsonl, uint16 or uint32", o.format));
  check(o.tokenizer != "ids" || ids, "--tokenizer ids takes the ids of another program: --format uint16 or uint32");
  check(o.tokenizer == "ids" || !ids || !o.tokenizer_from.empty(),
        fmt::format("--format {} holds ids, not text: --tokenizer ids, or --tokenizer-from their store", o.format));
  check(ids || (o.eos_id < 0 && o.skip_bytes == 0), "--eos-id and --skip-bytes are for ids: --format uint16 or uint32");
  check(!ids || o.tokenizer_from.empty() || (o.eos_id < 0 && !o.vocab_size),
        "--tokenizer-from says what the vocabulary and the end of a document are; leave out --vocab-size and --eos-id");
  const int64_t vocab_size = o.vocab_size.value_or(kMaxVocabulary);
  check(vocab_size > 0 && vocab_size <= kMaxVocabulary && o.eos_id >= -1 && o.eos_id < vocab_size && o.skip_bytes >= 0,
        fmt::format("a vocabulary of {} with end of document {}; expected a size from 1 to {} and an id below it", vocab_size, o.eos_id, kMaxVocabulary));
  const double valid = o.valid.value_or(0);
  check(valid >= 0 && o.test >= 0 && valid + o.test < 1,
        fmt::format("the shares valid {} and test {} must be at least 0 and leave something to train", valid, o.test));
  check(o.valid_files.empty() || valid == 0, "give a share to hold out or files to validate on, not both");
  check(o.test_files.empty() || o.test == 0, "give a share to test on or files to test on, not both");
  check(o.sample_bytes > 0, fmt::format("the training sample of {} bytes must be positive", o.sample_bytes));
}

TokenizerPtr make_tokenizer(const PrepareOptions& o, const Scan& scan, const std::vector<Source>& sources, bool eos,
                            double valid, int64_t total_bytes) {
  if (o.tokenizer == "byte") return make_byte_tokenizer(eos);
  if (o.tokenizer == "char") return make_char_tokenizer(scan.alphabet(), eos);
  SampleLines sample(total_bytes, o.quiet, sources[0].counts.bytes, o.sample_bytes, o.seed);
  sample.begin_source(sources[0], o, valid, false);
  read_documents(sources[0].files, {o.field, unescape(o.document_separator)}, sample);
  sample.finish();
  const int64_t vocab_size = o.vocab_size.value_or(SentencePieceOptions().vocab_size);
  if (!o.quiet)
    std::fputs(fmt::format("training a sentencepiece vocabulary of {} on {} lines\n", vocab_size, sample.lines().size()).c_str(), stderr);
  size_t next = 0;
  return train_sentencepiece(
      [&]() -> std::optional<std::string> {
        throw_if_interrupted();
        return next < sample.lines().size() ? std::optional(sample.lines()[next++]) : std::nullopt;
      },
      {.vocab_size = vocab_size, .model = o.model, .byte_fallback = o.byte_fallback});
}

std::string source_names(const PrepareOptions& o) {
  std::string out;
  size_t left_out = 0;
  for (const auto* list : {&o.inputs, &o.valid_files, &o.test_files})
    for (const std::string& name : *list) {
      if (out.size() > 16384)
        ++left_out;  // an attribute must stay small
      else
        out += (out.empty() ? "" : "\n") + (name == "-" ? "standard input" : name);
    }
  return left_out == 0 ? out : out + fmt::format("\n... and {} more", left_out);
}

/// A held-out file that lies in a directory of the inputs would be trained on, and its perplexity worth nothing.
void check_apart(const std::vector<Source>& sources) {
  std::map<std::pair<dev_t, ino_t>, size_t> owner;
  for (size_t i = 0; i < sources.size(); ++i)
    for (const TextInput& file : sources[i].files) {
      struct stat status {};
      if (::stat(file.path.c_str(), &status) != 0) continue;  // the one who reads it says why
      const auto [found, added] = owner.emplace(std::pair(status.st_dev, status.st_ino), i);
      KRAIT_CHECK(added || found->second == i, "{}: is text of {} and of {}; leave it out of one (a directory takes all files in it)",
                  file.shown, name_of(sources[found->second].whole), name_of(sources[i].whole));
    }
}

}  // namespace

PrepareSummary prepare(const PrepareOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  check_options(options);
  const InterruptGuard interrupts;
  OutputFile output(options.output, options.overwrite);
  const double valid = options.valid.value_or(options.valid_files.empty() ? 0.1 : 0.0);
  const DocumentFormat format{options.field, unescape(options.document_separator)};

  std::vector<Source> sources(1);
  InputFiles inputs(output.directory());
  sources[0].files = inputs.find(options.inputs, options.format);
  if (!options.valid_files.empty())
    sources.push_back({inputs.find(options.valid_files, options.format), Split::valid, 0, {}});
  if (!options.test_files.empty())
    sources.push_back({inputs.find(options.test_files, options.format), Split::test, 0, {}});
  check_apart(sources);
  const int64_t total_bytes = inputs.total_bytes();
  output.refuse_inputs(inputs.paths());

  TokenStorePtr given;
  if (!options.tokenizer_from.empty()) given = TokenStore::open(options.tokenizer_from);
  PrepareSummary summary;
  summary.output = options.output;
  const auto publish = [&] {
    throw_if_interrupted();
    summary.file_bytes = output.publish();
    summary.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return summary;
  };
  if (bytes_of_id(options.format) > 0) {
    std::vector<IdSource> of_ids;
    for (const Source& source : sources) of_ids.push_back({source.files, source.whole});
    store_ids(summary, options, of_ids, valid, given ? given->tokenizer() : nullptr, total_bytes, output.temporary(), source_names(options));
    return publish();
  }
  KRAIT_CHECK(!given || given->tokenizer()->has_text(), "{}: holds ids of a tokenizer that is not here, which cannot encode text",
              options.tokenizer_from);
  Scan scan(given ? given->tokenizer()->name() : options.tokenizer, total_bytes, options.quiet);
  bool several = false;
  for (Source& source : sources) {
    read_documents(source.files, format, scan);
    scan.take(source);
    KRAIT_CHECK(source.documents > 0, "{}: no text found{}", source.files[0].shown,
                source.files.size() > 1 ? ", nor in the files after it" : "");
    several |= source.documents > 1;
    for (const TextInput& file : source.files) several |= file.json_lines;
  }
  scan.finish();

  const bool eos = options.eos.value_or(given ? given->eos_id() >= 0 : several);
  const TokenizerPtr tokenizer =
      given ? given->tokenizer() : make_tokenizer(options, scan, sources, eos, valid, total_bytes);
  KRAIT_CHECK(!eos || tokenizer->eos_id() >= 0,
              "{}: its {} tokenizer has no end-of-document token; prepare without one (--no-eos)",
              options.tokenizer_from, tokenizer->name());

  summary.tokenizer = tokenizer->name();
  summary.vocab_size = tokenizer->vocab_size();
  summary.wanted_vocab = !given && options.tokenizer == "sentencepiece" ? options.vocab_size.value_or(SentencePieceOptions().vocab_size) : summary.vocab_size;
  summary.eos_id = eos ? tokenizer->eos_id() : -1;
  summary.sha256 = scan.sha256();
  {
    TokenStoreWriter writer(output.temporary(), *tokenizer, static_cast<int32_t>(summary.eos_id));
    Encode encode(total_bytes, options.quiet, *tokenizer, static_cast<int32_t>(summary.eos_id), writer);
    int64_t expected = 0, written = 0;
    for (const Source& source : sources) {
      encode.begin_source(source, options, valid, tokenizer->name() == "byte");
      read_documents(source.files, format, encode);
      expected += source.counts.bytes;
    }
    encode.finish();
    for (int s = 0; s < kSplits; ++s) {
      const auto split = static_cast<Split>(s);
      const auto totals = writer.totals(name_of(split));
      const TextCounts& c = encode.counts(split);
      writer.set_counts(name_of(split), c);
      written += c.bytes;
      if (totals.tokens > 0)
        summary.splits.push_back(
            {name_of(split), totals.documents, totals.tokens, c.bytes, c.characters, c.words, c.lines});
    }
    KRAIT_CHECK(written == expected, "the input changed while it was read ({} bytes, then {}); try again", expected,
                written);
    KRAIT_CHECK(!summary.splits.empty() && summary.splits[0].name == "train",
                "{}: too little text to train on ({} bytes)", sources[0].files[0].shown, expected);
    writer.finish(source_names(options), summary.sha256);
  }
  return publish();
}

std::string to_string(const PrepareSummary& s) {
  std::string out = fmt::format("{}: {} in {:.1f} s, sha256 of the text {}\n", s.output, human_bytes(s.file_bytes),
                                s.seconds, s.sha256);
  const std::string wanted =
      s.wanted_vocab > s.vocab_size ? fmt::format(" (the text has not enough pieces for {})", with_commas(s.wanted_vocab)) : "";
  out += fmt::format("tokenizer {}, vocabulary {}{}, {}\n", s.tokenizer, with_commas(s.vocab_size), wanted,
                     s.eos_id >= 0 ? fmt::format("end of document {}", s.eos_id) : "no end-of-document token");
  out += fmt::format("{:<6} {:>11} {:>15} {:>15} {:>15} {:>13} {:>12}\n", "split", "documents", "tokens", "bytes",
                     "characters", "words", "bytes/token");
  for (const SplitSummary& p : s.splits)
    out += fmt::format("{:<6} {:>11} {:>15} {:>15} {:>15} {:>13} {:>12.3f}\n", p.name, with_commas(p.documents),
                       with_commas(p.tokens), with_commas(p.bytes), with_commas(p.characters), with_commas(p.words),
                       static_cast<double>(p.bytes) / static_cast<double>(p.tokens));
  return out;
}

}  // namespace krait::data
