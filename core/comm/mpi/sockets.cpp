#include "core/comm/mpi/sockets.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>

#include "core/comm/mpi/frame.h"
#include "core/error.h"

namespace krait::comm {
namespace {

constexpr double kGreetingLimit = 10;  // seconds

void set(int socket, int level, int option, int value) { setsockopt(socket, level, option, &value, sizeof(value)); }

// 0 or an errno.
int bind_and_listen(int socket, const void* address, socklen_t length) {
  set(socket, SOL_SOCKET, SO_REUSEADDR, 1);
  if (bind(socket, static_cast<const sockaddr*>(address), length) != 0) return errno;
  return listen(socket, SOMAXCONN) == 0 ? 0 : errno;
}

// A connected socket, or the reason why not as an errno.
int connect_within(const addrinfo& address, int milliseconds, int& error) {
  const int socket = ::socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (socket < 0) {
    error = errno;
    return -1;
  }
  error = connect(socket, address.ai_addr, address.ai_addrlen) == 0 ? 0 : errno;
  if (error == EINPROGRESS) {
    pollfd ready{socket, POLLOUT, 0};
    error = ETIMEDOUT;
    socklen_t length = sizeof(error);
    if (poll(&ready, 1, milliseconds) == 1) getsockopt(socket, SOL_SOCKET, SO_ERROR, &error, &length);
  }
  if (error == 0) {
    fcntl(socket, F_SETFL, fcntl(socket, F_GETFL) & ~O_NONBLOCK);
    return socket;
  }
  close(socket);
  return -1;
}

}  // namespace

void prepare(int socket) {
  set(socket, IPPROTO_TCP, TCP_NODELAY, 1);
  set(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
  set(socket, IPPROTO_TCP, TCP_KEEPIDLE, 10);
  set(socket, IPPROTO_TCP, TCP_KEEPINTVL, 5);
  set(socket, IPPROTO_TCP, TCP_KEEPCNT, 3);
  set(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, 25'000);
}

int listen_at(int port) {
  int error = EAFNOSUPPORT;
  int listener = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);  // serves IPv4 too
  if (listener >= 0) {
    set(listener, IPPROTO_IPV6, IPV6_V6ONLY, 0);
    sockaddr_in6 any{};
    any.sin6_family = AF_INET6;
    any.sin6_addr = in6addr_any;
    any.sin6_port = htons(static_cast<uint16_t>(port));
    error = bind_and_listen(listener, &any, sizeof(any));
    if (error == 0) return listener;
    close(listener);
  }
  if (error == EAFNOSUPPORT || error == EADDRNOTAVAIL) {
    listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in any{};
    any.sin_family = AF_INET;
    any.sin_port = htons(static_cast<uint16_t>(port));
    error = listener < 0 ? errno : bind_and_listen(listener, &any, sizeof(any));
    if (error == 0) return listener;
    if (listener >= 0) close(listener);
  }
  throw_error(
      fmt::format("rank 0 cannot wait for the other ranks at port {}: {}\n       choose another with "
                  "KRAIT_RENDEZVOUS_PORT, the same for all ranks",
                  port, std::strerror(error)));
}

int connect_to(const std::string& host, int port, double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  std::string reason;
  do {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* list = nullptr;
    if (const int status = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &list)) {
      reason = gai_strerror(status);
      list = nullptr;
    }
    const std::unique_ptr<addrinfo, void (*)(addrinfo*)> addresses(list, [](addrinfo* a) {
      if (a) freeaddrinfo(a);
    });
    for (const addrinfo* a = list; a; a = a->ai_next) {
      int error = 0;
      const int socket = connect_within(*a, 2000, error);
      if (socket < 0) {
        reason = std::strerror(error);
        continue;
      }
      const auto begin = Clock::now();
      const auto greeting = receive_bytes(socket, kGreeting.size(), kGreetingLimit);
      if (greeting == kGreeting) {
        prepare(socket);
        return socket;
      }
      close(socket);
      // Closed at once: rank 0 of this job may be about to end, or another program's socket to be reused.
      if (greeting || Clock::now() - begin > std::chrono::duration<double>(kGreetingLimit - 1))
        throw_error(
            fmt::format("what listens at {}:{} is not rank 0 of this job\n       choose another port with "
                        "KRAIT_RENDEZVOUS_PORT, the same for all ranks",
                        host, port));
      reason = "the connection was closed";
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  } while (Clock::now() < end);
  throw_error(
      fmt::format("rank 0 was not found at {}:{} within {:g} s: {}\n       MASTER_ADDR must be the host of the "
                  "process with RANK=0, and the port open",
                  host, port, seconds, reason));
}

}  // namespace krait::comm
