#include "kernels/cuda/rows_head.h"

#include "kernels/cuda/hopper.h"
#include "kernels/cuda/likeliest.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/step_values.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/tma.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kGroups = 2, kThreads = 128 * kGroups;  // warpgroups that compute; one warp more brings x and w
constexpr int kRows = 64, kColumns = 64, kLine = 64;  // of a box: rows of x or columns of y, by values of k
constexpr int kBoxBytes = kRows * kLine * 2, kStageBoxes = 2, kMaxStages = 16;
constexpr int kMaxShared = 227 * 1024;
static_assert(kRows == kColumns);

struct Small {
  float factor[kRows];
  uint64_t best[kGroups][kRows];
  uint64_t x_full, full[kMaxStages], empty[kMaxStages];
};

struct HeadWork {
  CUtensorMap x, w;  // (k, rows), (k, n)
  RowsHead head;
  int boxes, stages;  // boxes along k, whole stages of them (zeros beyond k); of the ring
};

/// A block takes every gridDim.x-th tile of 64 columns, its warpgroups in turn. All of x stays in shared memory, w passes
/// through a ring of stages of two boxes, which is full before x is there. Bound by reading w.
__global__ void __launch_bounds__(kThreads + 32, 1) rows_head_kernel(const __grid_constant__ HeadWork work) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char head_shared[];
  const RowsHead& a = work.head;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, blocks = static_cast<int>(gridDim.x);
  const int tiles = (a.n + kColumns - 1) / kColumns, stages = work.stages;
  const uint32_t x = shared_address(head_shared), ring = x + work.boxes * kBoxBytes;
  Small& s = *reinterpret_cast<Small*>(head_shared + (work.boxes + stages * kStageBoxes) * kBoxBytes);
  const uint32_t full = shared_address(s.full), empty = shared_address(s.empty), x_full = shared_address(&s.x_full);
  if (tid == 0) {
    barrier_init(x_full, 1);
    for (int i = 0; i < stages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 4);
    }
    barriers_visible();
  }
  __syncthreads();
  if (warp == kThreads / 32) {
    if (lane != 0) return;
    int stage = 0, round = 0, tile = static_cast<int>(blockIdx.x), box = 0;
    const auto bring = [&] {
      if (round > 0) barrier_wait(empty + 8 * stage, (round - 1) % 2);
      barrier_expect(full + 8 * stage, kStageBoxes * kBoxBytes);
#pragma unroll
      for (int i = 0; i < kStageBoxes; ++i)
        bring_box(ring + (stage * kStageBoxes + i) * kBoxBytes, work.w, full + 8 * stage, (box + i) * kLine, tile * kColumns);
      box += kStageBoxes;
      if (box == work.boxes) box = 0, tile += blocks;
      if (++stage == stages) stage = 0, ++round;
    };
    while (tile < tiles && round == 0) bring();
    wait_for_previous();
    let_next_begin();
    asm volatile("fence.proxy.async;" ::: "memory");  // others stored x
    barrier_expect(x_full, work.boxes * kBoxBytes);
    for (int i = 0; i < work.boxes; ++i) bring_box(x + i * kBoxBytes, work.x, x_full, i * kLine, 0);
#pragma unroll 1
    while (tile < tiles) bring();
    return;
  }
  wait_for_previous();
  let_next_begin();
  {
    const int row = tid / 4;  // four neighbours add a row's squares
    float square = 0;
    if (a.scale.squares != nullptr && row < a.rows)
      for (int i = tid % 4; i < a.scale.parts; i += 4) square += __ldcg(a.scale.squares + int64_t{row} * a.scale.parts + i);
    square = sum_lanes<4>(square);
    if (tid % 4 == 0) s.factor[row] = a.scale.squares != nullptr ? rsqrtf(square / static_cast<float>(a.k) + a.scale.eps) : 1.0f;
  }
  meet(1, kThreads);
  if (a.scale.squares != nullptr && a.scale.rstd != nullptr && blockIdx.x == 0 && tid < a.rows) a.scale.rstd[tid] = s.factor[tid];
  const int group = warp / 4, first_row = warp % 4 * 16 + lane / 4, first_column = lane % 4 * 2;
  const float factor[2] = {s.factor[first_row], s.factor[first_row + 8]};
  uint32_t best[2] = {};
  int at[2] = {};
  barrier_wait(x_full, 0);

  const int tile_stages = work.boxes / kStageBoxes;
  int stage = group * tile_stages % stages, parity = group * tile_stages / stages % 2;
