#include "kernels/cuda/causal_conv1d.cuh"
#include "kernels/cuda/packed.cuh"

// The causal convolution of width 4: a thread walks along a tile of positions with a vector of channels, the last three
// inputs in registers and the next eight positions on their way. Bound by memory: forward 2 b l c sizeof(T) bytes,
// backward 3; at 3 TB/s in bf16 B32 L2048 C1536 0.13 and 0.20 ms. silu needs 2 special functions a value, 0.06 ms.
// A tile's start is as dear as a dozen positions: its filters lie 16 bytes a channel apart.
namespace krait::kernels::cuda {

namespace {

constexpr int kFourThreads = 128, kNext = 8;
constexpr int kForwardBlocks = 4, kBackwardBlocks = 4;  // on a multiprocessor

// V values in one access of 4, 8 or 16 bytes, packed.
template <class T, int V>
struct ConvVector {
  static constexpr int kBytes = V * static_cast<int>(sizeof(T));
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
  Word word;

  __device__ static ConvVector load(const T* p) { return {*reinterpret_cast<const Word*>(p)}; }
  template <class A>
  __device__ void unpack(A (&to)[V]) const {
    T v[V];
    __builtin_memcpy(v, &word, kBytes);
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = static_cast<A>(v[i]);
  }
  template <class A>
  __device__ static void store(T* p, const A (&from)[V]) {
    T v[V];
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = static_cast<T>(from[i]);
    Word w;
    __builtin_memcpy(&w, v, kBytes);
    *reinterpret_cast<Word*>(p) = w;
  }
};

// Which tile and channels a thread has: neighbours have neighbouring channels.
struct ConvPlace {
  int64_t piece, row, channel;
  int t0, t1;
  __device__ ConvPlace(int64_t groups, int values, int64_t l, int64_t tiles, int64_t tile) {
    const int64_t thread = int64_t{blockIdx.x} * kFourThreads + threadIdx.x;
    piece = thread / groups;
    channel = thread % groups * values;
    row = piece / tiles;
    t0 = static_cast<int>(piece % tiles * tile);
    t1 = static_cast<int>(t0 + tile < l ? t0 + tile : l);
  }
};

// Filters of V channels and their last three inputs.
template <int V>
struct FourTaps {
  float w[4][V], bias[V], x[3][V];

  template <class T>
  __device__ void start(const ConvInputs<T>& in, const ConvLine<T>& line, int64_t channel, int t0) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float4 taps = reinterpret_cast<const float4*>(in.weight)[channel + i];
      w[0][i] = taps.x;
      w[1][i] = taps.y;
      w[2][i] = taps.z;
      w[3][i] = taps.w;
      bias[i] = 0;
    }
    if (in.bias != nullptr) load_values(bias, in.bias + channel);
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const int s = t0 - 3 + j;
      if (!line.together(s, t0)) {
        forget(j);
      } else if (s >= 0) {
        ConvVector<T, V>::load(line.x + s * line.stride).unpack(x[j]);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i)
          x[j][i] = line.initial == nullptr ? 0.0f : static_cast<float>(line.initial[(s + 3) * line.c + i]);
      }
    }
  }
  __device__ void forget(int j) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[j][i] = 0;
  }
  __device__ void forget() {
#pragma unroll
    for (int j = 0; j < 3; ++j) forget(j);
  }
  __device__ float filter(int i, float now) const {
    return fmaf(w[0][i], x[0][i], fmaf(w[1][i], x[1][i], fmaf(w[2][i], x[2][i], fmaf(w[3][i], now, bias[i]))));
  }
  __device__ void push(const float (&now)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[0][i] = x[1][i];
      x[1][i] = x[2][i];
      x[2][i] = now[i];
    }
  }
};

