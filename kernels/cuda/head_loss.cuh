#pragma once
// Kernels of the language model's head and its cross entropy on sm_90 (head_loss.h has the mathematics).
#include <cfloat>
#include <type_traits>

#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/exp2.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/tma.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace krait::kernels::cuda {

// The product's shape: a block has 128 rows of x and 256 of w at a time, 64 terms a stage; the two blocks of a cluster
// have the same rows of w and bring half of them each. (Clusters of four, 192 columns in five stages, and one warpgroup
// some stages behind the other are slower by 5 to 15 %.)
constexpr int kHeadRows = 128, kHeadColumns = 256, kHeadDepth = 64, kHeadStages = 4, kHeadCluster = 2, kHeadThreads = 384;
constexpr int kHeadParts = kHeadColumns / 64;  // of a tile on its way out
constexpr int kHeadShared = 1024 + kHeadStages * (kHeadRows + kHeadColumns) * 128 + 16 * kHeadStages;

struct HeadProduct {
  int rows, columns, valid;     // of x and w; columns that are not padding
  int depth;                    // stages of kHeadDepth terms
  int row_tiles, column_tiles;  // row tiles: of a whole cluster
  int group;                    // of row tiles that see all columns before the next: their x stays in the cache
  const float* reference;       // (rows)
  const int* target;            // (rows): columns, -1 for none
  float* target_e;              // (rows): e there, in fp32
  float* partial;               // (column_tiles, rows): sums of a tile's e
  bf16* e;                      // (rows, columns), or null
};

struct HeadTile {
  int row, column;  // of the cluster
};
__device__ __forceinline__ HeadTile head_tile(const HeadProduct& job, int at) {
  const int per_group = job.group * job.column_tiles, first = at / per_group * job.group;
  const int in_group = at % per_group, group = min(job.group, job.row_tiles - first);
  const int n = in_group / group;
  return {(first + in_group - n * group) * kHeadCluster * kHeadRows, n * kHeadColumns};
}

