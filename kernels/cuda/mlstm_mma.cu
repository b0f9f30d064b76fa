// mLSTM in bf16 on tensor cores: blocks of 8 warps, 4 rows of 2, over tiles of 128 rows. Sums, gates and n are fp32; the
// states between chunks are summed in fp32 and handed over in bf16, as are the coefficients of a chunk (once made, used
// by every tile of a result, in the backward by two results). All operands come through three stages of shared memory,
// 64 of the summed dimension each.
// Bound by memory: the states are written once and read once for each result, dq dv 2 / 128 bytes a position.
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/mlstm_common.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 256, kStages = 3, kSlice = 64;
constexpr int kRows = kMmaChunk;

/// Where 8 columns from `column` on (a multiple of 8) of a row of a tile D wide lie. Pieces of 16 bytes are swapped
/// within the row so that those of 8 rows are in different banks.
template <int D>
__device__ inline int place(int row, int column) {
  return row * D + (column / 8 ^ (row & 7)) * 8;
}

/// Rows [0, N) and columns [0, D) from `from` on into shared memory; zeros for rows from `rows` and columns from
/// `columns` (a multiple of 8) on.
template <int N, int D>
__device__ inline void load_part(bf16* to, const bf16* from, int64_t row, int rows, int columns) {
  constexpr int kPieces = D / 8;
  if constexpr (kThreads % kPieces == 0) {  // a thread stays in its column, and in its place within 8 rows
    constexpr int kStep = kThreads / kPieces;
    static_assert(kStep % 8 == 0 && N % kStep == 0);
    const int r = static_cast<int>(threadIdx.x) / kPieces, c = static_cast<int>(threadIdx.x) % kPieces * 8;
    const uint32_t target = shared_address(to + place<D>(r, c));
    const bf16* source = from + r * row + c;
    const int valid = c < columns ? rows - r : 0;
#pragma unroll
    for (int i = 0; i < N / kStep; ++i) {
      copy_async(target + i * kStep * D * 2, source, i * kStep < valid);
      source += kStep * row;
    }
  } else {
#pragma unroll 2
    for (int i = 0; i < N * kPieces / kThreads; ++i) {
      const int at = i * kThreads + static_cast<int>(threadIdx.x), r = at / kPieces, c = at % kPieces * 8;
      copy_async(to + place<D>(r, c), from + r * row + c, r < rows && c < columns);
    }
  }
}

__device__ inline void copy_async_float(float* to, const float* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}

/// Two neighbouring values times their weights.
__device__ inline uint32_t weighted(uint32_t two, float low, float high) {
  return pack(__uint_as_float(two << 16) * low, __uint_as_float(two & 0xffff0000u) * high);
}
/// Products of neighbouring values, summed.
__device__ inline float dot_of_two(uint32_t a, uint32_t b) {
  return __uint_as_float(a << 16) * __uint_as_float(b << 16) +
         __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
}

