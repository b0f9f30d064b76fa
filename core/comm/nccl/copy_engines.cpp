#include "core/comm/nccl/copy_engines.h"

#include <algorithm>

#include "core/allocator.h"
#include "core/comm/nccl/sum_pieces.h"

namespace krait::comm {

namespace {

constexpr int64_t kCapacity = int64_t{48} << 20;  // bytes of the buffer to send from; what is larger goes in chunks
constexpr int64_t kReceive = int64_t{80} << 20;   // for a bucket of gradients that is sent from where it lies
constexpr int64_t kLeast = 256 << 10;             // less is faster through NCCL's kernels
constexpr size_t kPage = size_t{2} << 20;

char* at(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }

ncclDataType_t type_of(int64_t element) { return element == 2 ? ncclBfloat16 : element == 4 ? ncclFloat32 : ncclFloat64; }

}  // namespace

std::unique_ptr<CopyEngines> CopyEngines::make(const ProcessGroup& group, const Share& share, ncclComm_t comm) {
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0)
  int version = 0;
  check(ncclGetVersion(&version));
  if (version < NCCL_VERSION(2, 28, 0) || job_state().local_size != job_state().size) return nullptr;
  std::unique_ptr<CopyEngines> engines(new CopyEngines(group.rank(), group.size(), comm));
  const bool own = engines->start(share);
  return engines->all_agree(own) ? std::move(engines) : nullptr;
#else
  return nullptr;
#endif
}

#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0)
bool CopyEngines::start(const Share& share) {
  ncclUniqueId id{};
  if (rank_ == 0) check(ncclGetUniqueId(&id));
  share(&id, sizeof(id));
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.CTAPolicy = NCCL_CTA_POLICY_ZERO;
  check(ncclCommInitRankConfig(&comm_, size_, id, rank_, &config));
  send_ = registered(kCapacity);
  receive_ = registered(kReceive);
  return send_ && receive_;
}

// Null where NCCL cannot register it.
void* CopyEngines::registered(size_t bytes) {
  void* memory = nullptr;
  check(ncclMemAlloc(&memory, bytes));
  ncclWindow_t window = nullptr;
  const bool done = ncclCommWindowRegister(comm_, memory, bytes, &window, NCCL_WIN_COLL_SYMMETRIC) == ncclSuccess && window;
  if (!done) check(ncclMemFree(memory));
  return done ? memory : nullptr;
}

// All members or none.
bool CopyEngines::all_agree(bool own) const {
  int* agreed = nullptr;
  int value = own;
  check(cudaMalloc(&agreed, sizeof(int)));
  check(cudaMemcpy(agreed, &value, sizeof(int), cudaMemcpyHostToDevice));
  check(ncclAllReduce(agreed, agreed, 1, ncclInt32, ncclMin, group_, nullptr));
  check(cudaMemcpy(&value, agreed, sizeof(int), cudaMemcpyDeviceToHost));
  check(cudaFree(agreed));
  return value != 0;
}

Tensor CopyEngines::reachable(int64_t numel, DType dtype, Device device) {
  const size_t bytes = (static_cast<size_t>(numel * size_of(dtype)) + kPage - 1) / kPage * kPage;
  allocator(device).release_cached();  // NCCL takes its memory from the system
  void* memory = registered(bytes);
  if (!all_agree(memory != nullptr)) return zeros({numel}, dtype, device);
  const auto size = static_cast<int64_t>(bytes);
  allocator(device).note_taken(size);
  blocks_.push_back({static_cast<char*>(memory), size});
  const Shape shape{numel};
  Tensor t(std::make_shared<Storage>(memory, size, device, nullptr), shape, contiguous_strides(shape), 0, dtype);
  zero_(t);
  return t;
}

bool CopyEngines::reaches(const Tensor& t) const {
  const char* begin = static_cast<const char*>(t.raw_data());
  return std::any_of(blocks_.begin(), blocks_.end(),
                     [&](const Block& b) { return begin >= b.begin && begin + t.nbytes() <= b.begin + b.bytes; });
}

