// Backward of the state-space chunks in bf16 (ssd_mma.cuh, kernels/ssd.h). The states before and the gradients after
// every chunk are made by two walks along the sequence and kept in bf16; then a block takes a chunk and goes through the
// heads of a group in order, with dB, dC and the sum of Gamma over the heads in registers: no atomics, no partial sums
// of dB and dC in memory, and the products of Gamma with B and C are made once for all heads.
//
// Counted as in ssd_mma.cu: 25.8 GFLOP for each of the two walks; then 8.1 GFLOP each for Gamma and U inside chunks and
// 77 GFLOP through the states. Memory: the walks read x, dy and write states, 1.2 GB; the last kernel reads x, dy and
// both states and writes dx, 1.4 GB: 0.9 ms at 3 TB/s, which bounds it (ldmatrix: 52
// of 4 cycles per warp, chunk and head, 0.4 ms).
#include "kernels/cuda/ssd_mma.cuh"
#include "kernels/reduce.h"

namespace krait::kernels::cuda::ssd::mma64 {

namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr uint32_t kOne = 0x3F80, kOnes = 0x3F803F80;  // 1 in bf16, once and twice

constexpr int kParts = 4, kThreads = kParts * 128;
constexpr uint32_t kSpareWarps = 0xEDC984;  // whose columns lie behind their rows: they have no Gamma to make

// What the warps leave of a head for the one that puts it together. Warp (w, part): rows 16 w to 16 w + 15 and a quarter
// of the columns.
struct Parts {
  float W[4][kRows];          // sums over the rows i >= r of w of sum_{j < r} W_ij, j and r in the same quarter
  float left[3][kRows];       // of quarter v and rows i behind it: sum_j W_ij
  float in[kParts][kRows];    // e^{s_i} dy_i . h_in C_i
  float out[kParts][kRows];   // e^{s_q - s_j} dt_j x_j . dh_out B_j
  float step[kParts][kRows];  // U_j . x_j
  float skip[4][kRows];       // sum_j dy_j x_j
  float dot[kParts * 4];      // e^{s_q} <dh_out, h_in>
};

struct Grads {
  Rows<bf16> dx, dB, dC;
  float *da, *ddt, *dD;  // (b, l, heads), the same or null, (b, chunks, heads, p) or null
};

struct Inputs {
  Rows<const bf16> dy, x, B, C;
  const bf16 *products, *states, *dstates;
  const float *decays, *D;
  Sizes d;
};

__device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(kAll, v, 1);
  return v + __shfl_xor_sync(kAll, v, 2);
}

// Sums each of four values over the lanes of the same t; lane (g, t) gets the sum of value g % 4.
__device__ inline float sum_of_g(float (&v)[4]) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int size = 2; size > 0; size /= 2) {
    const bool upper = g & size;
#pragma unroll
    for (int k = 0; k < size; ++k) {
      const float other = __shfl_xor_sync(kAll, upper ? v[k] : v[k + size], 4 * size);
      v[k] = (upper ? v[k + size] : v[k]) + other;
    }
  }
  return v[0] + __shfl_xor_sync(kAll, v[0], 16);
}

__device__ inline float sum_of_parts(const float (&v)[kParts][kRows], int at) {
  return (v[0][at] + v[1][at]) + (v[2][at] + v[3][at]);
}

// Of values 2 lane and 2 lane + 1: the sums from each on.
struct Suffix {
  float first, second;
  __device__ Suffix(float v0, float v1) {
    const int lane = threadIdx.x % 32;
    float sum = v0 + v1;
    for (int offset = 1; offset < 32; offset *= 2) {
      const float other = __shfl_down_sync(kAll, sum, offset);
      if (lane + offset < 32) sum += other;
    }
    const float later = __shfl_down_sync(kAll, sum, 1);
    second = v1 + (lane < 31 ? later : 0.0f);
    first = v0 + second;
  }
};

