#include "core/comm/mpi/star_server.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <random>
#include <set>

#include "core/comm/job.h"
#include "core/comm/mpi/sockets.h"
#include "core/error.h"

namespace krait::comm {
namespace {

constexpr uint64_t kLongestHello = 4096;          // bytes; whoever sends more is no rank of ours
constexpr auto kGoing = std::chrono::seconds(3);  // for all ranks to end when they are told to
constexpr double kLeaving = 10;                   // seconds for all ranks to say bye after the first has

int number(const std::string& text) {
  int value = -1;
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

// Reads and drops what still comes.
bool closes_before(std::chrono::steady_clock::time_point end, int socket) {
  for (;;) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
    pollfd ready{socket, POLLIN, 0};
    if (poll(&ready, 1, std::max(0, static_cast<int>(left.count()))) <= 0) return false;
    char bytes[4096];
    if (recv(socket, bytes, sizeof(bytes), MSG_DONTWAIT) <= 0 && errno != EINTR) return true;
  }
}

// Two halves of 15 bits that are not 0: the processes of Open MPI 4.1 do not reach each other in a job with bit 15.
uint32_t job_number() {
  std::random_device random;
  const auto half = [&] { return random() % 0x7ffe + 1; };
  return half() << 16 | half();
}

}  // namespace

StarServer::StarServer(int listener, int own, int size, std::string version, double limit)
    : listener_(listener), size_(size), version_(std::move(version)), limit_(limit) {
  peers_.emplace_back().socket = own;
  send_bytes(own, kGreeting);
}

StarServer::~StarServer() {
  if (listener_ >= 0) close(listener_);
  for (const Peer& peer : peers_) close(peer.socket);
}

void StarServer::run() {
  while (!ended_ && left_ < static_cast<size_t>(size_)) {
    std::vector<pollfd> sockets;
    for (const Peer& peer : peers_) sockets.push_back({peer.gone ? -1 : peer.socket, POLLIN, 0});
    // -1 is passed over. Rank 0's own hello first: end_all() asks which machine it is on.
    sockets.push_back({of_rank(0) ? listener_ : -1, POLLIN, 0});
    if (poll(sockets.data(), sockets.size(), 200) > 0) {
      for (size_t i = 0; i + 1 < sockets.size() && !ended_; ++i)
        if (sockets[i].revents) read(peers_[i]);
      if (sockets.back().revents && listener_ >= 0) accept_peer();
      std::erase_if(peers_, [](const Peer& peer) {
        const bool stranger = peer.gone && peer.rank < 0;
        if (stranger) close(peer.socket);
        return stranger;
      });
    }
    if (!ended_) check_time();
  }
}

void StarServer::accept_peer() {
  const int socket = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
  if (socket < 0) return;
  prepare(socket);
  Peer& peer = peers_.emplace_back();
  peer.socket = socket;
  peer.gone = !send_bytes(socket, kGreeting);
}

void StarServer::read(Peer& peer) {
  char bytes[65536];
  for (;;) {
    const ssize_t got = recv(peer.socket, bytes, sizeof(bytes), MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (got <= 0) break;
    peer.buffer.append(bytes, static_cast<size_t>(got));
    if (peer.rank < 0 && frame_length(peer.buffer) > kLongestHello) break;
    while (auto frame = take_frame(peer.buffer)) {
      take(peer, *frame);
      if (ended_ || peer.gone) return;
    }
  }
  peer.gone = true;
  if (peer.rank >= 0 && !peer.left) end_all(name(peer) + " has ended before the job's end; was it killed?", 1, "");
}

void StarServer::take(Peer& peer, const Frame& frame) {
  if (peer.rank < 0) {
    frame.kind == Kind::hello ? welcome(peer, frame.body) : void(peer.gone = true);
    return;
  }
  switch (frame.kind) {
    case Kind::part:
      if (parts_++ == 0) begin_ = Clock::now();
      peer.part = frame.body;
      if (parts_ == static_cast<size_t>(size_)) finish_round();
      return;
    case Kind::end:
      return end_all(name(peer) + " has ended the job", number(frame.body), peer.machine);
    case Kind::bye:
      if (left_++ == 0) begin_ = Clock::now();
      peer.left = true;
      return;
    default:
      return;
  }
}

void StarServer::welcome(Peer& peer, const std::string& hello) {
  const auto fields = unpack(hello);
  const int rank = fields && fields->size() == 6 ? number((*fields)[0]) : -1;
  if (rank < 0) {
    peer.gone = true;
    return;
  }
  const int size = number((*fields)[1]);
  const std::string& version = (*fields)[2];
  peer.host = (*fields)[3];
  peer.machine = (*fields)[4];
  peer.process = (*fields)[5];
  const std::string who = fmt::format("rank {} ({}, process {})", rank, peer.host, peer.process);
  if (size != size_ || rank >= size_)
    return end_all(fmt::format("{} has WORLD_SIZE={}, but rank 0 has {}", who, size, size_), 1, "");
  if (version != version_) return end_all(fmt::format("{} is {}, but rank 0 is {}", who, version, version_), 1, "");
  if (const Peer* other = of_rank(rank))
    return end_all(fmt::format("{} and {} have the same RANK", name(*other), who.substr(who.find('(')), rank), 1, "");
  peer.rank = rank;
  if (++ranks_ == static_cast<size_t>(size_)) start();
}

void StarServer::start() {
  close(listener_);
  listener_ = -1;
  for (Peer& peer : peers_) peer.gone |= peer.rank < 0;
  std::vector<std::string> fields{std::to_string(job_number()), of_rank(0)->host};
  for (int r = 0; r < size_; ++r) fields.push_back(of_rank(r)->machine);
  const std::string body = pack(fields);
  for (Peer& peer : peers_)
    if (peer.rank >= 0) send_frame(peer.socket, Kind::start, body);
  started_ = true;
}

void StarServer::finish_round() {
  std::vector<std::string> parts(static_cast<size_t>(size_));
  for (Peer& peer : peers_)
    if (peer.rank >= 0) parts[static_cast<size_t>(peer.rank)] = std::move(*peer.part);
  const std::string body = pack(parts);
  for (Peer& peer : peers_) {
    peer.part.reset();
    if (peer.rank >= 0) send_frame(peer.socket, Kind::round, body);  // who does not take it is seen as lost when read
  }
  parts_ = 0;
}

void StarServer::check_time() {
  const double waited = std::chrono::duration<double>(Clock::now() - begin_).count();
  if (!started_ && waited > limit_) {
    std::string missing;
    for (int r = 0, named = 0; r < size_ && named < 8; ++r)
      if (!of_rank(r)) missing += (named++ ? ", " : "") + std::to_string(r);
    end_all(fmt::format("{} of {} ranks have come within {:g} s; not there: rank {}", ranks_, size_, limit_, missing),
            1, "");
  } else if (parts_ > 0 && waited > timeout()) {
    const auto late = std::find_if(peers_.begin(), peers_.end(), [](const Peer& p) { return p.rank >= 0 && !p.part; });
    end_all(fmt::format("the other ranks have waited {:.1f} s for {} (if it only is slow, raise KRAIT_COMM_TIMEOUT, "
                        "{:g} s)",
                        waited, name(*late), timeout()),
            1, "");
  } else if (left_ > 0 && waited > kLeaving) {
    ended_ = true;
  }
}

void StarServer::end_all(const std::string& text, int status, const std::string& except) {
  ended_ = true;
  const std::string code = std::to_string(status);
  std::set<std::string> spoken{except};
  const Peer* own = &peers_.front();
  const bool speaks = spoken.insert(own->machine).second;
  std::vector<const Peer*> told;
  for (const Peer& peer : peers_) {
    if (&peer == own || peer.gone) continue;
    const bool prints = peer.rank >= 0 && spoken.insert(peer.machine).second;
    if (send_frame(peer.socket, Kind::ended, pack({code, prints ? text : ""}))) told.push_back(&peer);
  }
  // Rank 0 ends last: what is on its way to the others would be lost with it. Who is stopped does not go by itself.
  const auto end = Clock::now() + kGoing;
  for (const Peer* peer : told)
    if (!closes_before(end, peer->socket) && peer->machine == own->machine) kill(number(peer->process), SIGKILL);
  send_frame(own->socket, Kind::ended, pack({code, speaks ? text : ""}));
}

StarServer::Peer* StarServer::of_rank(int rank) {
  const auto found = std::find_if(peers_.begin(), peers_.end(), [&](const Peer& p) { return p.rank == rank; });
  return found == peers_.end() ? nullptr : &*found;
}

std::string StarServer::name(const Peer& peer) {
  return fmt::format("rank {} ({}, process {})", peer.rank, peer.host, peer.process);
}

}  // namespace krait::comm
