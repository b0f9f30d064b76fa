#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/launch_with.cuh"
#include "kernels/cuda/step_inputs.cuh"
#include "kernels/cuda/step_mixers.cuh"

namespace krait::kernels::cuda {

namespace step {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// Columns of y whose weights fill a stage: as many for every warp, where a stage has so many.
__device__ __forceinline__ int columns_of_stage(const LinearStep& l) {
  const int fit = kStepStageBytes / (2 * l.k);
  return fit < kWarps ? fit : fit / kWarps * kWarps;
}

// One warp a column, as its weights come; `one` makes the column of a stage.
template <class F>
__device__ __forceinline__ Turn each_column(const LinearStep& l, Range own, int per, Shared& shared, Turn turn, F one) {
  for (int first = own.begin; first < own.end; first += per, turn.next()) {
    const int count = min(per, own.end - first);
    const bf16* const stage = reinterpret_cast<const bf16*>(shared.stages[turn.stage]);
    const int column = warp_of();
    float bias = column < count && l.bias != nullptr ? static_cast<float>(l.bias[first + column]) : 0.0f;
    wait_barrier(&shared.full[turn.stage], turn.parity);
    for (int c = column; c < count; c += kWarps) {
      if (c != column && l.bias != nullptr) bias = static_cast<float>(l.bias[first + c]);
      one(stage + c * l.k, first + c, bias);
    }
    __syncwarp();
    if (lane_of() == 0) arrive_barrier(&shared.empty[turn.stage]);
  }
  return turn;
}

__device__ __forceinline__ void multiply_add(float (&sum)[4], const float (&a)[8], const float (&b)[8]) {
#pragma unroll
  for (int v = 0; v < 8; ++v) sum[v % 4] = fmaf(a[v], b[v], sum[v % 4]);
}
__device__ __forceinline__ float joined(const float (&sum)[4]) { return lanes_sum((sum[0] + sum[1]) + (sum[2] + sum[3]), 32); }

// One row of up to 256 kHeld values, which stays in registers.
template <int kHeld>
__device__ __noinline__ Turn multiply_held(int operation_at, Range own, int per, Turn turn) {
  Shared& shared = here();
  const LinearStep& l = operation(operation_at).linear;
  const int lane = lane_of(), k = l.k;
  float x[kHeld][8];
#pragma unroll
  for (int q = 0; q < kHeld; ++q) {
    const int at = (q * 32 + lane) * 8;
    uint4 four = {0, 0, 0, 0};
    if (at < k) four = *reinterpret_cast<const uint4*>(reinterpret_cast<const bf16*>(shared.rows) + at);
    unpack8(x[q], four);
  }
  return each_column(l, own, per, shared, turn, [&](const bf16* w, int column, float bias) {
    float sum[4] = {};
#pragma unroll
    for (int q = 0; q < kHeld; ++q) {
      const int at = (q * 32 + lane) * 8;
      if (at >= k) continue;
      float v[8];
      read8(v, w + at);
      multiply_add(sum, x[q], v);
    }
    const float s = joined(sum);
    if (lane == 0) l.y[column] = static_cast<bf16>(activate_as(l.epilogue, s + bias));
  });
}

// Any few rows, read again for every column.
__device__ __noinline__ Turn multiply(int operation_at, Range own, int per, Turn turn) {
  Shared& shared = here();
  const StepOp& op = operation(operation_at);
  const LinearStep& l = op.linear;
  const int lane = lane_of(), rows = op.rows;
  return each_column(l, own, per, shared, turn, [&](const bf16* w, int column, float bias) {
    for (int r = 0; r < rows; ++r) {
      const bf16* const x = reinterpret_cast<const bf16*>(shared.rows) + r * l.k;
      float sum[4] = {};
#pragma unroll 3
      for (int at = lane * 8; at < l.k; at += 256) {
        float a[8], b[8];
        read8(a, x + at);
        read8(b, w + at);
        multiply_add(sum, a, b);
      }
      const float s = joined(sum);
      if (lane == 0) l.y[r * l.y_row + column] = static_cast<bf16>(activate_as(l.epilogue, s + bias));
    }
  });
}

__device__ __forceinline__ Turn multiply_any(int at, Range own, int per, Turn turn) {
  const int k = operation(at).linear.k, rows = operation(at).rows;
  if (rows == 1 && k <= 256 * 3) return multiply_held<3>(at, own, per, turn);
  if (rows == 1 && k <= 256 * 6) return multiply_held<6>(at, own, per, turn);
  return multiply(at, own, per, turn);
}

__device__ __forceinline__ void work(int count) {
  Turn turn;
  for (int i = 0; i < count; ++i) {
    switch (operation(i).kind) {
      case StepKind::linear: {
        const Range own = share(operation(i).linear.n);
        const int per = columns_of_stage(operation(i).linear);
        prepare(i, own.begin < own.end);
        turn = multiply_any(i, own, per, turn);
        break;
      }
      case StepKind::input: prepare(i, blockIdx.x == 0); break;
      case StepKind::mamba_scan: scan(i); break;
      case StepKind::mamba2_state: advance_state(i); break;
      case StepKind::attention: attend(i); break;
      case StepKind::pause: wait(here()); break;
    }
    if (i + 1 < count) arrive(here());
  }
}

// One warp runs ahead of the workers as far as the ring lets it: weights depend on nothing.
__device__ __forceinline__ void bring_weights(int count) {
  Shared& shared = here();
  Turn turn;
  const uint64_t policy = passing_through();
  for (int i = 0; i < count; ++i) {
    const StepOp& op = operation(i);
    switch (op.kind) {
      case StepKind::linear: {
        touch_input(op);
        const LinearStep& l = op.linear;
        const Range own = share(l.n);
        if (l.bias != nullptr && own.begin < own.end) touch(l.bias + own.begin, (own.end - own.begin) * int64_t{2});
        const int per = columns_of_stage(l);
        for (int first = own.begin; first < own.end; first += per, turn.next()) {
          if (lane_of() != 0) continue;
          const auto bytes = static_cast<uint32_t>(min(per, own.end - first) * l.k * 2);
          wait_barrier(&shared.empty[turn.stage], turn.parity ^ 1);
          expect_bytes(&shared.full[turn.stage], bytes);
          bring(shared.stages[turn.stage], l.w + int64_t{first} * l.k, bytes, &shared.full[turn.stage], policy);
        }
        __syncwarp();
        break;
      }
      case StepKind::input: touch_input(op); break;
      case StepKind::mamba_scan: touch_scan(op); break;
      case StepKind::mamba2_state: touch_state(op); break;
      case StepKind::attention: touch_caches(op); break;
      case StepKind::pause: break;
    }
  }
}

#endif

constexpr int kOpWords = sizeof(StepOp) / sizeof(uint4);

// One block a multiprocessor, all at once. Bound by reading the weights, and by the barriers between operations.
__global__ void __launch_bounds__(kWorkers + 32, 1) step_kernel(const __grid_constant__ StepProgram program) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  Shared& shared = here();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(&shared.full[i], 1);
      init_barrier(&shared.empty[i], kWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    shared.counter = program.counter;
    shared.target = 0;
  }
  // Read as ordinary memory, all at once: as constants they would come line by line.
  const uint4* from = reinterpret_cast<const uint4*>(program.ops);
  asm volatile("" : "+l"(from));
  for (int at = static_cast<int>(threadIdx.x); at < program.count * kOpWords; at += kWorkers + 32)
    reinterpret_cast<uint4*>(shared.ops)[at] = from[at];
  __syncthreads();
  if (threadIdx.x < kWorkers)
    work(program.count);
  else
    bring_weights(program.count);
#endif
}

}  // namespace step

int step_blocks(Device device) {
  int blocks = 0;
  check(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device.index));
  return blocks;
}

void run_steps(const StepProgram& program, Device device) {
  constexpr int kShared = static_cast<int>(sizeof(step::Shared));
  static_assert(kShared <= 227 * 1024 && sizeof(StepProgram) <= 32764, "more than a block, or a launch, may have");
  launch_cooperative(step::step_kernel,
                     {.grid = step_blocks(device), .block = step::kWorkers + 32, .shared = kShared, .stream = current_stream(device)},
                     program);
}

}  // namespace krait::kernels::cuda
