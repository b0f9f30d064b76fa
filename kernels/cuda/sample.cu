#include "kernels/sample.h"

#include "core/random.h"
#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/few_queue.h"
#include "kernels/cuda/likeliest.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/rows_queue.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
using Weight = unsigned long long;

__device__ float number(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// One block a row; every pass reads the logits again, from cache.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(int64_t* tokens, const T* logits, const int64_t* step, int64_t row_stride, int v, float temperature, double top_p,
                  int64_t top_k, uint64_t key, bool wide) {
  __shared__ Weight shared[32], of_warp[kWarps];
  const int row = static_cast<int>(blockIdx.x), warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  take_over();
  const T* const s = logits + row * row_stride;
  const auto sum = [&](Weight x) { return block_reduce(x, shared, [](Weight a, Weight b) { return a + b; }); };

  Weight best = 0;
  const auto meet = [&](float x, int i) { best = max(best, Weight{likeliest_key(x, i)}); };
  constexpr int V = 16 / sizeof(T);
  const int whole = wide ? v / V * V : 0;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x) * V; i < whole; i += kThreads * V) {
    float x[V];
    load_values(x, s + i);
#pragma unroll
    for (int k = 0; k < V; ++k) meet(x[k], i + k);
  }
  for (int i = whole + static_cast<int>(threadIdx.x); i < v; i += kThreads) meet(static_cast<float>(s[i]), i);
  best = block_reduce(best, shared, [](Weight a, Weight b) { return a > b ? a : b; });
  if (threadIdx.x == 0) tokens[row] = likeliest_index(best);
  if (temperature == 0.0f) return;
  const float top = number(static_cast<uint32_t>(best >> 32));
  const auto weight = [&](float x) { return static_cast<Weight>(expf((x - top) / temperature) * 1099511627776.0f); };

  // The largest key from which on enough are kept, two bits a pass.
  uint32_t least = 0;
  if (top_p < 1 || top_k > 0) {
    Weight all = 0;
    for (int i = threadIdx.x; i < v; i += kThreads) all += weight(static_cast<float>(s[i]));
    all = sum(all);
    const Weight wanted = max(static_cast<Weight>(top_p * static_cast<double>(all)), Weight{1});
    const Weight limit = top_k > 0 ? static_cast<Weight>(top_k) : static_cast<Weight>(v);
    for (int shift = 30; shift >= 0; shift -= 2) {
      Weight w[3] = {}, n[3] = {};
      for (int i = threadIdx.x; i < v; i += kThreads) {
        const float x = static_cast<float>(s[i]);
        const uint32_t at = ordered(x);
        const Weight mine = weight(x);
#pragma unroll
        for (int b = 0; b < 3; ++b)
          if (at >= (least | static_cast<uint32_t>(b + 1) << shift)) {
            w[b] += mine;
            ++n[b];
          }
      }
      uint32_t bits = 0;
#pragma unroll
      for (int b = 0; b < 3; ++b)
        if (sum(w[b]) >= wanted | sum(n[b]) >= limit) bits = static_cast<uint32_t>(b + 1);
      least |= bits << shift;
    }
  }

  // Each warp a stretch of tokens; the warp in whose stretch the target lies finds it.
  const int length = (v + kWarps - 1) / kWarps, begin = warp * length, end = min(v, begin + length);
  const auto kept = [&](int i) {
    if (i >= end) return Weight{0};
    const float x = static_cast<float>(s[i]);
    return ordered(x) >= least ? weight(x) : Weight{0};
  };
  Weight mine = 0;
  for (int i = begin + lane; i < end; i += 32) mine += kept(i);
  for (int offset = 16; offset > 0; offset /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, offset);
  if (lane == 0) of_warp[warp] = mine;
  __syncthreads();
  Weight total = 0, before = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = total;
    total += of_warp[w];
  }
  const Philox word = philox(key, static_cast<uint64_t>(*step), static_cast<uint64_t>(row));
  const auto target = static_cast<Weight>(static_cast<double>(uniform_from_bits(word.word[0])) * static_cast<double>(total));
  if (target < before || target >= before + of_warp[warp]) return;
  for (int start = begin; start < end; start += 32) {
    Weight passed = kept(start + lane);
    for (int offset = 1; offset < 32; offset *= 2) {
      const Weight left = __shfl_up_sync(0xffffffffu, passed, offset);
      if (lane >= offset) passed += left;
    }
    const unsigned over = __ballot_sync(0xffffffffu, before + passed > target);
    if (over != 0) {
      if (lane == 0) tokens[row] = start + __ffs(static_cast<int>(over)) - 1;
      return;
    }
    before += __shfl_sync(0xffffffffu, passed, 31);
  }
}

__global__ void advance_kernel(int64_t* made, int64_t* last, int32_t* position, int64_t* step, const int64_t* tokens, int64_t rows, int64_t room) {
  take_over();
  const int64_t at = *step;
  __syncthreads();
  for (int64_t r = threadIdx.x; r < rows; r += blockDim.x) {
    last[r] = tokens[r];
    if (at < room) made[r * room + at] = tokens[r];
    ++position[r];
  }
  if (threadIdx.x == 0) *step = at + 1;
}

}  // namespace

void sample(Tensor& tokens, const Tensor& logits, const Tensor& step, const SampleOptions& o) {
  visit_float(logits.dtype(), [&]<class T>() {
    launch_overlapped(sample_kernel<T>, {.grid = logits.size(0), .block = kThreads, .stream = current_stream(logits.device())},
                      tokens.data<int64_t>(), logits.data<T>(), step.data<int64_t>(), logits.stride(0),
                      static_cast<int>(logits.size(1)), o.temperature, o.top_p, o.top_k, o.key,
                      logits.stride(0) % (16 / static_cast<int64_t>(sizeof(T))) == 0 && aligned16(logits.data<T>()));
  });
}

void sample_next(Tensor& made, Tensor& last, Tensor& position, Tensor& step, const Tensor& logits, const SampleOptions& o) {
  if (o.temperature == 0 && (gather_few_draw(made, last, position, step, logits) || gather_rows_draw(made, last, position, step, logits))) return;
  Tensor tokens = empty({logits.size(0)}, DType::i64, logits.device());
  sample(tokens, logits, step, o);
  launch_overlapped(advance_kernel, {.grid = 1, .block = 256, .stream = current_stream(tokens.device())}, made.data<int64_t>(),
                    last.data<int64_t>(), position.data<int32_t>(), step.data<int64_t>(), tokens.data<int64_t>(), tokens.numel(), made.size(1));
}

}  // namespace krait::kernels::cuda
