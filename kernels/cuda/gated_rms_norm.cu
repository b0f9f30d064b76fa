#include "kernels/gated_rms_norm.h"

#include "kernels/cuda/norm_backward.cuh"

// A block takes a row, group by group; what a group's second pass reads again comes from cache. Bound by memory:
// forward 3 r e sizeof(T) bytes, backward 5.
namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 256;

template <class A>
struct Gate {
  A s, slope;  // silu(z) and its derivative
  __device__ explicit Gate(A z) {
    const A c = z < A(-80) ? A(-80) : z, sigmoid = A(1) / (A(1) + exp(-c));
    s = c * sigmoid;
    slope = sigmoid * (A(1) + c * (A(1) - sigmoid));
  }
};

template <class T, class A = accum_t<T>>
__global__ void __launch_bounds__(kThreads)
    gated_rms_norm_forward_kernel(T* y, A* rstd, const T* x, const T* z, const A* w, int64_t e, int64_t c,
                                  int64_t z_row, A eps, bool norm_first) {
  const int64_t row = blockIdx.x, groups = e / c;
  x += row * e;
  y += row * e;
  z += row * z_row;
  for (int64_t g = 0; g < groups; ++g) {
    A sum[1] = {0};
    for (int64_t j = g * c + threadIdx.x; j < (g + 1) * c; j += kThreads) {
      A v = static_cast<A>(x[j]);
      if (!norm_first) v *= Gate<A>(static_cast<A>(z[j])).s;
      sum[0] += v * v;
    }
    group_sum<kThreads>(sum);
    const A scale = A(1) / sqrt(sum[0] / static_cast<A>(c) + eps);
    if (threadIdx.x == 0) rstd[row * groups + g] = scale;
    for (int64_t j = g * c + threadIdx.x; j < (g + 1) * c; j += kThreads)
      y[j] = static_cast<T>(static_cast<A>(x[j]) * Gate<A>(static_cast<A>(z[j])).s * scale * w[j]);
  }
}

template <class T, class A = accum_t<T>>
__global__ void __launch_bounds__(kThreads)
    gated_rms_norm_backward_kernel(T* dx, T* dz, A* partial_w, const T* dy, const T* x, const T* z, const A* w,
                                   const A* rstd, int64_t r, int64_t e, int64_t c, int64_t z_row, bool norm_first) {
  A* dw = partial_w + int64_t{blockIdx.x} * e;
  const int64_t groups = e / c;
  for (int64_t row = blockIdx.x; row < r; row += gridDim.x) {
    const int64_t at = row * e;
    for (int64_t g = 0; g < groups; ++g) {
      const A scale = rstd[row * groups + g];
      A sum[1] = {0};
      for (int64_t j = g * c + threadIdx.x; j < (g + 1) * c; j += kThreads) {  // a thread's columns are its own
        const A up = static_cast<A>(dy[at + j]), v = static_cast<A>(x[at + j]);
        const A s = Gate<A>(static_cast<A>(z[row * z_row + j])).s;
        const A product = up * v * s * scale;  // t vhat, whichever of the two holds s
        dw[j] = row == blockIdx.x ? product : dw[j] + product;
        sum[0] += product * w[j];
      }
      group_sum<kThreads>(sum);
      const A mean = sum[0] / static_cast<A>(c);
      for (int64_t j = g * c + threadIdx.x; j < (g + 1) * c; j += kThreads) {
        const A up = static_cast<A>(dy[at + j]), v = static_cast<A>(x[at + j]);
        const Gate<A> gate(static_cast<A>(z[row * z_row + j]));
        const A t = norm_first ? up * gate.s : up, vhat = (norm_first ? v : v * gate.s) * scale;
        const A dv = scale * (t * w[j] - vhat * mean);
        dx[at + j] = static_cast<T>(norm_first ? dv : dv * gate.s);
        dz[at + j] = static_cast<T>((norm_first ? up * vhat * w[j] : dv * v) * gate.slope);
      }
    }
  }
}

}  // namespace

void gated_rms_norm_forward(Tensor& y, Tensor& rstd, const Tensor& x, const Tensor& z, const Tensor& w, double eps,
                            bool norm_first) {
  const int64_t e = x.size(1), c = e / rstd.size(1);
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    launch(gated_rms_norm_forward_kernel<T>,
           {.grid = x.size(0), .block = kThreads, .stream = current_stream(x.device())}, y.data<T>(), rstd.data<A>(),
           x.data<T>(), z.data<T>(), w.data<A>(), e, c, z.stride(0), eps, norm_first);
  });
}

void gated_rms_norm_backward(Tensor& dx, Tensor& dz, Tensor& dw, bool add_dw, const Tensor& dy, const Tensor& x,
                             const Tensor& z, const Tensor& w, const Tensor& rstd, bool norm_first) {
  const int64_t r = x.size(0), e = x.size(1), c = e / rstd.size(1);
  const int64_t blocks = std::min<int64_t>(r, 4 * 132);  // a fixed number, so that every GPU gives the same bits
  const Stream stream = current_stream(x.device());
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tensor partial = empty({blocks, e}, dtype_of<A>, x.device());
    launch(gated_rms_norm_backward_kernel<T>, {.grid = blocks, .block = kThreads, .stream = stream}, dx.data<T>(),
           dz.data<T>(), partial.data<A>(), dy.data<T>(), x.data<T>(), z.data<T>(), w.data<A>(), rstd.data<A>(), r, e,
           c, z.stride(0), norm_first);
    launch(sum_partials_kernel<A>, {.grid = ceil_div(e, 32), .block = 512, .stream = stream}, dw.data<A>(), add_dw,
           static_cast<A*>(nullptr), false, partial.data<A>(), static_cast<A*>(nullptr), blocks, e);
  });
}

}  // namespace krait::kernels::cuda
