#pragma once
#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "core/comm/mpi/frame.h"

namespace krait::comm {

/// Rank 0's side of a Star: hands parts round, and tells all ranks when one is lost. Owns its sockets.
class StarServer {
 public:
  /// `own` is connected to rank 0 itself.
  StarServer(int listener, int own, int size, std::string version, double limit);
  ~StarServer();
  StarServer(const StarServer&) = delete;
  StarServer& operator=(const StarServer&) = delete;

  /// Until all ranks have left, or all have been told that the job is ended.
  void run();

 private:
  using Clock = std::chrono::steady_clock;
  struct Peer {
    int socket = -1;
    int rank = -1;  // not yet known
    std::string host, machine, process, buffer;
    std::optional<std::string> part;
    bool left = false, gone = false;
  };

  void accept_peer();
  void read(Peer& peer);
  void take(Peer& peer, const Frame& frame);
  void welcome(Peer& peer, const std::string& hello);
  void start();
  void finish_round();
  void check_time();
  /// Tells every rank; one rank of each machine prints, rank 0 on its own, but nobody on machine `except`.
  void end_all(const std::string& text, int status, const std::string& except);
  Peer* of_rank(int rank);
  static std::string name(const Peer& peer);

  int listener_, size_;
  std::string version_;
  double limit_;
  std::vector<Peer> peers_;
  size_t ranks_ = 0, parts_ = 0, left_ = 0;
  bool started_ = false, ended_ = false;
  Clock::time_point begin_ = Clock::now();  // of the meeting, of a round, of the leaving
};

}  // namespace krait::comm
