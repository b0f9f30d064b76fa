#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "core/cuda/launch.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/embedding.h"
#include "kernels/norm.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kChunk = 32;  // sorted positions that one block adds up

// One warp per token. Bound by memory: n d sizeof(T) bytes read (rows used often come from cache) and written.
template <class T, int V, class I>
__global__ void embedding_forward_kernel(T* __restrict__ y, const T* __restrict__ table, const I* __restrict__ tokens,
                                         int64_t n, int64_t v, int64_t d, TableRows rows) {
  const int64_t i = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  if (i >= n) return;
  const auto id = static_cast<int64_t>(tokens[i]);
  const int64_t token = id - rows.first;
  const bool inside = token >= 0 && token < v, elsewhere = id >= 0 && id < rows.whole;
  for (int64_t j = (threadIdx.x % 32) * V; j < d; j += 32 * V) {
    Packed<T, V> row;
    if (inside) {
      row.load(table + token * d + j);
    } else {
      float fill[V];
#pragma unroll
      for (int k = 0; k < V; ++k) fill[k] = elsewhere ? 0.0f : nanf("");
      row.pack(fill);
    }
    row.store(y + i * d + j);
  }
}

// Sort keys: the tokens, with v for those outside the table.
template <class I>
__global__ void token_keys_kernel(uint32_t* keys, int32_t* positions, const I* tokens, int64_t n, int64_t v,
                                  int64_t first) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const int64_t token = static_cast<int64_t>(tokens[i]) - first;
  keys[i] = static_cast<uint32_t>(token >= 0 && token < v ? token : v);
  positions[i] = static_cast<int32_t>(i);
}

template <int V, class D, class A>
__device__ __forceinline__ void add_to_row(D* row, const A (&sum)[V]) {
  A old[V];
  load_values(old, row);
#pragma unroll
  for (int k = 0; k < V; ++k) old[k] += sum[k];
  store_values(row, old);
}

// Block (chunk, columns) walks kChunk sorted positions and adds up runs of equal keys. A run inside the chunk goes to
// its row of dtable; a piece of a longer run goes to partial (chunks, 2, d): slot 0 if the run began before the chunk
// (it may fill it), else slot 1.
template <class T, class D, int V, class A = accum_t<D>>
__global__ void sum_runs_kernel(D* __restrict__ dtable, A* __restrict__ partial, const T* __restrict__ dy,
                                const uint32_t* __restrict__ keys, const int32_t* __restrict__ positions, int64_t n,
                                int64_t v, int64_t d) {
  __shared__ int64_t key[kChunk + 2];  // with the neighbours; -1 beyond the ends
  __shared__ int64_t from[kChunk];
  const int64_t first = int64_t{blockIdx.x} * kChunk;
  const int count = static_cast<int>(n - first < kChunk ? n - first : kChunk);
  for (int k = static_cast<int>(threadIdx.x); k < count + 2; k += static_cast<int>(blockDim.x)) {
    const int64_t at = first + k - 1;
    key[k] = at >= 0 && at < n ? static_cast<int64_t>(keys[at]) : -1;
    if (k < count) from[k] = positions[first + k];
  }
  __syncthreads();
  const int64_t col = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
  if (col >= d) return;
  partial += int64_t{blockIdx.x} * 2 * d + col;
  bool open = key[0] == key[1];  // the current run began before this chunk
  A sum[V] = {};
  for (int k = 0; k < count; k += 4) {
    Packed<T, V> rows[4];
#pragma unroll
    for (int m = 0; m < 4; ++m)
      if (k + m < count) rows[m].load(dy + from[k + m] * d + col);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      if (k + m >= count) break;
      A g[V];
      rows[m].unpack(g);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += g[i];
      const int64_t token = key[k + m + 1];
      if (token == key[k + m + 2]) continue;
      if (open)
        store_values(partial, sum);
      else if (token < v)
        add_to_row(dtable + token * d + col, sum);
      open = false;
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] = 0;
    }
  }
  if (key[count] == key[count + 1]) store_values(partial + (open ? 0 : d), sum);
}

// Block (chunk, columns): where a run begins in the chunk and goes on, adds its pieces in order to its row.
template <class D, int V, class A = accum_t<D>>
__global__ void join_runs_kernel(D* __restrict__ dtable, const A* __restrict__ partial,
                                 const uint32_t* __restrict__ keys, int64_t n, int64_t v, int64_t d) {
  const int64_t first = int64_t{blockIdx.x} * kChunk, next = first + kChunk;
  if (next >= n) return;
  const int64_t token = keys[next - 1];
  if (token >= v || keys[next] != token || (first > 0 && keys[first - 1] == token)) return;
  int64_t low = next + 1, high = n;  // the end of the run is in [low, high]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] == token)
      low = middle + 1;
    else
      high = middle;
  }
  const int64_t last_chunk = (low - 1) / kChunk;
  const int64_t col = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
  if (col >= d) return;
  partial += col;
  A sum[V];
  load_values(sum, partial + (int64_t{blockIdx.x} * 2 + 1) * d);
