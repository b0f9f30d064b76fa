// Backward of the state-space chunks in bf16 (ssd_mma.cuh, kernels/ssd.h). The states before and the gradients after
// every chunk are made by two walks along the sequence and kept in bf16; then a block takes a chunk and goes through the
// heads of a group in order, with dB, dC and the sum of Gamma over the heads in registers: no atomics, no partial sums
// of dB and dC in memory, and the products of Gamma with B and C are made once for all heads.
//
// Counted as in ssd_mma.cu: 25.8 GFLOP for each of the two walks; then 8.1 GFLOP each for Gamma and U inside chunks and
// 77 GFLOP through the states. Memory: the walks read x, dy and write states, 1.2 GB; the last kernel reads x, dy and
// both states and writes dx, 1.4 GB: 0.9 ms at 3 TB/s, which bounds it (ldmatrix: 80 per warp, chunk and head, 0.3 ms).
#include "kernels/cuda/ssd_mma.cuh"
#include "kernels/reduce.h"

namespace krait::kernels::cuda::ssd::mma64 {

namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr uint32_t kOne = 0x3F80, kOnes = 0x3F803F80;  // 1 in bf16, once and twice

// What the warps leave of a head for the one that puts it together. half: of the columns, w: 16 rows.
struct Parts {
  float W[4][kRows];             // sums over the rows i >= r of w of sum_{j < r} W_ij, j and r in the same half
  float left[kRows];             // of rows from 32 on: sum_{j < 32} W_ij
  float in[2][kRows];            // e^{s_i} dy_i . h_in C_i
  float out[2][kRows];           // e^{s_q - s_j} dt_j x_j . dh_out B_j
  float step[2][kRows];          // U_j . x_j
  float skip[4][kRows];          // sum_j dy_j x_j
  float dot[8];                  // e^{s_q} <dh_out, h_in>
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

// Sums each of eight values over the lanes of the same t; lane (g, t) gets the sum of value g.
__device__ inline float sum_of_g(float (&v)[8]) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int size = 4; size > 0; size /= 2) {
    const bool upper = g & size;
#pragma unroll
    for (int k = 0; k < size; ++k) {
      const float other = __shfl_xor_sync(kAll, upper ? v[k] : v[k + size], 4 * size);
      v[k] = (upper ? v[k + size] : v[k]) + other;
    }
  }
  return v[0];
}

// da_r = sum_{i >= r > j} W_ij + sum_{i >= r} in_i + sum_{j < r} out_j + e^{s_q} <dh_out, h_in>, ddt and dD of one head,
// by one warp; a lane has positions 2 lane and 2 lane + 1.
__device__ inline void put_together(const Parts& parts, const Grads& grad, const Sizes& d, int64_t b, int64_t c, int64_t h) {
  const int lane = threadIdx.x % 32, r = 2 * lane, valid = d.valid(c);
  float own[2] = {0, 0}, in[2], left[2], out[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    for (int w = r / 16; w < 4; ++w) own[e] += parts.W[w][r + e];
    in[e] = parts.in[0][r + e] + parts.in[1][r + e];
    left[e] = lane < 16 ? 0.0f : parts.left[r + e];
    out[e] = parts.out[0][r + e] + parts.out[1][r + e];
  }
  float dot = 0;
  for (int w = 0; w < 8; ++w) dot += parts.dot[w];
  float in_after = in[0] + in[1], left_after = left[0] + left[1], out_before = out[0] + out[1];
  for (int offset = 1; offset < 32; offset *= 2) {
    const float i = __shfl_down_sync(kAll, in_after, offset), k = __shfl_down_sync(kAll, left_after, offset);
    const float o = __shfl_up_sync(kAll, out_before, offset);
    if (lane + offset < 32) {
      in_after += i;
      left_after += k;
    }
    if (lane >= offset) out_before += o;
  }
  const float later_in = __shfl_down_sync(kAll, in_after, 1), later_left = __shfl_down_sync(kAll, left_after, 1);
  const float earlier = __shfl_up_sync(kAll, out_before, 1);
  const float in1 = in[1] + (lane < 31 ? later_in : 0.0f), left1 = left[1] + (lane < 31 ? later_left : 0.0f);
  const float out0 = lane > 0 ? earlier : 0.0f;
  const float da[2] = {own[0] + in[0] + in1 + (lane < 16 ? 0.0f : left[0] + left1) + out0 + dot,
                       own[1] + in1 + (lane < 16 ? 0.0f : left1) + out0 + out[0] + dot};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (r + e < valid) {
      const int64_t at = (b * d.l + c * kRows + r + e) * d.heads + h;
      grad.da[at] = da[e];
      if (grad.ddt != nullptr) grad.ddt[at] = parts.step[0][r + e] + parts.step[1][r + e];
    }
    if (grad.dD != nullptr && r + e < d.p)
      grad.dD[d.unit(b, c, h) * d.p + r + e] =
          (parts.skip[0][r + e] + parts.skip[1][r + e]) + (parts.skip[2][r + e] + parts.skip[3][r + e]);
  }
}

