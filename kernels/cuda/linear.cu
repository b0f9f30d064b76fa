#include "kernels/cuda/linear_fused.h"
#include "kernels/cuda/linear_rows.h"
#include "kernels/linear.h"

#include "core/cuda/launch.cuh"
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/blas.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/epilogue.h"

namespace krait::kernels::cuda {

namespace {

struct Math {
  __device__ static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
  __device__ static double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
  __device__ static float erf(float x) { return erff(x); }
  __device__ static double erf(double x) { return ::erf(x); }
  __device__ static float exp(float x) { return expf(x); }
  __device__ static double exp(double x) { return ::exp(x); }
};

// For results that are rounded to bf16: 2 ulp of fp32 are far below that.
struct FastMath : Math {
  __device__ static float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
  __device__ static float exp(float x) { return __expf(x); }
};
template <class T>
using math_for = std::conditional_t<std::is_same_v<T, bf16>, FastMath, Math>;

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

// y = epilogue(y + bias), and y + bias to pre when given. Bound by memory: 2 (3 with pre) r n sizeof(T) bytes.
template <class T, Epilogue e, int V>
__global__ void finish_kernel(T* y, T* pre, const T* bias, int64_t count, int64_t n) {
  using A = accum_t<T>;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    Pack<T, V> v = reinterpret_cast<const Pack<T, V>*>(y)[i];
    const int64_t j = i * V % n;
#pragma unroll
    for (int q = 0; q < V; ++q)
      if (bias) v.at[q] = static_cast<T>(static_cast<A>(v.at[q]) + static_cast<A>(bias[j + q]));
    if (pre) reinterpret_cast<Pack<T, V>*>(pre)[i] = v;
#pragma unroll
    for (int q = 0; q < V; ++q) v.at[q] = static_cast<T>(activate<math_for<T>, e>(static_cast<A>(v.at[q])));
    reinterpret_cast<Pack<T, V>*>(y)[i] = v;
  }
}

constexpr int kChunk = 128;  // rows per block, summed by 8 warps
constexpr int kWarps = 8;

// Block (chunk of rows, 32 V columns): g = dy epilogue'(pre) unless there is no epilogue, and the sums over the
// chunk's rows to partial (chunks, n). Bound by memory: 1 to 3 times r n sizeof(T) bytes.
template <class T, Epilogue e, int V>
__global__ void __launch_bounds__(32 * kWarps)
    gradient_kernel(T* g, accum_t<T>* partial, const T* dy, const T* pre, int64_t rows, int64_t n) {
  using A = accum_t<T>;
  __shared__ A sums[kWarps][32 * V];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = (int64_t{blockIdx.y} * 32 + lane) * V, first = int64_t{blockIdx.x} * kChunk;
  const int64_t last = first + kChunk < rows ? first + kChunk : rows;
  A acc[V] = {};
  if (column < n) {  // V divides n
#pragma unroll 4
    for (int64_t r = first + warp; r < last; r += kWarps) {
      const int64_t at = r * n + column;
      Pack<T, V> d = *reinterpret_cast<const Pack<T, V>*>(dy + at);
      if constexpr (e != Epilogue::none) {
        const Pack<T, V> x = *reinterpret_cast<const Pack<T, V>*>(pre + at);
#pragma unroll
        for (int q = 0; q < V; ++q)
          d.at[q] = static_cast<T>(static_cast<A>(d.at[q]) * derivative<math_for<T>, e>(static_cast<A>(x.at[q])));
        *reinterpret_cast<Pack<T, V>*>(g + at) = d;
      }
#pragma unroll
      for (int q = 0; q < V; ++q) acc[q] += static_cast<A>(d.at[q]);
    }
  }
  if (!partial) return;  // the same for the whole block
#pragma unroll
  for (int q = 0; q < V; ++q) sums[warp][lane * V + q] = acc[q];
  __syncthreads();
  for (int j = threadIdx.x; j < 32 * V; j += 32 * kWarps) {
    const int64_t c = int64_t{blockIdx.y} * 32 * V + j;
    if (c >= n) break;
    A sum = A(0);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w][j];
    partial[int64_t{blockIdx.x} * n + c] = sum;
  }
}

constexpr int kTotalWarps = 32;

// Block of 32 columns: db (or +=) the sum of the partials, kTotalWarps interleaved parts joined in order. Bound by the
// latency of a thread's loads: eight at a time.
template <class D, class A>
__global__ void __launch_bounds__(32 * kTotalWarps)
    column_total_kernel(D* db, const A* partial, int64_t chunks, int64_t n, bool add) {
  __shared__ A sums[kTotalWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = int64_t{blockIdx.x} * 32 + lane;
  take_over();
  A sum = A(0);
  if (c < n)
#pragma unroll 8
    for (int64_t q = warp; q < chunks; q += kTotalWarps) sum += partial[q * n + c];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= n) return;
  A total = add ? static_cast<A>(db[c]) : A(0);
#pragma unroll
  for (int w = 0; w < kTotalWarps; ++w) total += sums[w][lane];
  db[c] = static_cast<D>(total);
}

