#include <utility>

#include "core/comm/backend.h"
#include "core/comm/job.h"
#include "core/comm/nccl/check.h"
#include "core/comm/nccl/copy_engines.h"
#include "core/comm/nccl/watchdog.h"
#include "core/comm/work.h"
#include "core/stream.h"

namespace krait::comm {

void check(ncclResult_t status, std::source_location where) {
  if (status == ncclSuccess) return;
  throw_error(fmt::format("NCCL error: {} ({}) at {}:{}\n       NCCL_DEBUG=INFO tells more", ncclGetErrorString(status),
                          ncclGetLastError(nullptr), where.file_name(), where.line()));
}

namespace {

cudaStream_t native(Device device) { return static_cast<cudaStream_t>(current_stream(device).handle); }

ncclDataType_t nccl_type(DType dtype) {
  switch (dtype) {
    case DType::f32: return ncclFloat32;
    case DType::f64: return ncclFloat64;
    case DType::bf16: return ncclBfloat16;
    case DType::f16: return ncclFloat16;
    case DType::i32: return ncclInt32;
    case DType::i64: return ncclInt64;
    case DType::u8:
    case DType::boolean: return ncclUint8;
  }
  throw_error("invalid dtype");
}

/// Work on the group's stream up to an event. In a graph that is being recorded the event only carries the order;
/// such work must be waited for inside.
class NcclWork final : public Work::State {
 public:
  NcclWork(Device device, cudaEvent_t done, std::vector<Tensor> tensors)
      : device_(device), done_(done), tensors_(std::move(tensors)) {}

  // Memory is reused in the order of the current stream, so the tensors may go as soon as that stream waits.
  void wait() override {
    if (!done_) return;
    check(cudaStreamWaitEvent(native(device_), done_, 0));
    Watchdog::instance().give_event(done_);  // what waits has noted its state
    done_ = nullptr;
    tensors_.clear();
  }

 private:
  Device device_;
  cudaEvent_t done_;
  std::vector<Tensor> tensors_;
};

class NcclGroup final : public ProcessGroup {
 public:
  NcclGroup(const ProcessGroup& group, Device device, const Share& share, const Beside& beside)
      : ProcessGroup(group.rank(), group.size(), group.name()), device_(device),
        place_(std::make_shared<std::string>(fmt::format("group '{}' of {} ranks (NCCL, {})", name_, size_, device))) {
    check(cudaSetDevice(device.index));
    ncclUniqueId id{};
    if (rank_ == 0) check(ncclGetUniqueId(&id));
    share(&id, sizeof(id));
    {
      const Watchdog::Blocking watched({"the start", place_, ""});
      ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
      if (beside.multiprocessors > 0) config.minCTAs = config.maxCTAs = beside.multiprocessors;
      check(ncclCommInitRankConfig(&comm_, size_, id, rank_, &config));
    }
    Watchdog::instance().watch(comm_, place_);
    if (beside.copy_engines) {
      const Watchdog::Blocking watched({"the start of the copy engines", place_, ""});
      engines_ = CopyEngines::make(*this, share, comm_);
    }
    if (engines_) Watchdog::instance().watch(engines_->comm(), place_);
    int least = 0, greatest = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest));  // before the backward's kernels
    check(cudaEventCreateWithFlags(&start_, cudaEventDisableTiming));
  }
  // The communicator lives until the process ends: destroying it would be a call of all members.