#pragma unroll 8
  for (int64_t chunk = int64_t{blockIdx.x} + 1; chunk <= last_chunk; ++chunk) {
    A piece[V];
    load_values(piece, partial + chunk * 2 * d);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += piece[i];
  }
  add_to_row(dtable + token * d + col, sum);
}

}  // namespace

void embedding_forward(Tensor& y, const Tensor& table, const Tensor& tokens, TableRows rows) {
  const int64_t n = tokens.numel(), v = table.size(0), d = table.size(1);
  visit_float(table.dtype(), [&]<class T>() {
    visit_index(tokens.dtype(), [&]<class I>() {
      constexpr int V = 16 / sizeof(T);
      const auto run = [&]<int kV>() {
        launch(embedding_forward_kernel<T, kV, I>,
               {.grid = ceil_div(n, 8), .block = 256, .stream = current_stream(table.device())}, y.data<T>(),
               table.data<T>(), tokens.data<I>(), n, v, d, rows);
      };
      if (d % V == 0 && aligned16(y.data<T>(), table.data<T>()))
        run.template operator()<V>();
      else
        run.template operator()<1>();
    });
  });
}

void embedding_backward(Tensor& dtable, const Tensor& dy, const Tensor& tokens, TableRows rows) {
  const int64_t n = tokens.numel(), v = dtable.size(0), d = dtable.size(1), chunks = ceil_div(n, kChunk);
  KRAIT_CHECK(n < (int64_t{1} << 31), "embedding: {} tokens in one backward pass; at most 2^31 - 1 on a GPU", n);
  const Device device = dtable.device();
  const Stream stream = current_stream(device);

  // Stable: equal tokens keep the order of their positions. i32 holds the bits of the unsigned keys.
  const Tensor unsorted = empty({2, n}, DType::i32, device), sorted = empty({2, n}, DType::i32, device);
  uint32_t* keys_in = reinterpret_cast<uint32_t*>(unsorted.data<int32_t>());
  uint32_t* keys = reinterpret_cast<uint32_t*>(sorted.data<int32_t>());
  int32_t *positions_in = unsorted.data<int32_t>() + n, *positions = sorted.data<int32_t>() + n;
  visit_index(tokens.dtype(), [&]<class I>() {
    launch(token_keys_kernel<I>, {.grid = ceil_div(n, 256), .block = 256, .stream = stream}, keys_in, positions_in,
           tokens.data<I>(), n, v, rows.first);
  });
  const int bits = std::max(1, static_cast<int>(std::bit_width(static_cast<uint32_t>(v))));  // v itself is a key
  size_t bytes = 0;
  check(cub::DeviceRadixSort::SortPairs(nullptr, bytes, keys_in, keys, positions_in, positions, static_cast<int>(n), 0,
                                        bits, native(stream)));
  const Tensor scratch = empty({static_cast<int64_t>(bytes) + 1}, DType::u8, device);
  check(cub::DeviceRadixSort::SortPairs(scratch.raw_data(), bytes, keys_in, keys, positions_in, positions,
                                        static_cast<int>(n), 0, bits, native(stream)));

  visit_norm(dy.dtype(), dtable.dtype(), [&]<class T, class D>() {
    using A = accum_t<D>;
    const Tensor partial = empty({chunks, 2, d}, dtype_of<A>, device);
    const auto run = [&]<int kV>() {
      const int64_t columns = ceil_div(d, kV);
      const int block = static_cast<int>(std::min<int64_t>(128, ceil_div(columns, 32) * 32));
      const LaunchConfig config{
          .grid = chunks, .grid_y = ceil_div(columns, block), .block = block, .stream = stream};
      launch(sum_runs_kernel<T, D, kV>, config, dtable.data<D>(), partial.data<A>(), dy.data<T>(), keys, positions, n,
             v, d);
      launch(join_runs_kernel<D, kV>, config, dtable.data<D>(), partial.data<A>(), keys, n, v, d);
    };
    constexpr int V = 16 / sizeof(T);
    if (d % V == 0 && aligned16(dtable.data<D>(), dy.data<T>()))
      run.template operator()<V>();
    else
      run.template operator()<1>();
  });
}

}  // namespace krait::kernels::cuda
