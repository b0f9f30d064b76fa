#include "core/comm/mpi/frame.h"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <chrono>
#include <cstring>

namespace krait::comm {
namespace {

constexpr int kSendLimit = 20'000;  // ms
constexpr size_t kHeader = 8;

void append(std::string& bytes, uint32_t value) { bytes.append(reinterpret_cast<const char*>(&value), sizeof(value)); }

uint32_t read_u32(std::string_view bytes) {
  uint32_t value = 0;
  std::memcpy(&value, bytes.data(), sizeof(value));
  return value;
}

}  // namespace

std::string pack(const std::vector<std::string>& fields) {
  std::string bytes;
  for (const std::string& field : fields) {
    append(bytes, static_cast<uint32_t>(field.size()));
    bytes += field;
  }
  return bytes;
}

std::optional<std::vector<std::string>> unpack(std::string_view bytes) {
  std::vector<std::string> fields;
  while (!bytes.empty()) {
    if (bytes.size() < 4) return {};
    const size_t length = read_u32(bytes);
    bytes.remove_prefix(4);
    if (bytes.size() < length) return {};
    fields.emplace_back(bytes.substr(0, length));
    bytes.remove_prefix(length);
  }
  return fields;
}

bool send_bytes(int socket, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent >= 0) {
      bytes.remove_prefix(static_cast<size_t>(sent));
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      pollfd ready{socket, POLLOUT, 0};
      if (poll(&ready, 1, kSendLimit) == 0) return false;
    } else if (errno != EINTR) {
      return false;
    }
  }
  return true;
}

bool send_frame(int socket, Kind kind, std::string_view body) {
  std::string bytes;
  bytes.reserve(kHeader + body.size());
  append(bytes, static_cast<uint32_t>(kind));
  append(bytes, static_cast<uint32_t>(body.size()));
  bytes += body;
  return send_bytes(socket, bytes);
}

std::optional<std::string> receive_bytes(int socket, size_t count, double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  std::string bytes(count, '\0');
  for (size_t have = 0; have < count;) {
    int wait = -1;
    if (seconds > 0) {
      const double left = seconds - std::chrono::duration<double>(Clock::now() - begin).count();
      if (left <= 0) return {};
      wait = static_cast<int>(left * 1000) + 1;
    }
    pollfd ready{socket, POLLIN, 0};
    if (poll(&ready, 1, wait) <= 0) continue;
    const ssize_t got = recv(socket, bytes.data() + have, count - have, 0);
    if (got > 0)
      have += static_cast<size_t>(got);
    else if (got == 0 || errno != EINTR)
      return {};
  }
  return bytes;
}

std::optional<Frame> receive_frame(int socket, double seconds) {
  const auto header = receive_bytes(socket, kHeader, seconds);
  if (!header) return {};
  auto body = receive_bytes(socket, read_u32(std::string_view(*header).substr(4)), seconds);
  if (!body) return {};
  return Frame{static_cast<Kind>(read_u32(*header)), std::move(*body)};
}

uint64_t frame_length(std::string_view buffer) {
  return buffer.size() < kHeader ? 0 : kHeader + uint64_t{read_u32(buffer.substr(4))};
}

std::optional<Frame> take_frame(std::string& buffer) {
  const uint64_t length = frame_length(buffer);
  if (length == 0 || buffer.size() < length) return {};
  Frame frame{static_cast<Kind>(read_u32(buffer)), buffer.substr(kHeader, length - kHeader)};
  buffer.erase(0, length);
  return frame;
}

}  // namespace krait::comm
