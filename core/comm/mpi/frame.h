#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

// What the processes of a Star say to each other.
namespace krait::comm {

/// The first bytes on each connection, from rank 0: a client sends nothing to a server that is not ours.
inline constexpr std::string_view kGreeting = "krait 1\n";

enum class Kind : uint32_t {
  hello = 1,  // to rank 0: rank, size, version, host, machine, process
  start,      // to all, once all are there: the job's number, the machine of each rank, the host of rank 0
  part,       // to rank 0, from each rank:
  round,      // to all: every rank's part
  end,        // to rank 0: status
  ended,      // to all: status, text to print ("": none)
  bye,        // to rank 0
};
struct Frame {
  Kind kind;
  std::string body;
};

std::string pack(const std::vector<std::string>& fields);
/// Nothing if the bytes are not from pack().
std::optional<std::vector<std::string>> unpack(std::string_view bytes);

/// False: the other side is gone, or takes nothing for 20 s. SIGPIPE is not raised.
bool send_bytes(int socket, std::string_view bytes);
bool send_frame(int socket, Kind kind, std::string_view body);
/// Waits. Nothing: the other side is gone, or nothing came within `seconds` (0: for ever).
std::optional<std::string> receive_bytes(int socket, size_t count, double seconds);
std::optional<Frame> receive_frame(int socket, double seconds);
/// The first frame in `buffer`, taken out, if it is there as a whole.
std::optional<Frame> take_frame(std::string& buffer);
/// Of the frame that begins in `buffer`; 0 if that is not known yet.
uint64_t frame_length(std::string_view buffer);

}  // namespace krait::comm
