#include "data/inspect.h"

#include <algorithm>
#include <filesystem>
#include <vector>

#include "core/error.h"
#include "data/progress.h"
#include "data/token_store.h"

namespace krait::data {
namespace {

// On one line: line ends, tabs and control characters as escapes.
std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '\n')
      out += "\\n";
    else if (c == '\t')
      out += "\\t";
    else if (c == '"' || c == '\\')
      out += {'\\', c};
    else if (static_cast<unsigned char>(c) < 0x20)
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    else
      out += c;
  }
  return out + "\"";
}

}  // namespace

std::string inspect(const std::string& path, int64_t n_tokens) {
  // Nothing is kept in memory: the whole file is read once, block by block.
  const TokenStorePtr store = TokenStore::open(path, {.max_memory_bytes = 0});
  std::string out =
      fmt::format("{}: token store, {}\n", path, human_bytes(static_cast<int64_t>(std::filesystem::file_size(path))));
  out += fmt::format(
      "tokenizer   {}, vocabulary {}, {}\n", store->tokenizer()->name(), with_commas(store->vocab_size()),
      store->eos_id() >= 0 ? fmt::format("end of document {}", store->eos_id()) : "no end-of-document token");
  out += fmt::format("source      {}\n", quoted(store->source()));
  out += fmt::format("sha256      {} (of the source text)\n", store->source_sha256());
  for (const std::string& name : store->splits()) {
    const TokensPtr tokens = store->split(name);
    std::vector<bool> used(static_cast<size_t>(store->vocab_size()), false);
    std::vector<int32_t> block;
    for (int64_t at = 0; at < tokens->size(); at += static_cast<int64_t>(block.size())) {
      block.resize(static_cast<size_t>(std::min<int64_t>(tokens->size() - at, int64_t{1} << 20)));
      tokens->read(at, block);
      for (const int32_t id : block) used[static_cast<size_t>(id)] = true;
    }
    std::vector<int32_t> head(static_cast<size_t>(std::clamp<int64_t>(n_tokens, 0, tokens->size())));
    tokens->read(0, head);
    const TextCounts& c = tokens->counts();
    out += fmt::format(
        "\nsplit {}: {} tokens ({} different), {} documents, {} bytes, {} characters, {} words, {} lines, {:.3f} "
        "bytes/token\n",
        name, with_commas(tokens->size()), std::count(used.begin(), used.end(), true),
        with_commas(static_cast<int64_t>(tokens->documents().size())), with_commas(c.bytes), with_commas(c.characters),
        with_commas(c.words), with_commas(c.lines),
        static_cast<double>(c.bytes) / static_cast<double>(std::max<int64_t>(tokens->size(), 1)));
    std::string ids;
    for (const int32_t id : head) ids += fmt::format(" {}", id);
    out += fmt::format("  ids {}\n  text {}\n", ids, quoted(store->tokenizer()->decode(head)));
  }
  return out + "\nverified: checksums of all chunks, ids within the vocabulary, document offsets\n";
}

}  // namespace krait::data