/// acc (16 MT, 16 NT) += A B over kSlice. A: rows from `row` on of a tile (rows, DA), or with kTurnA columns of a tile
/// (summed, DA). B: columns from `column` on of a tile (summed, DB), or with kTurnB rows of a tile (columns, DB).
/// weights (kSlice): factors of the summed dimension, or null.
template <int MT, int NT, int DA, bool kTurnA, int DB, bool kTurnB>
__device__ inline void multiply(float (&acc)[MT][2 * NT][4], const bf16* a, int row, const bf16* b, int column,
                                const float* weights = nullptr) {
  const int lane = static_cast<int>(threadIdx.x) % 32, m = lane / 8, r = lane % 8;
#pragma unroll
  for (int x = 0; x < kSlice; x += 16) {
    uint32_t fa[MT][4];
    float w[4] = {};
    if (weights)
#pragma unroll
      for (int e = 0; e < 4; ++e) w[e] = weights[x + 2 * (lane % 4) + e % 2 + e / 2 * 8];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      if constexpr (kTurnA)
        load_matrices_transposed(fa[i], a + place<DA>(x + m / 2 * 8 + r, row + i * 16 + m % 2 * 8));
      else
        load_matrices(fa[i], a + place<DA>(row + i * 16 + m % 2 * 8 + r, x + m / 2 * 8));
      if (weights) {
        fa[i][0] = weighted(fa[i][0], w[0], w[1]);
        fa[i][1] = weighted(fa[i][1], w[0], w[1]);
        fa[i][2] = weighted(fa[i][2], w[2], w[3]);
        fa[i][3] = weighted(fa[i][3], w[2], w[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      uint32_t fb[4];
      if constexpr (kTurnB)
        load_matrices(fb, b + place<DB>(column + n * 16 + m / 2 * 8 + r, x + m % 2 * 8));
      else
        load_matrices_transposed(fb, b + place<DB>(x + m % 2 * 8 + r, column + n * 16 + m / 2 * 8));
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        mma(acc[i][2 * n], fa[i], fb[0], fb[1]);
        mma(acc[i][2 * n + 1], fa[i], fb[2], fb[3]);
      }
    }
  }
}

/// Of two neighbouring tiles of 8 columns (a lane's two columns of a row in each): 4 columns of the first in even lanes,
/// of the second in odd ones, from columns_of(lane) on.
__device__ inline uint2 exchanged(const float (&first)[4], const float (&second)[4], int half) {
  const uint32_t low = pack(first[2 * half], first[2 * half + 1]), high = pack(second[2 * half], second[2 * half + 1]);
  const bool odd = threadIdx.x % 2 != 0;
  const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
  return odd ? uint2{other, high} : uint2{low, other};
}
__device__ inline int exchanged_column() {
  const int t = static_cast<int>(threadIdx.x) % 4;
  return t % 2 * 8 + t / 2 * 4;
}

/// Sum over the four lanes that share a row.
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Shared memory of a block that carries T x T of a state.
template <int T>
struct StateLayout {
  static constexpr int kTile = kSlice * T * 2;                    // of a or b, in bytes
  static constexpr int kOther = kStages * 2 * kTile;              // where the forward state comes, for `flow`
  static constexpr int kGroups = 2 * kThreads / T;                // threads that share two columns of n
  static constexpr int kFloats = (2 * kStages * kSlice + kGroups * T) * 4;
  static int64_t bytes(bool flow) { return kOther + kFloats + (flow ? T * T * 2 : 0); }
};

// T x T of a state, carried through all chunks.
template <int T>
__global__ void __launch_bounds__(kThreads, T == 192 ? 1 : 2) states_kernel(MlstmStateJob<bf16> job) {
  using Layout = StateLayout<T>;
  constexpr int kTile = kSlice * T, MT = T / 64, NT = T / 16, kHalves = kMmaChunk / kSlice;
  extern __shared__ __align__(128) unsigned char shared[];
  bf16* const shared_rows = reinterpret_cast<bf16*>(shared);  // (a, b) of each stage
  float* const s_wc = reinterpret_cast<float*>(shared + Layout::kOther);
  float *const s_wn = s_wc + kStages * kSlice, *const s_n = s_wn + kStages * kSlice;  // s_n (groups, T): parts of n
  bf16* const s_other = reinterpret_cast<bf16*>(shared + Layout::kOther + Layout::kFloats);
  const MlstmShape& s = job.shape;
  const int64_t unit = blockIdx.x / job.tiles, tile = blockIdx.x % job.tiles;
  const int64_t v_tiles = (s.dv + T - 1) / T, b = unit / s.heads, h = unit % s.heads;
  const int a0 = static_cast<int>(tile / v_tiles) * T, b0 = static_cast<int>(tile % v_tiles) * T;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int row0 = warp / 2 * (T / 4), column0 = warp % 2 * (T / 2);  // of the warp
  const int own = static_cast<int>(threadIdx.x), na = a0 + own;
  const bool has_n = b0 == 0 && own < T && na < s.dq;
  // Of n: two columns of every kGroups-th position.
  const int pair = own % (T / 2) * 2, part = own / (T / 2);
  const bool sums_n = b0 == 0 && part < Layout::kGroups;
  const int64_t size = int64_t{s.dq} * s.dv, slices = s.chunks * kHalves;

  const auto chunk_of = [&](int64_t step) { return job.reverse ? s.chunks - 1 - step : step; };
  const auto load = [&](int64_t i) {
    if (i < slices) {
      const int stage = static_cast<int>(i % kStages);
      const int64_t t0 = chunk_of(i / kHalves) * kMmaChunk + i % kHalves * kSlice;
      const int rows = static_cast<int>(max(int64_t{0}, min(int64_t{kSlice}, s.l - t0)));
      bf16* to = shared_rows + stage * 2 * kTile;
      load_part<kSlice, T>(to, job.a.at(b, t0, h) + a0, job.a.row, rows, s.dq - a0);
      load_part<kSlice, T>(to + kTile, job.b.at(b, t0, h) + b0, job.b.row, rows, s.dv - b0);
      if (threadIdx.x < 2 * kSlice) {
        const int j = static_cast<int>(threadIdx.x) % kSlice;
        const bool first = threadIdx.x < kSlice, valid = j < rows;
        const float* from = first ? job.wc : job.wn;
        copy_async_float((first ? s_wc : s_wn) + stage * kSlice + j, valid ? from + unit * s.l + t0 + j : from, valid);
      }
    }
  };
  for (int i = 0; i < kStages - 1; ++i) {
    load(i);
    copy_commit();
  }

  float c[MT][2 * (NT / 2)][4] = {}, n[2] = {0, 0};
  // f(two values, their place) for the thread's values inside the state.
  const auto each_pair = [&](auto&& f) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int y = 0; y < NT; ++y)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = a0 + row0 + i * 16 + g + 8 * half, column = b0 + column0 + y * 8 + 2 * t;
          if (row < s.dq && column < s.dv) f(&c[i][y][2 * half], unit * size + int64_t{row} * s.dv + column);
        }
  };
  if (job.c_begin)
    each_pair([&](float* two, int64_t cell) {
      two[0] = job.c_begin[cell];
      two[1] = job.c_begin[cell + 1];
    });
  if (job.n_begin && sums_n && part == 0 && a0 + pair < s.dq) {
    n[0] = job.n_begin[unit * s.dq + a0 + pair];
    n[1] = job.n_begin[unit * s.dq + a0 + pair + 1];
  }
  const auto share_n = [&] {
    if (sums_n) *reinterpret_cast<float2*>(s_n + part * T + pair) = make_float2(n[0], n[1]);
  };
  const auto whole_n = [&] {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < Layout::kGroups; ++k) sum += s_n[k * T + own];
    return sum;
  };

  // Writes the state, and the warp's part of <dC, C> + <dn, n>, from the rounded values: nothing comes from behind the
  // sequence without a gradient of the last state.
  const auto hand_over = [&](int64_t x) {
    const int64_t at = unit * s.chunks + x;
    const bool inner = x + 1 < s.chunks;
    float flow = 0;
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int y = 0; y < NT; y += 2) {
          const uint2 four = exchanged(c[i][y], c[i][y + 1], half);
          const int r = row0 + i * 16 + g + 8 * half, k = column0 + y * 8 + exchanged_column();
          if (a0 + r >= s.dq || b0 + k >= s.dv) continue;
          const int64_t cell = int64_t{a0 + r} * s.dv + b0 + k;
          *reinterpret_cast<uint2*>(job.states + at * size + cell) = four;
          if (!job.flow) continue;
          if (inner) {
            const uint2 other = *reinterpret_cast<const uint2*>(s_other + place<T>(r, k / 8 * 8) + k % 8);
            flow += dot_of_two(four.x, other.x) + dot_of_two(four.y, other.y);
          } else if (job.c_begin) {
            const float* other = job.c_last + unit * size + cell;
            flow += dot_of_two(four.x, pack(other[0], other[1])) + dot_of_two(four.y, pack(other[2], other[3]));
          }
        }
    if (has_n) {
      const float value = whole_n();
      job.n_states[at * s.dq + na] = value;
      if (job.flow) flow += value * (inner ? job.forward_n[(at + 1) * s.dq + na] : job.n_last[unit * s.dq + na]);
    }
    if (!job.flow) return;
    for (int w = 16; w > 0; w /= 2) flow += __shfl_xor_sync(0xffffffffu, flow, w);
    if (lane == 0) job.flow[(at * job.tiles + tile) * (kThreads / 32) + warp] = flow;
  };

  for (int64_t i = 0; i < slices; ++i) {
    const bool begins = i % kHalves == 0;
    if (begins) share_n();
    if (begins && job.flow)
      copy_wait<0>();  // the forward state came with the latest slice
    else
      copy_wait<kStages - 2>();
    __syncthreads();  // the stage is here, and the one before is free
    load(i + kStages - 1);
    if (i % kHalves == kHalves - 1 && job.flow && i + 1 < slices)  // behind the next chunk: before this one
      load_part<T, T>(s_other, job.forward_states + (unit * s.chunks + chunk_of(i / kHalves)) * size + int64_t{a0} * s.dv + b0,
                      s.dv, s.dq - a0, s.dv - b0);
    copy_commit();
    if (begins) {
      const int64_t x = chunk_of(i / kHalves);
      hand_over(x);
      const float decay = job.decay[unit * s.chunks + x];
      n[0] *= decay;
      n[1] *= decay;
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int y = 0; y < NT; ++y)
#pragma unroll
          for (int e = 0; e < 4; ++e) c[m][y][e] *= decay;
    }
    const int stage = static_cast<int>(i % kStages);
    const bf16* ta = shared_rows + stage * 2 * kTile;
    multiply<MT, NT / 2, T, true, T, false>(c, ta, row0, ta + kTile, column0, s_wc + stage * kSlice);
    if (sums_n)