// f(first element, count) of pieces of n elements, so that those of all members fit a buffer.
template <class F>
void CopyEngines::in_chunks(int64_t n, int64_t element, F f) const {
  const int64_t most = kCapacity / size_ / element / 128 * 128;
  for (int64_t first = 0; first < n; first += most) f(first, std::min(most, n - first));
}

bool CopyEngines::serves(const Tensor& whole) const {
  const DType dtype = whole.dtype();
  if (dtype != DType::f32 && dtype != DType::bf16 && dtype != DType::f64) return false;
  const int64_t bytes = whole.numel() * size_of(dtype);
  return bytes >= kLeast && bytes % (16 * size_) == 0 && reinterpret_cast<uintptr_t>(whole.raw_data()) % 16 == 0;
}

void CopyEngines::reduce_scatter(const Tensor& whole, const Tensor& piece, cudaStream_t stream) {
  const int64_t n = whole.numel() / size_, element = size_of(whole.dtype());
  if (reaches(whole) && whole.nbytes() <= kReceive) {
    check(ncclAlltoAll(whole.raw_data(), receive_, static_cast<size_t>(n), type_of(element), comm_, stream));
    return sum_pieces(piece.raw_data(), receive_, n, size_, whole.dtype(), stream);
  }
  const auto pitch = [&](int64_t count) { return static_cast<size_t>(count * element); };
  in_chunks(n, element, [&](int64_t first, int64_t count) {
    check(cudaMemcpy2DAsync(send_, pitch(count), at(whole.raw_data(), first * element), pitch(n), pitch(count),
                            static_cast<size_t>(size_), cudaMemcpyDeviceToDevice, stream));
    check(ncclAlltoAll(send_, receive_, static_cast<size_t>(count), type_of(element), comm_, stream));
    sum_pieces(at(piece.raw_data(), first * element), receive_, count, size_, whole.dtype(), stream);
  });
}

void CopyEngines::all_gather(const Tensor& piece, const Tensor& whole, cudaStream_t stream) {
  const int64_t n = piece.numel(), element = size_of(piece.dtype());
  if (reaches(piece) && reaches(whole)) {
    check(ncclAllGather(piece.raw_data(), whole.raw_data(), static_cast<size_t>(n), type_of(element), comm_, stream));
    return;
  }
  const auto pitch = [&](int64_t count) { return static_cast<size_t>(count * element); };
  in_chunks(n, element, [&](int64_t first, int64_t count) {
    check(cudaMemcpyAsync(send_, at(piece.raw_data(), first * element), pitch(count), cudaMemcpyDeviceToDevice, stream));
    check(ncclAllGather(send_, receive_, static_cast<size_t>(count), type_of(element), comm_, stream));
    check(cudaMemcpy2DAsync(at(whole.raw_data(), first * element), pitch(n), receive_, pitch(count), pitch(count),
                            static_cast<size_t>(size_), cudaMemcpyDeviceToDevice, stream));
  });
}

void CopyEngines::all_reduce(const Tensor& t, cudaStream_t stream) {
  const int64_t n = t.numel() / size_;
  const Tensor flat = t.view({t.numel()}), own = flat.slice(0, rank_ * n, (rank_ + 1) * n);
  reduce_scatter(flat, own, stream);
  all_gather(own, flat, stream);
}
#else
bool CopyEngines::serves(const Tensor&) const { return false; }
void CopyEngines::reduce_scatter(const Tensor&, const Tensor&, cudaStream_t) {}
void CopyEngines::all_gather(const Tensor&, const Tensor&, cudaStream_t) {}
void CopyEngines::all_reduce(const Tensor&, cudaStream_t) {}
Tensor CopyEngines::reachable(int64_t numel, DType dtype, Device device) { return zeros({numel}, dtype, device); }
#endif

}  // namespace krait::comm
