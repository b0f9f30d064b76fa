// Routing and what surrounds the experts' products (grouped_matmul.cu). A warp routes a token. Choices are sorted by a
// count per piece of 1024, a pass over the pieces and a placement in order: no atomics, the same order every time.
#include <algorithm>
#include <limits>

#include "core/cuda/launch.cuh"
#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/moe.h"
#include "kernels/visit_wide.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 4, kPiece = 1024;

__device__ float exp_of(float x) { return expf(x); }
__device__ double exp_of(double x) { return exp(x); }
__device__ float log_of(float x) { return logf(x); }
__device__ double log_of(double x) { return log(x); }

template <class A>
__device__ A warp_sum(A v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, offset);
  return v;
}

template <class A>
__global__ void route_kernel(int32_t* index, A* weight, A* lse, const A* logits, int64_t t, int n, int k, int experts,
                             bool renormalize) {
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (i >= t) return;
  const A* row = logits + i * n;
  index += i * k;
  weight += i * k;
  const A lowest = -std::numeric_limits<A>::infinity();
  A largest = lowest, sum = 0;
  for (int e = lane; e < n; e += 32) largest = row[e] > largest ? row[e] : largest;
  for (int offset = 16; offset > 0; offset /= 2) {
    const A other = __shfl_xor_sync(0xFFFFFFFFu, largest, offset);
    largest = other > largest ? other : largest;
  }
  for (int e = lane; e < n; e += 32) sum += exp_of(row[e] - largest);
  const A total = largest + log_of(warp_sum(sum));
  if (lane == 0) lse[i] = total;

  A last = 0, base = total, chosen = 0;
  int last_at = -1;
  bool found = false;  // a real slot: the first one has the largest logit
  for (int j = 0; j < k; ++j) {
    A best = lowest;
    int at = n;
    for (int e = lane; e < n; e += 32) {
      const A v = row[e];
      const bool open = j == 0 || v < last || (v == last && e > last_at);
      if (open && (v > best || (v == best && e < at))) {
        best = v;
        at = e;
      }
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      const A v = __shfl_xor_sync(0xFFFFFFFFu, best, offset);
      const int e = __shfl_xor_sync(0xFFFFFFFFu, at, offset);
      if (v > best || (v == best && e < at)) {
        best = v;
        at = e;
      }
    }
    if (at == n) at = j;  // NaN is never the best: slots 0, 1, ... stand in
    last = row[at];
    last_at = at;
    if (renormalize && !found && at < experts) base = last;
    found = found || at < experts;
    const A w = at < experts ? exp_of(last - base) : A(0);
    chosen += w;
    if (lane == 0) {
      index[j] = at;
      weight[j] = w;
    }
  }
  if (lane == 0 && renormalize && chosen > A(0))
    for (int j = 0; j < k; ++j) weight[j] /= chosen;
}

// counts[piece, slot] of the piece's choices.
__global__ void count_kernel(int32_t* counts, const int32_t* index, int64_t choices, int n) {
  __shared__ int32_t slots[kPiece];
  const int64_t first = int64_t{blockIdx.x} * kPiece;
  const int valid = static_cast<int>(min(int64_t{kPiece}, choices - first));
  for (int c = threadIdx.x; c < valid; c += blockDim.x) slots[c] = index[first + c];
  __syncthreads();
  for (int s = threadIdx.x; s < n; s += blockDim.x) {
    int32_t count = 0;
    for (int c = 0; c < valid; ++c) count += slots[c] == s ? 1 : 0;
    counts[int64_t{blockIdx.x} * n + s] = count;
  }
}

