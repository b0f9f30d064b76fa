#include "core/cuda/launch.cuh"
#include "kernels/cuda/step_inputs.cuh"
#include "kernels/cuda/step_mixers.cuh"
#include "kernels/epilogue.h"

namespace krait::kernels::cuda {

namespace step {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

struct Functions {
  static __device__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }
  static __device__ float erf(float x) { return erff(x); }
  static __device__ float exp(float x) { return __expf(x); }
};

__device__ __forceinline__ float activate_as(Epilogue e, float x) {
  if (e == Epilogue::gelu_tanh) return activate<Functions, Epilogue::gelu_tanh>(x);
  if (e == Epilogue::gelu_erf) return activate<Functions, Epilogue::gelu_erf>(x);
  return e == Epilogue::relu ? activate<Functions, Epilogue::relu>(x) : x;
}

/// Columns of y whose weights fill a stage.
__device__ __forceinline__ int columns_of_stage(const LinearStep& l) { return kStepStageBytes / (2 * l.k); }

// One warp a column, as its weights come.
template <int kRows>
__device__ __noinline__ Turn multiply(int operation_at, Turn turn) {
  Shared& shared = here();
  const StepOp& op = operation(operation_at);
  const Range own = share(op.linear.n);
  const LinearStep& l = op.linear;
  const bf16* const x = reinterpret_cast<const bf16*>(shared.rows);
  const int per = columns_of_stage(l), pieces = l.k / 8, lane = lane_of();
  for (int first = own.begin; first < own.end; first += per, turn.next()) {
    const int count = min(per, own.end - first);
    const bf16* const stage = reinterpret_cast<const bf16*>(shared.stages[turn.stage]);
    wait_barrier(&shared.full[turn.stage], turn.parity);
    for (int c = warp_of(); c < count; c += kWarps) {
      const float bias = l.bias != nullptr ? static_cast<float>(l.bias[first + c]) : 0.0f;
      float sum[kRows][2] = {};
#pragma unroll(kRows == 1 ? 3 : 1)
      for (int piece = lane; piece < pieces; piece += 32) {
        float w[8];
        read8(w, stage + c * l.k + piece * 8);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= op.rows) break;
          float a[8];
          read8(a, x + r * l.k + piece * 8);
#pragma unroll
          for (int v = 0; v < 8; ++v) sum[r][v % 2] = fmaf(a[v], w[v], sum[r][v % 2]);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= op.rows) break;
        const float s = lanes_sum(sum[r][0] + sum[r][1], 32);
        if (lane == 0) l.y[r * l.y_row + first + c] = static_cast<bf16>(activate_as(l.epilogue, s + bias));
      }
    }
    __syncwarp();
    if (lane == 0) arrive_barrier(&shared.empty[turn.stage]);
  }
  return turn;
}

__device__ __forceinline__ void work(int count) {
  Turn turn;
  for (int i = 0; i < count; ++i) {
    switch (operation(i).kind) {
      case StepKind::linear: {
        const Range own = share(operation(i).linear.n);
        prepare(i, own.begin < own.end);
        turn = operation(i).rows == 1 ? multiply<1>(i, turn) : multiply<kMaxStepRows>(i, turn);
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
    shared.trace = program.trace != nullptr && (blockIdx.x == 0 || blockIdx.x == 77) ? program.trace + (blockIdx.x == 0 ? 0 : 512) : nullptr;
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

void run_steps(const StepProgram& program, Device device) {
  constexpr int kShared = static_cast<int>(sizeof(step::Shared));
  static const bool ready = [] {
    check(cudaFuncSetAttribute(step::step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    return true;
  }();
  KRAIT_ASSERT(ready);
  int blocks = 0;
  check(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device.index));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(step::kWorkers + 32);
  config.dynamicSmemBytes = kShared;
  config.stream = native(current_stream(device));
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, step::step_kernel, program));
}

}  // namespace krait::kernels::cuda
