#include "kernels/cuda/launch_with.cuh"
#include "kernels/cuda/step_solo_linear.cuh"
#include "kernels/cuda/step_solo_mixers.cuh"

// A decoding step of one row. Between exchanges little is done, so what counts is how many instructions a warp meets that
// its cache does not hold: every piece of work is one short loop, and there is one body for all linear maps.
namespace krait::kernels::cuda::solo {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ void work(int count) {
  int row = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    switch (reinterpret_cast<const SoloOp*>(here().ops)[i].kind) {
      case SoloKind::linear:
        linear(i, row);
        row ^= 1;
        break;
      case SoloKind::scan: scan(i); break;
      case SoloKind::state: advance_state(i); break;
      case SoloKind::attention: attend(i); break;
    }
  }
}

/// A warp asks for memory to be brought into the L2 cache.
__device__ __noinline__ void touch(const void* from, int bytes) {
  const uintptr_t last = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes);
#pragma unroll 1
  for (uintptr_t at = (reinterpret_cast<uintptr_t>(from) & ~uintptr_t{127}) + static_cast<uintptr_t>(lane_of()) * 128; at < last; at += 32 * 128)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}
/// The same for what all blocks read: each asks for its share.
template <class T>
__device__ __forceinline__ void touch_share(const T* from, int count) {
  if (from == nullptr) return;
  const Range own = share(count);
  touch(from + own.begin, (own.end - own.begin) * static_cast<int>(sizeof(T)));
}

// What a linear map needs beside its weights, into the L2 cache.
__device__ __forceinline__ void touch_linear(const SoloLinear& l, const Range (&own)[3]) {
  if (l.input == StepInput::norm) {
    touch_share(l.norm.w, l.k);
    touch_share(l.norm.b, l.k);
  } else if (l.input == StepInput::gated) {
    touch_share(l.gate.w, l.k);
  }
#pragma unroll 1
  for (int s = 0; s < 3; ++s) {
    const int first = l.segment[s].base + own[s].begin, count = own[s].end - own[s].begin, c = first - l.conv_first;
    if (count <= 0) continue;
    if (l.bias != nullptr) touch(l.bias + first, count * 2);
    if (l.conv == nullptr || c < 0 || c >= l.channels) continue;
    touch(l.conv_weight + 4 * c, count * 8);
    if (l.conv_bias != nullptr) touch(l.conv_bias + c, count * 2);
#pragma unroll 1
    for (int j = 0; j < 3; ++j) touch(l.conv + j * l.channels + c, count * 2);
  }
}
__device__ __forceinline__ void touch_scan(const SoloScan& a) {
  const Range own = even_range(a.e, a.each, static_cast<int>(blockIdx.x));
  const int c = own.begin, count = own.end - own.begin;
  touch(a.h + int64_t{c} * a.n, count * a.n * 4);
  touch(a.A_log + c * a.n, count * a.n * 4);
  touch(a.dt_proj + c * a.r, count * a.r * 2);
  touch(a.dt_bias + c, count * 4);
  touch(a.D + c, count * 4);
}
__device__ __forceinline__ void touch_caches(const AttentionStep& a) {
  const int count = min(max(a.position[0], 0), a.capacity) * a.hkv * a.d;
  touch_share(a.k_cache, count);
  touch_share(a.v_cache, count);
}

#ifndef KRAIT_SOLO_PIECE
#define KRAIT_SOLO_PIECE 4096
#endif