// da_r = sum_{i >= r > j} W_ij + sum_{i >= r} in_i + sum_{j < r} out_j + e^{s_q} <dh_out, h_in>, ddt and dD of one head,
// by one warp; a lane has positions 2 lane and 2 lane + 1.
__device__ inline void put_together(const Parts& parts, const Grads& grad, const Sizes& d, int64_t b, int64_t c, int64_t h) {
  const int lane = threadIdx.x % 32, r = 2 * lane, block = r / 16, valid = d.valid(c);
  const Suffix in(sum_of_parts(parts.in, r), sum_of_parts(parts.in, r + 1));
  float da[2] = {in.first, in.second};
  for (int v = 0; v < 3; ++v) {
    const Suffix left(parts.left[v][r], parts.left[v][r + 1]);
    if (v >= block) continue;
    da[0] += left.first;
    da[1] += left.second;
  }
  const float out[2] = {sum_of_parts(parts.out, r), sum_of_parts(parts.out, r + 1)};
  float before = out[0] + out[1], dot = lane < 16 ? parts.dot[lane] : 0.0f;
  for (int offset = 1; offset < 32; offset *= 2) {
    const float other = __shfl_up_sync(kAll, before, offset);
    if (lane >= offset) before += other;
    dot += __shfl_xor_sync(kAll, dot, offset);
  }
  const float earlier = __shfl_up_sync(kAll, before, 1), out0 = lane > 0 ? earlier : 0.0f;
  da[0] += out0 + dot;
  da[1] += out0 + out[0] + dot;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    for (int w = block; w < 4; ++w) da[e] += parts.W[w][r + e];
    if (r + e < valid) {
      const int64_t at = (b * d.l + c * kRows + r + e) * d.heads + h;
      grad.da[at] = da[e];
      if (grad.ddt != nullptr) grad.ddt[at] = sum_of_parts(parts.step, r + e);
    }
    if (grad.dD != nullptr && r + e < d.p) grad.dD[d.unit(b, c, h) * d.p + r + e] = sum_of_parts(parts.skip, r + e);
  }
}

