#include "kernels/step_embedding.h"

#include "kernels/cuda/aligned.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/rows_queue.h"

namespace krait::kernels::cuda {

namespace {

// A block: V columns a lane of one row. Bound by latency: the token, then its row.
template <class T, int V>
__global__ void step_embedding_kernel(T* y, const T* table, const int64_t* tokens, const T* places, const int32_t* positions, int64_t v, int64_t p, int64_t d) {
  const int64_t row = blockIdx.x, at = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
  wait_for_previous();  // first: whoever reads ahead behind this kernel reads what those in front of it wrote
  let_next_begin();
  if (at >= d) return;
  const int64_t token = __ldcg(tokens + row), place = places != nullptr ? __ldcg(positions + row) : 0;
  const bool inside = token >= 0 && token < v, placed = places == nullptr || (place >= 0 && place < p);
  using A = accum_t<T>;
  A sum[V], other[V] = {};
  if (inside && placed) {
    load_values(sum, table + token * d + at);
    if (places != nullptr) load_values(other, places + place * d + at);
  }
#pragma unroll
  for (int k = 0; k < V; ++k) sum[k] = inside && placed ? (places != nullptr ? sum[k] + other[k] : sum[k]) : static_cast<A>(nanf(""));
  store_values(y + row * d + at, sum);
}

}  // namespace

void step_embedding(Tensor& y, const Tensor& table, const Tensor& tokens, const Tensor& places, const Tensor& positions) {
  if (gather_rows_embedding(y, table, tokens, places, positions)) return;
  const int64_t d = table.size(1);
  visit_float(table.dtype(), [&]<class T>() {
    const auto run = [&]<int V>() {
      constexpr int kThreads = 128;
      launch_overlapped(step_embedding_kernel<T, V>,
                        {.grid = tokens.numel(), .grid_y = ceil_div(d, int64_t{kThreads} * V), .block = kThreads, .stream = current_stream(table.device())},
                        y.data<T>(), table.data<T>(), tokens.data<int64_t>(), pointer_or_null<T>(places), pointer_or_null<int32_t>(positions),
                        table.size(0), places.defined() ? places.size(0) : 0, d);
    };
    constexpr int kWide = 16 / sizeof(T);
    if (d % kWide == 0 && aligned(y, table, places))
      run.template operator()<kWide>();
    else
      run.template operator()<1>();
  });
}

}  // namespace krait::kernels::cuda