// Eight warps: w = 16 rows (positions), half = which half of the columns (of positions, channels or states).
template <int N>
__global__ void __launch_bounds__(256, 1) chunk_kernel(const Grads grad, const Inputs in) {
  constexpr int kStage = 2 * (kSquare + kWide<N> + kDecays);
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Parts all_parts[2];
  bf16 *const b_tile = reinterpret_cast<bf16*>(shared), *const c_tile = b_tile + kWide<N>;
  bf16 *const square = c_tile + kWide<N>, *const stages = square + kSquare;
  const Sizes& d = in.d;
  const int64_t group = blockIdx.x % d.g, c = blockIdx.x / d.g % d.chunks, b = blockIdx.x / d.g / d.chunks;
  const int64_t t0 = c * kRows, h0 = group * d.group;
  const int heads = static_cast<int>(d.group), rows = d.valid(c), p = static_cast<int>(d.p), n = static_cast<int>(d.n);
  const int tid = threadIdx.x, warp = tid / 32, w = warp % 4, half = warp / 4, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int i = 16 * w + g;  // the lane's rows are i and i + 8

  const auto fetch_head = [&](int k) {
    if (k < heads) {
      bf16* to = stages + k % 2 * kStage;
      fetch<kRows>(to, in.x.at(b, t0, h0 + k), in.x.row, rows, p, tid, 256);
      fetch<kRows>(to + kSquare, in.dy.at(b, t0, h0 + k), in.dy.row, rows, p, tid, 256);
      const int64_t unit = d.unit(b, c, h0 + k);
      fetch<N>(to + 2 * kSquare, in.states + unit * (kRows * N), N, kRows, N, tid, 256);
      fetch<N>(to + 2 * kSquare + kWide<N>, in.dstates + unit * (kRows * N), N, kRows, N, tid, 256);
      fetch_line(reinterpret_cast<float*>(to + 2 * kSquare + 2 * kWide<N>), in.decays + unit * kDecays, kDecays, tid, 256);
    }
    copy_commit();
  };
  fetch<N>(b_tile, in.B.at(b, t0, group), in.B.row, rows, n, tid, 256);
  fetch<N>(c_tile, in.C.at(b, t0, group), in.C.row, rows, n, tid, 256);
  fetch_head(0);

  const Corner corner;
  uint4 product[2];
#pragma unroll
  for (int q = 0; q < 2; ++q)
    product[q] = 2 * half + q <= w ? *reinterpret_cast<const uint4*>(in.products + (d.product(b, c, group) * 4 + w) * 1024 +
                                                                     (2 * half + q) * 256 + lane * 8)
                                   : make_uint4(0, 0, 0, 0);
  const uint32_t below = (2 * t < g ? kOne : 0u) | (2 * t + 1 < g ? kOne << 16 : 0u);  // [j < r] of an 8 x 8 tile
  float gamma_sum[2][2][4] = {}, dB[N / 64][4][4] = {}, dC[N / 64][4][4] = {};

  for (int k = 0; k < heads; ++k) {
    copy_wait<0>();
    __syncthreads();
    fetch_head(k + 1);
    if (k > 0 && warp == k % 8) put_together(all_parts[(k - 1) % 2], grad, d, b, c, h0 + k - 1);
    Parts& parts = all_parts[k % 2];
    const bf16 *x = stages + k % 2 * kStage, *dy = x + kSquare, *state = dy + kSquare, *dstate = state + kWide<N>;
    const Decay decay(reinterpret_cast<const float*>(dstate + kWide<N>));

    uint32_t own_dy[4][4];
#pragma unroll
    for (int q = 0; q < 4; ++q) corner.left(own_dy[q], dy, kNarrow, 16 * w, 16 * q);

    // Gamma_ij = (dy_i . x_j) M_ij dt_j for the columns of this half, W_ij = Gamma_ij (C_i . B_j), and M_ij (C_i . B_j)
    // into `square`.
    float row_sums[4] = {};
    const float s0 = decay.s[i], s1 = decay.s[i + 8];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int j0 = 32 * half + 16 * v;
      if (j0 > 16 * w) break;
      float gamma[2][4] = {};
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        uint32_t fb[4];
        corner.right(fb, x, kNarrow, j0, 16 * q);
        mma_pair(gamma[0], gamma[1], own_dy[q], fb);
      }
      const uint32_t words[4] = {product[v].x, product[v].y, product[v].z, product[v].w};
      uint32_t W[4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int j = j0 + 8 * m + 2 * t;
        const float2 s = pair(decay.s + j), dt = pair(decay.dt + j);
        const bool under = j0 < 16 * w;
        const float mask[4] = {under || j <= i ? exp2_of(s0 - s.x) : 0.0f, under || j < i ? exp2_of(s0 - s.y) : 0.0f,
                               under || j <= i + 8 ? exp2_of(s1 - s.x) : 0.0f,
                               under || j < i + 8 ? exp2_of(s1 - s.y) : 0.0f};
        const float of[4] = {low(words[2 * m]), high(words[2 * m]), low(words[2 * m + 1]), high(words[2 * m + 1])};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          gamma[m][e] *= mask[e] * (e % 2 == 0 ? dt.x : dt.y);
          gamma_sum[v][m][e] += gamma[m][e];
        }
        W[2 * m] = pack(gamma[m][0] * of[0], gamma[m][1] * of[1]);
        W[2 * m + 1] = pack(gamma[m][2] * of[2], gamma[m][3] * of[3]);
        bf16* to = square + i * kNarrow + j;
        *reinterpret_cast<uint32_t*>(to) = pack(mask[0] * of[0], mask[1] * of[1]);
        *reinterpret_cast<uint32_t*>(to + 8 * kNarrow) = pack(mask[2] * of[2], mask[3] * of[3]);
      }
      // Sums over j < r of this half for r in this block of columns: a product with [j < r].
      float before[2][4];