// Sixteen warps: w = 16 rows (positions), part = which quarter of the columns (of positions, channels or states).
template <int N>
__global__ void __launch_bounds__(kThreads, 1) chunk_kernel(const Grads grad, const Inputs in) {
  constexpr int kStage = 2 * (kSquare + kWide<N> + kDecays), kColumns = N / kParts, kPairs = kColumns / 16;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Parts all_parts[2];
  bf16 *const b_tile = reinterpret_cast<bf16*>(shared), *const c_tile = b_tile + kWide<N>;
  bf16 *const square = c_tile + kWide<N>, *const stages = square + kSquare;
  const Sizes& d = in.d;
  const int64_t group = blockIdx.x % d.g, c = blockIdx.x / d.g % d.chunks, b = blockIdx.x / d.g / d.chunks;
  const int64_t t0 = c * kRows, h0 = group * d.group;
  const int heads = static_cast<int>(d.group), rows = d.valid(c), p = static_cast<int>(d.p), n = static_cast<int>(d.n);
  const int tid = threadIdx.x, warp = uniform(tid / 32), w = warp % 4, part = warp / 4;
  const int lane = tid % 32, g = lane / 4, t = lane % 4;
  const int i = 16 * w + g;          // the lane's rows are i and i + 8
  const int first = part * kColumns;  // of the warp's columns of states

  // One piece of x and dy a thread, and one or two of the states: fetch()'s loops would take twice the instructions.
  static_assert(kThreads == kRows * kRows / 8 && kRows * N / 8 % kThreads == 0);
  const int own_row = tid / 8, own_column = tid % 8 * 8;
  const bool own_inside = own_row < rows && own_column < p;
  const auto fetch_head = [&](int k) {
    if (k < heads) {
      bf16* to = stages + k % 2 * kStage;
      const bf16 *from_x = in.x.at(b, t0, h0 + k), *from_dy = in.dy.at(b, t0, h0 + k);
      bf16* place = to + own_row * kNarrow + own_column;
      copy_async(place, own_inside ? from_x + own_row * in.x.row + own_column : from_x, own_inside);
      copy_async(place + kSquare, own_inside ? from_dy + own_row * in.dy.row + own_column : from_dy, own_inside);
      const int64_t unit = d.unit(b, c, h0 + k), begin = unit * (kRows * N) + tid * 8;
      bf16* states = to + 2 * kSquare + tid / (N / 8) * kPitch<N> + tid % (N / 8) * 8;
#pragma unroll
      for (int i = 0; i < kRows * N / 8 / kThreads; ++i) {
        const int later = i * (kThreads / (N / 8)) * kPitch<N>;
        copy_async(states + later, in.states + begin + i * kThreads * 8, true);
        copy_async(states + kWide<N> + later, in.dstates + begin + i * kThreads * 8, true);
      }
      if (tid < kDecays / 4)
        copy_async(reinterpret_cast<float*>(to + 2 * kSquare + 2 * kWide<N>) + tid * 4,
                   in.decays + unit * kDecays + tid * 4, true);
    }
    copy_commit();
  };
  fetch<N>(b_tile, in.B.at(b, t0, group), in.B.row, rows, n, tid, kThreads);
  fetch<N>(c_tile, in.C.at(b, t0, group), in.C.row, rows, n, tid, kThreads);
  fetch_head(0);

  const Corner corner;
  uint4 product = make_uint4(0, 0, 0, 0);
  if (part <= w)
    product = *reinterpret_cast<const uint4*>(in.products + (d.product(b, c, group) * 4 + w) * 1024 + part * 256 + lane * 8);
  const uint32_t below = (2 * t < g ? kOne : 0u) | (2 * t + 1 < g ? kOne << 16 : 0u);  // [j < r] of an 8 x 8 tile
  float gamma_sum[2][4] = {}, dB[2 * kPairs][4] = {}, dC[2 * kPairs][4] = {};

  for (int k = 0;; ++k) {
    copy_wait<0>();
    __syncthreads();
    fetch_head(k + 1);
    if (k > 0 && warp == static_cast<int>(kSpareWarps >> k % 6 * 4 & 15))
      put_together(all_parts[(k - 1) % 2], grad, d, b, c, h0 + k - 1);
    if (k == heads) break;
    Parts& parts = all_parts[k % 2];
    const bf16 *x = stages + k % 2 * kStage, *dy = x + kSquare, *state = dy + kSquare, *dstate = state + kWide<N>;
    const Decay decay(reinterpret_cast<const float*>(dstate + kWide<N>));
    const float s0 = decay.s[i], s1 = decay.s[i + 8];

    uint32_t own[4][4];
#pragma unroll
    for (int q = 0; q < 4; ++q) corner.left(own[q], dy, kNarrow, 16 * w, 16 * q);

    // Gamma_ij = (dy_i . x_j) M_ij dt_j for the positions j of this quarter, W_ij = Gamma_ij (C_i . B_j), and
    // M_ij (C_i . B_j) into `square`.
    if (part <= w) {
      const int j0 = 16 * part;
      const bool under = part < w;  // every row of this warp is past every column
      float gamma[2][4] = {};
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        uint32_t fb[4];
        corner.right(fb, x, kNarrow, j0, 16 * q);
        mma_pair(gamma[0], gamma[1], own[q], fb);
      }
      const uint32_t words[4] = {product.x, product.y, product.z, product.w};
      uint32_t W[4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int j = j0 + 8 * m + 2 * t;
        const float2 s = pair(decay.s + j), dt = pair(decay.dt + j);
        const float mask[4] = {under || j <= i ? exp2_fast(s0 - s.x) : 0.0f, under || j < i ? exp2_fast(s0 - s.y) : 0.0f,
                               under || j <= i + 8 ? exp2_fast(s1 - s.x) : 0.0f,
                               under || j < i + 8 ? exp2_fast(s1 - s.y) : 0.0f};
        const float of[4] = {low(words[2 * m]), high(words[2 * m]), low(words[2 * m + 1]), high(words[2 * m + 1])};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          gamma[m][e] *= mask[e] * (e % 2 == 0 ? dt.x : dt.y);
          gamma_sum[m][e] += gamma[m][e];
        }
        W[2 * m] = pack(gamma[m][0] * of[0], gamma[m][1] * of[1]);
        W[2 * m + 1] = pack(gamma[m][2] * of[2], gamma[m][3] * of[3]);
        bf16* to = square + i * kNarrow + j;
        *reinterpret_cast<uint32_t*>(to) = pack(mask[0] * of[0], mask[1] * of[1]);
        *reinterpret_cast<uint32_t*>(to + 8 * kNarrow) = pack(mask[2] * of[2], mask[3] * of[3]);
      }
      // Sums over j < r for the r of this quarter, and over its j: products with [j < r] and with 1.
      float before[2][4] = {}, all[4] = {};
      mma(before[0], W, below, 0);
      mma(before[1], W, kOnes, below);
      mma(all, W, kOnes, kOnes);
      float over[4];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool reached = under || g >= 2 * t + e;
        over[e] = (reached ? before[0][e] : 0.0f) + before[0][2 + e];
        over[2 + e] = (under ? before[1][e] : 0.0f) + (reached ? before[1][2 + e] : 0.0f);
      }
      const float sum = sum_of_g(over);
      if (g < 4) parts.W[w][j0 + g / 2 * 8 + 2 * t + g % 2] = sum;
      if (under && t == 0) {
        parts.left[part][i] = all[0];
        parts.left[part][i + 8] = all[2];
      }
    }

    // e^{s_q} <dh_out, h_in>: of the products of rows with rows what lies on the diagonal.
    float crossed[2][4] = {};