// e = exp(x w^T - reference) and its sums. Two warpgroups multiply 64 rows each and turn their sums into e, the third
// brings x and w, also those of the next tile meanwhile. w's map changes places of rows so that the columns which a thread
// has lie side by side in e.
// Bound by the products: 2 rows columns d. At 8192 x 768 -> 50304 a tile takes 13,500 cycles of products (12,288 counted),
// 2,100 of exponentials (2,048 counted) and 1,800 of stores.
static __global__ void __launch_bounds__(kHeadThreads, 1)
    head_exponentials_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w,
                             const HeadProduct job) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kShare = kHeadColumns / kHeadCluster;
  constexpr uint32_t kRowBytes = kHeadRows * 128, kStage = kRowBytes + kHeadColumns * 128;
  extern __shared__ unsigned char raw[];
  const uint32_t stages = (shared_address(raw) + 1023) & ~1023u;
  const uint32_t full = stages + kHeadStages * kStage, empty = full + 8 * kHeadStages;
  const int rank = static_cast<int>(cluster_rank()), team = static_cast<int>(threadIdx.x) / 128;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kHeadStages; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 2 * kHeadCluster);  // two warpgroups in each block
    }
    barriers_visible();
  }
  cluster_barrier();

  const int tiles = job.row_tiles * job.column_tiles, step = static_cast<int>(gridDim.x) / kHeadCluster;
  uint32_t slot = 0, parity = 0;
  const auto advance = [&] {
    if (++slot == kHeadStages) {
      slot = 0;
      parity ^= 1;
    }
  };
  const auto place = [&](int at) {
    HeadTile tile = head_tile(job, at);
    tile.row += rank * kHeadRows;
    return tile;
  };
  if (team == 2) {
    give_registers<24>();
    if (threadIdx.x == 256) {
      for (int at = static_cast<int>(blockIdx.x) / kHeadCluster; at < tiles; at += step) {
        const HeadTile tile = place(at);
        for (int k = 0; k < job.depth; ++k, advance()) {
          const uint32_t to = stages + slot * kStage, barrier = full + 8 * slot;
          barrier_wait_cluster(empty + 8 * slot, parity ^ 1);
          barrier_expect(barrier, kStage);
          bring_box(to, x, barrier, k * kHeadDepth, tile.row);
          bring_box_to(to + kRowBytes + rank * kShare * 128, w, barrier, k * kHeadDepth, 0, 0, 0,
                       (tile.column + rank * kShare) / 32, (1 << kHeadCluster) - 1);
        }
      }
    }
    __syncwarp();
  } else {
    take_registers<240>();
    const int thread = static_cast<int>(threadIdx.x) % 128, warp = thread / 32, lane = thread % 32, c = lane % 4;
    const auto release = [&](uint32_t s) {
      if (thread < kHeadCluster) barrier_arrive_at(empty + 8 * s, thread);
    };
    // The tile before, as bf16, leaves while the next one's products run: in columns 32 m + 8 c to + 7 this lane has
    // held[8 m] to [8 m + 3] of row g of its warp, and the next four of row g + 8.
    uint32_t held[kHeadColumns / 4];
    int held_row = job.rows, held_column = 0;
    const auto leave_part = [&](auto part) {
      bf16* const out = job.e + int64_t{held_row} * job.columns + held_column;
#pragma unroll
      for (int m = 2 * part.value; m < 2 * part.value + 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t* v = held + 8 * m + 4 * half;
          if (held_column + 32 * m < job.columns && held_row + 8 * half < job.rows)
            *reinterpret_cast<uint4*>(out + 8 * half * int64_t{job.columns} + 32 * m) = uint4{v[0], v[1], v[2], v[3]};
        }
    };
    const auto leave = [&](int part) {
      if (!job.e) return;
      switch (part) {
        case 0: return leave_part(std::integral_constant<int, 0>{});
        case 1: return leave_part(std::integral_constant<int, 1>{});
        case 2: return leave_part(std::integral_constant<int, 2>{});
        case 3: return leave_part(std::integral_constant<int, 3>{});
      }
    };
    float d[kHeadColumns / 2];
    for (int at = static_cast<int>(blockIdx.x) / kHeadCluster; at < tiles; at += step) {
      const HeadTile tile = place(at);
      const int row = tile.row + 64 * team + 16 * warp + lane / 4;
      const float reference_low = row < job.rows ? job.reference[row] : 0.0f;
      const float reference_high = row + 8 < job.rows ? job.reference[row + 8] : 0.0f;
      const int target_low = row < job.rows ? job.target[row] : -1;
      const int target_high = row + 8 < job.rows ? job.target[row + 8] : -1;
      uint32_t before = 0;
      for (int k = 0; k < job.depth; ++k, advance()) {
        const uint32_t from = stages + slot * kStage;
        barrier_wait(full + 8 * slot, parity);
        const uint64_t a = along_lines(from + team * (kRowBytes / 2)), b = along_lines(from + kRowBytes);
        wgmma_begin();
#pragma unroll
        for (int q = 0; q < 4; ++q) wgmma(d, further(a, 32 * q), further(b, 32 * q), k + q > 0);
        wgmma_commit();
        if (k > 0) {
          wgmma_wait<1>();
          release(before);
        }
        before = slot;
        if (k % 2 == 1) leave(k / 2);  // while these products run
      }
      wgmma_wait<0>();
      hold(d);
      release(before);
      for (int part = job.depth / 2; part < kHeadParts; ++part) leave(part);

      if (job.valid - tile.column < kHeadColumns) {
#pragma unroll
        for (int i = 0; i < kHeadColumns / 2; ++i)
          if (i / 16 * 32 + 8 * c + i / 4 % 4 * 2 + i % 2 >= job.valid - tile.column) d[i] = -INFINITY;
      }
      const float low = reference_low * kLog2e, high = reference_high * kLog2e;
      // The lane that has a row's target: column 32 m + 8 c + 2 j + i lies in d[16 m + 4 j + i].
      const auto pick = [&](int column, int half, float shift) {
        const int place = column / 32 * 16 + column % 8 / 2 * 4 + column % 2 + 2 * half;
        float s = 0.0f;
#pragma unroll
        for (int i = 0; i < kHeadColumns / 2; ++i)
          if (i == place) s = d[i];
        job.target_e[row + 8 * half] = exp2_fast(fmaf(s, kLog2e, -shift));
      };
      const int column_low = target_low - tile.column, column_high = target_high - tile.column;
      if (column_low >= 0 && column_low < kHeadColumns && column_low / 8 % 4 == c) pick(column_low, 0, low);
      if (column_high >= 0 && column_high < kHeadColumns && column_high / 8 % 4 == c) pick(column_high, 1, high);
      float sum_low = 0.0f, sum_high = 0.0f;
#pragma unroll
      for (int j = 0; j < kHeadColumns / 8; ++j) {
        const float e0 = exp2_fast(fmaf(d[4 * j], kLog2e, -low)), e1 = exp2_fast(fmaf(d[4 * j + 1], kLog2e, -low));
        const float e2 = exp2_fast(fmaf(d[4 * j + 2], kLog2e, -high)), e3 = exp2_fast(fmaf(d[4 * j + 3], kLog2e, -high));
        sum_low += e0 + e1;
        sum_high += e2 + e3;
        held[j / 4 * 8 + j % 4] = pack(e0, e1);
        held[j / 4 * 8 + 4 + j % 4] = pack(e2, e3);
      }
      held_row = row;
      held_column = tile.column + 8 * c;
#pragma unroll
      for (int m = 1; m < 4; m *= 2) {
        sum_low += __shfl_xor_sync(~0u, sum_low, m);
        sum_high += __shfl_xor_sync(~0u, sum_high, m);
      }
      float* partial = job.partial + int64_t{tile.column / kHeadColumns} * job.rows + row;
      if (c == 0 && row < job.rows) partial[0] = sum_low;
      if (c == 0 && row + 8 < job.rows) partial[8] = sum_high;
    }
    for (int part = 0; part < kHeadParts; ++part) leave(part);
  }
  cluster_barrier();  // the other blocks' arrivals come here
