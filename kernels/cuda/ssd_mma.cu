// Forward of the state-space chunks in bf16 (ssd_mma.cuh). A block walks along a piece of the sequence with the states
// of up to three heads of a group in registers, so that B, C and C B^T are read once for three heads and no state goes
// through memory; the next chunk's tiles come in meanwhile. Short batches are cut in pieces, whose own states are
// summed first.
//
// Counted for b = 32, l = 2048, 24 heads of 64, n = 128, one group: 25.8 GFLOP each for states and h_in C, 8.1 GFLOP
// inside chunks (below the diagonal), 1.1 GFLOP for C B^T; memory x, y 0.40 GB, B and C 0.03 GB, decays 0.05 GB: 0.16 ms
// at 3 TB/s. Shared memory: 86 ldmatrix.x4 of 4 cycles per warp, chunk and head, 0.15 ms, besides 0.05 ms to fill the
// tiles. One H100 took 0.46 ms for the outputs: three warps per scheduler wait for each other (1,400 instructions a chunk,
// 0.17 ms of issue slots). States alone took 0.25 ms, the rate of a copy there.
#include "kernels/cuda/shared_limit.h"
#include "kernels/cuda/ssd_mma.cuh"

namespace krait::kernels::cuda::ssd::mma64 {

namespace {

constexpr int kMaxBundle = 3;
constexpr int kCarryThreads = 256, kCarryEach = 4;  // values of a state that a thread carries
constexpr int64_t kSmallest = 163 * 1024;  // shared memory of a block that every kernel here makes do with
constexpr float kGone = -256.0f;  // 2^kGone is 0

// One block per chunk; a warp sums the decays of a head.
__global__ void __launch_bounds__(256)
    decay_kernel(float* decays, const float* a, const float* dt, const int32_t* segments, Sizes d) {
  __shared__ float log_decay[kRows][33], step[kRows][33];
  const int64_t b = blockIdx.x / d.chunks, c = blockIdx.x % d.chunks;
  const int rows = d.valid(c), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t h0 = 0; h0 < d.heads; h0 += 32) {
    for (int r = warp; r < kRows; r += 8) {
      float s = 0, w = 0;
      if (r < rows && h0 + lane < d.heads) {
        const int64_t t = b * d.l + c * kRows + r, at = t * d.heads + h0 + lane;
        const bool begins = segments != nullptr && c * kRows + r > 0 && segments[t] != segments[t - 1];
        s = begins ? kGone : fmaxf(a[at] * kLog2e, kGone);
        w = dt != nullptr ? dt[at] : 1.0f;
      }
      log_decay[r][lane] = s;
      step[r][lane] = w;
    }
    __syncthreads();
    for (int k = warp; k < 32; k += 8) {
      if (h0 + k >= d.heads) break;
      const float x0 = log_decay[2 * lane][k], x1 = log_decay[2 * lane + 1][k];
      float sum = x0 + x1;
      for (int offset = 1; offset < 32; offset *= 2) {
        const float other = __shfl_up_sync(0xFFFFFFFFu, sum, offset);
        if (lane >= offset) sum += other;
      }
      const float up = __shfl_up_sync(0xFFFFFFFFu, sum, 1), before = lane > 0 ? up : 0.0f;
      const float s0 = before + x0, s1 = sum, end = __shfl_sync(0xFFFFFFFFu, sum, 31);
      const float w0 = step[2 * lane][k], w1 = step[2 * lane + 1][k];
      float2* to = reinterpret_cast<float2*>(decays + d.unit(b, c, h0 + k) * kDecays) + lane;
      to[0] = make_float2(s0, s1);
      to[32] = make_float2(w0, w1);
      to[64] = make_float2(exp2_fast(s0), exp2_fast(s1));
      to[96] = make_float2(w0 * exp2_fast(end - s0), w1 * exp2_fast(end - s1));
    }
    __syncthreads();
  }
}

// C B^T of one chunk and group, warp w rows 16 w to 16 w + 15. Bound by memory: B and C once.
template <int N>
__global__ void __launch_bounds__(128)
    products_kernel(bf16* products, const Rows<const bf16> B, const Rows<const bf16> C, const Sizes d) {
  extern __shared__ __align__(16) unsigned char shared[];
  bf16 *c_tile = reinterpret_cast<bf16*>(shared), *b_tile = c_tile + kWide<N>;
  const int64_t group = blockIdx.x % d.g, c = blockIdx.x / d.g % d.chunks, b = blockIdx.x / d.g / d.chunks;
  const int tid = threadIdx.x, w = tid / 32, rows = d.valid(c);
  fetch<N>(c_tile, C.at(b, c * kRows, group), C.row, rows, static_cast<int>(d.n), tid, 128);
  fetch<N>(b_tile, B.at(b, c * kRows, group), B.row, rows, static_cast<int>(d.n), tid, 128);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  const Corner corner;
  float s[4][2][4] = {};
#pragma unroll
  for (int k = 0; k < N; k += 16) {
    uint32_t fa[4], fb[4];
    corner.left(fa, c_tile, kPitch<N>, 16 * w, k);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      if (v > w) break;
      corner.right(fb, b_tile, kPitch<N>, 16 * v, k);
      mma_pair(s[v][0], s[v][1], fa, fb);
    }
  }
  bf16* to = products + (d.product(b, c, group) * 4 + w) * 1024 + tid % 32 * 8;
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    if (v > w) break;
    if (v == w) {  // above the diagonal 0
      const int i = tid % 32 / 4, j = tid % 4 * 2;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (j + e % 2 > i + e / 2 * 8) s[v][0][e] = 0;
        if (j + 8 + e % 2 > i + e / 2 * 8) s[v][1][e] = 0;
      }
    }
    *reinterpret_cast<uint4*>(to + v * 256) = make_uint4(pack(s[v][0][0], s[v][0][1]), pack(s[v][0][2], s[v][0][3]),
                                                         pack(s[v][1][0], s[v][1][1]), pack(s[v][1][2], s[v][1][3]));
  }
}

