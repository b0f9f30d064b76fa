// Every collective against what one rank computes of all ranks' values: whole numbers, so that every dtype is exact.
#include "core/comm/process_group.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "core/allocator.h"
#include "core/comm/backend.h"
#include "core/comm/background.h"
#include "core/comm/job.h"
#include "core/comm/mpi/environment_launch.h"
#include "core/comm/mpi/sockets.h"
#include "core/comm/mpi/star_server.h"
#include "core/stream.h"
#include "tests/parallel/world.h"

namespace krait::comm {
namespace {

constexpr DType kDTypes[] = {DType::f32, DType::f64, DType::bf16, DType::i32, DType::i64};
constexpr int64_t kSizes[] = {0, 1, 3, 257, 10007};

int64_t value(int64_t rank, int64_t i) { return (i * 7 + rank * 3) % 11 - 5; }

// What `rank` holds: n values from number `first`.
Tensor values(int64_t rank, int64_t n, DType dtype, Device device, int64_t first = 0) {
  std::vector<double> v(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) v[static_cast<size_t>(i)] = static_cast<double>(value(rank, first + i));
  return from_vector(v).to(dtype).to(device);
}

// f(i) for i in [0, n) equals t. In a case of many checks one failed one is enough.
template <class F>
bool equals(const Tensor& t, F f) {
  const auto v = t.cpu().to(DType::f64).to_vector<double>();
  for (size_t i = 0; i < v.size(); ++i)
    if (v[i] != static_cast<double>(f(static_cast<int64_t>(i)))) {
      UNSCOPED_INFO("element " << i << " of " << describe(t) << ": " << v[i] << ", expected "
                               << f(static_cast<int64_t>(i)));
      return false;
    }
  return true;
}

int64_t sum_at(const ProcessGroup& g, int64_t i) {
  int64_t sum = 0;
  for (int r = 0; r < g.size(); ++r) sum += value(r, i);
  return sum;
}

void check_collectives(ProcessGroup& g, DType dtype, int64_t n, Device device) {
  INFO(g.name() << " of " << g.size() << ", " << name_of(dtype) << ", n " << n);
  const int p = g.size(), me = g.rank();

  Tensor t = values(me, n, dtype, device);
  g.all_reduce(t).wait();
  CHECK(equals(t, [&](int64_t i) { return sum_at(g, i); }));

  t = values(me, n, dtype, device);
  g.all_reduce(t, Reduce::max).wait();
  CHECK(equals(t, [&](int64_t i) {
    int64_t max = value(0, i);
    for (int r = 1; r < p; ++r) max = std::max(max, value(r, i));
    return max;
  }));

  Tensor whole = empty({n * p}, dtype, device);
  g.all_gather(values(me, n, dtype, device), whole).wait();
  CHECK(equals(whole, [&](int64_t i) { return value(i / n, i % n); }));

  Tensor piece = empty({n}, dtype, device);
  g.reduce_scatter(values(me, n * p, dtype, device), piece).wait();
  CHECK(equals(piece, [&](int64_t i) { return sum_at(g, me * n + i); }));

  whole = empty({p, n}, dtype, device);
  g.all_to_all(values(me, n * p, dtype, device), whole).wait();
  CHECK(equals(whole, [&](int64_t i) { return value(i / n, me * n + i % n); }));

  for (int root = 0; root < p; ++root) {
    t = values(me, n, dtype, device);
    g.broadcast(t, root).wait();
    CHECK(equals(t, [&](int64_t i) { return value(root, i); }));
  }

  const int next = (me + 1) % p, previous = (me + p - 1) % p;
  t = empty({n}, dtype, device);
  g.exchange(values(me, n, dtype, device), next, t, previous).wait();
  CHECK(equals(t, [&](int64_t i) { return value(previous, i); }));

  // A halo: the last member sends nothing, the first receives nothing.
  const Tensor send = me + 1 < p ? values(me, n, dtype, device) : Tensor();
  t = me > 0 ? empty({n}, dtype, device) : Tensor();
  g.exchange(send, next, t, previous).wait();
  if (t.defined()) CHECK(equals(t, [&](int64_t i) { return value(me - 1, i); }));
}

void check_all(ProcessGroup& g, Device device) {
  for (const DType dtype : kDTypes)
    for (const int64_t n : kSizes) check_collectives(g, dtype, n, device);
}

void check_mesh(Device device) {
  const int p = world()->size();
  const Mesh mesh = p == 4 ? make_mesh(world(), 2, 1, 2) : make_mesh(world(), 1, p, 1);
  const int rank = world()->rank();
  if (p == 4) {
    CHECK(mesh.data->size() == 2);
    CHECK(mesh.data->rank() == rank / 2);
    CHECK(mesh.tensor->size() == 2);
    CHECK(mesh.tensor->rank() == rank % 2);
    CHECK(mesh.sequence->size() == 1);
    CHECK(mesh.replicas->size() == 2);
    // Who is in the groups: world ranks as values.
    Tensor ranks = full({1}, rank, DType::i64, device);
    mesh.tensor->all_reduce(ranks).wait();
    CHECK(ranks.item() == (rank < 2 ? 0 + 1 : 2 + 3));
    ranks = full({1}, rank, DType::i64, device);
    mesh.replicas->all_reduce(ranks).wait();
    CHECK(ranks.item() == (rank % 2 == 0 ? 0 + 2 : 1 + 3));
  } else {
    CHECK(mesh.sequence->size() == p);
    CHECK(mesh.replicas->size() == p);
    CHECK(mesh.tensor->size() == 1);
  }
  check_all(*mesh.data, device);
  check_all(*mesh.sequence, device);
  check_all(*mesh.tensor, device);
}

// Several collectives of two groups under way at once, ended in another order, the tensors dropped by the caller.
void check_overlap(Device device) {
  const GroupPtr other = world()->split(0, "other");
  const int64_t n = 100003;
  std::vector<Tensor> sums;
  std::vector<Work> works;
  for (int k = 0; k < 5; ++k) {
    sums.push_back(values(world()->rank(), n, DType::f32, device, k));
    works.push_back((k % 2 ? *world() : *other).all_reduce(sums.back()));
  }
  Tensor gathered = empty({world()->size() * n}, DType::f32, device);
  Work gather = world()->all_gather(values(world()->rank(), n, DType::f32, device), gathered);
  for (int k = 4; k >= 0; --k) works[static_cast<size_t>(k)].wait();
  for (int k = 0; k < 5; ++k)
    CHECK(equals(sums[static_cast<size_t>(k)], [&](int64_t i) { return sum_at(*world(), k + i); }));
  gather = {};  // the last copy waits
  CHECK(equals(gathered, [&](int64_t i) { return value(i / n, i % n); }));
}

}  // namespace

TEST_CASE("collectives give what one rank computes, for every dtype and size") { check_all(*world(), kCpu); }
TEST_CASE("a background group does the same") {
  const GroupPtr background = background_group(world(), {4, true});
  check_all(*background, kCpu);
  CHECK(!reachable_memory(background, kCpu));
}
TEST_CASE("groups of a mesh hold the right ranks and work side by side") { check_mesh(kCpu); }
TEST_CASE("collectives under way together keep apart") { check_overlap(kCpu); }

TEST_CASE("counts beyond what one call of MPI takes are cut in pieces") {
  set_max_count(100);
  check_collectives(*world(), DType::f32, 257, kCpu);
  check_collectives(*world(), DType::bf16, 99, kCpu);
  set_max_count(int64_t{1} << 30);
}

TEST_CASE("an MPI that takes no job by RANK and WORLD_SIZE is named, and mpirun as the way out") {
  for (const char* served : {"Open MPI v3.1.6", "Open MPI v4.1.4"}) CHECK(environment_refusal(served, 4).empty());
  for (const char* other : {"Open MPI v5.0.3", "MPICH Version: 4.1.2", "Intel(R) MPI Library 2021.13 for Linux* OS"})
    CHECK(environment_refusal(other, 4) == fmt::format("{} takes no job that RANK and WORLD_SIZE describe (Open MPI 3 and 4 do)\n"
                                                       "       start the job with mpirun -n 4", other));
  CHECK(mpi_version().find_first_of("\t\n,") == std::string::npos);
}

TEST_CASE("ranks that come late are waited for") {
  std::this_thread::sleep_for(std::chrono::milliseconds(20 * world()->rank()));
  Tensor t = ones({3}, DType::f32, kCpu);
  world()->all_reduce(t).wait();
  CHECK(t.select(0, 0).item() == world()->size());
  world()->barrier();
}

TEST_CASE("a sum in bfloat16 is rounded once per addition, a maximum never") {
  Tensor t = full({5}, world()->rank() == 0 ? 256.0 : 1.0, DType::bf16, kCpu);  // 257 is not a bfloat16
  world()->all_reduce(t, Reduce::max).wait();
  CHECK(t.select(0, 4).item() == 256);
  if (world()->size() == 2) {
    t = full({5}, world()->rank() == 0 ? 256.0 : 1.0, DType::bf16, kCpu);
    world()->all_reduce(t).wait();
    CHECK(t.select(0, 4).item() == 256);
  }
}

TEST_CASE("groups refuse what does not fit, before anything is sent") {
  const int p = world()->size();
  const Tensor piece = zeros({3}, DType::f32, kCpu);
  CHECK(contains(error_of([&] { (void)world()->all_gather(piece, zeros({3 * p + 1}, DType::f32, kCpu)); }), "does not fit"));
  CHECK(contains(error_of([&] { (void)world()->all_gather(piece, zeros({3 * p}, DType::f64, kCpu)); }), "all_gather"));
  CHECK(contains(error_of([&] { (void)world()->all_reduce(zeros({4, 3}, DType::f32, kCpu).transpose(0, 1)); }),
                 "not contiguous"));
  CHECK(contains(error_of([&] { (void)world()->all_reduce({}); }), "undefined"));
  CHECK(contains(error_of([&] { (void)world()->broadcast(piece, p); }), "no member"));
  CHECK(contains(error_of([&] { make_mesh(world(), 3, p, 1); }), fmt::format("{} ranks, but {} were started", 3 * p, p)));
}

TEST_CASE("NCCL: collectives give what one rank computes, for every dtype and size", "[cuda]") {
  check_all(*world(), local_cuda_device());
}
TEST_CASE("NCCL: groups of a mesh hold the right ranks and work side by side", "[cuda]") { check_mesh(local_cuda_device()); }
TEST_CASE("NCCL: collectives under way together keep apart", "[cuda]") { check_overlap(local_cuda_device()); }

TEST_CASE("NCCL: collectives may be recorded in a graph", "[cuda]") {
  const Device device = local_cuda_device();
  const int p = world()->size();
  const int64_t n = 1003;
  Tensor t = ones({n}, DType::f32, device), whole = zeros({n * p}, DType::f32, device);
  Tensor other = zeros({n}, DType::f32, device), beside = zeros({n}, DType::f32, device);
  const GroupPtr background = background_group(world(), {4, true});
  const auto step = [&] {
    fill_(beside, 2);
    Work slow = background->all_reduce(beside), sum = world()->all_reduce(t);  // two communicators at once
    fill_(other, 7);  // beside them
    sum.wait();
    slow.wait();
    const Tensor copy = t.clone();  // memory of the graph's own
    world()->all_gather(copy, whole).wait();
  };
  step();  // starts NCCL
  fill_(t, 1);
  MemoryPool pool(device);
  CapturedGraph graph(device);
  {
    const MemoryPool::Scope scope(pool);
    graph.begin();
    step();
    graph.end();
  }
  double expected = 1;
  for (int k = 0; k < 3; ++k) {
    graph.replay();
    watch_device(device, "a replay");
    world()->all_reduce(other, Reduce::max).wait();  // outside, in between
    expected *= p;
    CHECK(equals(whole, [&](int64_t) { return expected; }));
    CHECK(equals(other, [&](int64_t) { return 7; }));
    CHECK(equals(beside, [&](int64_t) { return 2 * p; }));
  }
}

// All tensors from `make`.
static void check_beside(ProcessGroup& background, Device device, const ReachableMemory& make) {
  const int p = background.size(), rank = background.rank();
  for (const int64_t n : {int64_t{1} << 17, (int64_t{1} << 20) + 64, int64_t{9000000}})  // the last in several pieces
    for (const DType dtype : {DType::f32, DType::bf16}) {
      Tensor whole = make(n * p, dtype), piece = make(n, dtype), t = make(n * p, dtype), own = make(n, dtype);
      fill_(whole, rank + 1);
      fill_(own, 10 + rank);
      Tensor place = whole.slice(0, n, 2 * n), sum = t;
      const Tensor gathered = make(n * p, dtype);
      const auto step = [&] {
        fill_(place, 3 * (rank + 1));
        fill_(sum, rank + 2);
        Work first = background.reduce_scatter(whole, piece), second = background.all_reduce(t);
        Work third = background.all_gather(own, gathered);
        first.wait();
        second.wait();
        third.wait();
      };
      const auto right = [&] {
        CHECK(equals(piece, [&](int64_t) { return (rank == 1 ? 3 : 1) * p * (p + 1) / 2; }));
        CHECK(equals(t, [&](int64_t) { return p * (p + 3) / 2; }));
        CHECK(equals(gathered, [&](int64_t i) { return 10 + i / n; }));
      };
      step();
      right();
      CapturedGraph graph(device);
      graph.begin();
      step();
      graph.end();
      for (int k = 0; k < 3; ++k) {
        for (Tensor out : {piece, gathered}) zero_(out);
        graph.replay();
        watch_device(device, "a replay");
        right();
        if (k == 1) step();
      }
    }
}

TEST_CASE("NCCL: large sums and gathers beside computation, at once and in a graph", "[cuda]") {
  const Device device = local_cuda_device();
  const GroupPtr background = background_group(world(), {4, true});
  const int beside = multiprocessors_beside(background, device);
  CHECK((beside == 0 || beside == 4));
  check_beside(*background, device, [&](int64_t numel, DType dtype) { return zeros({numel}, dtype, device); });
}
TEST_CASE("NCCL: memory that copy engines reach is summed and gathered where it lies", "[cuda]") {
  const Device device = local_cuda_device();
  const GroupPtr background = background_group(world(), {4, true});
  const ReachableMemory reachable = reachable_memory(background, device);
  if (!reachable) {
    WARN("nothing is checked: ranks on several hosts, or an NCCL without copy engines");
    return;
  }
  check_beside(*background, device, reachable);
  // Pieces of one block, and a sum that stays in it.
  const int p = world()->size(), rank = world()->rank();
  const int64_t n = int64_t{1} << 18;
  const Tensor block = reachable(3 * n * p, DType::f32);
  Tensor middle = block.slice(0, n * p, 2 * n * p);
  for (int k = 1; k < 4; ++k) {
    fill_(middle, k * (rank + 1));
    background->all_reduce(middle).wait();
    CHECK(equals(block, [&](int64_t i) { return i / (n * p) == 1 ? k * p * (p + 1) / 2 : 0; }));
  }
}

TEST_CASE("a rank that does not fit is told of by rank 0, also when it comes before rank 0's own hello") {
  const int listener = listen_at(0);
  sockaddr_in6 address{};
  socklen_t length = sizeof(address);
  REQUIRE(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length) == 0);
  int own[2];
  REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, own) == 0);
  StarServer server(listener, own[0], 2, "version", 30);
  std::thread runs([&] { server.run(); });
  int stranger = -1;
  std::thread comes([&] {
    stranger = connect_to("localhost", ntohs(address.sin6_port), 10);
    send_frame(stranger, Kind::hello, pack({"1", "3", "version", "host", "machine", "0"}));
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(400));
  send_frame(own[1], Kind::hello, pack({"0", "2", "version", "host", "machine", "0"}));
  receive_bytes(own[1], kGreeting.size(), 10);
  comes.join();
  receive_frame(stranger, 10);
  close(stranger);
  const auto told = receive_frame(own[1], 10);
  runs.join();
  close(own[1]);
  REQUIRE(told);
  CHECK(told->kind == Kind::ended);
  const auto fields = unpack(told->body);
  REQUIRE((fields && fields->size() == 2));
  CHECK((*fields)[1] == "rank 1 (host, process 0) has WORLD_SIZE=3, but rank 0 has 2");
}

TEST_CASE("NCCL: many collectives in flight on a busy device keep their order and their memory", "[cuda]") {
  const Device device = local_cuda_device();
  const GroupPtr other = background_group(world(), {4, true});
  const int64_t n = (int64_t{1} << 20) + 3;
  for (int round = 0; round < 20; ++round) {
    std::vector<Tensor> sums;
    for (int k = 0; k < 8; ++k) {
      Tensor t = full({n}, world()->rank() + k, DType::f32, device);
      Work work = (k % 2 ? *world() : *other).all_reduce(t);
      sums.push_back(t);
      t = {};
      zeros({n}, DType::f32, device);  // takes and gives back memory meanwhile
    }
    const int p = world()->size();
    for (int k = 0; k < 8; ++k) {
      const Tensor& t = sums[static_cast<size_t>(k)];
      CHECK(t.select(0, 0).item() == p * (p - 1) / 2 + p * k);
      CHECK(t.select(0, n - 1).item() == p * (p - 1) / 2 + p * k);
    }
  }
}

}  // namespace krait::comm
