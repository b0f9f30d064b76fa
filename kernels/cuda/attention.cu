// Which kernel serves, and the small ones that all share.
#include "kernels/cuda/attention_common.cuh"

namespace krait::kernels::cuda {

namespace {

// Smallest and largest document id of a tile of 64 positions: one warp a tile.
__global__ void segment_ranges_kernel(int2* ranges, const int32_t* ids, int64_t l, int64_t tiles) {
  const int64_t b = blockIdx.x / tiles, t = blockIdx.x % tiles;
  int low = INT_MAX, high = INT_MIN;
  for (int64_t i = t * kRangeTile + threadIdx.x; i < min(l, (t + 1) * kRangeTile); i += 32) {
    low = min(low, ids[b * l + i]);
    high = max(high, ids[b * l + i]);
  }
  low = __reduce_min_sync(0xffffffffu, low);
  high = __reduce_max_sync(0xffffffffu, high);
  if (threadIdx.x == 0) ranges[blockIdx.x] = make_int2(low, high);
}

Tensor segment_ranges(const Tensor& ids) {
  const int64_t b = ids.size(0), l = ids.size(1), tiles = ceil_div(l, kRangeTile);
  Tensor ranges = empty({b, tiles, 2}, DType::i32, ids.device());
  launch(segment_ranges_kernel, {.grid = b * tiles, .block = 32, .stream = current_stream(ids.device())},
         reinterpret_cast<int2*>(ranges.data<int32_t>()), ids.data<int32_t>(), l, tiles);
  return ranges;
}

// One warp a row.
template <class T>
__global__ void delta_kernel(accum_t<T>* delta, Strided<const T> do_, Strided<const T> o, int64_t rows, int64_t lq,
                             int64_t hq, int d) {
  const int64_t row = int64_t{blockIdx.x} * 8 + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t i = row % lq, h = row / lq % hq, b = row / (lq * hq);
  const T* x = do_.at(b, i, h);
  const T* y = o.at(b, i, h);
  accum_t<T> sum = 0;
  for (int c = threadIdx.x % 32; c < d; c += 32) sum += static_cast<accum_t<T>>(x[c]) * static_cast<accum_t<T>>(y[c]);
  for (int w = 16; w > 0; w /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, w);
  if (threadIdx.x % 32 == 0) delta[row] = sum;
}

constexpr int64_t kDecodeQueries = 4;

bool use_cudnn(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  return options.vendor_library && attention_cudnn_supported(q, k, v, options);
}
bool use_cudnn_backward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  return options.vendor_library && attention_cudnn_backward_supported(q, k, v, options);
}
bool use_decode(const Tensor& q, const AttentionOptions& options) {
  return q.size(1) <= kDecodeQueries && options.dropout.p == 0;
}
bool use_mma(const Tensor& q, const Tensor& k, const Tensor& v) {
  return attention_mma_serves(q) && attention_mma_serves(k) && attention_mma_serves(v);
}

}  // namespace

View::View(const Tensor& q, const Tensor& k, const AttentionOptions& options)
    : q_ranges(options.q_segments.defined() ? segment_ranges(options.q_segments) : Tensor{}),
      k_ranges(options.k_segments.defined() ? segment_ranges(options.k_segments) : Tensor{}),
      tiles{AttentionMask(q, k, options),
            q_ranges.defined() ? reinterpret_cast<const int2*>(q_ranges.data<int32_t>()) : nullptr,
            k_ranges.defined() ? reinterpret_cast<const int2*>(k_ranges.data<int32_t>()) : nullptr} {}

Tensor attention_delta(const Tensor& do_, const Tensor& o) {
  const int64_t b = o.size(0), lq = o.size(1), hq = o.size(2), rows = b * lq * hq;
  Tensor delta = empty({b, hq, lq}, accum_dtype(o.dtype()), o.device());
  visit_float(o.dtype(), [&]<class T>() {
    launch(delta_kernel<T>, {.grid = ceil_div(rows, 8), .stream = current_stream(o.device())},
           delta.data<accum_t<T>>(), Strided<const T>(do_), Strided<const T>(o), rows, lq, hq, o.size(3));
  });
  return delta;
}

void attention_forward(Tensor& o, Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                       const AttentionOptions& options) {
  if (use_cudnn(q, k, v, options) && attention_forward_cudnn(o, lse, q, k, v, options)) return;
  if (use_decode(q, options))
    attention_forward_decode(o, lse, q, k, v, options);
  else if (use_mma(q, k, v))
    attention_forward_mma(o, lse, q, k, v, options);
  else
    attention_forward_simt(o, lse, q, k, v, options);
}

void attention_backward(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& do_, const Tensor& q, const Tensor& k,
                        const Tensor& v, const Tensor& o, const Tensor& lse, const AttentionOptions& options) {
  if (attention_backward_wgmma_serves(q, k, v, options) &&
      attention_backward_wgmma(dq, dk, dv, do_, q, k, v, o, lse, options))
    return;
  if (use_cudnn_backward(q, k, v, options) && attention_backward_cudnn(dq, dk, dv, do_, q, k, v, o, lse, options))
    return;
  const Tensor delta = attention_delta(do_, o);
  bool mma = use_mma(q, k, v);
  for (const Tensor& t : {do_, dq, dk, dv}) mma = mma && attention_mma_serves(t);
  if (mma)
    attention_backward_mma(dq, dk, dv, do_, q, k, v, lse, delta, options);
  else
    attention_backward_simt(dq, dk, dv, do_, q, k, v, lse, delta, options);
}

void attention_kernel_name(std::string& name, const Tensor& q, const Tensor& k, const Tensor& v,
                           const AttentionOptions& options) {
  const char* own = use_mma(q, k, v) ? "own, bf16 tensor cores" : "own, CUDA cores";
  const bool hopper = attention_backward_wgmma_serves(q, k, v, options);
  if (use_cudnn(q, k, v, options))
    name = fmt::format("{} forward, backward {}", attention_cudnn_version(),
                       hopper                                    ? "own, wgmma"
                       : use_cudnn_backward(q, k, v, options) ? "the same, deterministic"
                                                                 : own);
  else if (use_decode(q, options))
    name = fmt::format("own, split keys, {}", name_of(q.dtype()));
  else
    name = fmt::format("{}, {}{}", own, name_of(q.dtype()), hopper ? ", backward wgmma" : "");
  if (options.dropout.p == 0) return;
  AttentionOptions evaluation = options;
  evaluation.dropout = {};
  name += fmt::format(", for dropout {}", options.dropout.p);
  if (use_cudnn(q, k, v, evaluation)) name += fmt::format("; evaluation {}", attention_cudnn_version());
}

}  // namespace krait::kernels::cuda
