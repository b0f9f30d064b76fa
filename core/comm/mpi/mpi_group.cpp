#include "core/comm/mpi/mpi_group.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "core/comm/backend.h"
#include "core/comm/background.h"
#include "core/comm/job.h"
#include "core/comm/mpi/mpi_types.h"
#include "core/comm/roll_call.h"
#include "core/comm/work.h"
#include "core/stream.h"

namespace krait::comm {

using Clock = std::chrono::steady_clock;

namespace {

int64_t max_count = int64_t{1} << 30;

std::string member_list(MPI_Comm comm) {
  int size = 0;
  MPI_Comm_size(comm, &size);
  MPI_Group here, world;
  MPI_Comm_group(comm, &here);
  MPI_Comm_group(MPI_COMM_WORLD, &world);
  std::vector<int> ranks(static_cast<size_t>(size)), in_world(ranks.size());
  for (int i = 0; i < size; ++i) ranks[static_cast<size_t>(i)] = i;
  MPI_Group_translate_ranks(here, size, ranks.data(), world, in_world.data());
  MPI_Group_free(&here);
  MPI_Group_free(&world);
  std::string text = "world ranks";
  for (int i = 0; i < std::min(size, 16); ++i) text += fmt::format("{}{}", i ? ", " : " ", in_world[static_cast<size_t>(i)]);
  return size > 16 ? text + ", ..." : text;
}

int as_int(int64_t n) { return static_cast<int>(n); }

char* at(const Tensor& t, int64_t element) { return static_cast<char*>(t.raw_data()) + element * size_of(t.dtype()); }

// f(first, count) over [0, n) in counts that MPI takes.
template <class F>
void in_pieces(int64_t n, F f) {
  for (int64_t first = 0; first < n; first += max_count) f(first, as_int(std::min(max_count, n - first)));
}

}  // namespace

void set_max_count(int64_t elements) { max_count = elements; }

/// One collective's requests. Polls, so that a limit can be kept and more processes than cores make progress.
class MpiGroup::Call final : public Work::State {
 public:
  Call(const MpiGroup& group, const char* collective, std::vector<Tensor> tensors)
      : collective_(collective), place_(fmt::format("group '{}' ({})", group.name(), group.members_)),
        tensors_(std::move(tensors)), start_(Clock::now()) {}

  MPI_Request* request() {
    requests_.push_back(MPI_REQUEST_NULL);
    return &requests_.back();
  }
  void keep(const Tensor& t) { tensors_.push_back(t); }
  /// As a Work; without any request there is nothing to wait for.
  static Work start(std::shared_ptr<Call> call) { return call->requests_.empty() ? Work() : Work(std::move(call)); }

  void wait() override {
    if (requests_.empty()) return;
    const Waiting waiting;
    const auto begin = Clock::now();
    for (int64_t turn = 0;; ++turn) {
      int done = 0;
      check_mpi(MPI_Testall(as_int(static_cast<int64_t>(requests_.size())), requests_.data(), &done, MPI_STATUSES_IGNORE),
                collective_);
      if (done) break;
      pause(turn, begin);
    }
    requests_.clear();
    tensors_.clear();
  }

 private:
  // At first only steps aside; then sleeps, ever longer but never so long that the latency of a collective of several
  // rounds would show.
  void pause(int64_t turn, Clock::time_point begin) const {
    if (turn < 100) {
      sched_yield();
      return;
    }
    const auto now = Clock::now();
    const double waited = std::chrono::duration<double>(now - start_).count();
    if (waited > timeout()) {
      std::string what;
      if (!tensors_.empty()) what = " of " + describe(tensors_.back());
      abort_job(fmt::format("{}{} in {} has not ended after {:.1f} s: another rank is stuck, has ended or made another "
                            "call (if it only is slow, raise KRAIT_COMM_TIMEOUT, {:g} s){}",
                            collective_, what, place_, waited, timeout(), roll_call()));
    }
    const auto waiting = now - begin;
    if (waiting < std::chrono::milliseconds(1))
      sched_yield();
    else
      std::this_thread::sleep_for(std::clamp<Clock::duration>(waiting / 50, std::chrono::microseconds(20),
                                                              std::chrono::microseconds(200)));
  }