#pragma unroll 8
      for (int k = 0; k < kSlice / Layout::kGroups; ++k) {
        const int j = k * Layout::kGroups + part;
        const uint32_t two = *reinterpret_cast<const uint32_t*>(ta + place<T>(j, pair / 8 * 8) + pair % 8);
        const float w = s_wn[stage * kSlice + j];
        n[0] += w * __uint_as_float(two << 16);
        n[1] += w * __uint_as_float(two & 0xffff0000u);
      }
  }
  if (job.c_end)
    each_pair([&](const float* two, int64_t cell) {
      job.c_end[cell] = two[0];
      job.c_end[cell + 1] = two[1];
    });
  if (!job.n_end) return;
  share_n();
  __syncthreads();
  if (has_n) job.n_end[unit * s.dq + na] = whole_n();
}

// The coefficients of a chunk: weight times q . k (read; dv, there over den) or times dh . v / den + dr (dq).
template <Mix M>
__global__ void __launch_bounds__(kThreads, 2) coefficients_kernel(MlstmMixJob<bf16> job) {
  constexpr int kTile = kRows * kSlice;
  extern __shared__ __align__(128) bf16 shared_rows[];  // (rows, columns) of each stage
  __shared__ float s_c[kRows], s_u[kRows], s_inverse[kRows], s_dr[kRows], s_sum[2][kRows];
  __shared__ int s_first[kRows];
  const MlstmShape& s = job.shape;
  const int64_t chunk = blockIdx.x, unit = chunk / s.chunks, t0 = chunk % s.chunks * kRows;
  const int n = static_cast<int>(min(int64_t{kRows}, s.l - t0)), depth = M == Mix::dq ? s.dv : s.dq;
  const int64_t b = unit / s.heads, h = unit % s.heads;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int row0 = warp / 2 * 32, column0 = warp % 2 * 64;
  // Positions are rows and keys columns.
  const Strided<const bf16>& rows = M == Mix::dv ? job.columns : job.rows;
  const Strided<const bf16>& columns = M == Mix::dv ? job.rows : job.columns;

  const int slices = (depth + kSlice - 1) / kSlice;
  const auto load = [&](int i) {
    if (i < slices) {
      bf16* to = shared_rows + i % kStages * 2 * kTile;
      const int d0 = i * kSlice;
      load_part<kRows, kSlice>(to, rows.at(b, t0, h) + d0, rows.row, n, depth - d0);
      load_part<kRows, kSlice>(to + kTile, columns.at(b, t0, h) + d0, columns.row, n, depth - d0);
    }
    copy_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) load(i);
  if (threadIdx.x < kRows) {
    const int i = static_cast<int>(threadIdx.x);
    const int64_t row = unit * s.l + t0 + i;
    const bool valid = i < n;
    s_c[i] = valid ? job.gates.c[row] : 0.0f;
    s_u[i] = valid ? job.gates.u[row] : 0.0f;
    s_first[i] = valid ? job.gates.first[row] : kRows;
    s_inverse[i] = valid && M != Mix::read ? job.gates.inverse[row] : 0.0f;
    s_dr[i] = valid && M == Mix::dq ? job.gates.dr[row] : 0.0f;
  }

  float acc[2][8][4] = {};
  [[maybe_unused]] float by_n[2][2] = {};  // q . n, half of it in either warp of a row
  for (int i = 0; i < slices; ++i) {
    copy_wait<kStages - 2>();
    __syncthreads();
    load(i + kStages - 1);
    const bf16* tile = shared_rows + i % kStages * 2 * kTile;
    if (column0 < row0 + 32) multiply<2, 4, kSlice, false, kSlice, true>(acc, tile, row0, tile + kTile, column0);
    if constexpr (M == Mix::read) {
      const int d = column0 / 2 + t * 8;
      if (i * kSlice + d >= depth) continue;
      const float* with = job.n_states + chunk * s.dq + i * kSlice + d;
      const float4 low = *reinterpret_cast<const float4*>(with), high = *reinterpret_cast<const float4*>(with + 4);
      const float nk[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bf16* q = tile + place<kSlice>(row0 + m * 16 + half * 8 + g, d);
#pragma unroll
          for (int e = 0; e < 8; ++e) by_n[m][half] += static_cast<float>(q[e]) * nk[e];
        }
    }
  }

#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + m * 16 + half * 8 + g;
      float sum = 0;
#pragma unroll
      for (int y = 0; y < 8; ++y)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& value = acc[m][y][2 * half + e];
          const int key = column0 + y * 8 + 2 * t + e;
          const float weight = row < n && key < n ? job.scale * seen_weight(s_c[key], s_u[row], s_first[row], key, row) : 0.0f;
          if constexpr (M == Mix::dq) value = s_inverse[row] * value + s_dr[row];
          if constexpr (M == Mix::dv) value *= s_inverse[row];
          value = weight == 0.0f ? 0.0f : weight * value;
          sum += value;
        }
      if constexpr (M == Mix::read) {
        const float inter = row < n ? job.gates.inter[unit * s.l + t0 + row] : 0.0f;
        sum = row_sum(sum + job.scale * inter * by_n[m][half]);
        if (t == 0) s_sum[warp % 2][row] = sum;
      }
    }
  if constexpr (M == Mix::read) {
    __syncthreads();
    if (threadIdx.x < kRows) {
      const int i = static_cast<int>(threadIdx.x);
      const int64_t row = unit * s.l + t0 + i;
      if (i < n) {
        const float r = s_sum[0][i] + s_sum[1][i], inverse = 1.0f / mlstm_denominator(r, job.m[row], job.eps);
        job.r[row] = r;
        job.gates.wc[row] = job.scale * job.gates.inter[row] * inverse;
        s_inverse[i] = inverse;
      }
    }
    __syncthreads();
  }
  bf16* out = job.coefficients + chunk * kRows * kRows;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + m * 16 + half * 8 + g;