struct Scan {
  Rows<const bf16> rows, columns;  // x and B; in reverse dy and C
  const float *decays, *start;     // start (b, pieces, heads, p, n) or null
  const bf16* products;            // with outputs only
  const float* D;                  // (heads, p) or null
  float* last;                     // (b, pieces, heads, p, n) or, of the last piece alone, (b, heads, p, n); or null
  bf16* states;                    // (b, chunks, heads, 64, N) or null
  Sizes d;
  int64_t pieces, piece, bundles;  // piece: chunks of one
  int bundle;                      // heads of a block
  bool reverse, last_of_each;
};

__device__ inline void head_barrier(int slot) {  // the four warps of a head
  asm volatile("bar.sync %0, 128;" ::"r"(slot + 1) : "memory");
}

__device__ inline uint32_t scale(uint32_t values, float2 by) { return pack(low(values) * by.x, high(values) * by.y); }

// Warp w of a head keeps rows 16 w to 16 w + 15 of the state and makes the outputs of positions 16 w to 16 w + 15.
template <int N, bool kOutput>
__global__ void __launch_bounds__(kMaxBundle * 128, 1)
    scan_kernel(const Scan in, const Rows<const bf16> C, const Rows<bf16> y) {
  constexpr int kStages = kOutput ? 2 : 3;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float skip[kMaxBundle * kRows];
  const Sizes& d = in.d;
  const int tid = threadIdx.x, threads = blockDim.x, slot = uniform(tid / 128), w = uniform(tid / 32 % 4);
  const int lane = tid % 32, g = lane / 4, t = lane % 4, n = static_cast<int>(d.n), p = static_cast<int>(d.p);
  const int64_t group = blockIdx.x / in.bundles % d.g, piece = blockIdx.x / in.bundles / d.g % in.pieces;
  const int64_t b = blockIdx.x / in.bundles / d.g / in.pieces, h0 = group * d.group + blockIdx.x % in.bundles * in.bundle;
  const int heads = static_cast<int>(min(int64_t{in.bundle}, (group + 1) * d.group - h0));
  const int64_t c0 = piece * in.piece, h = h0 + slot;
  const int count = static_cast<int>(min(in.piece, d.chunks - c0));
  const bool active = slot < heads;

  const int stage_values = (kOutput ? 2 : 1) * kWide<N> + in.bundle * (kSquare + 2 * kDecays);
  bf16* const stages = reinterpret_cast<bf16*>(shared);
  bf16* const state_tile = stages + kStages * stage_values + slot * kWide<N>;
  const auto chunk_of = [&](int k) { return in.reverse ? c0 + count - 1 - k : c0 + k; };
  const auto fetch_chunk = [&](int k) {
    if (k < count) {
      const int64_t c = chunk_of(k);
      const int valid = d.valid(c);
      bf16* to = stages + k % kStages * stage_values;
      fetch<N>(to, in.columns.at(b, c * kRows, group), in.columns.row, valid, n, tid, threads);
      to += kWide<N>;
      if constexpr (kOutput) {
        fetch<N>(to, C.at(b, c * kRows, group), C.row, valid, n, tid, threads);
        to += kWide<N>;
      }
      for (int s = 0; s < heads; ++s)
        fetch<kRows>(to + s * kSquare, in.rows.at(b, c * kRows, h0 + s), in.rows.row, valid, p, tid, threads);
      fetch_line(reinterpret_cast<float*>(to + in.bundle * kSquare), in.decays + d.unit(b, c, h0) * kDecays,
                 heads * kDecays, tid, threads);
    }
    copy_commit();
  };
#pragma unroll
  for (int k = 0; k + 1 < kStages; ++k) fetch_chunk(k);

  const Corner corner;
  float state[N / 8][4] = {};
  if (active && in.start != nullptr) {
    const float* from = in.start + ((b * in.pieces + piece) * d.heads + h) * d.p * d.n;
#pragma unroll
    for (int m = 0; m < N / 8; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = 16 * w + g + e / 2 * 8, column = 8 * m + 2 * t + e % 2;
        if (r < p && column < n) state[m][e] = from[r * d.n + column];
      }
  }
  const auto share_state = [&] {
#pragma unroll
    for (int m = 0; m < N / 8; ++m) {
      bf16* to = state_tile + (16 * w + g) * kPitch<N> + 8 * m + 2 * t;
      *reinterpret_cast<uint32_t*>(to) = pack(state[m][0], state[m][1]);
      *reinterpret_cast<uint32_t*>(to + 8 * kPitch<N>) = pack(state[m][2], state[m][3]);
    }
  };
  share_state();
  if (kOutput && tid < in.bundle * kRows)
    skip[tid] = in.D != nullptr && tid / kRows < heads && tid % kRows < p ? in.D[(h0 + tid / kRows) * d.p + tid % kRows] : 0.0f;

  for (int k = 0; k < count; ++k) {
    copy_wait<kStages - 2>();
    __syncthreads();
    fetch_chunk(k + kStages - 1);
    if (!active) continue;
    const int64_t c = chunk_of(k);
    const bf16* columns = stages + k % kStages * stage_values;
    const bf16 *c_tile = columns + kWide<N>, *rows = columns + (kOutput ? 2 : 1) * kWide<N> + slot * kSquare;
    const Decay decay(reinterpret_cast<const float*>(columns + (kOutput ? 2 : 1) * kWide<N> + in.bundle * kSquare) +
                      slot * kDecays);
    if constexpr (kOutput) {
      uint4 product[4];
      const bf16* from = in.products + (d.product(b, c, group) * 4 + w) * 1024 + lane * 8;
#pragma unroll
      for (int v = 0; v < 4; ++v)
        product[v] = v <= w ? __ldg(reinterpret_cast<const uint4*>(from + v * 256)) : make_uint4(0, 0, 0, 0);
      float acc[8][4] = {};
#pragma unroll
      for (int q = 0; q < N; q += 16) {  // h_in C_i
        uint32_t fa[4], fb[4];
        corner.left(fa, c_tile, kPitch<N>, 16 * w, q);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          corner.right(fb, state_tile, kPitch<N>, 16 * m, q);
          mma_pair(acc[2 * m], acc[2 * m + 1], fa, fb);
        }
      }
      head_barrier(slot);  // the state's tile has been read
      const int i = 16 * w + g;
      const float in0 = decay.in[i], in1 = decay.in[i + 8], s0 = decay.s[i], s1 = decay.s[i + 8];
#pragma unroll
      for (int m = 0; m < 8; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[m][e] *= e < 2 ? in0 : in1;
#pragma unroll
      for (int v = 0; v < 4; ++v) {  // + sum_j (C_i . B_j) M_ij dt_j x_j
        if (v > w) break;
        const uint32_t words[4] = {product[v].x, product[v].y, product[v].z, product[v].w};
        uint32_t fa[4], fb[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int j = 16 * v + 8 * half + 2 * t;
          const float2 s = pair(decay.s + j), dt = pair(decay.dt + j);
          // Above the diagonal the product is 0 and the power must be finite.
          const auto weight = [](float product_of, float difference, float dt_of) {
            return product_of * dt_of * exp2_fast(fminf(difference, 126.0f));
          };
          const uint32_t top = words[2 * half], bottom = words[2 * half + 1];
          fa[2 * half] = pack(weight(low(top), s0 - s.x, dt.x), weight(high(top), s0 - s.y, dt.y));
          fa[2 * half + 1] = pack(weight(low(bottom), s1 - s.x, dt.x), weight(high(bottom), s1 - s.y, dt.y));
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          corner.right_transposed(fb, rows, kNarrow, 16 * m, 16 * v);
          mma_pair(acc[2 * m], acc[2 * m + 1], fa, fb);
        }
      }
      if (in.D != nullptr) {
#pragma unroll
        for (int m = 0; m < 8; ++m) {
          const float2 D = pair(skip + slot * kRows + 8 * m + 2 * t);
          const uint32_t top = word(rows + i * kNarrow + 8 * m + 2 * t), bottom = word(rows + (i + 8) * kNarrow + 8 * m + 2 * t);
          float(&a)[4] = acc[m];
          a[0] += D.x * low(top);
          a[1] += D.y * high(top);
          a[2] += D.x * low(bottom);
          a[3] += D.y * high(bottom);
        }
      }
      bf16* to = y.at(b, c * kRows, h);
      const int valid = d.valid(c);
#pragma unroll
      for (int m = 0; m < 4; ++m) store_block(to, y.row, 16 * w, valid, 16 * m, p, acc[2 * m], acc[2 * m + 1]);
    } else if (in.states != nullptr) {
      __syncwarp();
      bf16* to = in.states + (d.unit(b, c, h) * kRows + 16 * w) * N;
#pragma unroll
      for (int at = lane; at < 16 * N / 8; at += 32)
        *reinterpret_cast<uint4*>(to + at * 8) =
            *reinterpret_cast<const uint4*>(state_tile + (16 * w + at / (N / 8)) * kPitch<N> + at % (N / 8) * 8);
      __syncwarp();
    }
    const float total = decay.total();
    const float* weights = in.reverse ? decay.in : decay.out;
#pragma unroll
    for (int m = 0; m < N / 8; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) state[m][e] *= total;
#pragma unroll
    for (int q = 0; q < kRows; q += 16) {
      uint32_t fa[4], fb[4];
      corner.left_transposed(fa, rows, kNarrow, 16 * w, q);
      const float2 w0 = pair(weights + q + 2 * t), w1 = pair(weights + q + 8 + 2 * t);
      fa[0] = scale(fa[0], w0);
      fa[1] = scale(fa[1], w0);
      fa[2] = scale(fa[2], w1);
      fa[3] = scale(fa[3], w1);
#pragma unroll
      for (int m = 0; m < N / 16; ++m) {
        corner.right_transposed(fb, columns, kPitch<N>, 16 * m, q);
        mma_pair(state[2 * m], state[2 * m + 1], fa, fb);
      }
    }
    share_state();
  }
  if (!active || in.last == nullptr) return;
  const bool end = piece == (in.reverse ? 0 : in.pieces - 1);
  if (!in.last_of_each && !end) return;
  float* to = in.last + ((in.last_of_each ? b * in.pieces + piece : b) * d.heads + h) * d.p * d.n;
#pragma unroll
  for (int m = 0; m < N / 8; ++m)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = 16 * w + g + e / 2 * 8, column = 8 * m + 2 * t + e % 2;
      if (r < p && column < n) to[r * d.n + column] = state[m][e];
    }
}

