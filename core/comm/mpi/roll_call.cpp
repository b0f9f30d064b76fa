#include "core/comm/roll_call.h"

#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "core/comm/backend.h"
#include "core/comm/mpi/roll_call_thread.h"

namespace krait::comm {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kQuestion = 1, kAnswer = 2;
constexpr auto kPatience = std::chrono::seconds(3);
constexpr size_t kNamed = 4;  // ranks spelled out

struct Answer {
  int64_t calls;  // so far
  double seconds;  // since the last one
  char waiting;
  char host[64];
  char call[160];
};

struct Activity {
  std::mutex mutex;
  int64_t calls = 0;
  const char* collective = nullptr;
  std::string group;
  DType dtype = DType::f32;
  int64_t numel = 0;
  int waiting = 0;
  Clock::time_point since = Clock::now();
};
Activity& activity() {
  static auto* a = new Activity;  // the thread outlives static objects
  return *a;
}

MPI_Comm channel = MPI_COMM_NULL;

Answer answer() {
  Activity& a = activity();
  const std::lock_guard lock(a.mutex);
  Answer r{};
  r.calls = a.calls;
  r.seconds = std::chrono::duration<double>(Clock::now() - a.since).count();
  r.waiting = a.waiting > 0;
  std::snprintf(r.host, sizeof(r.host), "%s", host_name().c_str());
  const std::string call = a.collective ? fmt::format("{} ({} x {}) in group '{}'", a.collective, a.numel, a.dtype, a.group)
                                        : std::string("none");
  std::snprintf(r.call, sizeof(r.call), "%s", call.c_str());
  return r;
}

void reply() {
  int asked = 0;
  MPI_Status status;
  while (MPI_Iprobe(MPI_ANY_SOURCE, kQuestion, channel, &asked, &status) == MPI_SUCCESS && asked) {
    MPI_Recv(nullptr, 0, MPI_BYTE, status.MPI_SOURCE, kQuestion, channel, MPI_STATUS_IGNORE);
    const Answer mine = answer();
    MPI_Send(&mine, sizeof(mine), MPI_BYTE, status.MPI_SOURCE, kAnswer, channel);  // small: does not wait
  }
}

std::string line(size_t rank, const Answer* a) {
  if (!a) return fmt::format("\n       rank {} does not answer", rank);
  return fmt::format("\n       rank {} ({}) {}: its call {}, {:.1f} s ago, was {}", rank, a->host,
                     a->waiting ? "waits too" : "is not in a collective", a->calls, a->seconds, a->call);
}

}  // namespace

RollCallThread::RollCallThread() {
  MPI_Comm_dup(MPI_COMM_WORLD, &channel);
  thread_ = std::thread([this] {
    while (!stop_) {
      reply();
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
  });
}
RollCallThread::~RollCallThread() {
  stop_ = true;
  thread_.join();
}

void note_call(const char* collective, const std::string& group, const Tensor& t) {
  Activity& a = activity();
  const std::lock_guard lock(a.mutex);
  ++a.calls;
  a.collective = collective;
  if (a.group != group) a.group = group;
  a.numel = t.numel();
  a.dtype = t.dtype();
  a.since = Clock::now();
}

Waiting::Waiting() {
  const std::lock_guard lock(activity().mutex);
  ++activity().waiting;
}
Waiting::~Waiting() {
  const std::lock_guard lock(activity().mutex);
  --activity().waiting;
}

std::string roll_call() {
  const JobState& job = job_state();
  const size_t n = static_cast<size_t>(job.size), me = static_cast<size_t>(job.rank);
  std::vector<Answer> answers(n);
  std::vector<MPI_Request> questions(n, MPI_REQUEST_NULL), replies(n, MPI_REQUEST_NULL);
  for (size_t r = 0; r < n; ++r) {
    if (r == me) continue;
    MPI_Irecv(&answers[r], sizeof(Answer), MPI_BYTE, static_cast<int>(r), kAnswer, channel, &replies[r]);
    MPI_Isend(nullptr, 0, MPI_BYTE, static_cast<int>(r), kQuestion, channel, &questions[r]);
  }
  answers[me] = answer();
  std::vector<char> answered(n, 0);
  const auto end = Clock::now() + kPatience;
  for (bool all = false; !all && Clock::now() < end;) {
    all = true;
    for (size_t r = 0; r < n; ++r) {
      int done = 0;
      if (!answered[r]) MPI_Test(&replies[r], &done, MPI_STATUS_IGNORE);
      answered[r] |= static_cast<char>(done != 0);
      all = all && answered[r];
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  // First the silent, then those at work, then the ones that are behind.
  std::vector<size_t> order(n);
  for (size_t r = 0; r < n; ++r) order[r] = r;
  const auto key = [&](size_t r) {
    return answered[r] ? std::pair<int, int64_t>(1 + answers[r].waiting, answers[r].calls) : std::pair<int, int64_t>(0, 0);
  };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return key(a) < key(b); });
  std::string text;
  size_t named = 0;
  for (const size_t r : order) {
    if (named == kNamed || key(r) != key(order[0])) break;
    text += line(r, answered[r] ? &answers[r] : nullptr);
    ++named;
  }
  return text;
}

}  // namespace krait::comm