  const char* collective_;
  std::string place_;
  std::vector<Tensor> tensors_;
  std::vector<MPI_Request> requests_;
  Clock::time_point start_;
};

MpiGroup::MpiGroup(MPI_Comm comm, const std::string& name) : ProcessGroup(0, 1, name), comm_(comm), members_(member_list(comm)) {
  MPI_Comm_rank(comm, &rank_);
  MPI_Comm_size(comm, &size_);
}

ProcessGroup& MpiGroup::nccl(const char* collective, Device device) {
  if (!nccl_) {
    KRAIT_CHECK(!is_capturing(device), "{} of group '{}': its first collective of CUDA tensors cannot be recorded in a "
                "graph; run the step once without", collective, name_);
    const NcclStart start = make_nccl_group(*this, device, [this](void* bytes, int64_t count) {
      auto call = std::make_shared<Call>(*this, "the start of NCCL", std::vector<Tensor>{});
      check_mpi(MPI_Ibcast(bytes, as_int(count), MPI_BYTE, 0, comm_, call->request()), "MPI_Ibcast");
      call->wait();
    }, beside_);
    nccl_ = start.group;
    reachable_ = start.reachable;
  }
  return *nccl_;
}

Work MpiGroup::all_reduce(Tensor t, Reduce op) {
  check_tensor("all_reduce", *this, t);
  note_call("all_reduce", name_, t);
  if (t.device().is_cuda()) return nccl("all_reduce", t.device()).all_reduce(t, op);
  const MPI_Datatype type = mpi_type(t.dtype());
  const MPI_Op mpi = mpi_op(t.dtype(), op);
  auto call = std::make_shared<Call>(*this, "all_reduce", std::vector{t});
  in_pieces(t.numel(), [&](int64_t first, int count) {
    check_mpi(MPI_Iallreduce(MPI_IN_PLACE, at(t, first), count, type, mpi, comm_, call->request()), "MPI_Iallreduce");
  });
  return Call::start(std::move(call));
}

Work MpiGroup::all_gather(const Tensor& piece, Tensor whole) {
  check_parts("all_gather", *this, whole, piece, size_);
  note_call("all_gather", name_, piece);
  if (piece.device().is_cuda()) return nccl("all_gather", piece.device()).all_gather(piece, whole);
  auto call = std::make_shared<Call>(*this, "all_gather", std::vector{piece, whole});
  const MPI_Datatype type = mpi_type(piece.dtype());
  if (whole.numel() > max_count) {
    const BlockType block(type, size_of(piece.dtype()), piece.numel());
    check_mpi(MPI_Iallgather(piece.raw_data(), 1, block.get(), whole.raw_data(), 1, block.get(), comm_, call->request()),
              "MPI_Iallgather");
  } else if (whole.numel() > 0) {
    const int n = as_int(piece.numel());
    check_mpi(MPI_Iallgather(piece.raw_data(), n, type, whole.raw_data(), n, type, comm_, call->request()),
              "MPI_Iallgather");
  }
  return Call::start(std::move(call));
}

Work MpiGroup::reduce_scatter(const Tensor& whole, Tensor piece) {
  check_parts("reduce_scatter", *this, whole, piece, size_);
  note_call("reduce_scatter", name_, whole);
  if (piece.device().is_cuda()) return nccl("reduce_scatter", piece.device()).reduce_scatter(whole, piece);
  auto call = std::make_shared<Call>(*this, "reduce_scatter", std::vector{piece, whole});
  const MPI_Datatype type = mpi_type(piece.dtype());
  const MPI_Op op = mpi_op(piece.dtype(), Reduce::sum);
  const int64_t n = piece.numel();
  if (whole.numel() > max_count) {
    for (int r = 0; r < size_; ++r)
      in_pieces(n, [&](int64_t first, int count) {
        check_mpi(MPI_Ireduce(at(whole, r * n + first), at(piece, first), count, type, op, r, comm_, call->request()),
                  "MPI_Ireduce");
      });
  } else if (n > 0) {
    check_mpi(MPI_Ireduce_scatter_block(whole.raw_data(), piece.raw_data(), as_int(n), type, op, comm_, call->request()),
              "MPI_Ireduce_scatter_block");
  }
  return Call::start(std::move(call));
}

Work MpiGroup::all_to_all(const Tensor& send, Tensor receive) {
  check_parts("all_to_all", *this, send, receive, 1);
  note_call("all_to_all", name_, send);
  if (send.device().is_cuda()) return nccl("all_to_all", send.device()).all_to_all(send, receive);
  auto call = std::make_shared<Call>(*this, "all_to_all", std::vector{send, receive});
  const MPI_Datatype type = mpi_type(send.dtype());
  if (send.numel() > max_count) {
    const BlockType block(type, size_of(send.dtype()), send.numel() / size_);
    check_mpi(MPI_Ialltoall(send.raw_data(), 1, block.get(), receive.raw_data(), 1, block.get(), comm_, call->request()),
              "MPI_Ialltoall");
  } else if (send.numel() > 0) {
    const int n = as_int(send.numel() / size_);
    check_mpi(MPI_Ialltoall(send.raw_data(), n, type, receive.raw_data(), n, type, comm_, call->request()),
              "MPI_Ialltoall");
  }
  return Call::start(std::move(call));
}

Work MpiGroup::broadcast(Tensor t, int root) {
  check_tensor("broadcast", *this, t);
  check_root("broadcast", *this, root);
  note_call("broadcast", name_, t);
  if (t.device().is_cuda()) return nccl("broadcast", t.device()).broadcast(t, root);
  auto call = std::make_shared<Call>(*this, "broadcast", std::vector{t});
  in_pieces(t.numel(), [&](int64_t first, int count) {
    check_mpi(MPI_Ibcast(at(t, first), count, mpi_type(t.dtype()), root, comm_, call->request()), "MPI_Ibcast");
  });
  return Call::start(std::move(call));
}

// Messages between two members arrive in the order of the calls, so that one tag will do.
Work MpiGroup::exchange(const Tensor& send, int to, Tensor receive, int from) {
  check_exchange(*this, send, to, receive, from);
  if (!send.defined() && !receive.defined()) return {};
  const Device device = send.defined() ? send.device() : receive.device();
  note_call("exchange", name_, send.defined() ? send : receive);
  if (device.is_cuda()) return nccl("exchange", device).exchange(send, to, receive, from);
  auto call = std::make_shared<Call>(*this, "exchange", std::vector<Tensor>{});
  if (receive.defined()) {
    call->keep(receive);
    in_pieces(receive.numel(), [&](int64_t first, int count) {
      check_mpi(MPI_Irecv(at(receive, first), count, mpi_type(receive.dtype()), from, 0, comm_, call->request()), "MPI_Irecv");
    });
  }
  if (send.defined()) {
    call->keep(send);
    in_pieces(send.numel(), [&](int64_t first, int count) {
      check_mpi(MPI_Isend(at(send, first), count, mpi_type(send.dtype()), to, 0, comm_, call->request()), "MPI_Isend");
    });
  }
  return Call::start(std::move(call));
}

void MpiGroup::barrier() {
  note_call("barrier", name_, {});
  Call call(*this, "barrier", {});
  check_mpi(MPI_Ibarrier(comm_, call.request()), "MPI_Ibarrier");
  call.wait();
}

GroupPtr MpiGroup::split(int color, const std::string& name) {
  barrier();  // MPI_Comm_split has no time limit
  MPI_Comm part;
  check_mpi(MPI_Comm_split(comm_, color, rank_, &part), "MPI_Comm_split");
  int size = 0;
  MPI_Comm_size(part, &size);
  if (size == 1) return single_group(name);
  return std::make_shared<MpiGroup>(part, name);
}

int MpiGroup::multiprocessors(Device device) {
  return reachable(device) ? 0 : beside_.multiprocessors;
}

ReachableMemory MpiGroup::reachable(Device device) {
  if (device.is_cuda()) nccl("the start", device);
  return reachable_;
}

GroupPtr background_group(const GroupPtr& group, const Beside& beside) {
  if (group->size() == 1 || (beside.multiprocessors == 0 && !beside.copy_engines)) return group;
  GroupPtr second = group->split(0, group->name() + ", beside computation");
  dynamic_cast<MpiGroup&>(*second).set_beside(beside);
  return second;
}

int multiprocessors_beside(const GroupPtr& background, Device device) {
  return background->size() == 1 ? 0 : dynamic_cast<MpiGroup&>(*background).multiprocessors(device);
}

ReachableMemory reachable_memory(const GroupPtr& background, Device device) {
  return background->size() == 1 ? ReachableMemory() : dynamic_cast<MpiGroup&>(*background).reachable(device);
}

}  // namespace krait::comm