// The decay over the whole of each piece, (b, pieces, heads). A warp each.
__global__ void piece_decay_kernel(float* totals, const float* decays, Sizes d, int64_t pieces, int64_t piece) {
  const int64_t at = int64_t{blockIdx.x} * (kCarryThreads / 32) + threadIdx.x / 32;
  if (at >= d.b * pieces * d.heads) return;
  const int64_t h = at % d.heads, i = at / d.heads % pieces, b = at / d.heads / pieces;
  const int64_t end = min((i + 1) * piece, d.chunks);
  float total = 1;
  for (int64_t c = i * piece + threadIdx.x % 32; c < end; c += 32) total *= Decay(decays + d.unit(b, c, h) * kDecays).total();
  for (int other = 16; other > 0; other /= 2) total *= __shfl_xor_sync(0xffffffff, total, other);
  if (threadIdx.x % 32 == 0) totals[at] = total;
}

// The own states of pieces to the states before them (in reverse: after them), and the one that leaves the last to `end`,
// if that is not null. `tiles` blocks share a head.
__global__ void __launch_bounds__(kCarryThreads)
    carry_kernel(float* states, float* end, const float* start, const float* totals, Sizes d, int64_t pieces, int tiles,
                 bool reverse) {
  const int64_t size = d.p * d.n, unit = blockIdx.x / tiles, h = unit % d.heads, b = unit / d.heads;
  const int64_t first = int64_t{blockIdx.x % tiles} * (kCarryThreads * kCarryEach) + threadIdx.x;
  float running[kCarryEach];
#pragma unroll
  for (int j = 0; j < kCarryEach; ++j) {
    const int64_t element = first + j * kCarryThreads;
    running[j] = start != nullptr && element < size ? start[unit * size + element] : 0.0f;
  }
  for (int64_t k = 0; k < pieces; ++k) {
    const int64_t piece = (b * pieces + (reverse ? pieces - 1 - k : k)) * d.heads + h;
    const float total = totals[piece];
    float* own = states + piece * size;
    float here[kCarryEach];
#pragma unroll
    for (int j = 0; j < kCarryEach; ++j) {
      const int64_t element = first + j * kCarryThreads;
      here[j] = element < size ? own[element] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kCarryEach; ++j) {
      const int64_t element = first + j * kCarryThreads;
      if (element < size) own[element] = running[j];
      running[j] = total * running[j] + here[j];
    }
  }
  if (end == nullptr) return;
#pragma unroll
  for (int j = 0; j < kCarryEach; ++j) {
    const int64_t element = first + j * kCarryThreads;
    if (element < size) end[unit * size + element] = running[j];
  }
}