#pragma unroll
      for (int y = 0; y < 8; y += 2) {
        if constexpr (M == Mix::read)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            acc[m][y][2 * half + e] *= s_inverse[row];
            acc[m][y + 1][2 * half + e] *= s_inverse[row];
          }
        *reinterpret_cast<uint2*>(out + row * kRows + column0 + y * 8 + exchanged_column()) =
            exchanged(acc[m][y], acc[m][y + 1], half);
      }
    }
}

// W columns of a chunk's result; see Mix.
template <Mix M, int W>
__global__ void __launch_bounds__(kThreads, 2) mix_kernel(MlstmMixJob<bf16> job) {
  constexpr int kA = kRows * kSlice, kStage = kA + kSlice * W, NT = W / 16;
  extern __shared__ __align__(128) bf16 shared_rows[];  // (rows, state) and then (coefficients, values) of each stage
  __shared__ float s_row[kRows], s_row_n[kRows], s_n[W];
  const MlstmShape& s = job.shape;
  const int64_t chunk = blockIdx.x / job.tiles, unit = chunk / s.chunks, t0 = chunk % s.chunks * kRows;
  const int w0 = static_cast<int>(blockIdx.x % job.tiles) * W, n = static_cast<int>(min(int64_t{kRows}, s.l - t0));
  const int64_t b = unit / s.heads, h = unit % s.heads;
  const int depth = is_turned(M) ? s.dv : s.dq, width = is_turned(M) ? s.dq : s.dv;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int row0 = warp / 2 * 32, column0 = warp % 2 * (W / 2);
  const bf16* state = job.states + chunk * s.dq * s.dv;
  const bf16* coefficients = job.coefficients + chunk * kRows * kRows;

  const int slices = (depth + kSlice - 1) / kSlice, all = slices + (n > kSlice ? 2 : 1);
  const auto load = [&](int i) {
    bf16* to = shared_rows + i % kStages * kStage;
    if (i < slices) {
      const int d0 = i * kSlice;
      load_part<kRows, kSlice>(to, job.rows.at(b, t0, h) + d0, job.rows.row, n, depth - d0);
      if constexpr (is_turned(M))
        load_part<W, kSlice>(to + kA, state + int64_t{w0} * s.dv + d0, s.dv, width - w0, depth - d0);
      else
        load_part<kSlice, W>(to + kA, state + int64_t{d0} * s.dv + w0, s.dv, depth - d0, width - w0);
    } else if (i < all) {
      const int j0 = (i - slices) * kSlice;
      if constexpr (rows_are_keys(M))
        load_part<kSlice, kRows>(to, coefficients + j0 * kRows, kRows, kSlice, kRows);
      else
        load_part<kRows, kSlice>(to, coefficients + j0, kRows, kRows, kSlice);
      load_part<kSlice, W>(to + kA, job.values.at(b, t0 + j0, h) + w0, job.values.row, n - j0, width - w0);
    }
    copy_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) load(i);

  if (threadIdx.x < kRows) {
    const int i = static_cast<int>(threadIdx.x);
    const int64_t row = unit * s.l + t0 + i;
    const bool valid = i < n;
    const float own = !valid ? 0.0f : rows_are_keys(M) ? job.gates.w[row] : job.gates.wc[row];  // weight of the state
    s_row[i] = own;
    s_row_n[i] = valid && M == Mix::dq ? job.gates.wn[row] : own;
  }
  if constexpr (is_turned(M))
    for (int c = static_cast<int>(threadIdx.x); c < W; c += kThreads)
      s_n[c] = w0 + c < width ? job.n_states[chunk * s.dq + w0 + c] : 0.0f;

  float acc[2][2 * (NT / 2)][4] = {};
  for (int i = 0; i < slices; ++i) {
    copy_wait<kStages - 2>();
    __syncthreads();
    load(i + kStages - 1);
    const bf16* tile = shared_rows + i % kStages * kStage;
    multiply<2, NT / 2, kSlice, false, is_turned(M) ? kSlice : W, is_turned(M)>(acc, tile, row0, tile + kA, column0);
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int y = 0; y < NT; ++y)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = row0 + m * 16 + e / 2 * 8 + g;
        acc[m][y][e] *= s_row[row];
        if constexpr (is_turned(M)) acc[m][y][e] += s_row_n[row] * s_n[column0 + y * 8 + 2 * t + e % 2];
      }
  for (int i = slices; i < all; ++i) {
    copy_wait<kStages - 2>();
    __syncthreads();
    load(i + kStages - 1);
    const bf16* tile = shared_rows + i % kStages * kStage;
    const int j0 = (i - slices) * kSlice;
    // Keys that no position of the warp sees, or positions that see no key of it.
    if (rows_are_keys(M) ? j0 + kSlice <= row0 : j0 >= row0 + 32) continue;
    multiply<2, NT / 2, rows_are_keys(M) ? kRows : kSlice, rows_are_keys(M), W, false>(acc, tile, row0, tile + kA, column0);
  }

