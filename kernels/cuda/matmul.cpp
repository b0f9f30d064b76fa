#include "kernels/matmul.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <mutex>

#include "core/stream.h"
#include "kernels/cuda/blas.h"
#include "kernels/cuda/linear_fused.h"

namespace krait::kernels::cuda {

void check(cublasStatus_t status, std::source_location where) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw_error(fmt::format("cuBLASLt error {} ({}) at {}:{}", cublasLtGetStatusName(status),
                          cublasLtGetStatusString(status), where.file_name(), where.line()));
}

namespace {

constexpr size_t kWorkspace = size_t{64} << 20;
constexpr uint32_t kMaxAlignment = 256;

cudaDataType_t type_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return CUDA_R_32F;
    case DType::f64: return CUDA_R_64F;
    case DType::bf16: return CUDA_R_16BF;
    default: throw_error(fmt::format("matmul: {} is not computed in", dtype));
  }
}

template <class T>
void set(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  check(cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof(value)));
}

// Descriptors and the chosen algorithm of one problem. They live as long as the process: the library's handle must
// not be destroyed after the driver has shut down.
struct Plan {
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;
  cublasLtMatmulAlgo_t algo{};
  bool supported = false;
};

struct Library {
  std::mutex mutex;
  cublasLtHandle_t handle = nullptr;
  Tensor workspace;  // shared by all products of the device: they are queued on one stream
  std::map<std::array<int64_t, 22>, Plan> plans;
};

Library& library_of(Device device) {
  static std::mutex mutex;
  static auto* all = new std::map<int, std::unique_ptr<Library>>;
  const std::lock_guard lock(mutex);
  auto& lib = (*all)[device.index];
  if (!lib) {
    auto fresh = std::make_unique<Library>();
    current_stream(device);  // makes the device current
    check(cublasLtCreate(&fresh->handle));
    fresh->workspace = empty({static_cast<int64_t>(kWorkspace)}, DType::u8, device);
    lib = std::move(fresh);
  }
  return *lib;
}

// The power of two that every batch entry's address is a multiple of.
uint32_t alignment_of(const void* p, int64_t batch_bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(batch_bytes) | kMaxAlignment;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

cublasLtMatrixLayout_t layout(DType dtype, int64_t rows, int64_t columns, int64_t ld, int64_t batch, int64_t stride) {
  cublasLtMatrixLayout_t l = nullptr;
  check(cublasLtMatrixLayoutCreate(&l, type_of(dtype), static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), ld));
  const auto count = static_cast<int32_t>(batch);
  check(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof(count)));
  check(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof(stride)));
  return l;
}

struct Alignments {
  uint32_t a, b, c;
};