// Calls f with the vector width that n and the addresses allow.
template <class T, class F>
void visit_width(bool wide, F&& f) {
  if (wide)
    f.template operator()<16 / sizeof(T)>();
  else
    f.template operator()<1>();
}

// What the library can do in the product itself: bias with any activation's input left for finish(), or everything.
bool fused(const Gemm& g, const Tensor& y, const Tensor& pre, const Tensor& bias, Epilogue epilogue) {
  Fusion f{.bias = bias.defined() ? bias.raw_data() : nullptr, .pre = pre.defined() ? pre.raw_data() : nullptr};
  if (epilogue == Epilogue::relu && !pre.defined()) {
    f.epilogue = bias.defined() ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_RELU;
  } else if (epilogue == Epilogue::gelu_tanh && y.dtype() == DType::bf16) {
    if (pre.defined()) {
      if (g.n % 8 != 0 || !aligned(pre)) return false;  // the library's rule for the saved input
      f.epilogue = bias.defined() ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    } else {
      f.epilogue = bias.defined() ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    }
  } else if (epilogue == Epilogue::none) {
    f.epilogue = CUBLASLT_EPILOGUE_BIAS;
  } else {
    return false;
  }
  return y.dtype() != DType::f64 && aligned(bias) && try_gemm(g, f);
}

template <Epilogue e>
void finish(Tensor& y, Tensor& pre, const Tensor& bias) {
  const int64_t n = y.size(1);
  visit_float(y.dtype(), [&]<class T>() {
    visit_width<T>(n % (16 / sizeof(T)) == 0 && aligned(y, pre), [&]<int V>() {
      const int64_t count = y.numel() / V;
      launch(finish_kernel<T, e, V>,
             {.grid = std::min<int64_t>(ceil_div(count, 256), 132 * 16), .stream = current_stream(y.device())},
             y.data<T>(), pre.defined() ? pre.data<T>() : nullptr, bias.defined() ? bias.data<T>() : nullptr, count,
             n);
    });
  });
}

template <class A>
void total(Tensor& db, bool add, const Tensor& partial) {
  const int64_t chunks = partial.size(0), n = partial.size(1);
  visit_float(db.dtype(), [&]<class D>() {
    launch_overlapped(column_total_kernel<D, A>,
                      {.grid = ceil_div(n, 32), .block = 32 * kTotalWarps, .stream = current_stream(db.device())},
                      db.data<D>(), partial.data<A>(), chunks, n, add);
  });
}

}  // namespace

void linear_forward(Tensor& y, Tensor& pre, const Gemm& g, const Tensor& bias, Epilogue epilogue) {
  if (!pre.defined() && linear_few_rows(y, g, bias, epilogue)) return;
  if (!bias.defined() && epilogue == Epilogue::none) return gemm(g);
  if (epilogue == Epilogue::none && fused_product(g, bias)) return;
  if (epilogue == Epilogue::gelu_tanh && pre.defined() && fused_gelu(y, pre, g, bias)) return;
  if (fused(g, y, pre, bias, epilogue)) return;
  gemm(g);
  visit_epilogue(epilogue, [&]<Epilogue e>() { finish<e>(y, pre, bias); });
}

void linear_gradient(Tensor& g, Tensor& db, const Tensor& dy, const Tensor& pre, Epilogue epilogue, bool add_db) {
  const int64_t rows = dy.size(0), n = dy.size(1), chunks = ceil_div(rows, kChunk);
  const Stream stream = current_stream(dy.device());
  visit_float(dy.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tensor partial = db.defined() ? empty({chunks, n}, dtype_of<A>, dy.device()) : Tensor{};
    A* sums = db.defined() ? partial.data<A>() : nullptr;
    const bool wide = n % (16 / sizeof(T)) == 0 && aligned(dy, pre, g);
    visit_epilogue(epilogue, [&]<Epilogue e>() {
      visit_width<T>(wide, [&]<int V>() {
        launch(gradient_kernel<T, e, V>,
               {.grid = chunks, .grid_y = ceil_div(n, 32 * V), .block = 32 * kWarps, .stream = stream},
               g.defined() ? g.data<T>() : nullptr, sums, dy.data<T>(), pre.defined() ? pre.data<T>() : nullptr, rows,
               n);
      });
    });
    if (db.defined()) total<A>(db, add_db, partial);
  });
}

void sum_chunks(Tensor& db, bool add, const Tensor& partial) { total<float>(db, add, partial); }

}  // namespace krait::kernels::cuda