// How a walk along the chunks is cut: blocks for two on each of about 132 multiprocessors, pieces of four chunks or more.
struct Cut {
  int64_t bundles, pieces, piece;
  int bundle;
  Cut(const Sizes& d, int64_t shared) {
    bundles = ceil_div(d.group, shared < 200 * 1024 ? kMaxBundle - 1 : kMaxBundle);
    bundle = static_cast<int>(ceil_div(d.group, bundles));
    const int64_t blocks = d.b * d.g * bundles, wanted = std::min(264 / blocks, d.chunks / 4);
    piece = ceil_div(d.chunks, std::max<int64_t>(1, wanted));
    pieces = ceil_div(d.chunks, piece);
  }
};

template <int N, bool kOutput>
void launch_scan(const Scan& in, const Rows<const bf16>& C, const Rows<bf16>& y, Stream stream) {
  const int64_t stage = (kOutput ? 2 : 1) * kWide<N> + in.bundle * (kSquare + 2 * kDecays);
  const int64_t values = (kOutput ? 2 : 3) * stage + in.bundle * kWide<N>;
  launch(scan_kernel<N, kOutput>,
         {.grid = in.d.b * in.pieces * in.d.g * in.bundles, .block = in.bundle * 128,
          .shared = values * int64_t{sizeof(bf16)}, .stream = stream},
         in, C, y);
}

