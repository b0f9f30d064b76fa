#include "kernels/cuda/attention_common.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 4, kSplitKeys = 256;

// One block: one query row and up to 256 keys; each warp takes every fourth key, each lane every 32nd column.
// Leaves (max, sum, o) of its keys in `parts`. Bound by reading k and v.
template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    decode_kernel(accum_t<T>* parts, Strided<const T> q, Strided<const T> k, Strided<const T> v, TileView view,
                  accum_t<T> scale, HeadShape shape, int64_t splits) {
  using A = accum_t<T>;
  constexpr int kMax = 8;  // columns a lane: d <= 256
  __shared__ A shared_o[kWarps][256], shared_m[kWarps], shared_l[kWarps];
  const int64_t split = blockIdx.x % splits, row = blockIdx.x / splits, lq = view.mask.lq;
  const int64_t i = row % lq, h = row / lq % shape.hq, b = row / (lq * shape.hq);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = shape.d;
  const int64_t begin = max(view.mask.key_begin(b, i), split * kSplitKeys);
  const int64_t end = min(view.mask.key_end(b, i), (split + 1) * kSplitKeys);
  const A slope = view.mask.alibi ? static_cast<A>(view.mask.alibi[h]) : A(0);
  const A none = -INFINITY;

  A query[kMax], acc[kMax], m = none, l = 0;
#pragma unroll
  for (int x = 0; x < kMax; ++x) {
    const int c = lane + 32 * x;
    query[x] = c < d ? static_cast<A>(q.at(b, i, h)[c]) * scale : A(0);
    acc[x] = 0;
  }
  for (int64_t j = begin + warp; j < end; j += kWarps) {
    if (!view.same_document(b, i, j)) continue;
    const T* key = k.at(b, j, h / shape.group);
    A s = 0;
#pragma unroll
    for (int x = 0; x < kMax; ++x)
      if (lane + 32 * x < d) s += query[x] * static_cast<A>(key[lane + 32 * x]);
#pragma unroll
    for (int w = 16; w > 0; w /= 2) s += __shfl_xor_sync(0xffffffffu, s, w);
    const int64_t distance = view.mask.position(b, i) - j;
    s -= slope * static_cast<A>(distance < 0 ? -distance : distance);
    const A now = s > m ? s : m, shrink = exp_of(m - now), p = exp_of(s - now);
    m = now;
    l = l * shrink + p;
    const T* value = v.at(b, j, h / shape.group);
#pragma unroll
    for (int x = 0; x < kMax; ++x)
      if (lane + 32 * x < d) acc[x] = acc[x] * shrink + p * static_cast<A>(value[lane + 32 * x]);
  }
#pragma unroll
  for (int x = 0; x < kMax; ++x) shared_o[warp][lane + 32 * x] = acc[x];
  if (lane == 0) {
    shared_m[warp] = m;
    shared_l[warp] = l;
  }
  __syncthreads();
  A top = none, sum = 0;
  for (int w = 0; w < kWarps; ++w) top = shared_m[w] > top ? shared_m[w] : top;
  A* out = parts + blockIdx.x * int64_t{d + 2};
  A factor[kWarps];
  for (int w = 0; w < kWarps; ++w) {
    factor[w] = shared_m[w] == none ? A(0) : exp_of(shared_m[w] - top);
    sum += shared_l[w] * factor[w];
  }
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    A o = 0;
    for (int w = 0; w < kWarps; ++w) o += shared_o[w][c] * factor[w];
    out[2 + c] = o;
  }
  if (threadIdx.x == 0) {
    out[0] = top;
    out[1] = sum;
  }
}

// One warp a row: adds up the parts in order.
template <class T>
__global__ void combine_kernel(Strided<T> o, accum_t<T>* lse, const accum_t<T>* parts, int64_t rows, int64_t lq,
                               HeadShape shape, int64_t splits) {
  using A = accum_t<T>;
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t i = row % lq, h = row / lq % shape.hq, b = row / (lq * shape.hq), pitch = shape.d + 2;
  const A* part = parts + row * splits * pitch;
  const A none = -INFINITY;
  A top = none, sum = 0;
  for (int64_t s = 0; s < splits; ++s) top = part[s * pitch] > top ? part[s * pitch] : top;
  for (int64_t s = 0; s < splits; ++s)
    if (part[s * pitch] != none) sum += part[s * pitch + 1] * exp_of(part[s * pitch] - top);
  const A inverse = sum > 0 ? 1 / sum : A(0);
  for (int c = threadIdx.x % 32; c < shape.d; c += 32) {
    A value = 0;
    for (int64_t s = 0; s < splits; ++s)
      if (part[s * pitch] != none) value += part[s * pitch + 2 + c] * exp_of(part[s * pitch] - top);
    o.at(b, i, h)[c] = static_cast<T>(value * inverse);
  }
  if (threadIdx.x % 32 == 0) lse[row] = sum > 0 ? top + log_of(sum) : none;
}

}  // namespace

void attention_forward_decode(Tensor& o, Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                              const AttentionOptions& options) {
  const HeadShape shape(q, k);
  const int64_t lq = q.size(1), rows = shape.b * shape.hq * lq;
  const int64_t splits = std::max<int64_t>(1, ceil_div(k.size(1), kSplitKeys));
  const View view(q, k, options);
  const Stream stream = current_stream(q.device());
  visit_float(q.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tensor parts = empty({rows, splits, shape.d + 2}, dtype_of<A>, q.device());
    launch(decode_kernel<T>, {.grid = rows * splits, .block = 32 * kWarps, .stream = stream}, parts.data<A>(),
           Strided<const T>(q), Strided<const T>(k), Strided<const T>(v), view.tiles, options.scale, shape, splits);
    launch(combine_kernel<T>, {.grid = ceil_div(rows, 4), .block = 128, .stream = stream}, Strided<T>(o),
           lse.data<A>(), parts.data<A>(), rows, lq, shape, splits);
  });
}

}  // namespace krait::kernels::cuda
