#include "core/comm/nccl/copy_engines.h"

#include <algorithm>

#include "core/comm/nccl/sum_pieces.h"

namespace krait::comm {

namespace {

constexpr int64_t kCapacity = int64_t{48} << 20;  // bytes of each buffer; larger sums go in chunks
constexpr int64_t kLeast = 256 << 10;             // less is faster through NCCL's kernels

char* at(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }

ncclDataType_t type_of(int64_t element) { return element == 2 ? ncclBfloat16 : element == 4 ? ncclFloat32 : ncclFloat64; }

}  // namespace

std::unique_ptr<CopyEngines> CopyEngines::make(const ProcessGroup& group, const Share& share, ncclComm_t comm) {
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0)
  int version = 0;
  check(ncclGetVersion(&version));
  if (version < NCCL_VERSION(2, 28, 0) || job_state().local_size != job_state().size) return nullptr;
  std::unique_ptr<CopyEngines> engines(new CopyEngines(group.rank(), group.size()));
  // All members or none.
  int* agreed = nullptr;
  const int own = engines->start(share);
  int all = 0;
  check(cudaMalloc(&agreed, sizeof(int)));
  check(cudaMemcpy(agreed, &own, sizeof(int), cudaMemcpyHostToDevice));
  check(ncclAllReduce(agreed, agreed, 1, ncclInt32, ncclMin, comm, nullptr));
  check(cudaMemcpy(&all, agreed, sizeof(int), cudaMemcpyDeviceToHost));
  check(cudaFree(agreed));
  return all ? std::move(engines) : nullptr;
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
  for (void** buffer : {&send_, &receive_}) {
    check(ncclMemAlloc(buffer, kCapacity));
    ncclWindow_t window = nullptr;
    if (ncclCommWindowRegister(comm_, *buffer, kCapacity, &window, NCCL_WIN_COLL_SYMMETRIC) != ncclSuccess || !window)
      return false;
  }
  return true;
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
#endif

}  // namespace krait::comm