// kPacked: with documents.
template <class T, int V, bool kPacked>
__global__ void __launch_bounds__(kFourThreads, kForwardBlocks)
    conv_four_forward_kernel(T* __restrict__ y, T* __restrict__ final_state, const ConvInputs<T> in, int64_t groups,
                             int64_t pieces, int64_t tiles, int64_t tile) {
  using Vector = ConvVector<T, V>;
  const ConvPlace at(groups, V, in.l, tiles, tile);
  if (at.piece >= pieces) return;
  const ConvLine<T> line = in.line(at.row, at.channel);
  y += at.row * in.l * in.c + at.channel;
  const int full = at.t0 + (at.t1 - at.t0) / kNext * kNext;
  Vector raw[kNext];
  if (full > at.t0) {
#pragma unroll
    for (int s = 0; s < kNext; ++s) raw[s] = Vector::load(line.x + (at.t0 + s) * line.stride);
  }
  FourTaps<V> taps;
  taps.start(in, line, at.channel, at.t0);

  const auto step = [&](int t, const float(&now)[V]) {
    if (kPacked && t > at.t0 && !line.together(t - 1, t)) taps.forget();
    float out[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float p = taps.filter(i, now[i]);
      out[i] = in.silu ? silu_of(p) : p;
    }
    Vector::store(y + t * in.c, out);
    taps.push(now);
  };
  for (int t = at.t0; t < full; t += kNext) {
    const T* next = line.x + (t + kNext < full ? t + kNext : t) * line.stride;
#pragma unroll
    for (int s = 0; s < kNext; ++s) {
      float now[V];
      raw[s].unpack(now);
      raw[s] = Vector::load(next + s * line.stride);
      step(t + s, now);
    }
  }
  for (int t = full; t < at.t1; ++t) {
    float now[V];
    Vector::load(line.x + t * line.stride).unpack(now);
    step(t, now);
  }

  if (at.t1 < in.l) return;
  for (int j = 0; j < 3; ++j)
    for (int i = 0; i < V; ++i)
      final_state[(at.row * 3 + j) * in.c + at.channel + i] =
          static_cast<T>(in.line(at.row, at.channel + i).template input<float>(in.l - 3 + j, in.l - 1));
}

// A gradient at either end of the sequence: before its first position or in the final state.
template <class T, int V>
__device__ __noinline__ void store_edge(const ConvGradients<T>& grad, const ConvInputs<T>& in, int64_t row,
                                        int64_t channel, int s, float2 d) {
  const float values[2] = {d.x, d.y};
#pragma unroll
  for (int i = 0; i < V; ++i)
    grad.template store<float>(in.line(row, channel + i), row, channel + i, s, values[i]);
}

