#include "kernels/cuda/kan.cuh"
#include "kernels/cuda/kan_dense.h"

// Bases are made in shared memory, one tile of rows and columns at a time, and multiplied with the weights there:
// y = bases weights, d bases = dy weights^T, d weights = bases^T dy, each a product of 64 x 64 tiles with 4 x 4
// results per thread. Bound by shared memory loads (8 for 16 products); dense in the columns of an input, so a large
// grid computes (G+k)/(k+1) times more than it needs.
namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 256, kTile = kKanTile, kPitch = kTile + 1;  // one more column: no bank conflicts

template <class A>
constexpr int64_t tiles_bytes(int count) {
  return int64_t{count} * kTile * kPitch * static_cast<int64_t>(sizeof(A));
}

// tile[row][column] = the bases (and silu) of x at rows row0 ..., columns of the chunk. The caller synchronises
// before and after.
template <class T, int K>
__device__ void fill_bases(accum_t<T>* tile, const T* x, int64_t row0, int64_t rows, const KanView<T>& v,
                           const KanChunk& chunk) {
  using A = accum_t<T>;
  for (int q = threadIdx.x; q < kTile * kPitch; q += kThreads) tile[q] = A(0);
  __syncthreads();
  for (int q = threadIdx.x; q < kTile * chunk.inputs; q += kThreads) {
    const int row = q / chunk.inputs, local = q % chunk.inputs;
    if (row0 + row >= rows) break;
    const int64_t i = chunk.input + local;
    const A at = static_cast<A>(x[(row0 + row) * v.inputs + i]);
    LocalBasis<A, K> basis;
    basis.template compute<false>(at, v.grid + i * v.knots, v.knots, v.order);
    A* to = tile + row * kPitch + local * v.per_input - chunk.g0;
    const int end = min(v.bases, chunk.g0 + kTile);
    const int last = K >= 0 ? K : v.order;
#pragma unroll
    for (int j = 0; j <= (K >= 0 ? K : last); ++j) {
      const int g = basis.first + j;
      if (g >= chunk.g0 && g < end) to[g] = basis.value[j];
    }
    if (v.per_input > v.bases && v.bases >= chunk.g0 && v.bases < chunk.g0 + kTile) to[v.bases] = silu_value(at);
  }
}

// tile[output][column] = weights of the chunk's edges.
template <class T>
__device__ void load_weights(accum_t<T>* tile, int64_t o0, const KanView<T>& v, const KanChunk& chunk) {
  for (int q = threadIdx.x; q < kTile * chunk.width; q += kThreads) {
    const int o = q / chunk.width, c = q % chunk.width;
    const int local = c / v.per_input, g = chunk.g0 + c - local * v.per_input;
    tile[o * kPitch + c] = o0 + o < v.outputs ? v.weight(o0 + o, chunk.input + local, g) : accum_t<T>(0);
  }
}

// tile[row][output] = dy, zeros beyond the ends.
template <class T>
__device__ void load_upstream(accum_t<T>* tile, const T* dy, int64_t row0, int64_t rows, int64_t o0, int64_t outputs) {
  for (int q = threadIdx.x; q < kTile * kTile; q += kThreads) {
    const int row = q / kTile, o = q % kTile;
    tile[row * kPitch + o] = row0 + row < rows && o0 + o < outputs
                                 ? static_cast<accum_t<T>>(dy[(row0 + row) * outputs + o0 + o])
                                 : accum_t<T>(0);
  }
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads)
    kan_forward_kernel(T* y, const T* x, int64_t rows, KanView<T> v, KanChunks chunks) {
  using A = accum_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  A* bases = reinterpret_cast<A*>(shared);
  A* weights = bases + kTile * kPitch;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int64_t row0 = int64_t{blockIdx.x} * kTile, o0 = int64_t{blockIdx.y} * kTile;
  A acc[4][4] = {};
  for (int64_t c = 0; c < chunks.count(); ++c) {
    const KanChunk chunk = chunk_at(chunks, c);
    __syncthreads();  // the tiles of the chunk before have been read
    fill_bases<T, K>(bases, x, row0, rows, v, chunk);
    load_weights<T>(weights, o0, v, chunk);
    __syncthreads();
    for (int j = 0; j < chunk.width; ++j) {
      A b[4], w[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        b[q] = bases[(ty + 16 * q) * kPitch + j];
        w[q] = weights[(tx + 16 * q) * kPitch + j];
      }
#pragma unroll
      for (int p = 0; p < 4; ++p)
#pragma unroll
        for (int q = 0; q < 4; ++q) acc[p][q] += b[p] * w[q];
    }
  }
#pragma unroll
  for (int p = 0; p < 4; ++p)
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int64_t row = row0 + ty + 16 * p, o = o0 + tx + 16 * q;
      if (row < rows && o < v.outputs) y[row * v.outputs + o] = static_cast<T>(acc[p][q]);
    }
}