#pragma unroll
    for (int m = 0; m < kPairs; ++m) {
      uint32_t fa[4], fb[4];
      corner.left(fa, dstate, kPitch<N>, 16 * w, first + 16 * m);
      corner.right(fb, state, kPitch<N>, 16 * w, first + 16 * m);
      mma_pair(crossed[0], crossed[1], fa, fb);
    }
    float dot = g == 2 * t ? crossed[0][0] + crossed[1][2] : g == 2 * t + 1 ? crossed[0][1] + crossed[1][3] : 0.0f;
    for (int offset = 16; offset > 0; offset /= 2) dot += __shfl_xor_sync(kAll, dot, offset);
    if (lane == 0) parts.dot[warp] = dot * decay.total();

    // own, 16 rows, times a tile of states: this warp's columns.
    const auto own_times = [&](float(&sum)[2 * kPairs][4], const bf16* tile) {
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int m = 0; m < kPairs; ++m) {
          uint32_t fb[4];
          corner.right_transposed(fb, tile, kPitch<N>, first + 16 * m, 16 * q);
          mma_pair(sum[2 * m], sum[2 * m + 1], own[q], fb);
        }
    };

    // dC_i += e^{s_i} dy_i h_in
    const float in0 = decay.in[i], in1 = decay.in[i + 8];
    float carried[2] = {0, 0};
    {
      float sum[2 * kPairs][4] = {};
      own_times(sum, state);
#pragma unroll
      for (int m = 0; m < 2 * kPairs; ++m) {
        const bf16* own_c = c_tile + i * kPitch<N> + first + 8 * m + 2 * t;
        const uint32_t top = word(own_c), bottom = word(own_c + 8 * kPitch<N>);
        carried[0] += sum[m][0] * low(top) + sum[m][1] * high(top);
        carried[1] += sum[m][2] * low(bottom) + sum[m][3] * high(bottom);
#pragma unroll
        for (int e = 0; e < 4; ++e) dC[m][e] += sum[m][e] * (e < 2 ? in0 : in1);
      }
    }

    // dB_j += e^{s_q - s_j} dt_j x_j dh_out
    {
#pragma unroll
      for (int q = 0; q < 4; ++q) corner.left(own[q], x, kNarrow, 16 * w, 16 * q);
      const float out0 = decay.out[i], out1 = decay.out[i + 8];
      float sum[2 * kPairs][4] = {};
      own_times(sum, dstate);
#pragma unroll
      for (int m = 0; m < 2 * kPairs; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) dB[m][e] += sum[m][e] * (e < 2 ? out0 : out1);
    }

    // U_j = e^{s_q - s_j} dh_out B_j + sum_i M_ij (C_i . B_j) dy_i for the channels of this quarter.
    float u[2][4] = {};