// In place: counts of the pieces before. One block.
__global__ void offsets_kernel(int32_t* totals, int32_t* offsets, int32_t* counts, int64_t pieces, int n, int experts) {
  for (int s = threadIdx.x; s < n; s += blockDim.x) {
    int32_t running = 0;
#pragma unroll 4
    for (int64_t p = 0; p < pieces; ++p) {
      const int32_t own = counts[p * n + s];
      counts[p * n + s] = running;
      running += own;
    }
    totals[s] = running;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  int32_t sum = 0;
  offsets[0] = 0;
  for (int e = 0; e < experts; ++e) offsets[e + 1] = sum += totals[e];
}

__global__ void place_kernel(int32_t* position, int32_t* order, const int32_t* index, const int32_t* counts,
                             const int32_t* offsets, int64_t choices, int n, int experts) {
  __shared__ int32_t slots[kPiece];
  const int64_t first = int64_t{blockIdx.x} * kPiece;
  const int valid = static_cast<int>(min(int64_t{kPiece}, choices - first));
  for (int c = threadIdx.x; c < valid; c += blockDim.x) slots[c] = index[first + c];
  __syncthreads();
  for (int s = threadIdx.x; s < n; s += blockDim.x) {
    const bool real = s < experts;
    int32_t next = real ? offsets[s] + counts[int64_t{blockIdx.x} * n + s] : -1;
    for (int c = 0; c < valid; ++c) {
      if (slots[c] != s) continue;
      position[first + c] = next;
      if (real) order[next++] = static_cast<int32_t>(first + c);
    }
  }
}

// Of a range of experts, whose offsets are given: rows and positions from 0.
__global__ void part_kernel(int32_t* position, int32_t* order, int32_t* part_offsets, const int32_t* whole_position,
                            const int32_t* whole_order, const int32_t* offsets, int64_t choices, int64_t experts) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int32_t begin = offsets[0], end = offsets[experts];
  if (i <= experts) part_offsets[i] = offsets[i] - begin;
  if (i >= choices) return;
  const int32_t at = whole_position[i];
  position[i] = at >= begin && at < end ? at - begin : -1;
  if (i < end - begin) order[i] = whole_order[begin + i];
}

// One block per slot, each over all choices.
template <class A>
__global__ void counted_kernel(A* mask, int32_t* counts, const int32_t* index, const int32_t* lengths, int64_t first, int64_t t,
                               int64_t l, int k) {
  __shared__ int32_t shared[32];
  const int slot = static_cast<int>(blockIdx.x);
  int32_t own = 0;
  for (int64_t i = threadIdx.x; i < t; i += blockDim.x) {
    const bool counted = first + i % l < lengths[i / l];
    if (slot == 0) mask[i] = counted ? A(1) : A(0);
    for (int j = 0; j < k && counted; ++j) own += index[i * k + j] == slot ? 1 : 0;
  }
  own = block_reduce(own, shared, [](int32_t a, int32_t b) { return a + b; });
  if (threadIdx.x == 0) counts[slot] = own;
}

template <class A>
__global__ void route_backward_kernel(A* dlogits, const A* dweight, const A* logits, const A* lse, const int32_t* index,
                                      const A* weight, const int32_t* counts, const A* mask, int64_t t, int n, int k,
                                      int experts, bool renormalize, A balance, double router_z) {
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (i >= t) return;
  const A *row = logits + i * n, *w = weight + i * k, total = lse[i];
  const A* dw = dweight != nullptr ? dweight + i * k : nullptr;
  index += i * k;
  const A counted = mask != nullptr ? mask[i] : A(1);
  int64_t all = 0;  // choices of tokens that count
  for (int e = lane; e < n; e += 32) all += counts[e];
  const double tokens = static_cast<double>(warp_sum(all)) / k;
  const A z = counted * static_cast<A>(2 * router_z / tokens);
  balance *= counted;
  // n f / t of a slot: what p counts for in the balance loss.
  const A scale = static_cast<A>(static_cast<double>(n) / (tokens * tokens * k));
  A nulls = 0;
  for (int e = experts + lane; e < n; e += 32) nulls += static_cast<A>(counts[e]);
  const A null_share = n > experts ? warp_sum(nulls) / static_cast<A>(n - experts) * scale : A(0);
  const auto share = [&](int e) { return e < experts ? static_cast<A>(counts[e]) * scale : null_share; };
  A mean_share = 0, inner = 0;
  for (int e = lane; e < n; e += 32) mean_share += exp_of(row[e] - total) * share(e);
  mean_share = warp_sum(mean_share);
  if (dw != nullptr) {
    for (int j = lane; j < k; j += 32) inner += w[j] * dw[j];
    inner = warp_sum(inner);
  }
  for (int e = lane; e < n; e += 32) {
    const A p = exp_of(row[e] - total);
    A d = p * (balance * (share(e) - mean_share) + z * total - (renormalize ? A(0) : inner));
    if (dw != nullptr && e < experts)
      for (int j = 0; j < k; ++j)
        if (index[j] == e) d += w[j] * (renormalize ? dw[j] - inner : dw[j]);
    dlogits[i * n + e] = d;
  }
}

