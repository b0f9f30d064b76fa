#pragma once
// The state-space chunks for bf16 with heads of at most 64 channels and states of at most 128 columns: every call is
// cut in chunks of 64 positions, whatever chunk was asked for. Shared tiles have rows of D + 8 values (16-byte rows
// start in different banks); fragments as in attention_mma.cuh.
#include "core/cuda/launch.cuh"
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/exp2.cuh"
#include "kernels/cuda/ssd_tile.cuh"

namespace krait::kernels::cuda::ssd::mma64 {

inline constexpr int kRows = 64;                    // positions of a chunk, and places for a head's channels
inline constexpr int kNarrow = kRows + 8;           // pitch of a tile of 64 columns
inline constexpr int kSquare = kRows * kNarrow;     // values of it
inline constexpr int kDecays = 4 * kRows;           // floats of a chunk and head, see Decay
template <int N> inline constexpr int kPitch = N + 8;
template <int N> inline constexpr int kWide = kRows * kPitch<N>;

/// Of a chunk and head, 64 values each: the log2 decays summed from the chunk's start; dt; e^{s_i}, what of the state
/// before reaches i; dt_j e^{s_q - s_j}, what of j reaches the state after. Beyond the sequence: s goes on flat, dt and
/// the last are 0. A new document is a decay of 2^-256, as is any stronger decay: differences across it give 0.
struct Decay {
  const float *s, *dt, *in, *out;
  __device__ explicit Decay(const float* at) : s(at), dt(at + kRows), in(at + 2 * kRows), out(at + 3 * kRows) {}
  __device__ float total() const { return in[kRows - 1]; }  // e^{s_q}
};

struct Sizes {
  int64_t b, l, heads, p, g, n, chunks, group;
  explicit Sizes(const SsdInput& in)
      : b(in.x.size(0)), l(in.x.size(1)), heads(in.x.size(2)), p(in.x.size(3)), g(in.B.size(2)), n(in.B.size(3)),
        chunks(ceil_div(l, kRows)), group(heads / g) {}
  /// Of (b, chunks, heads, ...) and (b, chunks, g, ...).
  __device__ int64_t unit(int64_t ib, int64_t c, int64_t h) const { return (ib * chunks + c) * heads + h; }
  __device__ int64_t product(int64_t ib, int64_t c, int64_t group_index) const {
    return (ib * chunks + c) * g + group_index;
  }
  __device__ int valid(int64_t c) const { return static_cast<int>(min(int64_t{kRows}, l - c * kRows)); }
};

/// Whether these kernels serve a call (dy undefined in the forward).
bool serves(const SsdInput& in, const Tensor& dy, const std::vector<Tensor>& outputs);
void forward(Tensor& y, Tensor& final_state, const SsdInput& in);
void backward(SsdGrad& grad, const Tensor& dy, const Tensor& dfinal, const SsdInput& in);

/// What both directions start from.
struct Prepared {
  Sizes d;
  Tensor decays;    // (b, chunks, heads, 4, 64) fp32
  Tensor products;  // C B^T of a chunk and group in bf16, (b, chunks, g, 4 warps, 4 pairs of columns, 32 lanes, 8): a
                    // lane's accumulators of two tiles of 8 columns. 0 above the diagonal, nothing in blocks of 16 x 16 above it
  explicit Prepared(const SsdInput& in, bool with_products = true);
  /// Padded columns of states: 64 or 128.
  int64_t width() const { return d.n <= 64 ? 64 : 128; }
  /// Sums rows^T columns along the chunks: forward (x, B) and, last chunk first, reverse (dy, C). `start` and `last`
  /// (b, heads, p, n) fp32 may be undefined. The result in bf16 (b, chunks, heads, 64, width()): the state before each
  /// chunk, or the gradient of the state after it.
  Tensor states(const Tensor& rows, const Tensor& columns, const Tensor& start, const Tensor& last, bool reverse) const;
  /// `last` alone.
  void last_state(const Tensor& rows, const Tensor& columns, const Tensor& start, const Tensor& last, bool reverse) const;
};

/// A value that all lanes of a warp share, so that the compiler knows it.
__device__ inline int uniform(int v) { return __shfl_sync(0xFFFFFFFFu, v, 0); }

__device__ inline uint32_t word(const bf16* p) { return *reinterpret_cast<const uint32_t*>(p); }
__device__ inline float low(uint32_t w) { return __uint_as_float(w << 16); }
__device__ inline float high(uint32_t w) { return __uint_as_float(w & 0xFFFF0000u); }
__device__ inline float2 pair(const float* p) { return *reinterpret_cast<const float2*>(p); }

/// 64 rows of a tensor into a tile of D columns by `threads` threads (a multiple of 16); zeros from `rows` and `columns`
/// on.
template <int D>
__device__ inline void fetch(bf16* to, const bf16* from, int64_t row, int rows, int columns, int tid, int threads) {
  const int c = tid % (D / 8) * 8, first = tid / (D / 8), step = threads / (D / 8);
  const int count = c < columns ? rows : 0;
  const bf16* source = from + first * row + c;
#pragma unroll 1
  for (int r = first; r < kRows; r += step, source += step * row)
    copy_async(to + r * (D + 8) + c, r < count ? source : from, r < count);
}
/// `count` contiguous values (a multiple of 16 bytes).
__device__ inline void fetch_line(float* to, const float* from, int count, int tid, int threads) {
  for (int at = tid * 4; at < count; at += threads * 4) copy_async(to + at, from + at, true);
}

/// Lane's addresses for ldmatrix. Four 8 x 8 matrices; lanes 8 m to 8 m + 7 give the rows of matrix m.
struct Corner {
  int first, second;  // offset along the outer and the inner dimension for matrices in the order (0,0) (8,0) (0,8) (8,8)
  int first_b, second_b;  // and in the order (0,0) (0,8) (8,0) (8,8)
  __device__ Corner() {
    const int lane = threadIdx.x % 32, m = lane / 8, r = lane % 8;
    first = m % 2 * 8 + r;
    second = m / 2 * 8;
    first_b = m / 2 * 8 + r;
    second_b = m % 2 * 8;
  }
  /// 16 x 16 of a row-major (rows, k) tile as the left factor.
  __device__ void left(uint32_t (&f)[4], const bf16* tile, int pitch, int row, int k) const {
    load_matrices(f, tile + (row + first) * pitch + k + second);
  }
  /// The same of a (k, rows) tile.
  __device__ void left_transposed(uint32_t (&f)[4], const bf16* tile, int pitch, int row, int k) const {
    load_matrices_transposed(f, tile + (k + first_b) * pitch + row + second_b);
  }
  /// 16 columns of a (columns, k) tile as the right factor: f[0], f[1] the first 8, f[2], f[3] the next.
  __device__ void right(uint32_t (&f)[4], const bf16* tile, int pitch, int column, int k) const {
    load_matrices(f, tile + (column + first_b) * pitch + k + second_b);
  }
  /// The same of a (k, columns) tile.
  __device__ void right_transposed(uint32_t (&f)[4], const bf16* tile, int pitch, int column, int k) const {
    load_matrices_transposed(f, tile + (k + first) * pitch + column + second);
  }
};

__device__ inline void mma_pair(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma(c0, a, b[0], b[1]);
  mma(c1, a, b[2], b[3]);
}

/// The lanes of a quad hold words d0 to d3 each; afterwards lane t holds d_t of all four, in the order of the lanes.
__device__ inline uint4 transpose_quad(uint32_t d0, uint32_t d1, uint32_t d2, uint32_t d3) {
  constexpr unsigned kAll = 0xFFFFFFFFu;
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  const uint32_t a = __shfl_xor_sync(kAll, odd ? d0 : d1, 1), b = __shfl_xor_sync(kAll, odd ? d2 : d3, 1);
  (odd ? d0 : d1) = a;
  (odd ? d2 : d3) = b;
  const uint32_t c = __shfl_xor_sync(kAll, upper ? d0 : d2, 2), e = __shfl_xor_sync(kAll, upper ? d1 : d3, 2);
  (upper ? d0 : d2) = c;
  (upper ? d1 : d3) = e;
  return make_uint4(d0, d1, d2, d3);
}

/// Writes two accumulators, rows r0 to r0 + 15 of 16 columns, in pieces of 16 bytes; what lies outside is left out.
/// All lanes take part.
__device__ inline void store_block(bf16* to, int64_t row, int r0, int rows, int column, int columns, const float (&s)[4],
                                   const float (&next)[4]) {
  const uint4 piece = transpose_quad(pack(s[0], s[1]), pack(next[0], next[1]), pack(s[2], s[3]), pack(next[2], next[3]));
  const int t = threadIdx.x % 4, r = r0 + threadIdx.x % 32 / 4 + t / 2 * 8, c = column + t % 2 * 8;
  if (r < rows && c < columns) *reinterpret_cast<uint4*>(to + r * row + c) = piece;
}

}  // namespace krait::kernels::cuda::ssd::mma64