#pragma unroll
    for (int q = 0; q < N; q += 16) {
      uint32_t fa[4], fb[4];
      corner.left(fa, b_tile, kPitch<N>, 16 * w, q);
      corner.right(fb, dstate, kPitch<N>, 16 * part, q);
      mma_pair(u[0], u[1], fa, fb);
    }
    const float end = decay.s[kRows - 1], out0 = exp2_fast(end - s0), out1 = exp2_fast(end - s1);
    const float dt0 = decay.dt[i], dt1 = decay.dt[i + 8];
    const int channel = 16 * part + 2 * t;
    uint32_t own_x[2][2], up[2][2];
    float through[2] = {0, 0};
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int where = i * kNarrow + channel + 8 * m;
      own_x[m][0] = word(x + where);
      own_x[m][1] = word(x + where + 8 * kNarrow);
      up[m][0] = word(dy + where);
      up[m][1] = word(dy + where + 8 * kNarrow);
      u[m][0] *= out0;
      u[m][1] *= out0;
      u[m][2] *= out1;
      u[m][3] *= out1;
      through[0] += u[m][0] * low(own_x[m][0]) + u[m][1] * high(own_x[m][0]);
      through[1] += u[m][2] * low(own_x[m][1]) + u[m][3] * high(own_x[m][1]);
    }
    __syncthreads();  // `square` is whole
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (q < w) continue;
      uint32_t fa[4], fb[4];
      corner.left_transposed(fa, square, kNarrow, 16 * w, 16 * q);
      corner.right_transposed(fb, dy, kNarrow, 16 * part, 16 * q);
      mma_pair(u[0], u[1], fa, fb);
    }
    float step[2] = {0, 0};
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      step[0] += u[m][0] * low(own_x[m][0]) + u[m][1] * high(own_x[m][0]);
      step[1] += u[m][2] * low(own_x[m][1]) + u[m][3] * high(own_x[m][1]);
      u[m][0] *= dt0;
      u[m][1] *= dt0;
      u[m][2] *= dt1;
      u[m][3] *= dt1;
    }
    if (in.D != nullptr) {
      float skip[4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float2 D = make_float2(0, 0);  // p is a multiple of 8
        if (channel + 8 * m < p) D = __ldg(reinterpret_cast<const float2*>(in.D + (h0 + k) * d.p + channel + 8 * m));
        u[m][0] += D.x * low(up[m][0]);
        u[m][1] += D.y * high(up[m][0]);
        u[m][2] += D.x * low(up[m][1]);
        u[m][3] += D.y * high(up[m][1]);
        skip[2 * m] = low(up[m][0]) * low(own_x[m][0]) + low(up[m][1]) * low(own_x[m][1]);
        skip[2 * m + 1] = high(up[m][0]) * high(own_x[m][0]) + high(up[m][1]) * high(own_x[m][1]);
      }
      const float sum = sum_of_g(skip);
      if (g < 4) parts.skip[w][16 * part + g / 2 * 8 + 2 * t + g % 2] = sum;
    }
    store_block(grad.dx.at(b, t0, h0 + k), grad.dx.row, 16 * w, rows, 16 * part, p, u[0], u[1]);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      carried[e] = quad_sum(carried[e]);
      through[e] = quad_sum(through[e]);
      step[e] = quad_sum(step[e]);
    }
    if (t == 0) {
      parts.in[part][i] = carried[0] * in0;
      parts.in[part][i + 8] = carried[1] * in1;
      parts.out[part][i] = through[0] * dt0;
      parts.out[part][i + 8] = through[1] * dt1;
      parts.step[part][i] = step[0];
      parts.step[part][i + 8] = step[1];
    }
  }

  // + sum over the heads of Gamma_ij B_j, and of Gamma_ij C_i.
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    bf16* to = square + i * kNarrow + 16 * part + 8 * m + 2 * t;
    *reinterpret_cast<uint32_t*>(to) = pack(gamma_sum[m][0], gamma_sum[m][1]);
    *reinterpret_cast<uint32_t*>(to + 8 * kNarrow) = pack(gamma_sum[m][2], gamma_sum[m][3]);
  }
  __syncthreads();
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    uint32_t fa[4], fb[4];
    if (q <= w) {
      corner.left(fa, square, kNarrow, 16 * w, 16 * q);
#pragma unroll
      for (int m = 0; m < kPairs; ++m) {
        corner.right_transposed(fb, b_tile, kPitch<N>, first + 16 * m, 16 * q);
        mma_pair(dC[2 * m], dC[2 * m + 1], fa, fb);
      }
    }
    if (q >= w) {
      corner.left_transposed(fa, square, kNarrow, 16 * w, 16 * q);
#pragma unroll
      for (int m = 0; m < kPairs; ++m) {
        corner.right_transposed(fb, c_tile, kPitch<N>, first + 16 * m, 16 * q);
        mma_pair(dB[2 * m], dB[2 * m + 1], fa, fb);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kPairs; ++m) {
    store_block(grad.dB.at(b, t0, group), grad.dB.row, 16 * w, rows, first + 16 * m, n, dB[2 * m], dB[2 * m + 1]);
    store_block(grad.dC.at(b, t0, group), grad.dC.row, 16 * w, rows, first + 16 * m, n, dC[2 * m], dC[2 * m + 1]);
  }
}

}  // namespace

