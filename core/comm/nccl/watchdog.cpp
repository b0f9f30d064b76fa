#include "core/comm/nccl/watchdog.h"

#include <atomic>
#include <thread>

#include "core/comm/job.h"
#include "core/comm/nccl/check.h"
#include "core/comm/roll_call.h"
#include "core/stream.h"

namespace krait::comm {
namespace {

constexpr auto kInterval = std::chrono::milliseconds(50);
// A CUDA error reaches the main thread too, which says where; it gets this long.
constexpr double kGrace = 10;

std::atomic<bool> running{false};

double seconds(std::chrono::steady_clock::duration d) { return std::chrono::duration<double>(d).count(); }

std::string describe(const Watchdog::Entry& e) {
  return fmt::format("{}{}{}{}{}", e.collective, e.tensor.empty() ? "" : " of ", e.tensor, e.place ? " in " : "",
                     e.place ? *e.place : "");
}

}  // namespace

Watchdog& Watchdog::instance() {
  static auto* watchdog = new Watchdog;  // never destroyed: its thread runs until the process ends
  return *watchdog;
}
bool Watchdog::started() { return running; }

Watchdog::Watchdog() : progress_(Clock::now()) {
  running = true;
  int device = 0;
  check(cudaGetDevice(&device));
  std::thread([this, device] {
    check(cudaSetDevice(device));  // or its first call would open a context on device 0
    run();
  }).detach();
}

void Watchdog::watch(cudaEvent_t event, Entry entry) {
  const std::lock_guard lock(mutex_);
  pending_.push_back({event, std::move(entry), Clock::now()});
}

void Watchdog::watch(ncclComm_t comm, std::shared_ptr<const std::string> place) {
  const std::lock_guard lock(mutex_);
  communicators_.push_back({comm, std::move(place)});
}

Watchdog::Blocking::Blocking(Entry entry) { instance().watch(cudaEvent_t{}, std::move(entry)); }
Watchdog::Blocking::~Blocking() {
  Watchdog& w = instance();
  const std::lock_guard lock(w.mutex_);
  std::erase_if(w.pending_, [](const Pending& p) { return !p.event; });
  w.progress_ = Clock::now();
}

cudaEvent_t Watchdog::take_event() {
  {
    const std::lock_guard lock(mutex_);
    if (!events_.empty()) {
      const cudaEvent_t event = events_.back();
      events_.pop_back();
      return event;
    }
  }
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}

void Watchdog::give_event(cudaEvent_t event) {
  const std::lock_guard lock(mutex_);
  events_.push_back(event);
}

void Watchdog::run() {
  for (;;) {
    std::this_thread::sleep_for(kInterval);
    const std::lock_guard lock(mutex_);
    look(Clock::now());
  }
}

void Watchdog::look(Clock::time_point now) {
  std::erase_if(pending_, [&](const Pending& p) {
    if (!p.event) return false;
    const cudaError_t status = cudaEventQuery(p.event);
    if (status == cudaErrorNotReady) return false;
    if (status != cudaSuccess) {
      if (seconds(now - p.start) > kGrace && seconds(now - progress_) > kGrace)
        abort_job(fmt::format("{}: CUDA error {} ({})", describe(p.entry), cudaGetErrorName(status), cudaGetErrorString(status)));
      return false;
    }
    events_.push_back(p.event);
    progress_ = now;
    return true;
  });
  for (const Pending& p : pending_) {
    const double waited = seconds(now - std::max(p.start, progress_));
    if (waited > timeout())
      abort_job(fmt::format("{} has not ended after {:.1f} s: another rank is stuck, has ended or made another call "
                            "(if it only is slow, raise KRAIT_COMM_TIMEOUT, {:g} s){}",
                            describe(p.entry), waited, timeout(), roll_call()));
  }
  for (const Communicator& c : communicators_) {
    ncclResult_t status = ncclSuccess;
    if (ncclCommGetAsyncError(c.comm, &status) == ncclSuccess && status != ncclSuccess && status != ncclInProgress)
      abort_job(fmt::format("NCCL in {}: {} ({})", *c.place, ncclGetErrorString(status), ncclGetLastError(c.comm)));
  }
}

void watch_device(Device device, const std::string& what) {
  if (!device.is_cuda() || !Watchdog::started() || is_capturing(device)) return;
  Watchdog& watchdog = Watchdog::instance();
  const cudaEvent_t event = watchdog.take_event();
  check(cudaEventRecord(event, static_cast<cudaStream_t>(current_stream(device).handle)));
  watchdog.watch(event, {"the work of", nullptr, what});
}

}  // namespace krait::comm