#endif
}

// reference = x . w[y], the target's logit, and target = y; without one -1, and as reference +infinity (all e are 0)
// where the target is ignored, NaN where it is bad.
// One warp per row. Bound by memory: rows of x and w, read once.
template <class I>
__global__ void head_reference_kernel(float* reference, int* target, const bf16* __restrict__ x, const bf16* __restrict__ w,
                                      const I* targets, int64_t rows, int64_t valid, int64_t ignore, int64_t d) {
  const int64_t row = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const auto y = static_cast<int64_t>(targets[row]);
  float sum = y == ignore ? INFINITY : NAN;
  if (y != ignore && y >= 0 && y < valid) {
    sum = 0.0f;
    for (int64_t k = threadIdx.x % 32 * 8; k < d; k += 256) {
      float a[8], b[8];
      load_values(a, x + row * d + k);
      load_values(b, w + y * d + k);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(a[i], b[i], sum);
    }
    for (int m = 16; m > 0; m /= 2) sum += __shfl_xor_sync(~0u, sum, m);
  }
  if (threadIdx.x % 32 != 0) return;
  reference[row] = sum;
  target[row] = y != ignore && y >= 0 && y < valid ? static_cast<int>(y) : -1;
}

constexpr int kFinishRows = 32, kFinishWarps = 8;
constexpr float kHeadLimit = 0x1p80f;  // a sum from here on asks for a larger reference