// One warp runs ahead of the workers as far as the ring lets it: weights depend on nothing. They come in pieces: exchanges
// wait longer behind large ones (a step of GPT-2 takes 253 us with 4 KB, 273 us with whole packages).
__device__ __forceinline__ void bring_weights(int count) {
  Shared& shared = here();
  const uint64_t policy = passing_through();
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const SoloOp& op = reinterpret_cast<const SoloOp*>(shared.ops)[i];
    if (op.kind == SoloKind::scan) touch_scan(op.scan);
    if (op.kind == SoloKind::state) {
      const Range own = even_range(op.state.e, op.state.each, static_cast<int>(blockIdx.x));
      touch(op.state.h + int64_t{own.begin} * op.state.n, (own.end - own.begin) * op.state.n * 4);
    }
    if (op.kind == SoloKind::attention) touch_caches(op.attention.of);
    if (op.kind != SoloKind::linear) continue;
    const SoloLinear& l = op.linear;
    const Range own[3] = {range_of(l.segment[0]), range_of(l.segment[1]), range_of(l.segment[2])};
    touch_linear(l, own);
    if (lane_of() != 0) continue;
    const int total = own[0].end - own[0].begin + own[1].end - own[1].begin + own[2].end - own[2].begin, bytes = 2 * l.k;
#pragma unroll 1
    for (int p = 0; p < l.packages; ++p) {
      const int turn = l.package + p, begin = p * l.per, end = min(begin + l.per, total), after = shared.package[turn].after;
      if (after >= 0) wait_barrier(&shared.empty[after % kSoloTurns], after / kSoloTurns % 2);
      uint64_t* const full = &shared.full[turn % kSoloTurns];
      expect_bytes(full, static_cast<uint32_t>(max(end - begin, 0) * bytes));
      unsigned char* to = shared.ring + shared.package[turn].offset;
      int before = 0;  // columns of the segments so far
#pragma unroll 1
      for (int s = 0; s < 3; ++s) {
        const int size = own[s].end - own[s].begin, first = max(begin, before), last = min(end, before + size);
        if (first < last) {
          const auto* from = reinterpret_cast<const unsigned char*>(l.w + int64_t{l.segment[s].base + own[s].begin + first - before} * l.k);
          const auto* const until = from + (last - first) * int64_t{bytes};
#pragma unroll 1
          while (from < until) {
            const auto piece = static_cast<uint32_t>(min(until - from, int64_t{KRAIT_SOLO_PIECE}));
            bring(to, from, piece, full, policy);
            to += piece;
            from += piece;
          }
        }
        before += size;
      }
    }
  }
}

#endif

constexpr int kOpWords = sizeof(SoloOp) / sizeof(uint4), kPackageWords = kMaxSoloPackages * sizeof(SoloPackage) / sizeof(uint4);

// One block a multiprocessor, all at once.
__global__ void __launch_bounds__(kSoloThreads + 32, 1) solo_kernel(const __grid_constant__ SoloProgram program) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  Shared& shared = here();
  if (threadIdx.x == 0) {
    unsigned long long before;
    asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], 1;" : "=l"(before) : "l"(program.counter) : "memory");
    for (int i = 0; i < kSoloTurns; ++i) {
      init_barrier(&shared.full[i], 1);
      init_barrier(&shared.empty[i], kWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    shared.pairs = program.pairs;
    shared.launch = static_cast<uint32_t>(before / gridDim.x) + 1;
  }
  // Read as ordinary memory, all at once: as constants they would come line by line.
  const uint4* from = reinterpret_cast<const uint4*>(program.ops);
  const uint4* packages = reinterpret_cast<const uint4*>(program.package);
  asm volatile("" : "+l"(from), "+l"(packages));
  for (int at = static_cast<int>(threadIdx.x); at < program.count * kOpWords; at += kSoloThreads + 32) reinterpret_cast<uint4*>(shared.ops)[at] = from[at];
  for (int at = static_cast<int>(threadIdx.x); at < kPackageWords; at += kSoloThreads + 32) reinterpret_cast<uint4*>(shared.package)[at] = packages[at];
  __syncthreads();
  if (threadIdx.x < kSoloThreads)
    work(program.count);
  else
    bring_weights(program.count);
#endif
}

}  // namespace krait::kernels::cuda::solo

namespace krait::kernels::cuda {

void run_solo(const SoloProgram& program, Device device, int blocks) {
  constexpr int kShared = static_cast<int>(sizeof(solo::Shared));
  static_assert(kShared <= 227 * 1024 && sizeof(SoloProgram) <= 32764, "more than a block, or a launch, may have");
  launch_cooperative(solo::solo_kernel, {.grid = blocks, .block = kSoloThreads + 32, .shared = kShared, .stream = current_stream(device)}, program);
}

}  // namespace krait::kernels::cuda
