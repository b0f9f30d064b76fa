#include "kernels/attention_append.h"

#include "kernels/cuda/aligned.h"
#include "kernels/cuda/few_queue.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/rows_queue.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kColumns = 8;  // of a head, that a lane holds
constexpr int kMaxDim = 256;

template <class T>
struct Arguments {
  T *o, *k_cache, *v_cache;
  const T* qkv;
  const int32_t* position;
  const float *cos, *sin, *alibi;
  int64_t qkv_row;  // elements between rows of qkv
  int64_t capacity;
  int hq, hkv, d, half, interleaved;  // half: pairs that turn
  float scale;
};

// One column of a head after its rotation, rounded like the head.
template <class T>
__device__ float turned(const T* head, int c, int64_t position, const Arguments<T>& a) {
  const float own = static_cast<float>(head[c]);
  if (a.cos == nullptr || c >= 2 * a.half) return own;
  const int pair = a.interleaved ? c / 2 : c % a.half;
  const bool second = a.interleaved ? c % 2 == 1 : c >= a.half;
  const float other = static_cast<float>(head[a.interleaved ? c ^ 1 : (second ? c - a.half : c + a.half)]);
  const float cosine = a.cos[position * a.half + pair], sine = a.sin[position * a.half + pair];
  return static_cast<float>(static_cast<T>(second ? other * sine + own * cosine : own * cosine - other * sine));
}

// One block: one query head of one row. `lanes` neighbouring lanes share a key, kColumns columns each; the groups of
// lanes take keys in turn and are joined at the end. Bound by reading k and v.
template <class T>
__global__ void __launch_bounds__(kThreads) append_kernel(Arguments<T> a, int lanes) {
  __shared__ float q[kMaxDim], k_new[kMaxDim], v_new[kMaxDim];
  __shared__ float part_o[kThreads * kColumns], part_m[kThreads], part_l[kThreads];
  const int h = static_cast<int>(blockIdx.x) % a.hq, d = a.d;
  const int64_t b = blockIdx.x / a.hq;
  const int kv = h / (a.hq / a.hkv);
  take_over();
  const T* const row = a.qkv + b * a.qkv_row;
  T* const o = a.o + (b * a.hq + h) * d;
  const int64_t p = a.position[b];
  if (p < 0 || p >= a.capacity) {
    for (int c = threadIdx.x; c < d; c += kThreads) o[c] = static_cast<T>(NAN);
    return;
  }
  const int64_t pitch = int64_t{a.hkv} * d, base = b * a.capacity * pitch + int64_t{kv} * d;
  for (int c = threadIdx.x; c < d; c += kThreads) {
    q[c] = turned(row + int64_t{h} * d, c, p, a) * a.scale;
    k_new[c] = turned(row + int64_t{a.hq + kv} * d, c, p, a);
    v_new[c] = static_cast<float>(row[int64_t{a.hq + a.hkv + kv} * d + c]);
    if (h % (a.hq / a.hkv) == 0) {  // the others read the new position from their own copy
      a.k_cache[base + p * pitch + c] = static_cast<T>(k_new[c]);
      a.v_cache[base + p * pitch + c] = static_cast<T>(v_new[c]);
    }
  }
  __syncthreads();
  const int group = static_cast<int>(threadIdx.x) / lanes, groups = kThreads / lanes;
  const int first = static_cast<int>(threadIdx.x) % lanes * kColumns;
  const bool holds = first < d;
  float query[kColumns], sum[kColumns] = {}, m = -INFINITY, l = 0;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) query[c] = holds ? q[first + c] : 0.0f;
  const float slope = a.alibi != nullptr ? a.alibi[h] : 0.0f;
  // All groups go round together: the shuffles need whole warps.
  for (int64_t start = 0; start <= p; start += groups) {
    const int64_t j = start + group;
    float key[kColumns] = {}, value[kColumns] = {};
    if (holds && j < p) {
      load_values(key, a.k_cache + base + j * pitch + first);
      load_values(value, a.v_cache + base + j * pitch + first);
    } else if (holds && j == p) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        key[c] = k_new[first + c];
        value[c] = v_new[first + c];
      }
    }
    float s = 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) s = fmaf(query[c], key[c], s);
    for (int w = lanes / 2; w > 0; w /= 2) s += __shfl_xor_sync(0xffffffffu, s, w);
    if (j > p) continue;
    s -= slope * static_cast<float>(p - j);
    const float now = fmaxf(m, s), shrink = __expf(m - now), weight = __expf(s - now);
    m = now;
    l = l * shrink + weight;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[c] = sum[c] * shrink + weight * value[c];
  }
  if (threadIdx.x % lanes == 0) {
    part_m[group] = m;
    part_l[group] = l;
  }
  if (holds)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) part_o[group * d + first + c] = sum[c];
  __syncthreads();
  const int used = static_cast<int>(min(int64_t{groups}, p + 1));
  float top = -INFINITY;
  for (int g = 0; g < used; ++g) top = fmaxf(top, part_m[g]);
  for (int c = threadIdx.x; c < d; c += kThreads) {
    float all = 0, total = 0;
    for (int g = 0; g < used; ++g) {
      const float factor = __expf(part_m[g] - top);
      all += part_o[g * d + c] * factor;
      total += part_l[g] * factor;
    }
    o[c] = static_cast<T>(all / total);
  }
}

template <class T>
void run(Tensor& o, const Tensor& qkv, Tensor& k_cache, Tensor& v_cache, const Tensor& position, const AttentionAppend& a) {
  Arguments<T> x;
  x.o = o.data<T>();
  x.k_cache = k_cache.data<T>();
  x.v_cache = v_cache.data<T>();
  x.qkv = qkv.data<T>();
  x.position = position.data<int32_t>();
  x.cos = pointer_or_null<float>(a.cos);
  x.sin = pointer_or_null<float>(a.sin);
  x.alibi = pointer_or_null<float>(a.alibi_slopes);
  x.qkv_row = qkv.stride(0);
  x.capacity = k_cache.size(1);
  x.hq = static_cast<int>(a.hq);
  x.hkv = static_cast<int>(a.hkv);
  x.d = static_cast<int>(qkv.size(2));
  x.half = a.cos.defined() ? static_cast<int>(a.cos.size(1)) : 0;
  x.interleaved = a.style == RopeStyle::interleaved;
  x.scale = static_cast<float>(a.scale);
  int lanes = 1;
  while (lanes * kColumns < x.d) lanes *= 2;
  launch_overlapped(append_kernel<T>, {.grid = qkv.size(0) * a.hq, .block = kThreads, .stream = current_stream(qkv.device())}, x,
                    lanes);
}

}  // namespace

void attention_append(Tensor& o, const Tensor& qkv, Tensor& k_cache, Tensor& v_cache, const Tensor& position, const AttentionAppend& a) {
  if (gather_few_attention(o, qkv, k_cache, v_cache, position, a) || gather_rows_attention(o, qkv, k_cache, v_cache, position, a)) return;
  if (qkv.dtype() == DType::bf16)
    run<bf16>(o, qkv, k_cache, v_cache, position, a);
  else
    run<float>(o, qkv, k_cache, v_cache, position, a);
}

}  // namespace krait::kernels::cuda