// The library is column-major: it computes c^T (n, m) = op(b)^T op(a)^T, so its first operand is our b. A row-major
// matrix is its own transpose in column-major, which cancels: the transposition flags stay as they are.
Plan make_plan(Library& lib, const Gemm& g, const Fusion& fusion, const Alignments& align, bool with_tf32) {
  Plan plan;
  const bool wide = g.dtype == DType::f64;
  const bool fast = g.dtype == DType::f32 && with_tf32;
  const cublasComputeType_t compute = wide ? CUBLAS_COMPUTE_64F
                                           : (fast ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F);
  check(cublasLtMatmulDescCreate(&plan.desc, compute, wide ? CUDA_R_64F : CUDA_R_32F));
  set(plan.desc, CUBLASLT_MATMUL_DESC_TRANSA, g.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(plan.desc, CUBLASLT_MATMUL_DESC_TRANSB, g.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(plan.desc, CUBLASLT_MATMUL_DESC_EPILOGUE, fusion.epilogue);
  // The pointers are set again for every call; the choice of an algorithm wants to see them.
  if (fusion.bias) {
    set(plan.desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, fusion.bias);
    set(plan.desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type_of(g.c_dtype));
  }
  if (fusion.pre) {
    set(plan.desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, fusion.pre);
    set(plan.desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, g.n);
  }
  plan.a = g.trans_b ? layout(g.dtype, g.k, g.n, g.ldb, g.batch, g.batch_b)
                     : layout(g.dtype, g.n, g.k, g.ldb, g.batch, g.batch_b);
  plan.b = g.trans_a ? layout(g.dtype, g.m, g.k, g.lda, g.batch, g.batch_a)
                     : layout(g.dtype, g.k, g.m, g.lda, g.batch, g.batch_a);
  plan.c = layout(g.c_dtype, g.n, g.m, g.ldc, g.batch, g.batch_c);

  cublasLtMatmulPreference_t preference = nullptr;
  check(cublasLtMatmulPreferenceCreate(&preference));
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)));
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspace);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, align.b);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, align.a);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, align.c);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, align.c);
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(lib.handle, plan.desc, plan.a, plan.b, plan.c, plan.c,
                                                               preference, 1, &found, &count);
  check(cublasLtMatmulPreferenceDestroy(preference));
  if (status != CUBLAS_STATUS_NOT_SUPPORTED && status != CUBLAS_STATUS_INVALID_VALUE) check(status);
  plan.supported = status == CUBLAS_STATUS_SUCCESS && count > 0 && found.state == CUBLAS_STATUS_SUCCESS;
  plan.algo = found.algo;
  return plan;
}

}  // namespace

bool try_gemm(const Gemm& g, const Fusion& fusion) {
  KRAIT_CHECK(g.batch <= INT32_MAX, "matmul: a batch of {} is beyond the library's 32 bits", g.batch);
  Library& lib = library_of(g.device);
  const int64_t in = size_of(g.dtype), out = size_of(g.c_dtype);
  const Alignments align{alignment_of(g.a, g.batch_a * in), alignment_of(g.b, g.batch_b * in),
                         alignment_of(g.c, g.batch_c * out)};
  const bool with_tf32 = tf32();
  const std::array<int64_t, 22> key{static_cast<int64_t>(g.dtype), static_cast<int64_t>(g.c_dtype), g.m, g.n, g.k,
                                    g.batch, g.trans_a, g.trans_b, g.lda, g.ldb, g.ldc, g.batch_a, g.batch_b,
                                    g.batch_c, align.a, align.b, align.c, fusion.epilogue, fusion.bias != nullptr,
                                    fusion.pre != nullptr,
                                    g.beta != 0.0, with_tf32};
  const std::lock_guard lock(lib.mutex);
  auto it = lib.plans.find(key);
  if (it == lib.plans.end()) it = lib.plans.emplace(key, make_plan(lib, g, fusion, align, with_tf32)).first;
  const Plan& plan = it->second;
  if (!plan.supported) return false;
  if (fusion.bias) set(plan.desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, fusion.bias);
  if (fusion.pre) set(plan.desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, fusion.pre);
  const auto alpha = static_cast<float>(g.alpha), beta = static_cast<float>(g.beta);
  const bool wide = g.dtype == DType::f64;
  check(cublasLtMatmul(lib.handle, plan.desc, wide ? static_cast<const void*>(&g.alpha) : &alpha, g.b, plan.a, g.a,
                       plan.b, wide ? static_cast<const void*>(&g.beta) : &beta, g.c, plan.c, g.c, plan.c, &plan.algo,
                       lib.workspace.raw_data(), kWorkspace,
                       static_cast<cudaStream_t>(current_stream(g.device).handle)));
  return true;
}

void gemm(const Gemm& g) {
  if (fused_product(g, {})) return;
  KRAIT_CHECK(try_gemm(g, {}),
              "cuBLASLt has no kernel for {} {} x {} x {} (batch {}, transposed {} {}, rows {} {} {} apart)", g.dtype,
              g.m, g.k, g.n, g.batch, g.trans_a, g.trans_b, g.lda, g.ldb, g.ldc);
}

}  // namespace krait::kernels::cuda
