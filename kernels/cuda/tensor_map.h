#pragma once
#include <cuda.h>

#include <cstdint>
#include <span>

#include "core/dtype.h"

namespace krait::kernels::cuda {

/// A tensor in device memory for bulk copies (tma.cuh): sizes and strides innermost first, in elements, the innermost
/// stride 1 and not among the strides. A box of `box` elements has its innermost line of at most 128 bytes when swizzled:
/// then pieces of 16 bytes of line r change places by r % 8, what wgmma.cuh reads. The address and all strides in bytes
/// must be multiples of 16. bf16 or fp32.
CUtensorMap tensor_map(const void* data, DType dtype, std::span<const int64_t> sizes, std::span<const int64_t> strides,
                       std::span<const int> box, bool swizzled = true);

}  // namespace krait::kernels::cuda