void backward(SsdGrad& grad, const Tensor& dy, const Tensor& dfinal, const SsdInput& in) {
  const Prepared prepared(in);
  const Sizes& d = prepared.d;
  const Tensor states = prepared.states(in.x, in.B, in.initial_state, {}, false);
  const Tensor dstates = prepared.states(dy, in.C, dfinal, grad.dinitial_state, true);
  const Tensor partial_D = in.D.defined() ? empty({d.b * d.chunks, d.heads, d.p}, DType::f32, in.x.device()) : Tensor();
  const Grads out{Rows<bf16>(grad.dx), Rows<bf16>(grad.dB), Rows<bf16>(grad.dC), grad.da.data<float>(),
                  pointer_or_null<float>(grad.ddt), pointer_or_null<float>(partial_D)};
  const Inputs from{Rows<const bf16>(dy), Rows<const bf16>(in.x), Rows<const bf16>(in.B), Rows<const bf16>(in.C),
                    prepared.products.data<bf16>(), states.data<bf16>(), dstates.data<bf16>(),
                    prepared.decays.data<float>(), pointer_or_null<float>(in.D), d};
  const auto run = [&]<int N>() {
    constexpr int64_t values = 2 * kWide<N> + kSquare + 4 * (kSquare + kWide<N> + kDecays);
    launch(chunk_kernel<N>,
           {.grid = d.b * d.chunks * d.g, .block = kThreads, .shared = values * int64_t{sizeof(bf16)},
            .stream = current_stream(in.x.device())},
           out, from);
  };
  if (prepared.width() == 64)
    run.operator()<64>();
  else
    run.operator()<128>();
  if (in.D.defined()) copy_(grad.dD, kernels::sum(partial_D, {0}));
}

}  // namespace krait::kernels::cuda::ssd::mma64