// `out` undefined: states only. Neither: `last` alone, for which the pieces are walked once.
void walk(Scan in, const Tensor& start, const Tensor& last, const Tensor& C, const Tensor& out, const Tensor& like) {
  const Stream stream = current_stream(like.device());
  const Cut cut(in.d, shared_limit(like.device()));
  in.pieces = cut.pieces;
  in.piece = cut.piece;
  in.bundles = cut.bundles;
  in.bundle = cut.bundle;
  const bool narrow = in.d.n <= 64;
  const Rows<const bf16> unused(like);
  const auto states_only = [&] {
    if (narrow)
      launch_scan<64, false>(in, unused, Rows<bf16>(like), stream);
    else
      launch_scan<128, false>(in, unused, Rows<bf16>(like), stream);
  };
  Tensor carried;
  in.start = pointer_or_null<float>(start);
  if (cut.pieces > 1) {
    carried = empty({in.d.b, cut.pieces, in.d.heads, in.d.p, in.d.n}, DType::f32, like.device());
    bf16* const states = in.states;
    in.start = nullptr;
    in.states = nullptr;
    in.last = carried.data<float>();
    in.last_of_each = true;
    states_only();
    const Tensor totals = empty({in.d.b, cut.pieces, in.d.heads}, DType::f32, like.device());
    launch(piece_decay_kernel,
           {.grid = ceil_div(totals.numel(), kCarryThreads / 32), .block = kCarryThreads, .stream = stream},
           totals.data<float>(), in.decays, in.d, cut.pieces, cut.piece);
    const int64_t tiles = ceil_div(in.d.p * in.d.n, kCarryThreads * kCarryEach);
    const bool last_alone = !out.defined() && states == nullptr;
    launch(carry_kernel, {.grid = in.d.b * in.d.heads * tiles, .block = kCarryThreads, .stream = stream},
           carried.data<float>(), last_alone ? last.data<float>() : nullptr, pointer_or_null<float>(start),
           totals.data<float>(), in.d, cut.pieces, static_cast<int>(tiles), in.reverse);
    if (last_alone) return;
    in.start = carried.data<float>();
    in.states = states;
    in.last_of_each = false;
  }
  in.last = pointer_or_null<float>(last);
  if (!out.defined())
    states_only();
  else if (narrow)
    launch_scan<64, true>(in, Rows<const bf16>(C), Rows<bf16>(out), stream);
  else
    launch_scan<128, true>(in, Rows<const bf16>(C), Rows<bf16>(out), stream);
}

}  // namespace