#pragma unroll
      for (int e = 0; e < 4; ++e) before[0][e] = before[1][e] = row_sums[e];
      mma(before[0], W, below, 0);
      mma(before[1], W, kOnes, below);
      mma(row_sums, W, kOnes, kOnes);
      const bool under = j0 < 16 * w;  // every row of this warp is past every r
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool reached = under || g >= 2 * t + e;
        float first = (reached ? before[0][e] : 0.0f) + before[0][2 + e];
        float second = (under ? before[1][e] : 0.0f) + (reached ? before[1][2 + e] : 0.0f);
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
          first += __shfl_xor_sync(kAll, first, offset);
          second += __shfl_xor_sync(kAll, second, offset);
        }
        if (g == 0) {
          parts.W[w][j0 + 2 * t + e] = first;
          parts.W[w][j0 + 8 + 2 * t + e] = second;
        }
      }
    }
    if (half == 0 && w >= 2 && t == 0) {
      parts.left[i] = row_sums[0];
      parts.left[i + 8] = row_sums[2];
    }

    // e^{s_q} <dh_out, h_in>
    float dot = 0;
#pragma unroll
    for (int at = tid; at < kRows * N / 8; at += 256) {
      const int where = at / (N / 8) * kPitch<N> + at % (N / 8) * 8;
      const uint4 u = *reinterpret_cast<const uint4*>(state + where), v = *reinterpret_cast<const uint4*>(dstate + where);
      dot += low(u.x) * low(v.x) + high(u.x) * high(v.x) + low(u.y) * low(v.y) + high(u.y) * high(v.y) +
             low(u.z) * low(v.z) + high(u.z) * high(v.z) + low(u.w) * low(v.w) + high(u.w) * high(v.w);
    }
    for (int offset = 16; offset > 0; offset /= 2) dot += __shfl_xor_sync(kAll, dot, offset);
    if (lane == 0) parts.dot[warp] = dot * decay.total();

    // dC_i += e^{s_i} dy_i h_in
    const float in0 = decay.in[i], in1 = decay.in[i + 8];
    float carried[2] = {0, 0};
