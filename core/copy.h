#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
inline namespace core {

// What copy_, fill_ and arange need of a device. dst and src have equal shapes and live on this device; what arange
// writes is contiguous.
KRAIT_BACKENDS(void strided_copy(Tensor& dst, const Tensor& src); void fill(Tensor& dst, double value); void arange(Tensor& dst))

// Contiguous transfers in which at least one side is a CUDA device, in the order of its current stream.
namespace cuda {
void transfer(void* dst, Device dst_device, const void* src, Device src_device, int64_t bytes);
}

}  // namespace core
}  // namespace krait
