#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/causal_conv1d.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"

// The causal convolution of width 4. A thread has a vector of channels. Bound by memory: forward 2 b l c sizeof(T) bytes,
// backward 3; at 3 TB/s in bf16 B32 L2048 C1536 0.13 and 0.20 ms. silu needs 2 special functions a value, 0.06 ms.
namespace krait::kernels::cuda {

namespace {

constexpr int kFourThreads = 128;
constexpr int64_t kMostThreads = (int64_t{1} << 31) - kFourThreads;
template <class T>
constexpr int kFourValues = 8 / static_cast<int>(sizeof(T));  // channels of a thread
// Forward a thread brings so many positions at once and is gone. Longer walks are slower, by up to 10 %: blocks that
// follow each other then read far from each other.
constexpr int kForwardTile = 8;
// Backward it walks along a tile and keeps sums; what it reads next is on its way into shared memory, where a thread has
// places of its own: kStep positions together, kAhead of such groups.
constexpr int kStep = 4, kAhead = 4, kBackwardBlocks = 4;

// V values in one access of 4, 8 or 16 bytes, packed.
template <class T, int V>
struct ConvVector {
  static constexpr int kBytes = V * static_cast<int>(sizeof(T));
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
  Word word;

  __device__ static ConvVector load(const T* p) { return {*reinterpret_cast<const Word*>(p)}; }
  // The same into shared memory, on its way until copy_wait().
  __device__ void bring(const T* p) {
    if constexpr (kBytes == 16)
      copy_async(this, p, true);
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(this)), "l"(p), "n"(kBytes) : "memory");
  }
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

// Which tile and channels a thread has: neighbours have neighbouring channels. There are fewer than 2^31 threads.
struct ConvPlace {
  int piece, row, t0, t1;
  int64_t channel;
  __device__ ConvPlace(int groups, int values, int64_t l, int tiles, int tile) {
    const int thread = static_cast<int>(blockIdx.x) * kFourThreads + static_cast<int>(threadIdx.x);
    piece = thread / groups;
    channel = (thread - piece * groups) * int64_t{values};
    row = piece / tiles;
    t0 = (piece - row * tiles) * tile;
    t1 = static_cast<int>(t0 + tile < l ? t0 + tile : l);
  }
};

// Filters of V channels and their last three inputs.
template <int V>
struct FourTaps {
  float w[4][V], bias[V], x[3][V];