// One block per token.
template <class T, int V, class A = accum_t<T>>
__global__ void combine_kernel(T* y, const T* rows, const int32_t* position, const A* weight, int64_t m, int k) {
  const int64_t i = blockIdx.x;
  for (int64_t c = int64_t{threadIdx.x} * V; c < m; c += int64_t{blockDim.x} * V) {
    A sum[V];
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = 0;
    for (int j = 0; j < k; ++j) {
      const int64_t at = position[i * k + j];
      if (at < 0) continue;
      const A w = weight != nullptr ? weight[i * k + j] : A(1);
      A row[V];
      load_values(row, rows + at * m + c);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += w * row[v];
    }
    store_values(y + i * m + c, sum);
  }
}

// One block per expert row.
template <class T, int V, class A = accum_t<T>>
__global__ void hidden_backward_kernel(T* dhidden, T* weighted, A* dweight, const T* dh, const T* hidden,
                                       const A* weight, const int32_t* order, const int32_t* offsets, int64_t groups,
                                       int64_t f) {
  __shared__ A shared[32];
  const int64_t i = blockIdx.x;
  if (i >= offsets[groups]) return;
  const int64_t choice = order[i];
  const A w = weight[choice];
  const T *gate = hidden + i * 2 * f, *up = gate + f;
  T *dgate = dhidden + i * 2 * f, *dup = dgate + f;
  A sum = 0;
  for (int64_t c = int64_t{threadIdx.x} * V; c < f; c += int64_t{blockDim.x} * V) {
    A g[V], u[V], d[V], h[V];
    load_values(g, gate + c);
    load_values(u, up + c);
    load_values(d, dh + i * f + c);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A x = g[v] < A(-80) ? A(-80) : g[v];  // silu(-infinity) = 0
      const A s = A(1) / (A(1) + exp_of(-x)), a = x * s;
      sum += d[v] * a * u[v];
      h[v] = w * a * u[v];
      g[v] = w * d[v] * u[v] * s * (A(1) + x * (A(1) - s));
      u[v] = w * d[v] * a;
    }
    store_values(dgate + c, g);
    store_values(dup + c, u);
    store_values(weighted + i * f + c, h);
  }
  sum = block_reduce(sum, shared, [](A a, A b) { return a + b; });
  if (threadIdx.x == 0) dweight[choice] = sum;
}

}  // namespace

void moe_route(MoeRouting& r, const Tensor& logits, const MoeOptions& options) {
  const int64_t t = logits.size(0), choices = t * options.top_k, pieces = ceil_div(choices, kPiece);
  const int n = static_cast<int>(logits.size(1)), k = static_cast<int>(options.top_k);
  const int experts = static_cast<int>(options.experts);
  const Stream stream = current_stream(logits.device());
  const Tensor counts = empty({pieces, n}, DType::i32, logits.device());
  const int32_t* index = r.index.data<int32_t>();
  visit_wide(logits.dtype(), [&]<class A>() {
    launch(route_kernel<A>, {.grid = ceil_div(t, kWarps), .block = kWarps * 32, .stream = stream},
           r.index.data<int32_t>(), r.weight.data<A>(), r.lse.data<A>(), logits.data<A>(), t, n, k, experts,
           options.renormalize);
  });
  launch(count_kernel, {.grid = pieces, .block = 256, .stream = stream}, counts.data<int32_t>(), index, choices, n);
  launch(offsets_kernel, {.grid = 1, .block = 256, .stream = stream}, r.counts.data<int32_t>(),
         r.groups.offsets.data<int32_t>(), counts.data<int32_t>(), pieces, n, experts);
  launch(place_kernel, {.grid = pieces, .block = 256, .stream = stream}, r.position.data<int32_t>(),
         r.groups.order.data<int32_t>(), index, counts.data<int32_t>(), r.groups.offsets.data<int32_t>(), choices, n,
         experts);
}

