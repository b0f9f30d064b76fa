#pragma once
// Warpgroup products of sm_90a: 64 rows of a times n columns of b, 16 terms deep, bf16 with fp32 sums, operands in shared
// memory (a also in registers). All 128 threads of four warps, the first a multiple of four, call everything here.
//
// Operands in shared memory lie as a tensor map with 128-byte swizzle brings them: lines of 64 values (128 bytes), whose
// 16-byte pieces are permuted by line % 8, from an address that is a multiple of 1024. Two ways to read them:
// - along_lines: the terms (k) run along the lines and the lines are a's rows or b's columns: lines of 64 terms, 64 (a)
//   or n (b) lines. 16 terms further: + 32 bytes.
// - across_lines (template argument 1): the lines are the terms, each with 64 rows or columns; more than 64 lie in further
//   boxes, `box` bytes on. 16 terms further: + 2048 bytes.
// Accumulators: thread t of the 128 (warp w = t / 32, lane 4 g + c) has d[4 j + 0, 1] in row 16 w + g, columns 8 j + 2 c
// and + 1, and d[4 j + 2, 3] the same of row 16 w + g + 8. a in registers: the fragment of mma() (attention_mma.cuh).
// Source: PTX ISA 8.0 and later, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
#include <cstdint>

namespace krait::kernels::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Names an operand for wgmma; `shared` is its address in shared memory.
__device__ __forceinline__ uint64_t along_lines(uint32_t shared) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kGroupOf8Lines = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kGroupOf8Lines | uint64_t{1} << 16 | ((shared & 0x3ffff) >> 4);
}
__device__ __forceinline__ uint64_t across_lines(uint32_t shared, uint32_t box) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kGroupOf8Lines = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kGroupOf8Lines | static_cast<uint64_t>(box >> 4) << 16 | ((shared & 0x3ffff) >> 4);
}
/// The operand `bytes` further (a multiple of 16).
__device__ __forceinline__ uint64_t further(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }

/// Before the first product of a batch: registers (accumulators, a) written before are seen.
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// Closes the batch of the products issued since the last.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Until at most N batches are under way. Accumulators and a's registers of the others may be touched again; name them
/// with hold() so that the compiler keeps to it.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
template <int N>
__device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// wgmma(d, a, b, add): d (64, n) = a b (+ d when add), n twice the length of d. Asynchronous: see above.
#define KRAIT_D8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])

template <int kTransposeA = 0, int kTransposeB = 0>
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31 "
      "}, %32, %33, p, 1, 1, %35, %36;\n}"
      : KRAIT_D8(0), KRAIT_D8(8), KRAIT_D8(16), KRAIT_D8(24)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposeA), "n"(kTransposeB));
}
template <int kTransposeB = 0>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %37, 0;\n wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31 "
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
      : KRAIT_D8(0), KRAIT_D8(8), KRAIT_D8(16), KRAIT_D8(24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposeB));
}
template <int kTransposeA = 0, int kTransposeB = 0>
__device__ __forceinline__ void wgmma(float (&d)[48], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %50, 0;\n wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
      "%46, %47 "
      "}, %48, %49, p, 1, 1, %51, %52;\n}"
      : KRAIT_D8(0), KRAIT_D8(8), KRAIT_D8(16), KRAIT_D8(24), KRAIT_D8(32), KRAIT_D8(40)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposeA), "n"(kTransposeB));
}
template <int kTransposeB = 0>
__device__ __forceinline__ void wgmma(float (&d)[48], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %53, 0;\n wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
      "%46, %47 "
      "}, {%48, %49, %50, %51}, %52, p, 1, 1, %54;\n}"
      : KRAIT_D8(0), KRAIT_D8(8), KRAIT_D8(16), KRAIT_D8(24), KRAIT_D8(32), KRAIT_D8(40)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposeB));
}
template <int kTransposeA = 0, int kTransposeB = 0>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
      "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "
      "}, %64, %65, p, 1, 1, %67, %68;\n}"
      : KRAIT_D8(0), KRAIT_D8(8), KRAIT_D8(16), KRAIT_D8(24), KRAIT_D8(32), KRAIT_D8(40), KRAIT_D8(48), KRAIT_D8(56)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposeA), "n"(kTransposeB));
}
template <int kTransposeB = 0>
__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %69, 0;\n wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
      "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
      : KRAIT_D8(0), KRAIT_D8(8), KRAIT_D8(16), KRAIT_D8(24), KRAIT_D8(32), KRAIT_D8(40), KRAIT_D8(48), KRAIT_D8(56)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposeB));
}
template <int kTransposeA = 0, int kTransposeB = 0>
__device__ __forceinline__ void wgmma(float (&d)[96], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %98, 0;\n wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
      "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, "
      "%68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, "
      "%90, %91, %92, %93, %94, %95 "
      "}, %96, %97, p, 1, 1, %99, %100;\n}"
      : KRAIT_D8(0), KRAIT_D8(8), KRAIT_D8(16), KRAIT_D8(24), KRAIT_D8(32), KRAIT_D8(40), KRAIT_D8(48), KRAIT_D8(56),
        KRAIT_D8(64), KRAIT_D8(72), KRAIT_D8(80), KRAIT_D8(88)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposeA), "n"(kTransposeB));
}
template <int kTransposeB = 0>
__device__ __forceinline__ void wgmma(float (&d)[96], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %101, 0;\n wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
      "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, "
      "%68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, "
      "%90, %91, %92, %93, %94, %95 "
      "}, {%96, %97, %98, %99}, %100, p, 1, 1, %102;\n}"
      : KRAIT_D8(0), KRAIT_D8(8), KRAIT_D8(16), KRAIT_D8(24), KRAIT_D8(32), KRAIT_D8(40), KRAIT_D8(48), KRAIT_D8(56),
        KRAIT_D8(64), KRAIT_D8(72), KRAIT_D8(80), KRAIT_D8(88)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposeB));
}
template <int kTransposeA = 0, int kTransposeB = 0>
__device__ __forceinline__ void wgmma(float (&d)[128], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %130, 0;\n wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
      "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, "
      "%68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, "
      "%90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "
      "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127 "
      "}, %128, %129, p, 1, 1, %131, %132;\n}"
      : KRAIT_D8(0), KRAIT_D8(8), KRAIT_D8(16), KRAIT_D8(24), KRAIT_D8(32), KRAIT_D8(40), KRAIT_D8(48), KRAIT_D8(56),
        KRAIT_D8(64), KRAIT_D8(72), KRAIT_D8(80), KRAIT_D8(88), KRAIT_D8(96), KRAIT_D8(104), KRAIT_D8(112),
        KRAIT_D8(120)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposeA), "n"(kTransposeB));
}
template <int kTransposeB = 0>
__device__ __forceinline__ void wgmma(float (&d)[128], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %133, 0;\n wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
      "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, "
      "%68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, "
      "%90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "
      "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127 "
      "}, {%128, %129, %130, %131}, %132, p, 1, 1, %134;\n}"
      : KRAIT_D8(0), KRAIT_D8(8), KRAIT_D8(16), KRAIT_D8(24), KRAIT_D8(32), KRAIT_D8(40), KRAIT_D8(48), KRAIT_D8(56),
        KRAIT_D8(64), KRAIT_D8(72), KRAIT_D8(80), KRAIT_D8(88), KRAIT_D8(96), KRAIT_D8(104), KRAIT_D8(112),
        KRAIT_D8(120)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposeB));
}

#undef KRAIT_D8

/// Registers a thread of these four warps gives back or takes (multiples of 8, 24 to 256).
template <int N>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

#endif

}  // namespace krait::kernels::cuda