struct HeadFinish {
  int64_t rows, columns, valid, d, column_tiles;
  const float *partial, *reference, *target_e, *count;
  const int* target;
  const bf16 *x, *w;
  float *losses, *nll;  // (rows)
  double scale, z_loss;
  // Where gradients are wanted: e (rows, columns), factors s (rows), and for dw s x (rows, d); null otherwise.
  bf16* e;
  float* factors;
  bf16* scaled;
};

// The block's 32 rows again, with their maxima as references; those that `wanted` names get new e and sums. Slow: every
// block reads all of w twice. Only where a logit is some 55 above its target's.
__device__ __noinline__ void head_repair(float* top_of, float* sum_of, float* target_e_of, uint32_t wanted,
                                        const HeadFinish& job) {
  __shared__ float parts[kFinishWarps][kFinishRows];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, c = lane % 4;
  const int64_t first = int64_t{blockIdx.x} * kFinishRows;
  const auto two = [&](const bf16* from, int64_t line, int64_t lines, int64_t k) -> uint32_t {
    return line < lines && k < job.d ? *reinterpret_cast<const uint32_t*>(from + line * job.d + k) : 0u;
  };
  float top[4], sum[4] = {};  // rows g, g + 8, g + 16, g + 24
  for (int pass = 0; pass < 2; ++pass) {
    for (int i = 0; i < 4; ++i) top[i] = pass == 0 ? -FLT_MAX : top_of[g + 8 * i];
    for (int64_t n = warp * 32; n < job.valid; n += kFinishWarps * 32) {
      float s[2][4][4] = {};
      for (int64_t k = 2 * c; k < job.d + 2 * c; k += 16) {
        uint32_t a[2][4];
        for (int m = 0; m < 2; ++m)
          for (int i = 0; i < 4; ++i) a[m][i] = two(job.x, first + 16 * m + g + i % 2 * 8, job.rows, k + i / 2 * 8);
        for (int j = 0; j < 4; ++j) {
          const uint32_t b0 = two(job.w, n + 8 * j + g, job.columns, k), b1 = two(job.w, n + 8 * j + g, job.columns, k + 8);
          for (int m = 0; m < 2; ++m) mma(s[m][j], a[m], b0, b1);
        }
      }
      for (int m = 0; m < 2; ++m)
        for (int j = 0; j < 4; ++j)
          for (int i = 0; i < 4; ++i) {
            const int64_t column = n + 8 * j + 2 * c + i % 2;
            const int r = 2 * m + i / 2, row = g + 8 * r;
            if (column >= job.valid) continue;
            if (pass == 0) {
              top[r] = fmaxf(top[r], s[m][j][i]);
            } else {
              const float e = exp2_fast((s[m][j][i] - top[r]) * kLog2e);
              sum[r] += e;
              if (first + row < job.rows && column == job.target[first + row]) target_e_of[row] = e;
              if (job.e && (wanted >> row & 1)) job.e[(first + row) * job.columns + column] = static_cast<bf16>(e);
            }
          }
    }
    for (int i = 0; i < 4; ++i) {
      float value = pass == 0 ? top[i] : sum[i];
      for (int m = 1; m < 4; m *= 2) {
        const float other = __shfl_xor_sync(~0u, value, m);
        value = pass == 0 ? fmaxf(value, other) : value + other;
      }
      if (c == 0) parts[warp][g + 8 * i] = value;
    }
    __syncthreads();
    if (warp == 0) {
      float value = parts[0][lane];
      for (int k = 1; k < kFinishWarps; ++k) value = pass == 0 ? fmaxf(value, parts[k][lane]) : value + parts[k][lane];
      if (pass == 0)
        top_of[lane] = value;
      else
        sum_of[lane] = value;
    }
    __syncthreads();
  }
}