void moe_part(MoeRouting& part, const MoeRouting& whole, int64_t first) {
  const int64_t choices = whole.position.numel(), experts = part.groups.groups();
  launch(part_kernel,
         {.grid = ceil_div(std::max(choices, experts + 1), 256), .block = 256,
          .stream = current_stream(whole.position.device())},
         part.position.data<int32_t>(), part.groups.order.data<int32_t>(), part.groups.offsets.data<int32_t>(),
         whole.position.data<int32_t>(), whole.groups.order.data<int32_t>(),
         whole.groups.offsets.data<int32_t>() + first, choices, experts);
}

void moe_counted(Tensor& mask, Tensor& counts, const Tensor& index, const Tensor& lengths, int64_t first) {
  const int64_t t = index.size(0);
  visit_wide(mask.dtype(), [&]<class A>() {
    launch(counted_kernel<A>, {.grid = counts.numel(), .block = 256, .stream = current_stream(index.device())}, mask.data<A>(),
           counts.data<int32_t>(), index.data<int32_t>(), lengths.data<int32_t>(), first, t, t / lengths.numel(), index.size(1));
  });
}

void moe_route_backward(Tensor& dlogits, const Tensor& dweight, const Tensor& logits, const MoeRouting& r,
                        const MoeOptions& options, const MoePenalties& penalties) {
  const int64_t t = logits.size(0);
  visit_wide(logits.dtype(), [&]<class A>() {
    launch(route_backward_kernel<A>,
           {.grid = ceil_div(t, kWarps), .block = kWarps * 32, .stream = current_stream(logits.device())},
           dlogits.data<A>(), dweight.defined() ? dweight.data<A>() : nullptr, logits.data<A>(), r.lse.data<A>(),
           r.index.data<int32_t>(), r.weight.data<A>(), penalties.counts.data<int32_t>(),
           penalties.mask.defined() ? penalties.mask.data<A>() : nullptr, t, logits.size(1), options.top_k, options.experts,
           options.renormalize, penalties.balance, penalties.router_z);
  });
}

void moe_combine(Tensor& y, const Tensor& rows, const Tensor& position, const Tensor& weight) {
  const int64_t t = y.size(0), m = y.size(1);
  visit_float(y.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    constexpr int V = 16 / sizeof(T);
    const bool wide = m % V == 0 && aligned16(y.data<T>(), rows.data<T>());
    launch(wide ? combine_kernel<T, V> : combine_kernel<T, 1>,
           {.grid = t, .block = 128, .stream = current_stream(y.device())}, y.data<T>(), rows.data<T>(),
           position.data<int32_t>(), weight.defined() ? weight.data<A>() : nullptr, m, position.size(1));
  });
}

void moe_hidden_backward(Tensor& dhidden, Tensor& weighted, Tensor& dweight, const Tensor& dh, const Tensor& hidden,
                         const Tensor& weight, const RowGroups& groups) {
  const int64_t f = dh.size(1);
  visit_float(dh.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    constexpr int V = 16 / sizeof(T);
    const bool wide = f % V == 0 && aligned16(dhidden.data<T>(), weighted.data<T>(), dh.data<T>(), hidden.data<T>());
    launch(wide ? hidden_backward_kernel<T, V> : hidden_backward_kernel<T, 1>,
           {.grid = groups.rows, .block = 128, .stream = current_stream(dh.device())}, dhidden.data<T>(),
           weighted.data<T>(), dweight.data<A>(), dh.data<T>(), hidden.data<T>(), weight.data<A>(),
           groups.order.data<int32_t>(), groups.offsets.data<int32_t>(), groups.groups(), f);
  });
}

}  // namespace krait::kernels::cuda