  template <class T>
  __device__ FourTaps(const ConvInputs<T>& in, int64_t channel) {
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
  }
  // Input s = t0 - 3 + j, which is `here`, as position t0 sees it.
  template <class T>
  __device__ void start(const ConvLine<T>& line, int j, int t0, const ConvVector<T, V>& here) {
    const int s = t0 - 3 + j;
    forget(j);
    if (!line.together(s, t0)) return;
    if (s >= 0)
      here.unpack(x[j]);
    else if (line.initial != nullptr)
#pragma unroll
      for (int i = 0; i < V; ++i) x[j][i] = static_cast<float>(line.initial[(s + 3) * line.c + i]);
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
__global__ void __launch_bounds__(kFourThreads)
    conv_four_forward_kernel(T* __restrict__ y, T* __restrict__ final_state, const __grid_constant__ ConvInputs<T> in,
                             int groups, int pieces, int tiles) {
  using Vector = ConvVector<T, V>;
  const ConvPlace at(groups, V, in.l, tiles, kForwardTile);
  if (at.piece >= pieces) return;
  const ConvLine<T> line = in.line(at.row, at.channel);
  const T* from = line.x + (at.t0 - 3) * line.stride;
  const int x_step = static_cast<int>(line.stride), y_step = static_cast<int>(in.c);
  Vector raw[kForwardTile + 3];  // of positions t0 - 3 on
#pragma unroll
  for (int s = 0; s < kForwardTile + 3; ++s)
    if (at.t0 + s >= 3 && at.t0 + s - 3 < at.t1) raw[s] = Vector::load(from + s * x_step);
  FourTaps<V> taps(in, at.channel);
#pragma unroll
  for (int j = 0; j < 3; ++j) taps.start(line, j, at.t0, raw[j]);
  T* to = y + (at.row * in.l + at.t0) * in.c + at.channel;
#pragma unroll
  for (int s = 0; s < kForwardTile; ++s) {
    const int t = at.t0 + s;
    if (t >= at.t1) break;
    float now[V], out[V];
    raw[s + 3].unpack(now);
    if (kPacked && s > 0 && !line.together(t - 1, t)) taps.forget();
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = taps.filter(i, now[i]);
    if (in.silu)
#pragma unroll
      for (int i = 0; i < V; ++i) out[i] = silu_of(out[i]);
    Vector::store(to + s * y_step, out);
    taps.push(now);
  }
  if (at.t1 < in.l) return;
  for (int j = 0; j < 3; ++j)
    for (int i = 0; i < V; ++i)
      final_state[(at.row * 3 + j) * in.c + at.channel + i] =
          static_cast<T>(in.line(at.row, at.channel + i).template input<float>(in.l - 3 + j, in.l - 1));
}

// Positions of one thread on their way through shared memory, kStep at a time: of x and of dy.
template <class T, int V>
struct ConvRing {
  using Vector = ConvVector<T, V>;
  static constexpr int kBytes = kAhead * kStep * 2 * kFourThreads * static_cast<int>(sizeof(Vector));
  Vector* own;  // the thread's first; the others are kFourThreads apart
  const T *x, *dy;
  int x_step, dy_step;  // from a position to the next
  int left;             // positions to bring
  int to = 0, at = 0;

  __device__ Vector& place(int group, int s, int stream) const { return own[((group * kStep + s) * 2 + stream) * kFourThreads]; }
  __device__ void bring() {
#pragma unroll
    for (int s = 0; s < kStep; ++s)
      if (s < left) {
        place(to, s, 0).bring(x + s * x_step);
        place(to, s, 1).bring(dy + s * dy_step);
      }
    copy_commit();
    x += kStep * x_step;
    dy += kStep * dy_step;
    left -= kStep;
    to = (to + 1) % kAhead;
  }
  __device__ void start() {
#pragma unroll
    for (int k = 0; k < kAhead - 1; ++k) bring();
  }
  // f(group): the next kStep positions are in its places.
  template <class F>
  __device__ void next(const F& f) {
    copy_wait<kAhead - 2>();
    bring();
    f(at);
    at = (at + 1) % kAhead;
  }
};

// A gradient at either end of the sequence: before its first position or in the final state.
template <class T, int V>
__device__ __noinline__ void store_edge(const ConvGradients<T>& grad, const ConvInputs<T>& in, int64_t row,
                                        int64_t channel, int s, float4 d) {
  const float values[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
  for (int i = 0; i < V; ++i)
    grad.template store<float>(in.line(row, channel + i), row, channel + i, s, values[i]);
}

// partial (pieces, 5, c): four rows of dweight and one of dbias.
template <class T, int V, bool kPacked>
__global__ void __launch_bounds__(kFourThreads, kBackwardBlocks)
    conv_four_backward_kernel(const __grid_constant__ ConvGradients<T> grad, float* __restrict__ partial,
                              const __grid_constant__ ConvInputs<T> in,
                              int groups, int pieces, int tiles, int tile) {
  using Vector = ConvVector<T, V>;
  extern __shared__ __align__(16) unsigned char shared[];
  const ConvPlace at(groups, V, in.l, tiles, tile);
  if (at.piece >= pieces) return;
  const int l = static_cast<int>(in.l), seen = at.t1 + 3 < l ? at.t1 + 3 : l;
  const ConvLine<T> line = in.line(at.row, at.channel);
  const T* dy = grad.dy + at.row * grad.dy_batch + at.channel;
  T* dx_row = grad.dx + at.row * grad.dx_batch + at.channel;
  ConvRing<T, V> ring{reinterpret_cast<Vector*>(shared) + threadIdx.x,
                      line.x + at.t0 * line.stride,
                      dy + at.t0 * grad.dy_row,
                      static_cast<int>(line.stride),
                      static_cast<int>(grad.dy_row),
                      seen - at.t0};
  ring.start();
  FourTaps<V> taps(in, at.channel);
#pragma unroll
  for (int j = 0; j < 3; ++j)
    taps.start(line, j, at.t0, at.t0 > 0 ? Vector::load(line.x + (at.t0 - 3 + j) * line.stride) : Vector{});
  float dw[4][V] = {}, db[V] = {}, dx[3][V] = {};  // dx[j]: of input t - 3 + j, when t comes
  int back = 0;                                     // from how far back t may still be seen
  for (int j = 1; j < 4 && line.together(at.t0 - j, at.t0); ++j) back = j;
  const int oldest = at.t0 > 0 ? at.t0 : -3;  // first input whose gradient this tile stores

  const auto store = [&](int s, float(&d)[V]) {
    if (s < oldest) return;
    if (s < 0 || (grad.dfinal != nullptr && s >= l - 3))
      store_edge<T, V>(grad, in, at.row, at.channel, s, {d[0], d[1], d[V - 2], d[V - 1]});
    else
      Vector::store(dx_row + s * grad.dx_row, d);
  };
  // kInside: gradients of t - 3 are this tile's, and not an edge's.
  const auto step = [&]<bool kInside>(int t, const float(&now)[V], float(&g)[V], T* to) {
    if (kPacked && t > at.t0) {
      back = back < 3 ? back + 1 : 3;
      if (!line.together(t - 1, t)) {
        taps.forget();
        back = 0;
      }
    }
    if (in.silu)
#pragma unroll
      for (int i = 0; i < V; ++i) g[i] *= silu_slope(taps.filter(i, now[i]));
    if (kInside || t < at.t1)
#pragma unroll
      for (int i = 0; i < V; ++i) {
        db[i] += g[i];
        dw[3][i] = fmaf(g[i], now[i], dw[3][i]);
#pragma unroll
        for (int j = 0; j < 3; ++j) dw[j][i] = fmaf(g[i], taps.x[j][i], dw[j][i]);
      }
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const bool seen = !kPacked || 3 - j <= back;
#pragma unroll
      for (int i = 0; i < V; ++i) dx[j][i] = fmaf(seen ? taps.w[j][i] : 0.0f, g[i], dx[j][i]);
    }
    if constexpr (kInside)
      Vector::store(to, dx[0]);
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

  const int dx_step = static_cast<int>(grad.dx_row);
  const auto batch = [&]<bool kInside>(int group, int t, T* to) {
#pragma unroll
    for (int s = 0; s < kStep; ++s) {
      if (!kInside && t + s >= seen) break;
      float now[V], g[V];
      ring.place(group, s, 0).unpack(now);
      ring.place(group, s, 1).unpack(g);
      step.template operator()<kInside>(t + s, now, g, to + s * dx_step);
    }
  };
  T* to = dx_row + (at.t0 - 3) * grad.dx_row;
  for (int t = at.t0; t < seen; t += kStep, to += kStep * dx_step)
    ring.next([&](int group) {
      if (t > at.t0 && t + kStep <= at.t1)
        batch.template operator()<true>(group, t, to);
      else
        batch.template operator()<false>(group, t, to);
    });
  let_next_begin();
  // Inputs that no later position sees: the last ones of the sequence.
#pragma unroll
  for (int j = 0; j < 3; ++j)
    if (seen - 3 + j < at.t1) store(seen - 3 + j, dx[j]);

  float* sums = partial + int64_t{at.piece} * 5 * in.c + at.channel;
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

// Positions of a backward tile: long, since each writes sums, where there is work for all multiprocessors then.
int64_t backward_tile(int64_t b, int64_t l, int64_t groups) {
  int64_t tile = 128;
  while (tile > 32 && b * ceil_div(l, tile) * groups < 2 * 132 * kFourThreads) tile /= 2;
  return tile;
}

template <class F>
bool visit_four(DType type, const F& f) {
  return type == DType::bf16 ? f.template operator()<bf16>() : f.template operator()<float>();
}

}  // namespace

bool conv_four_forward(Tensor& y, Tensor& final_state, const CausalConv1dInputs& in) {
  if (!served(in)) return false;
  return visit_four(in.x.dtype(), [&]<class T>() {
    constexpr int V = kFourValues<T>;
    if (in.x.size(2) % V != 0 || !vectors<T>(in.x, V) || !vectors<T>(y, V)) return false;
    const int64_t groups = in.x.size(2) / V, tiles = ceil_div(in.x.size(1), kForwardTile), pieces = in.x.size(0) * tiles;
    if (pieces * groups >= kMostThreads) return false;
    const auto kernel =
        in.segments.defined() ? conv_four_forward_kernel<T, V, true> : conv_four_forward_kernel<T, V, false>;
    launch(kernel,
           {.grid = ceil_div(pieces * groups, kFourThreads), .block = kFourThreads, .stream = current_stream(y.device())},
           y.data<T>(), conv_pointer<T>(final_state), conv_inputs<T>(in), groups, pieces, tiles);
    return true;
  });
}

bool conv_four_backward(Tensor& dx, Tensor& dinitial, Tensor& dweight, bool add_dweight, Tensor& dbias, bool add_dbias,
                        const Tensor& dy, const Tensor& dfinal, const CausalConv1dInputs& in) {
  if (!served(in)) return false;
  return visit_four(in.x.dtype(), [&]<class T>() {
    constexpr int V = kFourValues<T>;
    if (in.x.size(2) % V != 0 || !vectors<T>(in.x, V) || !vectors<T>(dx, V) || !vectors<T>(dy, V)) return false;
    if (dy.stride(1) >= int64_t{1} << 28 || dx.stride(1) >= int64_t{1} << 28) return false;
    const int64_t b = in.x.size(0), l = in.x.size(1), groups = in.x.size(2) / V, tile = backward_tile(b, l, groups);
    const int64_t tiles = ceil_div(l, tile), pieces = b * tiles;
    if (pieces * groups >= kMostThreads) return false;
    const Tensor partial = empty({pieces, 5, in.x.size(2)}, DType::f32, in.x.device());
    const auto kernel =
        in.segments.defined() ? conv_four_backward_kernel<T, V, true> : conv_four_backward_kernel<T, V, false>;
    launch(kernel,
           {.grid = ceil_div(pieces * groups, kFourThreads), .block = kFourThreads, .shared = ConvRing<T, V>::kBytes,
            .stream = current_stream(dx.device())},
           conv_gradients<T>(dx, dinitial, dy, dfinal), partial.data<float>(), conv_inputs<T>(in), groups, pieces, tiles,
           tile);
    sum_conv_taps(dweight, add_dweight, dbias, add_dbias, partial);
    return true;
  });
}

}  // namespace krait::kernels::cuda