// Row results from the sums, and what the gradients' products want: the target's entry of e becomes e_y - sum / (1 + 2 z
// lse) (both from the same product: of a target that is all but certain the difference is left), and x is scaled. A block
// has 32 rows. Bound by memory: sums, x read and written.
static __global__ void __launch_bounds__(kFinishWarps * 32) head_finish_kernel(const HeadFinish job) {
  __shared__ float parts[kFinishWarps][kFinishRows], sum_of[kFinishRows], top_of[kFinishRows], target_e_of[kFinishRows];
  __shared__ float factor_of[kFinishRows];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t first = int64_t{blockIdx.x} * kFinishRows, row = first + lane;
  const bool inside = row < job.rows;
  float part = 0.0f;
  if (inside)
    for (int64_t n = warp; n < job.column_tiles; n += kFinishWarps) part += job.partial[n * job.rows + row];
  parts[warp][lane] = part;
  __syncthreads();

  const int64_t y = inside ? job.target[row] : -1;
  const float reference = inside ? job.reference[row] : INFINITY;
  const bool good = y >= 0, ignored = !good && !isnan(reference);
  float sum = parts[0][lane];
  for (int k = 1; k < kFinishWarps; ++k) sum += parts[k][lane];
  const uint32_t wrong = __ballot_sync(~0u, good && sum >= kHeadLimit), dirty = __ballot_sync(~0u, inside && ignored && sum != 0.0f);
  const bool again = wrong >> lane & 1;
  float shift = reference, target_e = good ? job.target_e[row] : 0.0f;
  if (wrong) {  // the same for all warps
    head_repair(top_of, sum_of, target_e_of, wrong, job);
    if (again) {
      shift = top_of[lane];
      sum = sum_of[lane];
      target_e = target_e_of[lane];
    }
  }
  if (warp == 0) {
    const float lse = shift + logf(sum);
    // Where it was made again e of the target may be 0. A bad target has no e, and NaN sums.
    const float nll = ignored ? 0.0f : again ? logf(sum) + (shift - reference) : good ? logf(sum / target_e) : sum;
    const float z = static_cast<float>(job.z_loss), scale = static_cast<float>(job.scale) / fmaxf(*job.count, 1.0f);
    float a = 1.0f + 2.0f * z * lse;
    if (fabsf(a) < 1e-6f) a = copysignf(1e-6f, a);
    factor_of[lane] = ignored ? 0.0f : scale * a / sum;
    if (inside) {
      job.losses[row] = ignored ? 0.0f : nll + z * lse * lse;
      job.nll[row] = nll;
      if (job.e) job.factors[row] = factor_of[lane];
      if (job.e && good) job.e[row * job.columns + y] = static_cast<bf16>(target_e - sum / a);
    }
  }
  if (!job.e) return;
  __syncthreads();
  for (int r = warp; r < kFinishRows && first + r < job.rows; r += kFinishWarps) {
    const float factor = factor_of[r];
    const bool skip = __shfl_sync(~0u, static_cast<int>(ignored), r);
    for (int64_t k = lane * 8; job.scaled && k < job.d; k += 256) {
      float v[8];
      load_values(v, job.x + (first + r) * job.d + k);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = skip ? 0.0f : v[i] * factor;
      store_values(job.scaled + (first + r) * job.d + k, v);
    }
    if (dirty >> r & 1)
      for (int64_t k = lane; k < job.columns; k += 32) job.e[(first + r) * job.columns + k] = static_cast<bf16>(0.0f);
  }
}

// dx = factor of the row times the product. Bound by memory.
static __global__ void head_scale_kernel(bf16* __restrict__ dx, const float* __restrict__ product,
                                         const float* __restrict__ factors, int64_t n, int64_t d) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * 8;
  if (i >= n) return;
  const float factor = factors[i / d];
  float v[8];
  load_values(v, product + i);
#pragma unroll
  for (int k = 0; k < 8; ++k) v[k] *= factor;
  store_values(dx + i, v);
}

}  // namespace krait::kernels::cuda