  Work all_reduce(Tensor t, Reduce op) override {
    return run("all_reduce", {t}, [&] {
      if (op == Reduce::sum && by_engines(t)) return engines_->all_reduce(t, stream_);
      check(ncclAllReduce(t.raw_data(), t.raw_data(), count(t), nccl_type(t.dtype()), op == Reduce::sum ? ncclSum : ncclMax,
                          comm_, stream_));
    });
  }
  Work all_gather(const Tensor& piece, Tensor whole) override {
    return run("all_gather", {piece, whole}, [&] {
      if (by_engines(whole)) return engines_->all_gather(piece, whole, stream_);
      check(ncclAllGather(piece.raw_data(), whole.raw_data(), count(piece), nccl_type(piece.dtype()), comm_, stream_));
    });
  }
  Work reduce_scatter(const Tensor& whole, Tensor piece) override {
    return run("reduce_scatter", {piece, whole}, [&] {
      if (by_engines(whole)) return engines_->reduce_scatter(whole, piece, stream_);
      check(ncclReduceScatter(whole.raw_data(), piece.raw_data(), count(piece), nccl_type(piece.dtype()), ncclSum, comm_,
                              stream_));
    });
  }
  Work all_to_all(const Tensor& send, Tensor receive) override {
    return run("all_to_all", {send, receive}, [&] {
      const size_t n = count(send) / static_cast<size_t>(size_);
      const size_t bytes = n * static_cast<size_t>(size_of(send.dtype()));
      const ncclDataType_t type = nccl_type(send.dtype());
      check(ncclGroupStart());
      for (int r = 0; r < size_; ++r) {
        const size_t place = static_cast<size_t>(r) * bytes;
        check(ncclSend(static_cast<char*>(send.raw_data()) + place, n, type, r, comm_, stream_));
        check(ncclRecv(static_cast<char*>(receive.raw_data()) + place, n, type, r, comm_, stream_));
      }
      check(ncclGroupEnd());
    });
  }
  Work broadcast(Tensor t, int root) override {
    return run("broadcast", {t}, [&] {
      check(ncclBroadcast(t.raw_data(), t.raw_data(), count(t), nccl_type(t.dtype()), root, comm_, stream_));
    });
  }
  Work exchange(const Tensor& send, int to, Tensor receive, int from) override {
    const bool sends = send.defined() && send.numel() > 0, receives = receive.defined() && receive.numel() > 0;
    std::vector<Tensor> tensors;
    if (sends) tensors.push_back(send);
    if (receives) tensors.push_back(receive);
    return run("exchange", std::move(tensors), [&] {
      check(ncclGroupStart());
      if (sends) check(ncclSend(send.raw_data(), count(send), nccl_type(send.dtype()), to, comm_, stream_));
      if (receives) check(ncclRecv(receive.raw_data(), count(receive), nccl_type(receive.dtype()), from, comm_, stream_));
      check(ncclGroupEnd());
    });
  }
  bool has_engines() const { return engines_ != nullptr; }
  /// See reachable_memory().
  Tensor reachable(int64_t numel, DType dtype) {
    const Watchdog::Blocking watched({"the registration of memory", place_, ""});
    return engines_->reachable(numel, dtype, device_);
  }
  void barrier() override { KRAIT_ASSERT(false, "the MPI group has barriers."); }
  GroupPtr split(int, const std::string&) override { KRAIT_ASSERT(false, "the MPI group is split."); }

 private:
  bool by_engines(const Tensor& whole) const { return engines_ && engines_->serves(whole); }
  static size_t count(const Tensor& t) { return static_cast<size_t>(t.numel()); }

  // f queues the collective on stream_, which waits for the work of the current stream so far.
  template <class F>
  Work run(const char* collective, std::vector<Tensor> tensors, F f) {
    if (tensors.empty() || tensors[0].numel() == 0) return {};
    for (const Tensor& t : tensors)
      KRAIT_CHECK(t.device() == device_, "{} in {}: {} is on another device", collective, *place_, describe(t));
    Watchdog& watchdog = Watchdog::instance();
    check(cudaSetDevice(device_.index));  // the events are this device's
    const cudaEvent_t done = watchdog.take_event();
    check(cudaEventRecord(start_, native(device_)));
    check(cudaStreamWaitEvent(stream_, start_, 0));
    {
      const Watchdog::Blocking watched({collective, place_, describe(tensors.back())});  // NCCL may connect first
      f();
    }
    check(cudaEventRecord(done, stream_));
    if (!is_capturing(device_)) {
      const cudaEvent_t watched = watchdog.take_event();
      check(cudaEventRecord(watched, stream_));
      watchdog.watch(watched, {collective, place_, describe(tensors.back())});
    }
    return Work(std::make_shared<NcclWork>(device_, done, std::move(tensors)));
  }

  Device device_;
  std::shared_ptr<const std::string> place_;
  ncclComm_t comm_ = nullptr;
  std::unique_ptr<CopyEngines> engines_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr;
};

}  // namespace

NcclStart make_nccl_group(const ProcessGroup& group, Device device, const Share& share, const Beside& beside) {
  const auto nccl = std::make_shared<NcclGroup>(group, device, share, beside);
  if (!nccl->has_engines()) return {nccl};
  return {nccl, [nccl](int64_t numel, DType dtype) { return nccl->reachable(numel, dtype); }};
}

std::string nccl_version() {
  int code = 0;
  check(ncclGetVersion(&code));
  return fmt::format("{}.{}.{}", code / 10000, code / 100 % 100, code % 100);
}

}  // namespace krait::comm
