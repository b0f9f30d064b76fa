#include "core/cuda/launch.cuh"
#include "kernels/cuda/flow_linear.cuh"
#include "kernels/cuda/flow_mixers.cuh"

namespace krait::kernels::cuda::flow {

namespace step {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ void work(int count) {
  Progress so_far;
  for (int i = 0; i < count; ++i) switch (operation(i).kind) {
      case StepKind::linear: so_far = linear(i, so_far); break;
      case StepKind::input: input_alone(i); break;
      case StepKind::convolve: convolve(i); break;
      case StepKind::mamba_scan: scan(i); break;
      case StepKind::mamba2_state: advance_state(i); break;
      case StepKind::attention: attend(i); break;
    }
}

// One warp runs ahead of the workers as far as the ring lets it: weights depend on nothing.
__device__ __forceinline__ void bring_weights(int count) {
  Shared& shared = here();
  uint32_t turn = 0;
  const uint64_t policy = passing_through();
  for (int i = 0; i < count; ++i) {
    const StepOp& op = operation(i);
    switch (op.kind) {
      case StepKind::linear: {
        touch_input(op);
        const LinearStep& l = op.linear;
        const Range own = share(l.n);
        if (l.bias != nullptr && own.begin < own.end) touch(l.bias + own.begin, (own.end - own.begin) * int64_t{2});
        if (l.mixed.conv != nullptr) touch_mixed(l, op.rows, own);
        const int per = columns_of_stage(l.k), pitch = step_pitch(l.k);
        for (int first = own.begin; first < own.end; first += per, ++turn) {
          const int columns = min(per, own.end - first);
          uint64_t* const full = &shared.full[stage_of(turn)];
          if (lane_of() == 0) {
            wait_barrier(&shared.empty[stage_of(turn)], parity_of(turn) ^ 1);
            expect_bytes(full, static_cast<uint32_t>(columns * l.k * 2));
          }
          __syncwarp();
          for (int c = lane_of(); c < columns; c += 32)
            bring(shared.stages[stage_of(turn)] + c * pitch, l.w + int64_t{first + c} * l.k, static_cast<uint32_t>(l.k * 2), full, policy);
        }
        break;
      }
      case StepKind::input: touch_input(op); break;
      case StepKind::convolve: break;
      case StepKind::mamba_scan: touch_scan(op); break;
      case StepKind::mamba2_state: touch_state(op); break;
      case StepKind::attention: touch_caches(op); break;
    }
  }
  // What the launch before has used is absent again for the next one.
  const Range own = share(shared.unused_pieces);
  for (int at = own.begin + lane_of(); at < own.end; at += 32) shared.unused[at] = {~0u, ~0u, ~0u, ~0u};
}

#endif

constexpr int kOpWords = sizeof(StepOp) / sizeof(uint4);

// One block a multiprocessor, all at once. Bound by reading the weights, and by what a value takes from block to block.
__global__ void __launch_bounds__(kWorkers + 32, 1) step_kernel(const __grid_constant__ StepProgram program) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  Shared& shared = here();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(&shared.full[i], 1);
      init_barrier(&shared.empty[i], kWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    // The launch's number tells which set of slots is its own.
    const int set = static_cast<int>(atomicAdd(&program.history->arrivals, 1ull) / gridDim.x % 2);
    shared.slots = program.slots + set * (kStepSlotBytes / 2);
    shared.unused = reinterpret_cast<uint4*>(program.slots + (1 - set) * (kStepSlotBytes / 2));
    shared.unused_pieces = (program.history->used[1 - set] + 15) / 16;
    if (blockIdx.x == 0) program.history->used[set] = program.used;
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
  static_assert(kShared <= 227 * 1024 && sizeof(StepProgram) <= 32764, "more than a block, or a launch, may have");
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

}  // namespace krait::kernels::cuda::flow
