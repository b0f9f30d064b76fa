#include "kernels/cuda/kan.cuh"

// L1 norms of edges and their gradient: every edge needs its value for every row before anything is summed, so these
// kernels read the k+1 live weights of an edge where they lie (cached) and keep values in registers. A block takes
// one input and a tile of outputs, one per thread; the bases of 64 rows pass through shared memory.
namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 64, kRows = 64;

// Bases of one input for kRows rows. value: [row][order + 1].
template <class A>
struct RowBases {
  A *value, *silu;
  int* first;
  __device__ RowBases(unsigned char* memory, int order)
      : value(reinterpret_cast<A*>(memory)), silu(value + kRows * (order + 1)),
        first(reinterpret_cast<int*>(silu + kRows)) {}
  static int64_t bytes(int64_t order) {
    return kRows * ((order + 2) * static_cast<int64_t>(sizeof(A)) + static_cast<int64_t>(sizeof(int)));
  }
};

template <class T>
__device__ void fill_rows(const RowBases<accum_t<T>>& to, const T* x, int64_t row0, int64_t rows, int64_t i,
                          const KanView<T>& v) {
  using A = accum_t<T>;
  __syncthreads();  // the rows before have been read
  for (int row = threadIdx.x; row < kRows && row0 + row < rows; row += kThreads) {
    const A at = static_cast<A>(x[(row0 + row) * v.inputs + i]);
    LocalBasis<A, -1> basis;
    basis.template compute<false>(at, v.grid + i * v.knots, v.knots, v.order);
    for (int j = 0; j <= v.order; ++j) to.value[row * (v.order + 1) + j] = basis.value[j];
    to.first[row] = basis.first;
    to.silu[row] = silu_value(at);
  }
  __syncthreads();
}

// sum_j c[j] spline[first + j], over bases that exist.
template <class T>
__device__ accum_t<T> live_sum(const accum_t<T>* c, int first, const T* spline, const KanView<T>& v) {
  accum_t<T> sum = 0;
  for (int j = 0; j <= v.order; ++j) {
    const int g = first + j;
    if (g >= 0 && g < v.bases) sum += c[j] * static_cast<accum_t<T>>(spline[g]);
  }
  return sum;
}

template <class A>
__device__ A sign_of(A x) {
  return x > A(0) ? A(1) : x < A(0) ? A(-1) : A(0);
}

template <class T>
__global__ void kan_edges_kernel(accum_t<T>* edges, const T* x, int64_t rows, KanView<T> v) {
  using A = accum_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  const RowBases<A> bases(shared, v.order);
  const int64_t i = blockIdx.x, o = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  const bool there = o < v.outputs;
  const int64_t edge = there ? o * v.inputs + i : 0;
  const A base = v.base != nullptr ? static_cast<A>(v.base[edge]) : A(0);
  const A scale = v.scaler != nullptr ? static_cast<A>(v.scaler[edge]) : A(1);
  A total = A(0);
  for (int64_t row0 = 0; row0 < rows; row0 += kRows) {
    fill_rows<T>(bases, x, row0, rows, i, v);
    A sum = A(0);
    for (int row = 0; row < kRows && row0 + row < rows; ++row) {
      const A phi = base * bases.silu[row] + scale * live_sum<T>(bases.value + row * (v.order + 1), bases.first[row],
                                                                v.spline + edge * v.bases, v);
      sum += phi < A(0) ? -phi : phi;
    }
    total += sum;
  }
  if (there) edges[edge] = total / static_cast<A>(rows);
}

