#include "kernels/gpu_memory.h"

namespace krait::kernels {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// kernels/cuda/ssd_tile.cuh and ssd_mma.cuh.
struct Ssd {
  explicit Ssd(const SsdInput& in)
      : b(in.x.size(0)), l(in.x.size(1)), heads(in.x.size(2)), p(in.x.size(3)), g(in.B.size(2)), n(in.B.size(3)),
        a(size_of(accum_dtype(in.x.dtype()))), has_D(in.D.defined()), segments(in.segments.defined()),
        tensor_cores(in.x.dtype() == DType::bf16 && p <= 64 && n <= 128 && p % 8 == 0 && n % 8 == 0),
        chunk(tensor_cores ? 64 : std::min(in.chunk, std::max<int64_t>(1, l))), chunks(ceil_div(l, chunk)) {}
  int64_t decays() const { return b * chunks * heads * 4 * 64 * 4; }  // on tensor cores
  /// Decays and C B^T.
  int64_t prepared() const {
    if (tensor_cores) return decays() + b * chunks * g * 64 * 64 * 2;
    return 2 * b * l * heads * a + (segments ? b * l * 4 : 0) + b * chunks * g * chunk * chunk * a;
  }
  /// Of all chunks, in one direction.
  int64_t states() const {
    return b * chunks * heads * (tensor_cores ? int64_t{64} * (n <= 64 ? 64 : 128) * 2 : p * n * a);
  }
  int64_t b, l, heads, p, g, n, a;
  bool has_D, segments, tensor_cores;
  int64_t chunk, chunks;
};

}  // namespace

GpuMemory gpu_memory_of_ssd_forward(const SsdInput& in) {
  const Ssd s(in);
  return {s.prepared() + (s.tensor_cores ? 0 : s.states())};
}

GpuMemory gpu_memory_of_ssd_backward(const SsdInput& in) {
  const Ssd s(in);
  const int64_t tiles = s.tensor_cores ? 1 : ceil_div(s.chunk, 64);
  const int64_t partial_D = s.has_D ? s.b * s.chunks * tiles * s.heads * s.p * s.a : 0;
  const int64_t parts_of_da = s.tensor_cores ? 0 : 2 * s.b * s.l * s.heads * s.a + s.b * s.chunks * s.heads * tiles * s.chunk * s.a;
  return {s.prepared() + 2 * s.states() + partial_D + parts_of_da};
}

GpuMemory gpu_memory_of_ssd_states(const SsdInput& in) {
  const Ssd s(in);
  return {s.tensor_cores ? s.decays() : s.prepared() + s.states()};
}

namespace {

// kernels/cuda/selective_scan_walk.cuh.
struct Scan {
  explicit Scan(const SelectiveScanInputs& in)
      : b(in.x.size(0)), l(in.x.size(1)), e(in.x.size(2)), n(in.A.size(1)), chunks(ceil_div(l, kScanChunk)),
        a(size_of(accum_dtype(in.x.dtype()))), walks(in.x.dtype() == DType::bf16 && n == 16 && e % 8 == 0),
        copies(in.x.is_contiguous() ? 0 : b * l * e * size_of(in.x.dtype())) {}
  int64_t b, l, e, n, chunks, a;
  bool walks;
  int64_t copies;  // of x, where its rows are apart
};

}  // namespace

GpuMemory gpu_memory_of_scan_forward(const SelectiveScanInputs& in) {
  const Scan s(in);
  if (s.walks) return {s.copies, s.b * ceil_div(s.l, 16) * 2 * s.e * 8 * 2};
  return {s.b * s.chunks * s.e * s.a, s.b * s.chunks * s.n * s.e * s.a};
}

GpuMemory gpu_memory_of_scan_backward(const SelectiveScanInputs& in) {
  const Scan s(in);
  if (s.walks) return {s.copies + ceil_div(s.e, 128) * s.b * s.l * 2 * 16 * 4};
  const int64_t blocks = ceil_div(ceil_div(s.e, 32), 4);
  return {s.b * s.chunks * (s.n + 3) * s.e * s.a + blocks * s.b * s.l * 2 * s.n * s.a};
}

namespace {

// kernels/cuda/mlstm.cu, on Hopper.
struct Mlstm {
  explicit Mlstm(const MlstmInputs& in)
      : l(in.q.size(1)), units(in.q.size(0) * in.q.size(2)), dq(in.q.size(3)), dv(in.v.size(3)), t(size_of(in.q.dtype())),
        a(size_of(accum_dtype(in.q.dtype()))), tensor_cores(in.q.dtype() == DType::bf16 && dq % 8 == 0 && dv % 8 == 0),
        chunk(!tensor_cores ? 64 : dq % 192 == 0 && dv % 192 == 0 ? 256 : 128), chunks(ceil_div(l, chunk)) {}
  int64_t gates() const { return units * l * (9 * a + 4) + 4 * units * chunks * a; }
  int64_t states() const { return units * chunks * (dq * dv * t + dq * a); }
  int64_t coefficients() const { return tensor_cores ? units * chunks * chunk * chunk * t : 0; }
  int64_t l, units, dq, dv, t, a;
  bool tensor_cores;
  int64_t chunk, chunks;
};

}  // namespace

GpuMemory gpu_memory_of_mlstm_forward(const MlstmInputs& in, const MlstmOptions& options) {
  const Mlstm s(in);
  const int64_t all = s.states() + s.coefficients(), kept = options.keep_states ? all : 0;
  return {s.gates() + all - kept, kept};
}

GpuMemory gpu_memory_of_mlstm_backward(const MlstmInputs& in, const MlstmUpstream& upstream, bool states_kept) {
  const Mlstm s(in);
  const bool rounds = upstream.dh.defined() && upstream.dh.dtype() != in.q.dtype();
  return {s.gates() + (states_kept ? 1 : 2) * (s.coefficients() + s.states()) +
          (rounds ? s.units * s.l * s.dv * s.t : 0)};
}

}  // namespace krait::kernels