#pragma unroll
    for (int m = 0; m < N / 32; ++m) {
      const int column = half * (N / 2) + 16 * m;
      float part[2][4] = {};
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        uint32_t fb[4];
        corner.right_transposed(fb, state, kPitch<N>, column, 16 * q);
        mma_pair(part[0], part[1], own_dy[q], fb);
      }
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const bf16* own_c = c_tile + i * kPitch<N> + column + 8 * o + 2 * t;
        const uint32_t top = word(own_c), bottom = word(own_c + 8 * kPitch<N>);
        carried[0] += part[o][0] * low(top) + part[o][1] * high(top);
        carried[1] += part[o][2] * low(bottom) + part[o][3] * high(bottom);
        float(&sum)[4] = dC[m / 2][m % 2 * 2 + o];
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += part[o][e] * (e < 2 ? in0 : in1);
      }
    }
    carried[0] = quad_sum(carried[0]) * in0;
    carried[1] = quad_sum(carried[1]) * in1;
    if (t == 0) {
      parts.in[half][i] = carried[0];
      parts.in[half][i + 8] = carried[1];
    }

    // dB_j += e^{s_q - s_j} dt_j x_j dh_out
    {
      uint32_t own_x[4][4];
#pragma unroll
      for (int q = 0; q < 4; ++q) corner.left(own_x[q], x, kNarrow, 16 * w, 16 * q);
      const float out0 = decay.out[i], out1 = decay.out[i + 8];
#pragma unroll
      for (int m = 0; m < N / 32; ++m) {
        float part[2][4] = {};
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          uint32_t fb[4];
          corner.right_transposed(fb, dstate, kPitch<N>, half * (N / 2) + 16 * m, 16 * q);
          mma_pair(part[0], part[1], own_x[q], fb);
        }
#pragma unroll
        for (int o = 0; o < 2; ++o)
#pragma unroll
          for (int e = 0; e < 4; ++e) dB[m / 2][m % 2 * 2 + o][e] += part[o][e] * (e < 2 ? out0 : out1);
      }
    }

    // U_j = e^{s_q - s_j} dh_out B_j + sum_i M_ij (C_i . B_j) dy_i for the channels of this half.
    float u[4][4] = {};
#pragma unroll
    for (int q = 0; q < N; q += 16) {
      uint32_t fa[4], fb[4];
      corner.left(fa, b_tile, kPitch<N>, 16 * w, q);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        corner.right(fb, dstate, kPitch<N>, 32 * half + 16 * m, q);
        mma_pair(u[2 * m], u[2 * m + 1], fa, fb);
      }
    }
    const float end = decay.s[kRows - 1], out0 = exp2_of(end - s0), out1 = exp2_of(end - s1);
    const float dt0 = decay.dt[i], dt1 = decay.dt[i + 8];
    float through[2] = {0, 0};
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const bf16* own = x + i * kNarrow + 32 * half + 8 * m + 2 * t;
      const uint32_t top = word(own), bottom = word(own + 8 * kNarrow);
      u[m][0] *= out0;
      u[m][1] *= out0;
      u[m][2] *= out1;
      u[m][3] *= out1;
      through[0] += u[m][0] * low(top) + u[m][1] * high(top);
      through[1] += u[m][2] * low(bottom) + u[m][3] * high(bottom);
    }
    __syncthreads();  // `square` is whole
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (q < w) continue;
      uint32_t fa[4], fb[4];
      corner.left_transposed(fa, square, kNarrow, 16 * w, 16 * q);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        corner.right_transposed(fb, dy, kNarrow, 32 * half + 16 * m, 16 * q);
        mma_pair(u[2 * m], u[2 * m + 1], fa, fb);
      }
    }
    float step[2] = {0, 0}, skip[8];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int where = i * kNarrow + 32 * half + 8 * m + 2 * t;
      const uint32_t top = word(x + where), bottom = word(x + where + 8 * kNarrow);
      step[0] += u[m][0] * low(top) + u[m][1] * high(top);
      step[1] += u[m][2] * low(bottom) + u[m][3] * high(bottom);
      u[m][0] *= dt0;
      u[m][1] *= dt0;
      u[m][2] *= dt1;
      u[m][3] *= dt1;
      if (in.D == nullptr) continue;
      const uint32_t up = word(dy + where), down = word(dy + where + 8 * kNarrow);
      const int channel = 32 * half + 8 * m + 2 * t;  // p is a multiple of 8
      const float2 D = channel < p ? __ldg(reinterpret_cast<const float2*>(in.D + (h0 + k) * d.p + channel)) : make_float2(0, 0);
      u[m][0] += D.x * low(up);
      u[m][1] += D.y * high(up);
      u[m][2] += D.x * low(down);
      u[m][3] += D.y * high(down);
      skip[2 * m] = low(up) * low(top) + low(down) * low(bottom);
      skip[2 * m + 1] = high(up) * high(top) + high(down) * high(bottom);
    }
    store_tiles(grad.dx.at(b, t0, h0 + k), grad.dx.row, 16 * w, rows, 32 * half, p, u);
    if (in.D != nullptr) {
      const float sum = sum_of_g(skip);
      parts.skip[w][32 * half + g / 2 * 8 + 2 * t + g % 2] = sum;
    }
    through[0] = quad_sum(through[0]) * dt0;
    through[1] = quad_sum(through[1]) * dt1;
    step[0] = quad_sum(step[0]);
    step[1] = quad_sum(step[1]);
    if (t == 0) {
      parts.out[half][i] = through[0];
      parts.out[half][i + 8] = through[1];
      parts.step[half][i] = step[0];
      parts.step[half][i + 8] = step[1];
    }
  }
  __syncthreads();
  if (warp == 0) put_together(all_parts[(heads - 1) % 2], grad, d, b, c, h0 + heads - 1);

  // + sum over the heads of Gamma_ij B_j, and of Gamma_ij C_i.