// One block: 64 rows, the inputs of one group. d bases in a tile, then contracted with the bases' derivatives.
template <class T, int K>
__global__ void __launch_bounds__(kThreads)
    kan_input_gradient_kernel(T* dx, const T* dy, const T* x, int64_t rows, KanView<T> v, KanChunks chunks) {
  using A = accum_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  A* upstream = reinterpret_cast<A*>(shared);  // then d bases
  A* weights = upstream + kTile * kPitch;
  A* sums = weights + kTile * kPitch;  // [row][input of the group], each owned by one thread
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int64_t groups = chunks.groups(), row0 = int64_t{blockIdx.x} / groups * kTile,
                group = int64_t{blockIdx.x} % groups;
  for (int q = threadIdx.x; q < kTile * chunks.together; q += kThreads) sums[q] = A(0);
  for (int piece = 0; piece < chunks.pieces; ++piece) {
    const KanChunk chunk = chunk_at(chunks, group * chunks.pieces + piece);
    A acc[4][4] = {};
    for (int64_t o0 = 0; o0 < v.outputs; o0 += kTile) {
      __syncthreads();
      load_upstream<T>(upstream, dy, row0, rows, o0, v.outputs);
      load_weights<T>(weights, o0, v, chunk);
      __syncthreads();
      for (int o = 0; o < kTile; ++o) {
        A u[4], w[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          u[q] = upstream[(ty + 16 * q) * kPitch + o];
          w[q] = tx + 16 * q < chunk.width ? weights[o * kPitch + tx + 16 * q] : A(0);
        }
#pragma unroll
        for (int p = 0; p < 4; ++p)
#pragma unroll
          for (int q = 0; q < 4; ++q) acc[p][q] += u[p] * w[q];
      }
    }
    __syncthreads();
#pragma unroll
    for (int p = 0; p < 4; ++p)
#pragma unroll
      for (int q = 0; q < 4; ++q) upstream[(ty + 16 * p) * kPitch + tx + 16 * q] = acc[p][q];
    __syncthreads();
    for (int q = threadIdx.x; q < kTile * chunk.inputs; q += kThreads) {
      const int row = q / chunk.inputs, local = q % chunk.inputs;
      if (row0 + row >= rows) break;
      const int64_t i = chunk.input + local;
      const A at = static_cast<A>(x[(row0 + row) * v.inputs + i]);
      LocalBasis<A, K> basis;
      basis.template compute<true>(at, v.grid + i * v.knots, v.knots, v.order);
      const A* d = upstream + row * kPitch + local * v.per_input - chunk.g0;
      const int end = min(v.bases, chunk.g0 + kTile), last = K >= 0 ? K : v.order;
      A sum = A(0);
#pragma unroll
      for (int j = 0; j <= (K >= 0 ? K : last); ++j) {
        const int g = basis.first + j;
        if (g >= chunk.g0 && g < end) sum += basis.slope[j] * d[g];
      }
      if (v.per_input > v.bases && v.bases >= chunk.g0 && v.bases < chunk.g0 + kTile)
        sum += silu_slope(at) * d[v.bases];
      sums[q] += sum;
      if (piece + 1 == chunks.pieces) dx[(row0 + row) * v.inputs + i] = static_cast<T>(sums[q]);
    }
  }
}