#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + m * 16 + half * 8 + g;
      const int64_t at = ((b * s.l + t0 + row) * s.heads + h) * width + w0;
      [[maybe_unused]] float dot = 0;
      if constexpr (M == Mix::read)
#pragma unroll
        for (int y = 0; y < NT; ++y) {
          const int column = column0 + y * 8 + 2 * t;
          if (row < n && w0 + column < width)
            *reinterpret_cast<float2*>(job.h + at + column) = make_float2(acc[m][y][2 * half], acc[m][y][2 * half + 1]);
        }
      if constexpr (is_turned(M)) {
        uint32_t own[NT];
#pragma unroll
        for (int y = 0; y < NT; ++y) {
          const int column = w0 + column0 + y * 8 + 2 * t;
          own[y] = row < n && column < width ? *reinterpret_cast<const uint32_t*>(job.own.at(b, t0 + row, h) + column) : 0;
        }
#pragma unroll
        for (int y = 0; y < NT; ++y)
          dot += acc[m][y][2 * half] * __uint_as_float(own[y] << 16) +
                 acc[m][y][2 * half + 1] * __uint_as_float(own[y] & 0xffff0000u);
      }
      if constexpr (M != Mix::read)
#pragma unroll
        for (int y = 0; y < NT; y += 2) {
          const uint2 four = exchanged(acc[m][y], acc[m][y + 1], half);
          const int column = column0 + y * 8 + exchanged_column();
          if (row < n && w0 + column < width) *reinterpret_cast<uint2*>(job.out + at + column) = four;
        }
      if constexpr (is_turned(M)) {
        dot = row_sum(dot);
        if (t == 0 && row < n)
          job.dots[((unit * s.l + t0 + row) * job.tiles + w0 / W) * 2 + warp % 2] = dot;
      }
    }
}