// partial (pieces, 5, c): four rows of dweight and one of dbias.
template <class T, int V, bool kPacked>
__global__ void __launch_bounds__(kFourThreads, kBackwardBlocks)
    conv_four_backward_kernel(const __grid_constant__ ConvGradients<T> grad, float* __restrict__ partial,
                              const __grid_constant__ ConvInputs<T> in,
                              int64_t groups, int64_t pieces, int64_t tiles, int64_t tile) {
  using Vector = ConvVector<T, V>;
  const ConvPlace at(groups, V, in.l, tiles, tile);
  if (at.piece >= pieces) return;
  const int l = static_cast<int>(in.l);
  const ConvLine<T> line = in.line(at.row, at.channel);
  const T* dy = grad.dy + at.row * grad.dy_batch + at.channel;
  T* dx_row = grad.dx + at.row * grad.dx_batch + at.channel;
  const int full = at.t0 + (at.t1 - at.t0) / kNext * kNext, seen = at.t1 + 3 < l ? at.t1 + 3 : l;
  Vector raw_x[kNext], raw_dy[kNext];
  if (full > at.t0) {
#pragma unroll
    for (int s = 0; s < kNext; ++s) {
      raw_x[s] = Vector::load(line.x + (at.t0 + s) * line.stride);
      raw_dy[s] = Vector::load(dy + (at.t0 + s) * grad.dy_row);
    }
  }
  FourTaps<V> taps;
  taps.start(in, line, at.channel, at.t0);
  float dw[4][V] = {}, db[V] = {}, dx[3][V] = {};  // dx[j]: of input t - 3 + j, when t comes
  int back = 0;                                     // from how far back t may still be seen
  for (int j = 1; j < 4 && line.together(at.t0 - j, at.t0); ++j) back = j;
  const int oldest = at.t0 > 0 ? at.t0 : -3;  // first input whose gradient this tile stores

  const auto store = [&](int s, float(&d)[V]) {
    if (s < oldest) return;
    if (s < 0 || (grad.dfinal != nullptr && s >= l - 3))
      store_edge<T, V>(grad, in, at.row, at.channel, s, {d[0], d[1]});
    else
      Vector::store(dx_row + s * grad.dx_row, d);
  };
  // kInside: gradients of t - 3 are this tile's, and not an edge's.
  const auto step = [&]<bool kInside>(int t, const float(&now)[V], float(&g)[V], bool own) {
    if (kPacked && t > at.t0) {
      back = back < 3 ? back + 1 : 3;
      if (!line.together(t - 1, t)) {
        taps.forget();
        back = 0;
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (in.silu) g[i] *= silu_slope(taps.filter(i, now[i]));
      if (own) {
        db[i] += g[i];
        dw[3][i] = fmaf(g[i], now[i], dw[3][i]);
#pragma unroll
        for (int j = 0; j < 3; ++j) dw[j][i] = fmaf(g[i], taps.x[j][i], dw[j][i]);
      }
    }
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const bool seen = !kPacked || 3 - j <= back;
#pragma unroll
      for (int i = 0; i < V; ++i) dx[j][i] = fmaf(seen ? taps.w[j][i] : 0.0f, g[i], dx[j][i]);
    }
    if constexpr (kInside)
      Vector::store(dx_row + (t - 3) * grad.dx_row, dx[0]);
    else
      store(t - 3, dx[0]);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      dx[0][i] = dx[1][i];
      dx[1][i] = dx[2][i];
      dx[2][i] = taps.w[3][i] * g[i];
    }
    taps.push(now);
  };

  const int x_step = static_cast<int>(line.stride), dy_step = static_cast<int>(grad.dy_row);
  const T *next_x = line.x + at.t0 * line.stride, *next_dy = dy + at.t0 * grad.dy_row;
  const auto batch = [&]<bool kInside>(int t) {
    if (t + kNext < full) {  // else the last once more
      next_x += kNext * x_step;
      next_dy += kNext * dy_step;
    }
#pragma unroll
    for (int s = 0; s < kNext; ++s) {
      float now[V], g[V];
      raw_x[s].unpack(now);
      raw_dy[s].unpack(g);
      raw_x[s] = Vector::load(next_x + s * x_step);
      raw_dy[s] = Vector::load(next_dy + s * dy_step);
      step.template operator()<kInside>(t + s, now, g, true);
    }
  };
  if (full > at.t0) batch.template operator()<false>(at.t0);
  for (int t = at.t0 + kNext; t < full; t += kNext) batch.template operator()<true>(t);
  for (int t = full; t < seen; ++t) {
    float now[V], g[V];
    Vector::load(line.x + t * line.stride).unpack(now);
    Vector::load(dy + t * grad.dy_row).unpack(g);
    step.template operator()<false>(t, now, g, t < at.t1);
  }
  // Inputs that no later position sees: the last ones of the sequence.
#pragma unroll
  for (int j = 0; j < 3; ++j)
    if (seen - 3 + j < at.t1) store(seen - 3 + j, dx[j]);

  float* sums = partial + at.piece * 5 * in.c + at.channel;
#pragma unroll
  for (int j = 0; j < 4; ++j) ConvVector<float, V>::store(sums + j * in.c, dw[j]);
  ConvVector<float, V>::store(sums + 4 * in.c, db);
}

template <class T>
bool vectors(const Tensor& t, int values) {
  if (t.numel() == 0) return true;
  const bool rows = t.stride(0) % values == 0 && t.stride(1) % values == 0;
  return rows && reinterpret_cast<uintptr_t>(t.data<T>()) % (static_cast<uintptr_t>(values) * sizeof(T)) == 0;
}