// One block: a chunk of columns, 64 outputs, the rows of one split.
template <class T, int K>
__global__ void __launch_bounds__(kThreads)
    kan_weight_gradient_kernel(accum_t<T>* partial, const T* dy, const T* x, int64_t rows, int64_t split_rows,
                               KanView<T> v, KanChunks chunks) {
  using A = accum_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  A* bases = reinterpret_cast<A*>(shared);
  A* upstream = bases + kTile * kPitch;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const KanChunk chunk = chunk_at(chunks, blockIdx.x);
  const int64_t o0 = int64_t{blockIdx.y} * kTile, first = int64_t{blockIdx.z} * split_rows;
  const int64_t last = first + split_rows < rows ? first + split_rows : rows;
  A acc[4][4] = {};
  for (int64_t row0 = first; row0 < last; row0 += kTile) {
    __syncthreads();
    fill_bases<T, K>(bases, x, row0, rows, v, chunk);
    load_upstream<T>(upstream, dy, row0, rows, o0, v.outputs);
    __syncthreads();
    for (int row = 0; row < kTile; ++row) {
      A u[4], b[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        u[q] = upstream[row * kPitch + ty + 16 * q];
        b[q] = bases[row * kPitch + tx + 16 * q];
      }
#pragma unroll
      for (int p = 0; p < 4; ++p)
#pragma unroll
        for (int q = 0; q < 4; ++q) acc[p][q] += u[p] * b[q];
    }
  }
  const int64_t columns = v.columns();
  A* to = partial + int64_t{blockIdx.z} * v.outputs * columns + chunk.input * v.per_input + chunk.g0;
#pragma unroll
  for (int p = 0; p < 4; ++p)
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int64_t o = o0 + ty + 16 * p;
      const int c = tx + 16 * q;
      if (o < v.outputs && c < chunk.width) to[o * columns + c] = acc[p][q];
    }
}

constexpr int kFinishLanes = 16;  // threads of an edge, neighbours along its columns

template <class T>
__global__ void __launch_bounds__(kThreads)
    kan_finish_kernel(accum_t<T>* dspline, accum_t<T>* dscaler, accum_t<T>* dbase, const accum_t<T>* partial,
                      int64_t splits, KanView<T> v) {
  using A = accum_t<T>;
  const int64_t edge = int64_t{blockIdx.x} * (kThreads / kFinishLanes) + threadIdx.x / kFinishLanes;
  const int lane = threadIdx.x % kFinishLanes;
  const bool here = edge < v.inputs * v.outputs;
  A along = A(0);
  if (here) {
    const A scale = v.scaler != nullptr ? static_cast<A>(v.scaler[edge]) : A(1);
    const int64_t stride = v.outputs * v.columns();
    for (int g = lane; g < v.per_input; g += kFinishLanes) {
      const A* from = partial + edge * v.per_input + g;
      A d = A(0);
      for (int64_t s = 0; s < splits; ++s) d += from[s * stride];
      if (g < v.bases) {
        dspline[edge * v.bases + g] = scale * d;
        along += static_cast<A>(v.spline[edge * v.bases + g]) * d;
      } else {
        dbase[edge] = d;
      }
    }
  }
  for (int w = kFinishLanes / 2; w > 0; w /= 2) along += __shfl_xor_sync(0xffffffffu, along, w);
  if (here && lane == 0 && dscaler != nullptr) dscaler[edge] = along;
}

template <class T, int K>
__global__ void bspline_basis_kernel(T* basis, const T* x, const T* grid, int64_t rows, int64_t inputs, int knots,
                                     int bases, int order, bool derivative) {
  const int64_t q = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (q >= rows * inputs) return;
  LocalBasis<T, K> local;
  local.template compute<true>(x[q], grid + q % inputs * knots, knots, order);
  for (int j = 0; j <= order; ++j) {
    const int g = local.first + j;
    if (g >= 0 && g < bases) basis[q * bases + g] = derivative ? local.slope[j] : local.value[j];
  }
}

}  // namespace