#pragma unroll 1
  for (int tile = static_cast<int>(blockIdx.x) + group * blocks; tile < tiles; tile += kGroups * blocks) {
    float acc[kColumns / 2] = {};
    int before = -1;  // the stage whose products are under way
#pragma unroll 1
    for (int box = 0; box < work.boxes; box += kStageBoxes) {
      barrier_wait(full + 8 * stage, parity);
      wgmma_begin();
#pragma unroll
      for (int i = 0; i < kStageBoxes; ++i) {
        const uint64_t left = along_lines(x + (box + i) * kBoxBytes), right = along_lines(ring + (stage * kStageBoxes + i) * kBoxBytes);
#pragma unroll
        for (int k = 0; k < kLine / 16; ++k) wgmma(acc, further(left, 32 * k), further(right, 32 * k), box + i + k > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (before >= 0 && lane == 0) barrier_arrive(empty + 8 * before);
      before = stage;
      if (++stage == stages) stage = 0, parity ^= 1;
    }
    wgmma_wait<0>();
    hold(acc);
    if (lane == 0) barrier_arrive(empty + 8 * before);
    stage += (kGroups - 1) * tile_stages;  // the other group's
    parity = (parity + stage / stages) % 2;
    stage %= stages;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_row + 8 * r, column = tile * kColumns + 8 * j + first_column;
        if (row >= a.rows || column >= a.n) continue;
        const uint32_t made = pack(acc[4 * j + 2 * r] * factor[r], acc[4 * j + 2 * r + 1] * factor[r]);
        if (a.y != nullptr) *reinterpret_cast<uint32_t*>(a.y + row * a.y_row + column) = made;
        const float2 v = two(made);  // columns only rise: the first of the largest stays
        const uint32_t low = ordered(v.x), high = ordered(v.y);
        if (column < a.choices && low > best[r]) best[r] = low, at[r] = column;
        if (column + 1 < a.choices && high > best[r]) best[r] = high, at[r] = column + 1;
      }
  }
  if (a.likeliest == nullptr) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint64_t key = uint64_t{best[r]} << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(at[r]));
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) key = max(key, uint64_t{__shfl_xor_sync(0xffffffffu, key, offset)});
    if (lane % 4 == 0) s.best[group][first_row + 8 * r] = key;
  }
  meet(1, kThreads);
  if (tid < a.rows) a.likeliest[int64_t{tid} * kHeadBlocks + blockIdx.x] = max(s.best[0][tid], s.best[1][tid]);
#endif
}

int boxes_along(int64_t k) { return static_cast<int>(ceil_div(k, kLine * kStageBoxes)) * kStageBoxes; }
int stages_beside(int boxes) {
  const int left = kMaxShared - static_cast<int>(sizeof(Small)) - boxes * kBoxBytes;
  return std::min(kMaxStages, left / (kStageBoxes * kBoxBytes));
}

CUtensorMap lines_map(const bf16* data, int64_t k, int64_t lines, int64_t row) {
  const int64_t sizes[] = {k, lines}, strides[] = {row};
  const int box[] = {kLine, kRows};
  return tensor_map(data, DType::bf16, sizes, strides, box);
}

}  // namespace

bool rows_head_fits(const RowsLinear& map, Device device) {
  constexpr int kMinStages = 4;
  return map.rows >= 1 && map.rows <= kRows && map.k % 8 == 0 && map.n % 2 == 0 && map.bias == nullptr && map.epilogue == Epilogue::none && map.x_row % 8 == 0 &&
         map.y_row % 2 == 0 && aligned16(map.x, map.w) && reinterpret_cast<uintptr_t>(map.y) % 4 == 0 &&
         stages_beside(boxes_along(map.k)) >= kMinStages && hopper_multiprocessors(device, reinterpret_cast<const void*>(rows_head_kernel)) > 0;
}

RowsHead rows_head_of(const RowsLinear& map) { return {map.x, map.w, map.y, map.x_row, map.y_row, map.rows, map.n, map.k, map.scale, nullptr, 0}; }

void rows_head(const RowsHead& a, Stream stream) {
  HeadWork work{lines_map(a.x, a.k, a.rows, a.x_row), lines_map(a.w, a.k, a.n, a.k), a, boxes_along(a.k), 0};
  work.stages = stages_beside(work.boxes);
  const auto shared = static_cast<int64_t>(sizeof(Small)) + int64_t{work.boxes + work.stages * kStageBoxes} * kBoxBytes;
  keep_shared_memory(rows_head_kernel);
  launch_overlapped(rows_head_kernel, {.grid = kHeadBlocks, .block = kThreads + 32, .shared = shared, .stream = stream}, work);
}

}  // namespace krait::kernels::cuda
