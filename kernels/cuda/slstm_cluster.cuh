#pragma once
// sLSTM over whole sequences in bf16 with a cluster of 8 blocks for each head of 8 rows of the batch. The head's
// recurrent weights stay in the registers of the cluster's warps, the states in those of their threads; a step's
// exchange goes from shared memory to shared memory. A head has p = 64 W units, a block W warps, a warp 8 units: its
// lane 4 g + t has unit g of rows 2t and 2t + 1, all gates.
//   forward   a warp multiplies R of its units with y_{t-1} of all units, and sends y_t to the 8 blocks.
//   backward  a warp multiplies R^T, all units by the gates of its block, with dr_t of the block; the 8 blocks' parts of
//             dy_{t-1} go to the block whose units they are and are summed there in the order of the blocks.
// Bound by latency: product, cell and exchange of a step follow one another. What comes from global memory is asked for
// kStages steps before.
// What the backward needs is kept as the threads have it: (group, l, warp of the cluster, 14 values of 32 lanes), less
// the lanes whose rows the batch does not have.
// Nothing tells a block that its neighbours have read what it sent at a step before, two steps later, it sends to the
// same place; but it has what they sent at the step between, which they made of it.
#include "core/cuda/launch.cuh"
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/cluster_launch.cuh"
#include "kernels/cuda/slstm_cluster.h"

namespace krait::kernels::cuda::slstm {

constexpr int kBlocks = 8, kTile = 8;  // blocks of a cluster, rows of the batch
constexpr int kStages = 8;             // steps of input under way, a power of two
constexpr int kStates = 4;             // y, c, n, m
constexpr int kKept = 7;               // values for the backward, of a (unit, row)

// How a warp keeps a step's values in global memory for a group of up to 8 rows: two times 4 values of each lane that has
// a row, then 4 and 2 of each that has two. Lanes without are left out. Kernels for whole groups alone, kWhole, know the
// places at compile time: up to a fifth faster.
struct KeptLayout {
  int begun, whole;  // lanes of a group g that have a row, and two
  __host__ __device__ constexpr explicit KeptLayout(int64_t rows)
      : begun(static_cast<int>(rows + 1) / 2), whole(static_cast<int>(rows) / 2) {}
  __host__ __device__ constexpr int size() const { return 8 * (8 * begun + 6 * whole); }
  // Where a lane's values are; slot: its number among those with a row, and among those with two.
  __device__ int four(int i, const int (&slot)[2]) const { return 4 * (8 * i * begun + slot[i / 2]); }
  __device__ int two(const int (&slot)[2]) const { return 4 * 8 * (2 * begun + whole) + 2 * slot[1]; }
};
constexpr int kKeptOfWarp = KeptLayout(kTile).size();

// Fragments of B (16 k, 8 n) for the k from 16 x and 16 (x + 1) on, from rows n of shared memory.
__device__ inline void load_vector(uint32_t (&r)[4], const bf16* vector, int pitch, int x) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices(r, vector + lane % 8 * pitch + x * 16 + lane / 8 * 8);
}

// Values that all warps keep of the groups before this one: all heads of 8 rows, then of the rows that are left.
template <int W, class Arguments>
__device__ int64_t kept_before(const Arguments& a, int64_t group, const KeptLayout& layout) {
  return (group / a.h * a.h * kKeptOfWarp + group % a.h * layout.size()) * a.l * kBlocks * W;
}

// False where the kernel was not compiled for clusters.
template <class Arguments>
bool run_clusters(void (*kernel)(Arguments), const Arguments& a, int64_t warps, int64_t shared, Stream stream) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel));
  if (attributes.ptxVersion < 90) return false;
  const int64_t blocks = a.h * ceil_div(a.b, kTile) * kBlocks;
  launch_clusters(kernel, kBlocks, {.grid = blocks, .block = static_cast<int>(32 * warps), .shared = shared, .stream = stream}, a);
  return true;
}

// f<W, whether all groups have 8 rows>().
template <class F>
bool with_shape(int64_t warps, int64_t b, F&& f) {
  const auto with_warps = [&]<int W>() {
    return b % kTile == 0 ? f.template operator()<W, true>() : f.template operator()<W, false>();
  };
  switch (warps) {
    case 1: return with_warps.template operator()<1>();
    case 2: return with_warps.template operator()<2>();
    case 3: return with_warps.template operator()<3>();
    case 4: return with_warps.template operator()<4>();
    default: return false;
  }
}

}  // namespace krait::kernels::cuda::slstm
