#include "data/documents.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

#include "core/error.h"
#include "data/utf8.h"

namespace krait::data {
namespace {

constexpr size_t kBlock = size_t{4} << 20;
constexpr size_t kMaxJsonLine = size_t{64} << 20;

// A file read in order, with every status checked.
class Reader {
 public:
  explicit Reader(const TextInput& input) : input_(input), fd_(::open(input.path.c_str(), O_RDONLY | O_CLOEXEC)) {
    KRAIT_CHECK(fd_ >= 0, "{}: cannot be opened: {}", input.shown, std::strerror(errno));
  }
  ~Reader() { ::close(fd_); }
  Reader(const Reader&) = delete;

  /// Appends up to one block to the buffer; false at the end of the file.
  bool more(std::string& buffer, DocumentSink& sink) {
    const size_t old = buffer.size();
    buffer.resize(old + kBlock);
    size_t got = 0;
    while (got < kBlock) {
      const ssize_t n = ::read(fd_, buffer.data() + old + got, kBlock - got);
      if (n < 0 && errno == EINTR) continue;
      KRAIT_CHECK(n >= 0, "{}: cannot be read: {}", input_.shown, std::strerror(errno));
      if (n == 0) break;
      got += static_cast<size_t>(n);
    }
    buffer.resize(old + got);
    if (!begun_) check_not_compressed(buffer, input_.shown);
    begun_ = true;
    if (got > 0) sink.raw(std::string_view(buffer).substr(old));
    return got > 0;
  }

 private:
  const TextInput& input_;
  int fd_;
  bool begun_ = false;
};

class TextFile {
 public:
  TextFile(const TextInput& input, const std::string& separator, DocumentSink& sink)
      : input_(input), separator_(separator), sink_(sink) {}

  void read() {
    Reader reader(input_);
    std::string buffer;
    while (reader.more(buffer, sink_)) {
      size_t cut = buffer.rfind('\n') + 1;  // npos + 1 == 0: no line ends here
      if (cut == 0) cut = utf8::complete_prefix(buffer);
      take(std::string_view(buffer).substr(0, cut));
      buffer.erase(0, cut);
    }
    take(buffer);
    end();
  }

 private:
  void take(std::string_view block) {
    size_t kept = 0;  // text before this position was passed on
    for (size_t at = 0; !separator_.empty() && at < block.size();) {
      const size_t newline = std::min(block.find('\n', at), block.size());
      std::string_view line = block.substr(at, newline - at);
      if (line.ends_with('\r')) line.remove_suffix(1);
      const size_t next = std::min(newline + 1, block.size());
      if (at_line_start_ && line == separator_) {
        emit(block.substr(kept, at - kept));
        byte_ += static_cast<int64_t>(next - at);
        kept = next;
        end();
      }
      at_line_start_ = newline < block.size();
      at = next;
    }
    emit(block.substr(kept));
  }

  void emit(std::string_view piece) {
    if (piece.empty()) return;
    sink_.text(piece, {&input_, byte_, 0});
    byte_ += static_cast<int64_t>(piece.size());
    open_ = true;
  }

  void end() {
    if (open_) sink_.end_document();
    open_ = false;
  }

  const TextInput& input_;
  const std::string& separator_;
  DocumentSink& sink_;
  int64_t byte_ = 0;
  bool open_ = false, at_line_start_ = true;
};

std::string text_of(std::string_view line, const std::string& field, const Place& place) {
  const nlohmann::json value = nlohmann::json::parse(line, nullptr, false);
  KRAIT_CHECK(!value.is_discarded(), "{}: is not JSON; expected one object a line, like {{\"{}\": \"...\"}}",
              place.str(), field);
  KRAIT_CHECK(value.is_object(), "{}: is {} {}, expected an object with the field '{}'", place.str(),
              value.is_array() ? "an" : "a", value.type_name(), field);
  const auto found = value.find(field);
  if (found == value.end()) {
    std::string names;
    for (const auto& item : value.items()) names += (names.empty() ? "" : ", ") + item.key();
    throw_error(fmt::format("{}: has no field '{}'; it has {}; choose one with --field", place.str(), field,
                            names.empty() ? "none" : names));
  }
  KRAIT_CHECK(found->is_string(), "{}: the field '{}' is a {}, expected a string", place.str(), field,
              found->type_name());
  return found->get<std::string>();
}

void read_json_lines(const TextInput& input, const std::string& field, DocumentSink& sink) {
  Reader reader(input);
  std::string buffer;
  Place place{&input, -1, 0};
  const auto take = [&](std::string_view line) {
    ++place.line;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) return;
    const std::string text = text_of(line, field, place);
    if (text.empty()) return;
    sink.text(text, place);
    sink.end_document();
  };
  while (reader.more(buffer, sink)) {
    size_t at = 0;
    for (size_t end; (end = buffer.find('\n', at)) != std::string::npos; at = end + 1)
      take(std::string_view(buffer).substr(at, end - at));
    buffer.erase(0, at);
    KRAIT_CHECK(buffer.size() <= kMaxJsonLine, "{}:{}: the line is longer than {} MiB; is this a file of JSON lines?",
                input.shown, place.line + 1, kMaxJsonLine >> 20);
  }
  if (!buffer.empty()) take(buffer);
}

}  // namespace

std::string Place::str(int64_t ahead) const {
  return byte < 0 ? fmt::format("{}:{}", input->shown, line) : fmt::format("{}: byte {}", input->shown, byte + ahead);
}

void check_not_compressed(std::string_view head, const std::string& shown) {
  using namespace std::string_view_literals;
  constexpr std::pair<std::string_view, std::string_view> kKinds[] = {{"gzip", "\x1F\x8B\x08"sv}, {"zip", "PK\x03\x04"sv},
                                                                      {"xz", "\xFD""7zXZ\0"sv}, {"zstd", "\x28\xB5\x2F\xFD"sv},
                                                                      {"bzip2", "BZh"sv}};
  for (const auto& [name, magic] : kKinds)
    KRAIT_CHECK(!head.starts_with(magic) || (name == "bzip2" && head.substr(4, 2) != "1A"sv),
                "{}: is compressed ({}), and its bytes are no text; unpack it, or pipe the text to krait data prepare -", shown, name);
}

void read_documents(const std::vector<TextInput>& inputs, const DocumentFormat& format, DocumentSink& sink) {
  for (const TextInput& input : inputs) {
    if (input.json_lines)
      read_json_lines(input, format.field, sink);
    else
      TextFile(input, format.separator, sink).read();
  }
}

}  // namespace krait::data