#pragma unroll
  for (int v = 0; v < 2; ++v)
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      bf16* to = square + i * kNarrow + 32 * half + 16 * v + 8 * m + 2 * t;
      *reinterpret_cast<uint32_t*>(to) = pack(gamma_sum[v][m][0], gamma_sum[v][m][1]);
      *reinterpret_cast<uint32_t*>(to + 8 * kNarrow) = pack(gamma_sum[v][m][2], gamma_sum[v][m][3]);
    }
  __syncthreads();
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    uint32_t fa[4], fb[4];
    if (q <= w) {
      corner.left(fa, square, kNarrow, 16 * w, 16 * q);
#pragma unroll
      for (int m = 0; m < N / 32; ++m) {
        corner.right_transposed(fb, b_tile, kPitch<N>, half * (N / 2) + 16 * m, 16 * q);
        mma_pair(dC[m / 2][m % 2 * 2], dC[m / 2][m % 2 * 2 + 1], fa, fb);
      }
    }
    if (q >= w) {
      corner.left_transposed(fa, square, kNarrow, 16 * w, 16 * q);
#pragma unroll
      for (int m = 0; m < N / 32; ++m) {
        corner.right_transposed(fb, c_tile, kPitch<N>, half * (N / 2) + 16 * m, 16 * q);
        mma_pair(dB[m / 2][m % 2 * 2], dB[m / 2][m % 2 * 2 + 1], fa, fb);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < N / 64; ++m) {
    store_tiles(grad.dB.at(b, t0, group), grad.dB.row, 16 * w, rows, half * (N / 2) + 32 * m, n, dB[m]);
    store_tiles(grad.dC.at(b, t0, group), grad.dC.row, 16 * w, rows, half * (N / 2) + 32 * m, n, dC[m]);
  }
}

template <class T>
T* data_or_null(const Tensor& t) {
  return t.defined() ? t.data<T>() : nullptr;
}

}  // namespace

void backward(SsdGrad& grad, const Tensor& dy, const Tensor& dfinal, const SsdInput& in) {
  const Prepared prepared(in);
  const Sizes& d = prepared.d;
  const Tensor states = prepared.states(in.x, in.B, in.initial_state, {}, false);
  const Tensor dstates = prepared.states(dy, in.C, dfinal, grad.dinitial_state, true);
  const Tensor partial_D = in.D.defined() ? empty({d.b * d.chunks, d.heads, d.p}, DType::f32, in.x.device()) : Tensor();
  const Grads out{Rows<bf16>(grad.dx), Rows<bf16>(grad.dB), Rows<bf16>(grad.dC), grad.da.data<float>(),
                  data_or_null<float>(grad.ddt), data_or_null<float>(partial_D)};
  const Inputs from{Rows<const bf16>(dy), Rows<const bf16>(in.x), Rows<const bf16>(in.B), Rows<const bf16>(in.C),
                    prepared.products.data<bf16>(), states.data<bf16>(), dstates.data<bf16>(),
                    prepared.decays.data<float>(), data_or_null<float>(in.D), d};
  const auto run = [&]<int N>() {
    constexpr int64_t values = 2 * kWide<N> + kSquare + 4 * (kSquare + kWide<N> + kDecays);
    launch(chunk_kernel<N>,
           {.grid = d.b * d.chunks * d.g, .block = 256, .shared = values * int64_t{sizeof(bf16)},
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