template <class T>
void finish_weight_gradient(KanGrad& grad, const Tensor& partial, const KanView<T>& v, Stream stream) {
  using A = accum_t<T>;
  const auto data = [](const Tensor& t) -> A* { return t.defined() ? t.data<A>() : nullptr; };
  launch(kan_finish_kernel<T>, {.grid = ceil_div(v.inputs * v.outputs, kThreads / kFinishLanes), .block = kThreads, .stream = stream},
         data(grad.spline), data(grad.scaler), data(grad.base), partial.data<A>(), partial.size(0), v);
}
template void finish_weight_gradient<float>(KanGrad&, const Tensor&, const KanView<float>&, Stream);
template void finish_weight_gradient<double>(KanGrad&, const Tensor&, const KanView<double>&, Stream);
template void finish_weight_gradient<bf16>(KanGrad&, const Tensor&, const KanView<bf16>&, Stream);

void kan_forward(Tensor& y, const Tensor& x, const KanParameters& p) {
  if (kan_dense_pays(x.size(0), p)) return kan_forward_dense(y, x, p);
  const int64_t rows = x.size(0);
  visit_kan(x.dtype(), p.order, [&]<class T, int K>() {
    const KanView<T> v = view_of<T>(p);
    launch(kan_forward_kernel<T, K>,
           {.grid = ceil_div(rows, kTile), .grid_y = ceil_div(v.outputs, kTile), .block = kThreads,
            .shared = tiles_bytes<accum_t<T>>(2), .stream = current_stream(x.device())},
           y.data<T>(), x.data<T>(), rows, v, chunks_of(v));
  });
}

void kan_backward(KanGrad& grad, const Tensor& dy, const Tensor& x, const KanParameters& p) {
  if (kan_dense_pays(x.size(0), p)) return kan_backward_dense(grad, dy, x, p);
  const int64_t rows = x.size(0);
  const Stream stream = current_stream(x.device());
  visit_kan(x.dtype(), p.order, [&]<class T, int K>() {
    using A = accum_t<T>;
    const KanView<T> v = view_of<T>(p);
    const KanChunks chunks = chunks_of(v);
    if (grad.dx.defined())
      launch(kan_input_gradient_kernel<T, K>,
             {.grid = ceil_div(rows, kTile) * chunks.groups(), .block = kThreads,
              .shared = tiles_bytes<A>(2) + int64_t{kTile} * chunks.together * static_cast<int64_t>(sizeof(A)),
              .stream = stream},
             grad.dx.data<T>(), dy.data<T>(), x.data<T>(), rows, v, chunks);
    if (!grad.spline.defined()) return;
    // As many splits of the rows as fill a large GPU, of at least 512 rows each; the shapes alone decide.
    const int64_t tiles = chunks.count() * ceil_div(v.outputs, kTile);
    const int64_t wanted = std::min(ceil_div(264, tiles), ceil_div(rows, 512));
    const int64_t split_rows = ceil_div(ceil_div(rows, wanted), kTile) * kTile, splits = ceil_div(rows, split_rows);
    const Tensor partial = empty({splits, v.outputs, v.columns()}, dtype_of<A>, x.device());
    launch(kan_weight_gradient_kernel<T, K>,
           {.grid = chunks.count(), .grid_y = ceil_div(v.outputs, kTile), .grid_z = splits, .block = kThreads,
            .shared = tiles_bytes<A>(2), .stream = stream},
           partial.data<A>(), dy.data<T>(), x.data<T>(), rows, split_rows, v, chunks);
    finish_weight_gradient<T>(grad, partial, v, stream);
  });
}

void bspline_basis(Tensor& basis, const Tensor& x, const Tensor& grid, int64_t order, bool derivative) {
  const int64_t rows = x.size(0), inputs = x.size(1);
  const auto run = [&]<class T>(T) {
    launch(bspline_basis_kernel<T, -1>,
           {.grid = ceil_div(rows * inputs, 128), .block = 128, .stream = current_stream(x.device())}, basis.data<T>(),
           x.data<T>(), grid.data<T>(), rows, inputs, grid.size(1), basis.size(2), order, derivative);
  };
  if (x.dtype() == DType::f64) return run(0.0);
  run(0.0F);
}

}  // namespace krait::kernels::cuda