bool serves(const SsdInput& in, const Tensor& dy, const std::vector<Tensor>& outputs) {
  if (in.x.dtype() != DType::bf16 || in.x.size(3) > 64 || in.B.size(3) > 128 || shared_limit(in.x.device()) < kSmallest)
    return false;
  const auto wide = [](const Tensor& t) { return !t.defined() || Rows<const bf16>(t).wide; };
  return wide(in.x) && wide(in.B) && wide(in.C) && wide(dy) && std::all_of(outputs.begin(), outputs.end(), wide);
}

Prepared::Prepared(const SsdInput& in, bool with_products) : d(in) {
  const Device device = in.x.device();
  const Stream stream = current_stream(device);
  decays = empty({d.b, d.chunks, d.heads, 4, kRows}, DType::f32, device);
  launch(decay_kernel, {.grid = d.b * d.chunks, .block = 256, .stream = stream}, decays.data<float>(), in.a.data<float>(),
         pointer_or_null<float>(in.dt), pointer_or_null<int32_t>(in.segments), d);
  if (!with_products) return;
  products = empty({d.b, d.chunks, d.g, kRows, kRows}, DType::bf16, device);
  const auto run = [&]<int N>() {
    launch(products_kernel<N>,
           {.grid = d.b * d.chunks * d.g, .block = 128, .shared = 2 * kWide<N> * int64_t{sizeof(bf16)}, .stream = stream},
           products.data<bf16>(), Rows<const bf16>(in.B), Rows<const bf16>(in.C), d);
  };
  if (width() == 64)
    run.operator()<64>();
  else
    run.operator()<128>();
}

Tensor Prepared::states(const Tensor& rows, const Tensor& columns, const Tensor& start, const Tensor& last,
                        bool reverse) const {
  Tensor states = empty({d.b, d.chunks, d.heads, kRows, width()}, DType::bf16, rows.device());
  const Scan scan{Rows<const bf16>(rows), Rows<const bf16>(columns), decays.data<float>(), nullptr, nullptr, nullptr,
                  nullptr, states.data<bf16>(), d, 1, 1, 1, 1, reverse, false};
  walk(scan, start, last, {}, {}, rows);
  return states;
}

void Prepared::last_state(const Tensor& rows, const Tensor& columns, const Tensor& start, const Tensor& last, bool reverse) const {
  const Scan scan{Rows<const bf16>(rows), Rows<const bf16>(columns), decays.data<float>(), nullptr, nullptr, nullptr,
                  nullptr, nullptr, d, 1, 1, 1, 1, reverse, false};
  walk(scan, start, last, {}, {}, rows);
}

void forward(Tensor& y, Tensor& final_state, const SsdInput& in) {
  const Prepared prepared(in);
  const Scan scan{Rows<const bf16>(in.x), Rows<const bf16>(in.B), prepared.decays.data<float>(), nullptr,
                  prepared.products.data<bf16>(), pointer_or_null<float>(in.D), nullptr, nullptr, prepared.d, 1, 1, 1, 1,
                  false, false};
  walk(scan, in.initial_state, final_state, in.C, y, in.x);
}

}  // namespace krait::kernels::cuda::ssd::mma64