bool served(const CausalConv1dInputs& in) {
  const DType type = in.x.dtype();
  if (type != DType::bf16 && type != DType::f32) return false;
  const bool aligned = aligned16(in.weight.data<float>(), conv_pointer<float>(in.bias));
  return aligned && in.weight.size(1) == 4 && in.x.size(1) < (int64_t{1} << 30) && in.x.stride(1) < (int64_t{1} << 28);
}

// Positions of a tile so that whole waves of blocks have the least to do. The number of multiprocessors is a fixed one, so
// that every GPU gives the same bits.
int64_t tile_of_four(int64_t b, int64_t l, int64_t groups, int64_t blocks) {
  constexpr int64_t kMultiprocessors = 132, kStart = 12;
  int64_t best = 0, least = 0;
  for (int64_t tile = 32; tile <= 512; tile += kNext) {
    const int64_t waves = ceil_div(ceil_div(b * ceil_div(l, tile) * groups, kFourThreads), kMultiprocessors * blocks);
    const int64_t cost = waves * (tile + kStart);
    if (best == 0 || cost < least) {
      best = tile;
      least = cost;
    }
  }
  return std::min(l, best);
}

template <class F>
void launch_four(const CausalConv1dInputs& in, int values, int64_t blocks, const F& run) {
  const int64_t b = in.x.size(0), l = in.x.size(1), groups = in.x.size(2) / values;
  const int64_t tile = tile_of_four(b, l, groups, blocks), tiles = ceil_div(l, tile), pieces = b * tiles;
  run(LaunchConfig{.grid = ceil_div(pieces * groups, kFourThreads),
                   .block = kFourThreads,
                   .stream = current_stream(in.x.device())},
      groups, pieces, tiles, tile);
}

template <class F>
bool visit_four(DType type, const F& f) {
  return type == DType::bf16 ? f.template operator()<bf16>() : f.template operator()<float>();
}

}  // namespace

bool conv_four_forward(Tensor& y, Tensor& final_state, const CausalConv1dInputs& in) {
  if (!served(in)) return false;
  return visit_four(in.x.dtype(), [&]<class T>() {
    constexpr int V = 4;  // with more the start of a tile would be dearer
    if (in.x.size(2) % V != 0 || !vectors<T>(in.x, V) || !vectors<T>(y, V)) return false;
    launch_four(in, V, kForwardBlocks, [&](const LaunchConfig& config, int64_t groups, int64_t pieces, int64_t tiles,
                                           int64_t tile) {
      const auto kernel =
          in.segments.defined() ? conv_four_forward_kernel<T, V, true> : conv_four_forward_kernel<T, V, false>;
      launch(kernel, config, y.data<T>(), conv_pointer<T>(final_state), conv_inputs<T>(in),
             groups, pieces, tiles, tile);
    });
    return true;
  });
}

bool conv_four_backward(Tensor& dx, Tensor& dinitial, Tensor& dweight, bool add_dweight, Tensor& dbias, bool add_dbias,
                        const Tensor& dy, const Tensor& dfinal, const CausalConv1dInputs& in) {
  if (!served(in)) return false;
  return visit_four(in.x.dtype(), [&]<class T>() {
    constexpr int V = 2;  // with more the gradients' registers would leave too few threads
    if (in.x.size(2) % V != 0 || !vectors<T>(in.x, V) || !vectors<T>(dx, V) || !vectors<T>(dy, V)) return false;
    if (dy.stride(1) >= int64_t{1} << 28) return false;
    launch_four(in, V, kBackwardBlocks, [&](const LaunchConfig& config, int64_t groups, int64_t pieces, int64_t tiles,
                                            int64_t tile) {
      const Tensor partial = empty({pieces, 5, in.x.size(2)}, DType::f32, in.x.device());
      const auto kernel =
          in.segments.defined() ? conv_four_backward_kernel<T, V, true> : conv_four_backward_kernel<T, V, false>;
      launch(kernel, config, conv_gradients<T>(dx, dinitial, dy, dfinal),
             partial.data<float>(), conv_inputs<T>(in), groups, pieces, tiles, tile);
      sum_conv_taps(dweight, add_dweight, dbias, add_dbias, partial);
    });
    return true;
  });
}

}  // namespace krait::kernels::cuda
