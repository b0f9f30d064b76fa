#include "kernels/cuda/kan_dense.h"

#include "core/copy.h"
#include "kernels/cuda/kan.cuh"
#include "kernels/matmul.h"

// y = bases W^T, d bases = dy W, dW = dy^T bases with bases (rows, columns) in memory: for cubic splines on 5
// intervals 36 bytes of them are written and read for each input of a row, which costs less than making them again in
// every tile of outputs. Bound by memory for the bases and by the matrix rate for the products.
namespace krait::kernels::cuda {

namespace {

constexpr int64_t kChunkBytes = int64_t{256} << 20;
constexpr int64_t kShared = 48 << 10;
constexpr int kMaxThreads = 256;

// Threads of a block whose columns fit into shared memory; fewer than a warp: they are written one by one.
template <class A>
int threads_of(int per_input) {
  const int64_t fit = kShared / (int64_t{per_input} * static_cast<int64_t>(sizeof(A)));
  return static_cast<int>(std::min<int64_t>(kMaxThreads, fit / 32 * 32));
}

// The columns of one input of one row.
template <class T, int K>
__device__ void put_columns(accum_t<T>* to, T value, int64_t input, const KanView<T>& v) {
  using A = accum_t<T>;
  const A at = static_cast<A>(value);
  LocalBasis<A, K> basis;
  basis.template compute<false>(at, v.grid + input * v.knots, v.knots, v.order);
  for (int g = 0; g < v.bases; ++g) to[g] = A(0);
  const int last = K >= 0 ? K : v.order;
#pragma unroll
  for (int j = 0; j <= (K >= 0 ? K : last); ++j) {
    const int g = basis.first + j;
    if (g >= 0 && g < v.bases) to[g] = basis.value[j];
  }
  if (v.per_input > v.bases) to[v.bases] = silu_value(at);
}

// bases (rows, columns): a thread for each (row, input), neighbours side by side; through shared memory, so that
// memory sees whole lines.
template <class T, int K, bool kStaged>
__global__ void __launch_bounds__(kMaxThreads)
    fill_bases_kernel(accum_t<T>* bases, const T* x, int64_t count, KanView<T> v) {
  using A = accum_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  A* tile = reinterpret_cast<A*>(shared);
  const int64_t first = int64_t{blockIdx.x} * blockDim.x, q = first + threadIdx.x;
  if constexpr (!kStaged) {
    if (q < count) put_columns<T, K>(bases + q * v.per_input, x[q], q % v.inputs, v);
    return;
  }
  if (q < count) put_columns<T, K>(tile + threadIdx.x * v.per_input, x[q], q % v.inputs, v);
  __syncthreads();
  const int64_t here = count - first < blockDim.x ? count - first : blockDim.x;
  for (int j = threadIdx.x; j < here * v.per_input; j += blockDim.x) bases[first * v.per_input + j] = tile[j];
}

// W (outputs, columns): the weights of the edges as KanView gives them. A thread for each.
template <class T>
__global__ void fill_weights_kernel(accum_t<T>* w, KanView<T> v) {
  const int64_t q = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, edge = q / v.per_input;
  if (edge >= v.inputs * v.outputs) return;
  w[q] = v.weight(edge / v.inputs, edge % v.inputs, static_cast<int>(q - edge * v.per_input));
}

// dx from d bases: the slopes of the live bases and of silu.
template <class T, int K>
__global__ void input_gradient_kernel(T* dx, const accum_t<T>* dbases, const T* x, int64_t count, KanView<T> v) {
  using A = accum_t<T>;
  const int64_t q = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (q >= count) return;
  const A at = static_cast<A>(x[q]);
  LocalBasis<A, K> basis;
  basis.template compute<true>(at, v.grid + q % v.inputs * v.knots, v.knots, v.order);
  const A* d = dbases + q * v.per_input;
  A sum = v.per_input > v.bases ? silu_slope(at) * d[v.bases] : A(0);
  const int last = K >= 0 ? K : v.order;
#pragma unroll
  for (int j = 0; j <= (K >= 0 ? K : last); ++j) {
    const int g = basis.first + j;
    if (g >= 0 && g < v.bases) sum += basis.slope[j] * d[g];
  }
  dx[q] = static_cast<T>(sum);
}

template <class T, int K>
void fill_bases(Tensor& bases, const Tensor& x, const KanView<T>& v, Stream stream) {
  using A = accum_t<T>;
  const int64_t count = x.numel();
  const int threads = threads_of<A>(v.per_input);
  if (threads >= 32)
    launch(fill_bases_kernel<T, K, true>,
           {.grid = ceil_div(count, threads), .block = threads,
            .shared = int64_t{threads} * v.per_input * static_cast<int64_t>(sizeof(A)), .stream = stream},
           bases.data<A>(), x.data<T>(), count, v);
  else
    launch(fill_bases_kernel<T, K, false>, {.grid = ceil_div(count, 128), .block = 128, .stream = stream},
           bases.data<A>(), x.data<T>(), count, v);
}

template <class T>
Tensor edge_weights(const KanView<T>& v, Device device, Stream stream) {
  const Tensor w = empty({v.outputs, v.columns()}, dtype_of<accum_t<T>>, device);
  launch(fill_weights_kernel<T>, {.grid = ceil_div(v.outputs * v.columns(), 256), .block = 256, .stream = stream},
         w.data<accum_t<T>>(), v);
  return w;
}

void product(Tensor& c, const Tensor& a, const Tensor& b, bool trans_a, bool trans_b, double beta = 0.0) {
  Gemm g = gemm_of(c, a, b, trans_a, trans_b);
  g.beta = beta;
  gemm(g);
}

// f(first row, end) for chunks whose bases take at most kChunkBytes.
template <class F>
void in_chunks(int64_t rows, int64_t columns, DType dtype, F&& f) {
  const int64_t most = std::max<int64_t>(128, kChunkBytes / (columns * size_of(dtype)) / 128 * 128);
  for (int64_t first = 0; first < rows; first += most) f(first, std::min(rows, first + most));
}

}  // namespace

bool kan_dense_pays(int64_t rows, const KanParameters& p) {
  // kan.cu works off whole tiles of outputs: few of them cost it what a tile does.
  const int64_t columns = p.spline.size(1) * (p.spline.size(2) + 1), outputs = ceil_div(p.spline.size(0), kKanTile) * kKanTile;
  return static_cast<double>(rows) * static_cast<double>(columns) * static_cast<double>(outputs) >= double(1 << 28);
}

void kan_forward_dense(Tensor& y, const Tensor& x, const KanParameters& p) {
  const Stream stream = current_stream(x.device());
  visit_kan(x.dtype(), p.order, [&]<class T, int K>() {
    constexpr DType a = dtype_of<accum_t<T>>;
    const KanView<T> v = view_of<T>(p);
    const Tensor w = edge_weights(v, x.device(), stream);
    in_chunks(x.size(0), v.columns(), a, [&](int64_t first, int64_t end) {
      Tensor bases = empty({end - first, v.columns()}, a, x.device()), out = y.slice(0, first, end);
      fill_bases<T, K>(bases, x.slice(0, first, end), v, stream);
      if (y.dtype() == a) return product(out, bases, w, false, true);
      Tensor wide = empty(out.shape(), a, x.device());
      product(wide, bases, w, false, true);
      copy_(out, wide);
    });
  });
}

void kan_backward_dense(KanGrad& grad, const Tensor& dy_in, const Tensor& x, const KanParameters& p) {
  const Stream stream = current_stream(x.device());
  visit_kan(x.dtype(), p.order, [&]<class T, int K>() {
    constexpr DType a = dtype_of<accum_t<T>>;
    const KanView<T> v = view_of<T>(p);
    const Tensor dy = dy_in.to(a);
    const Tensor w = grad.dx.defined() ? edge_weights(v, x.device(), stream) : Tensor{};
    Tensor dw = grad.spline.defined() ? empty({1, v.outputs, v.columns()}, a, x.device()) : Tensor{};
    in_chunks(x.size(0), v.columns(), a, [&](int64_t first, int64_t end) {
      const Tensor rows = x.slice(0, first, end), upstream = dy.slice(0, first, end);
      Tensor columns = empty({end - first, v.columns()}, a, x.device());
      if (dw.defined()) {
        fill_bases<T, K>(columns, rows, v, stream);
        Tensor total = dw.select(0, 0);
        product(total, upstream, columns, true, false, first > 0 ? 1.0 : 0.0);
      }
      if (!grad.dx.defined()) return;
      product(columns, upstream, w, false, false);
      launch(input_gradient_kernel<T, K>, {.grid = ceil_div(rows.numel(), 256), .stream = stream},
             grad.dx.slice(0, first, end).template data<T>(), columns.data<accum_t<T>>(), rows.template data<T>(),
             rows.numel(), v);
    });
    if (dw.defined()) finish_weight_gradient<T>(grad, dw, v, stream);
  });
}

}  // namespace krait::kernels::cuda
