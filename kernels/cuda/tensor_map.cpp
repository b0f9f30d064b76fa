#include "kernels/cuda/tensor_map.h"

#include <cuda_runtime_api.h>

#include <array>

#include "core/cuda/check.h"
#include "core/error.h"

namespace krait::kernels::cuda {

namespace {

constexpr size_t kMaxDims = 5;

auto encode_function() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status));
    KRAIT_CHECK(status == cudaDriverEntryPointSuccess, "the NVIDIA driver has no tensor maps: update it");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function;
}

}  // namespace

CUtensorMap tensor_map(const void* data, DType dtype, std::span<const int64_t> sizes, std::span<const int64_t> strides,
                       std::span<const int> box, bool swizzled) {
  const size_t dims = sizes.size();
  KRAIT_CHECK(dims >= 1 && dims <= kMaxDims && strides.size() + 1 == dims && box.size() == dims,
              "tensor_map: {} sizes, {} strides, {} box sizes", dims, strides.size(), box.size());
  KRAIT_CHECK(dtype == DType::bf16 || dtype == DType::f32, "tensor_map: bf16 or fp32, not {}", dtype);
  std::array<cuuint64_t, kMaxDims> size{}, stride{};
  std::array<cuuint32_t, kMaxDims> boxes{}, steps{};
  for (size_t i = 0; i < dims; ++i) {
    size[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    if (i > 0) stride[i - 1] = static_cast<cuuint64_t>(strides[i - 1]) * static_cast<cuuint64_t>(size_of(dtype));
  }
  CUtensorMap map;
  const CUresult result = encode_function()(
      &map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
      static_cast<cuuint32_t>(dims), const_cast<void*>(data), size.data(), stride.data(), boxes.data(), steps.data(),
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  KRAIT_CHECK(result == CUDA_SUCCESS, "tensor_map: the driver refuses it (error {})", static_cast<int>(result));
  return map;
}

}  // namespace krait::kernels::cuda
