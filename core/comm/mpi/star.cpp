#include "core/comm/mpi/star.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <utility>

#include "core/comm/backend.h"
#include "core/comm/mpi/frame.h"
#include "core/comm/mpi/sockets.h"
#include "core/comm/mpi/star_server.h"
#include "core/error.h"

namespace krait::comm {
namespace {

// Machines may share a name, and containers a machine.
std::string machine() {
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  std::error_code ignored;
  return fmt::format("{} {} {}", host_name(), boot,
                     std::filesystem::read_symlink("/proc/self/ns/pid", ignored).string());
}

void allow_sockets(int count) {
  rlimit files{};
  const auto wanted = static_cast<rlim_t>(count) + 256;
  if (getrlimit(RLIMIT_NOFILE, &files) != 0 || files.rlim_cur >= wanted) return;
  files.rlim_cur = std::min(wanted, files.rlim_max);
  setrlimit(RLIMIT_NOFILE, &files);
}

}  // namespace

Star::Star(const Options& o) : rank_(o.rank), size_(o.size) {
  if (rank_ == 0) {
    allow_sockets(size_);
    const int listener = listen_at(o.port);
    int pair[2];
    KRAIT_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0, "socketpair: no socket");
    socket_ = pair[0];
    server_ = std::thread([=, own = pair[1]] { StarServer(listener, own, o.size, o.version, o.limit).run(); });
  } else {
    socket_ = connect_to(o.host, o.port, o.limit);
  }
  const std::string hello =
      pack({std::to_string(rank_), std::to_string(size_), o.version, host_name(), machine(), std::to_string(getpid())});
  if (rank_ == 0) receive_bytes(socket_, kGreeting.size(), 0);
  send_frame(socket_, Kind::hello, hello);
  meet(o.limit);
  std::thread([this] { read_frames(); }).detach();
}

void Star::meet(double limit) {
  const auto frame = receive_frame(socket_, 2 * limit);
  const auto fields = frame ? unpack(frame->body) : std::nullopt;
  if (frame && fields && frame->kind == Kind::start && fields->size() == static_cast<size_t>(size_) + 2) {
    job_ = static_cast<uint32_t>(std::stoul((*fields)[0]));
    host_of_0_ = (*fields)[1];
    const std::string& here = (*fields)[static_cast<size_t>(rank_) + 2];
    for (int r = 0; r < size_; ++r)
      if ((*fields)[static_cast<size_t>(r) + 2] == here) local_ranks_.push_back(r);
    return;
  }
  if (server_.joinable()) server_.join();
  if (!frame || !fields || frame->kind != Kind::ended || fields->size() != 2)
    throw_error("rank 0 has ended before all ranks had come");
  if ((*fields)[1].empty()) exit_now(1);
  throw_error((*fields)[1]);
}

void Star::read_frames() {
  while (auto frame = receive_frame(socket_, 0)) {
    if (frame->kind == Kind::ended) ended(frame->body);
    if (frame->kind != Kind::round) continue;
    auto parts = unpack(frame->body);
    const std::lock_guard lock(mutex_);
    round_ = std::move(*parts);
    have_round_ = true;
    arrived_.notify_all();
  }
  {
    const std::lock_guard lock(mutex_);
    if (leaving_) return;
  }
  lost_rank_0();
}

std::vector<std::string> Star::all_gather(const std::string& part) {
  send_frame(socket_, Kind::part, part);  // a failure is seen by the thread that reads
  std::unique_lock lock(mutex_);
  arrived_.wait(lock, [&] { return have_round_; });
  have_round_ = false;
  return std::move(round_);
}

void Star::leave() {
  {
    const std::lock_guard lock(mutex_);
    leaving_ = true;
  }
  send_frame(socket_, Kind::bye, "");
  if (server_.joinable()) server_.join();
  clean_up();
}

void Star::end_job(int status) {
  send_frame(socket_, Kind::end, std::to_string(status));
  std::this_thread::sleep_for(std::chrono::seconds(10));  // the answer ends this process
  exit_now(status);
}

void Star::fail(const std::string& message) {
  if (rank_ == 0) {
    std::fprintf(stderr, "error: %s\n", message.c_str());
    end_job(1);
  }
  std::this_thread::sleep_for(std::chrono::seconds(30));
  exit_now(1);
}

void Star::ended(std::string_view order) {
  const auto fields = unpack(order);
  const bool speaks = fields && fields->size() == 2 && !(*fields)[1].empty();
  if (speaks)
    std::fputs(fmt::format("error: rank {} of {} ({}): {}\n", rank_, size_, host_name(), (*fields)[1]).c_str(), stderr);
  exit_now(fields && fields->size() == 2 ? std::stoi((*fields)[0]) : 1);
}

// Nobody is left to say who speaks: on each machine the lowest rank does.
void Star::lost_rank_0() {
  const int first = local_ranks_[0] == 0 && local_ranks_.size() > 1 ? local_ranks_[1] : local_ranks_[0];
  if (rank_ == first)
    std::fputs(fmt::format("error: rank {} of {} ({}): rank 0 ({}) has ended before the job's end; was it killed?\n",
                           rank_, size_, host_name(), host_of_0_)
                   .c_str(),
               stderr);
  else
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
  exit_now(1);
}

void Star::before_exit(std::function<void()> f) {
  const std::lock_guard lock(mutex_);
  before_exit_ = std::move(f);
}

void Star::clean_up() {
  const std::lock_guard lock(mutex_);
  if (before_exit_) std::exchange(before_exit_, nullptr)();
}

void Star::exit_now(int status) {
  clean_up();
  _exit(status);
}

}  // namespace krait::comm