// d of the weights of one input, 64 outputs and up to 64 columns, in shared memory: a thread adds to its own alone.
template <class T>
__global__ void kan_edges_weight_kernel(accum_t<T>* partial, const accum_t<T>* dedges, const T* x, int64_t rows,
                                        KanView<T> v) {
  using A = accum_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  A* sums = reinterpret_cast<A*>(shared);  // [column][thread]
  const RowBases<A> bases(shared + kKanTile * kThreads * sizeof(A), v.order);
  const int64_t i = blockIdx.x, o = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  const int g0 = static_cast<int>(blockIdx.z) * kKanTile, width = min(kKanTile, v.per_input - g0);
  const bool there = o < v.outputs;
  const int64_t edge = there ? o * v.inputs + i : 0;
  const A base = v.base != nullptr ? static_cast<A>(v.base[edge]) : A(0);
  const A scale = v.scaler != nullptr ? static_cast<A>(v.scaler[edge]) : A(1);
  const A up = dedges[edge] / static_cast<A>(rows);
  A* own = sums + threadIdx.x;
  for (int c = 0; c < width; ++c) own[c * kThreads] = A(0);
  for (int64_t row0 = 0; row0 < rows; row0 += kRows) {
    fill_rows<T>(bases, x, row0, rows, i, v);
    for (int row = 0; row < kRows && row0 + row < rows; ++row) {
      const A* value = bases.value + row * (v.order + 1);
      const int first = bases.first[row];
      const A phi = base * bases.silu[row] + scale * live_sum<T>(value, first, v.spline + edge * v.bases, v);
      const A d = up * sign_of(phi);
      for (int j = 0; j <= v.order; ++j) {
        const int c = first + j - g0;
        if (c >= 0 && c < width && c + g0 < v.bases) own[c * kThreads] += value[j] * d;
      }
      const int at_base = v.bases - g0;
      if (v.per_input > v.bases && at_base >= 0 && at_base < width) own[at_base * kThreads] += bases.silu[row] * d;
    }
  }
  if (!there) return;
  A* to = partial + o * v.columns() + i * v.per_input + g0;
  for (int c = 0; c < width; ++c) to[c] = own[c * kThreads];
}

// One thread per row and input.
template <class T>
__global__ void kan_edges_input_kernel(T* dx, const accum_t<T>* dedges, const T* x, int64_t rows, KanView<T> v) {
  using A = accum_t<T>;
  const int64_t q = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (q >= rows * v.inputs) return;
  const int64_t i = q / rows, row = q % rows;  // neighbours share the weights of an input
  const A at = static_cast<A>(x[row * v.inputs + i]);
  LocalBasis<A, -1> basis;
  basis.template compute<true>(at, v.grid + i * v.knots, v.knots, v.order);
  const A silu = silu_value(at), slope = silu_slope(at);
  A sum = A(0);
  for (int64_t o = 0; o < v.outputs; ++o) {
    const int64_t edge = o * v.inputs + i;
    const A base = v.base != nullptr ? static_cast<A>(v.base[edge]) : A(0);
    const A scale = v.scaler != nullptr ? static_cast<A>(v.scaler[edge]) : A(1);
    const T* w = v.spline + edge * v.bases;
    const A phi = base * silu + scale * live_sum<T>(basis.value, basis.first, w, v);
    const A dphi = base * slope + scale * live_sum<T>(basis.slope, basis.first, w, v);
    sum += dedges[edge] * sign_of(phi) * dphi;
  }
  dx[row * v.inputs + i] = static_cast<T>(sum / static_cast<A>(rows));
}

}  // namespace

void kan_edges_forward(Tensor& edges, const Tensor& x, const KanParameters& p) {
  visit_float(x.dtype(), [&]<class T>() {
    const KanView<T> v = view_of<T>(p);
    launch(kan_edges_kernel<T>,
           {.grid = v.inputs, .grid_y = ceil_div(v.outputs, kThreads), .block = kThreads,
            .shared = RowBases<accum_t<T>>::bytes(p.order), .stream = current_stream(x.device())},
           edges.data<accum_t<T>>(), x.data<T>(), x.size(0), v);
  });
}

void kan_edges_backward(KanGrad& grad, const Tensor& dedges, const Tensor& x, const KanParameters& p) {
  const int64_t rows = x.size(0);
  const Stream stream = current_stream(x.device());
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const KanView<T> v = view_of<T>(p);
    if (grad.dx.defined())
      launch(kan_edges_input_kernel<T>, {.grid = ceil_div(rows * v.inputs, 128), .block = 128, .stream = stream},
             grad.dx.data<T>(), dedges.data<A>(), x.data<T>(), rows, v);
    if (!grad.spline.defined()) return;
    const Tensor partial = empty({1, v.outputs, v.columns()}, dtype_of<A>, x.device());
    launch(kan_edges_weight_kernel<T>,
           {.grid = v.inputs, .grid_y = ceil_div(v.outputs, kThreads), .grid_z = ceil_div(v.per_input, kKanTile),
            .block = kThreads,
            .shared = int64_t{kKanTile} * kThreads * static_cast<int64_t>(sizeof(A)) + RowBases<A>::bytes(p.order),
            .stream = stream},
           partial.data<A>(), dedges.data<A>(), x.data<T>(), rows, v);
    finish_weight_gradient<T>(grad, partial, v, stream);
  });
}

}  // namespace krait::kernels::cuda