template <Mix M>
void launch_mix(const MlstmMixJob<bf16>& job, Stream stream) {
  const int64_t width = is_turned(M) ? job.shape.dq : job.shape.dv;
  const auto with = [&]<int W>() {
    launch(mix_kernel<M, W>,
           {.grid = job.shape.units * job.shape.chunks * job.tiles, .block = kThreads,
            .shared = 2 * kStages * (kRows + W) * kSlice, .stream = stream},
           job);
  };
  if (mlstm_tile_width(job.shape, width) == 128)
    with.template operator()<128>();
  else
    with.template operator()<64>();
}

}  // namespace

bool mlstm_mma_serves(const Tensor& t) {
  if (t.dtype() != DType::bf16 || t.size(-1) % 8 != 0 || reinterpret_cast<uintptr_t>(t.raw_data()) % 16 != 0) return false;
  for (int64_t i = 0; i < 3; ++i)
    if (t.size(i) > 1 && t.stride(i) % 8 != 0) return false;
  return true;
}

void mlstm_states_mma(const MlstmStateJob<bf16>& job, Stream stream) {
  const auto with = [&]<int T>() {
    launch(states_kernel<T>, {.grid = job.shape.units * job.tiles, .block = kThreads,
                              .shared = StateLayout<T>::bytes(job.flow != nullptr), .stream = stream}, job);
  };
  switch (job.tile) {
    case 192: return with.template operator()<192>();
    case 128: return with.template operator()<128>();
    default: return with.template operator()<64>();
  }
}

void mlstm_coefficients_mma(Mix mix, const MlstmMixJob<bf16>& job, Stream stream) {
  const LaunchConfig config{.grid = job.shape.units * job.shape.chunks, .block = kThreads,
                            .shared = 2 * kStages * 2 * kRows * kSlice, .stream = stream};
  switch (mix) {
    case Mix::read: return launch(coefficients_kernel<Mix::read>, config, job);
    case Mix::dv: return launch(coefficients_kernel<Mix::dv>, config, job);
    default: return launch(coefficients_kernel<Mix::dq>, config, job);
  }
}

void mlstm_mix_mma(Mix mix, const MlstmMixJob<bf16>& job, Stream stream) {
  switch (mix) {
    case Mix::read: return launch_mix<Mix::read>(job, stream);
    case Mix::dv: return launch_mix<Mix::dv>(job, stream);
    case Mix::dq: return launch_mix<Mix::dq>(job, stream);
    case Mix::dk: return launch_mix<Mix::dk>(job, stream);
  }
}

}  // namespace krait::kernels::cuda
