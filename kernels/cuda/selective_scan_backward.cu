#include "kernels/cuda/selective_scan.cuh"

// Backward in three launches over chunks, the mirror of the forward: what each chunk sends back of nothing; what each
// chunk receives (scan_chunks_kernel); the gradients. The last one computes the chunk's states again from the
// state before it, a tile of positions at a time. Sums over channels are made by shuffles, over blocks in a second
// pass: no atomics. Bound by the exponentials, 4 b l e n.
namespace krait::kernels::cuda {

namespace {

constexpr int kWarp = 32;

// g = dy silu(z) of one position.
template <class T, class A = accum_t<T>>
__device__ __forceinline__ A upstream_of(const T* dy, const T* z) {
  const A g = static_cast<A>(*dy);
  return z == nullptr ? g : g * scan_silu(static_cast<A>(*z));
}

template <class T>
struct Upstream {
  const T* dy;
  int64_t batch, row;
};

// back[k] = exp(delta_{t0} A) lambda_{t0} of chunk k alone, and deltas as in the forward. Shared: C (kSteps, width).
template <class T, int kStates, int kChannels, class A = accum_t<T>>
__global__ void __launch_bounds__(kChannels == 32 ? 512 : 128)
    scan_reverse_kernel(A* __restrict__ back, A* __restrict__ deltas, const Upstream<T> up, const ScanView<T> in,
                        int64_t chunks, int groups) {
  constexpr int kSteps = 16, kAhead = 8;
  extern __shared__ double shared_bytes[];
  A* c_rows = reinterpret_cast<A*>(shared_bytes);
  const int width = groups * kStates;
  const int lane = static_cast<int>(threadIdx.x) % kChannels, group = static_cast<int>(threadIdx.x) / kChannels;
  const int64_t row = int64_t{blockIdx.x} / chunks, k = int64_t{blockIdx.x} % chunks;
  const int64_t channel = int64_t{blockIdx.y} * kChannels + lane;
  const bool active = channel < in.e;
  const int64_t t0 = k * kScanChunk, t1 = t0 + kScanChunk < in.l ? t0 + kScanChunk : in.l;
  const int first = group * kStates;
  A a[kStates], r[kStates];
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    a[i] = active && first + i < in.n ? in.a[channel * in.n + first + i] * static_cast<A>(kLog2E) : A(0);
    r[i] = 0;
  }
  const A bias = active && in.bias != nullptr ? in.bias[channel] : A(0);
  const T* dt = in.dt + row * in.dt_batch + channel;
  const T* z = in.z == nullptr ? nullptr : in.z + row * in.z_batch + channel;
  const T* dy = up.dy + row * up.batch + channel;
  A sum = 0;
  for (int64_t tile = t0 + (t1 - 1 - t0) / kSteps * kSteps; tile >= t0; tile -= kSteps) {
    __syncthreads();
    load_state_rows<kSteps>(c_rows, in.c + row * in.c_batch, in.c_row, tile, t1, in.n, width);
    __syncthreads();
    for (int s0 = kSteps - kAhead; s0 >= 0; s0 -= kAhead) {
      A delta[kAhead], g[kAhead];
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        const int64_t t = tile + s0 + s;
        const bool real = active && t < t1;
        delta[s] = real ? static_cast<A>(dt[t * in.dt_row]) : A(0);
        g[s] = real ? upstream_of(dy + t * up.row, z == nullptr ? nullptr : z + t * in.z_row) : A(0);
      }
#pragma unroll
      for (int s = kAhead - 1; s >= 0; --s) {
        const int64_t t = tile + s0 + s;
        delta[s] += bias;
        if (in.softplus) delta[s] = scan_softplus(delta[s]);
        if (!active || t >= t1) delta[s] = 0;
        sum += delta[s];
        const bool begins = in.begins(row, t);
        const A* c = c_rows + (s0 + s) * width + first;
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
          const A lambda = g[s] * c[i] + r[i];
          r[i] = begins ? A(0) : scan_exp2(delta[s] * a[i]) * lambda;
        }
      }
    }
  }
  if (!active) return;
#pragma unroll
  for (int i = 0; i < kStates; ++i)
    if (first + i < in.n) back[((row * chunks + k) * in.n + first + i) * in.e + channel] = r[i];
  if (group == 0) deltas[(row * chunks + k) * in.e + channel] = sum;
}

// 32 values of 32 lanes to their sums over the lanes: lane j returns the sum of value j.
template <class A>
__device__ __forceinline__ A sum_transposed(A (&v)[kWarp], int lane) {
#pragma unroll
  for (int s = kWarp / 2; s > 0; s /= 2) {
    const bool upper = (lane & s) != 0;
#pragma unroll
    for (int j = 0; j < s; ++j) {
      const A sent = upper ? v[j] : v[j + s];
      const A kept = upper ? v[j + s] : v[j];
      v[j] = kept + __shfl_xor_sync(0xFFFFFFFFu, sent, s);
    }
  }
  return v[0];
}

template <class T, class A = accum_t<T>>
struct ScanOutputs {
  T *dx, *ddt, *dz;  // (b, l, e); dz may be null
  A* back;           // (b, chunks, n, e): what a chunk receives; replaced by its part of dA
  A* rows;           // (b chunks, 2, e): parts of dD and of ddt_bias
  A* bc;             // (blocks of channels, b l, 2, n): parts of dB and dC
};

// What a tile of positions needs, in shared memory: B, C (kSteps, width); delta, x, g (kSteps, 32); sums over a group's
// states, each (groups, kSteps, 32).
template <class A, int kSteps>
struct Tile {
  A *b, *c, *delta, *x, *g, *lambda_b, *exponent, *u;
  __device__ Tile(void* shared, int width, int groups) {
    b = static_cast<A*>(shared);
    c = b + kSteps * width;
    delta = c + kSteps * width;
    x = delta + kSteps * kWarp;
    g = x + kSteps * kWarp;
    lambda_b = g + kSteps * kWarp;
    exponent = lambda_b + groups * kSteps * kWarp;
    u = exponent + groups * kSteps * kWarp;
  }
  static int64_t bytes(int width, int groups) {
    return static_cast<int64_t>(sizeof(A)) * (2 * kSteps * width + 3 * kSteps * kWarp + 3 * groups * kSteps * kWarp);
  }
};

// A block takes `per_block` times 32 channels of one chunk, one after the other.
template <class T, int kStates, int kSteps, class A = accum_t<T>>
__global__ void __launch_bounds__(kStates == 4 ? 256 : 512)
    scan_backward_kernel(const ScanOutputs<T> out, const Upstream<T> up, const A* __restrict__ states,
                         const ScanView<T> in, int64_t chunks, int groups, int per_block) {
  constexpr int kTiles = static_cast<int>(kScanChunk) / kSteps, kPer = kWarp / (2 * kStates);
  extern __shared__ double shared_bytes[];
  const int width = groups * kStates;
  const Tile<A, kSteps> tile(shared_bytes, width, groups);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, group = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t row = int64_t{blockIdx.x} / chunks, k = int64_t{blockIdx.x} % chunks;
  const int64_t t0 = k * kScanChunk, t1 = t0 + kScanChunk < in.l ? t0 + kScanChunk : in.l;
  const int tiles = static_cast<int>((t1 - t0 + kSteps - 1) / kSteps), first = group * kStates;
  A* bc = out.bc + (int64_t{blockIdx.y} * (gridDim.x / chunks) + row) * in.l * 2 * in.n;

  for (int block = 0; block < per_block; ++block) {
    const int64_t begin = (int64_t{blockIdx.y} * per_block + block) * kWarp, channel = begin + lane;
    if (begin >= in.e) return;
    const bool active = channel < in.e;
    const T* x = in.x + row * in.x_batch + channel;
    const T* dt = in.dt + row * in.dt_batch + channel;
    const T* z = in.z == nullptr ? nullptr : in.z + row * in.z_batch + channel;
    const T* dy = up.dy + row * up.batch + channel;
    const A bias = active && in.bias != nullptr ? in.bias[channel] : A(0);
    const A d = active && in.d != nullptr ? in.d[channel] : A(0);
    const int64_t place = ((row * chunks + k) * in.n + first) * in.e + channel;  // of state `first`; next + e
    A a[kStates], h[kStates], r[kStates], da[kStates];
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const bool real = active && first + i < in.n;
      a[i] = real ? in.a[channel * in.n + first + i] * static_cast<A>(kLog2E) : A(0);
      h[i] = real ? states[place + i * in.e] : A(0);
      r[i] = real ? out.back[place + i * in.e] : A(0);
      da[i] = 0;
    }

    const auto load = [&](int64_t from, bool all) {
      __syncthreads();  // the tile before is done with
      load_state_rows<kSteps>(tile.b, in.b + row * in.b_batch, in.b_row, from, t1, in.n, width);
      if (all) load_state_rows<kSteps>(tile.c, in.c + row * in.c_batch, in.c_row, from, t1, in.n, width);
      for (int s = group; s < kSteps; s += groups) {
        const int64_t t = from + s;
        const bool real = active && t < t1;
        A delta = real ? static_cast<A>(dt[t * in.dt_row]) + bias : A(0);
        if (in.softplus) delta = scan_softplus(delta);
        tile.delta[s * kWarp + lane] = real ? delta : A(0);
        tile.x[s * kWarp + lane] = real ? static_cast<A>(x[t * in.x_row]) : A(0);
        if (all)
          tile.g[s * kWarp + lane] =
              real ? upstream_of(dy + t * up.row, z == nullptr ? nullptr : z + t * in.z_row) : A(0);
      }
      __syncthreads();
    };

    A start[kTiles][kStates];  // states before the tiles
#pragma unroll 1
    for (int j = 0; j < tiles; ++j) {
#pragma unroll
      for (int i = 0; i < kStates; ++i) start[j][i] = h[i];
      if (j + 1 == tiles) break;
      load(t0 + j * kSteps, false);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const A delta = tile.delta[s * kWarp + lane], dx = delta * tile.x[s * kWarp + lane];
        const bool begins = in.begins(row, t0 + j * kSteps + s);
#pragma unroll
        for (int i = 0; i < kStates; ++i)
          h[i] = (begins ? A(0) : scan_exp2(delta * a[i]) * h[i]) + dx * tile.b[s * width + first + i];
      }
    }

    A dd = 0, dbias = 0;
#pragma unroll 1
    for (int j = tiles - 1; j >= 0; --j) {
      const int64_t from = t0 + j * kSteps;
      load(from, true);
      A seen[kSteps][kStates];  // states after each position
#pragma unroll
      for (int i = 0; i < kStates; ++i) h[i] = start[j][i];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const A delta = tile.delta[s * kWarp + lane], dx = delta * tile.x[s * kWarp + lane];
        const bool begins = in.begins(row, from + s);
        A u = 0;
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
          const A before = s > 0 ? seen[s > 0 ? s - 1 : 0][i] : h[i];
          seen[s][i] = (begins ? A(0) : scan_exp2(delta * a[i]) * before) + dx * tile.b[s * width + first + i];
          u += tile.c[s * width + first + i] * seen[s][i];
        }
        tile.u[(group * kSteps + s) * kWarp + lane] = u;
      }
#pragma unroll
      for (int q = kSteps / kPer - 1; q >= 0; --q) {
        A sums[kWarp];  // (position, dB or dC, state)
#pragma unroll
        for (int p = kPer - 1; p >= 0; --p) {
          const int s = q * kPer + p;
          const A delta = tile.delta[s * kWarp + lane], dx = delta * tile.x[s * kWarp + lane];
          const A g = tile.g[s * kWarp + lane];
          const bool begins = in.begins(row, from + s);
          A lambda_b = 0, exponent = 0;
#pragma unroll
          for (int i = 0; i < kStates; ++i) {
            const A before = s > 0 ? seen[s > 0 ? s - 1 : 0][i] : h[i];
            const A lambda = g * tile.c[s * width + first + i] + r[i];
            r[i] = begins ? A(0) : scan_exp2(delta * a[i]) * lambda;
            const A of_exponent = r[i] * before;
            lambda_b += lambda * tile.b[s * width + first + i];
            exponent += of_exponent * a[i];
            da[i] += of_exponent * delta;
            sums[2 * p * kStates + i] = lambda * dx;
            sums[(2 * p + 1) * kStates + i] = g * seen[s][i];
          }
          tile.lambda_b[(group * kSteps + s) * kWarp + lane] = lambda_b;
          tile.exponent[(group * kSteps + s) * kWarp + lane] = exponent;
        }
        const A sum = sum_transposed(sums, lane);
        const int64_t t = from + q * kPer + lane / (2 * kStates);
        const int which = lane / kStates % 2, state = first + lane % kStates;
        if (t < t1 && state < in.n) {
          A& to = bc[(t * 2 + which) * in.n + state];  // this lane's alone
          to = block == 0 ? sum : to + sum;
        }
      }
      __syncthreads();
      for (int s = group; s < kSteps; s += groups) {
        const int64_t t = from + s;
        if (!active || t >= t1) continue;
        A lambda_b = 0, exponent = 0;
        for (int other = 0; other < groups; ++other) {
          lambda_b += tile.lambda_b[(other * kSteps + s) * kWarp + lane];
          exponent += tile.exponent[(other * kSteps + s) * kWarp + lane];
        }
        const A g = tile.g[s * kWarp + lane], value = tile.x[s * kWarp + lane], delta = tile.delta[s * kWarp + lane];
        const int64_t at = (row * in.l + t) * in.e + channel;
        A ddt = exponent * static_cast<A>(1.0 / kLog2E) + value * lambda_b;
        if (in.softplus) ddt *= scan_sigmoid(static_cast<A>(dt[t * in.dt_row]) + bias);
        out.dx[at] = static_cast<T>(delta * lambda_b + d * g);
        out.ddt[at] = static_cast<T>(ddt);
        dd += g * value;
        dbias += ddt;
        if (z == nullptr) continue;
        A u = d * value;
        for (int other = 0; other < groups; ++other) u += tile.u[(other * kSteps + s) * kWarp + lane];
        const A gate = static_cast<A>(z[t * in.z_row]), c = gate < A(-110) ? A(-110) : gate, sig = scan_sigmoid(c);
        out.dz[at] = static_cast<T>(static_cast<A>(dy[t * up.row]) * u * sig * (A(1) + c * (A(1) - sig)));
      }
    }

    __syncthreads();
    tile.lambda_b[group * kWarp + lane] = dd;
    tile.exponent[group * kWarp + lane] = dbias;
    __syncthreads();
    if (group == 0 && active) {
      for (int other = 1; other < groups; ++other) {
        dd += tile.lambda_b[other * kWarp + lane];
        dbias += tile.exponent[other * kWarp + lane];
      }
      out.rows[(row * chunks + k) * 2 * in.e + channel] = dd;
      out.rows[((row * chunks + k) * 2 + 1) * in.e + channel] = dbias;
    }
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      if (active && first + i < in.n) out.back[place + i * in.e] = da[i];
  }
}

// to (e, n) = the sum over parts of from (parts, stride), whose first n e values are (n, e). to may be null.
template <class A>
struct PartSum {
  A* to;
  const A* from;
  int64_t parts, stride, n;
};

// Three such sums, in a fixed order; blockIdx.y: which. Block (32, 16) for 32 values.
template <class A>
__global__ void sum_scan_parts_kernel(const PartSum<A> first, const PartSum<A> second, const PartSum<A> third, int64_t e) {
  __shared__ A part[16][33];
  const auto [to, from, parts, stride, n] = blockIdx.y == 0 ? first : blockIdx.y == 1 ? second : third;
  const int tx = static_cast<int>(threadIdx.x) % 32, ty = static_cast<int>(threadIdx.x) / 32;
  const int64_t at = int64_t{blockIdx.x} * 32 + tx;
  if (to == nullptr || int64_t{blockIdx.x} * 32 >= n * e) return;  // a whole block
  A s = 0;
  if (at < n * e)
    for (int64_t p = ty; p < parts; p += 16) s += from[p * stride + at];
  part[ty][tx] = s;
  __syncthreads();
  if (ty != 0 || at >= n * e) return;
  for (int i = 1; i < 16; ++i) s += part[i][tx];
  to[at % e * n + at / e] = s;
}

// dB and dC (positions, n) = the sums over blocks of from (blocks, positions, 2, n).
template <class T, class A = accum_t<T>>
__global__ void split_scan_sums_kernel(T* db, T* dc, const A* from, int64_t blocks, int64_t positions, int64_t n) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, size = positions * 2 * n;
  if (at >= size) return;
  A s = 0;
  for (int64_t i = 0; i < blocks; ++i) s += from[i * size + at];
  const int64_t position = at / (2 * n), state = at % n;
  (at / n % 2 == 0 ? db : dc)[position * n + state] = static_cast<T>(s);
}

template <class T, int kStates, int kChannels>
void run_reverse(const Tensor& back, const Tensor& deltas, const Upstream<T>& up, const SelectiveScanInputs& in,
                 int groups) {
  using A = accum_t<T>;
  const int64_t b = in.x.size(0), chunks = back.size(1);
  launch(scan_reverse_kernel<T, kStates, kChannels>,
         {.grid = b * chunks,
          .grid_y = ceil_div(in.x.size(2), kChannels),
          .block = kChannels * groups,
          .shared = static_cast<int64_t>(sizeof(A)) * 16 * groups * kStates,
          .stream = current_stream(in.x.device())},
         back.data<A>(), deltas.data<A>(), up, scan_view<T>(in), chunks, groups);
}

template <class T, int kStates, int kSteps>
void run_backward(const ScanOutputs<T>& out, const Upstream<T>& up, const Tensor& states, const SelectiveScanInputs& in,
                  int64_t blocks, int per_block) {
  using A = accum_t<T>;
  const int groups = static_cast<int>(ceil_div(in.A.size(1), kStates));
  const int64_t b = in.x.size(0), chunks = states.size(1);
  launch(scan_backward_kernel<T, kStates, kSteps>,
         {.grid = b * chunks,
          .grid_y = blocks,
          .block = kWarp * groups,
          .shared = Tile<A, kSteps>::bytes(groups * kStates, groups),
          .stream = current_stream(in.x.device())},
         out, up, states.data<A>(), scan_view<T>(in), chunks, groups, per_block);
}

}  // namespace

void sum_scan_parts(SelectiveScanGrad& grad, const Tensor& da, const Tensor& rows, const Tensor& bc) {
  const int64_t e = grad.dA.size(0), n = grad.dA.size(1);
  const Stream stream = current_stream(da.device());
  visit_float(grad.dx.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const auto sum = [&](const Tensor& to, const A* from, int64_t stride, int64_t width) {
      return PartSum<A>{to.defined() ? to.data<A>() : nullptr, from, rows.size(0), stride, width};
    };
    launch(sum_scan_parts_kernel<A>, {.grid = ceil_div(e * n, 32), .grid_y = 3, .block = 512, .stream = stream},
           sum(grad.dA, da.data<A>(), n * e, n), sum(grad.dD, rows.data<A>(), 2 * e, 1),
           sum(grad.ddt_bias, rows.data<A>() + e, 2 * e, 1), e);
    const int64_t positions = grad.dB.numel() / n;
    launch(split_scan_sums_kernel<T>, {.grid = ceil_div(positions * 2 * n, 256), .block = 256, .stream = stream},
           grad.dB.data<T>(), grad.dC.data<T>(), bc.data<A>(), bc.size(0), positions, n);
  });
}

void selective_scan_backward(SelectiveScanGrad& grad, const Tensor& dy, const Tensor& dfinal,
                             const SelectiveScanInputs& in, const Tensor& states) {
  if (scan_walks(in)) return walk_backward(grad, dy, dfinal, in, states);
  const bool done = selective_scan_backward_in_parts(
      grad, in, [&](Tensor& y, Tensor& last, Tensor& none) { selective_scan_forward(y, last, none, in); },
      [&](SelectiveScanGrad& whole) { selective_scan_backward(whole, dy, dfinal, in, states); });
  if (done) return;
  const int64_t b = in.x.size(0), l = in.x.size(1), e = in.x.size(2), n = in.A.size(1), chunks = states.size(1);
  const Device device = in.x.device();
  const Stream stream = current_stream(device);
  // Several times 32 channels per block keep the parts of dB and dC small where there are blocks enough.
  const int64_t warps = ceil_div(e, kWarp);
  const int per_block = static_cast<int>(std::clamp<int64_t>(b * chunks * warps / 512, 1, 4));
  const int64_t blocks = ceil_div(warps, per_block);
  visit_float(in.x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const DType sums = dtype_of<A>;
    const ScanView<T> view = scan_view<T>(in);
    const Upstream<T> up{dy.data<T>(), dy.stride(0), dy.stride(1)};
    const Tensor back = empty({b, chunks, n, e}, sums, device), deltas = empty({b, chunks, e}, sums, device);
    if (n <= 4)
      run_reverse<T, 4, 128>(back, deltas, up, in, 1);
    else if (n <= 16)
      run_reverse<T, 16, 128>(back, deltas, up, in, 1);
    else
      run_reverse<T, 16, 32>(back, deltas, up, in, static_cast<int>(ceil_div(n, 16)));
    launch(scan_chunks_kernel<true, T>,
           {.grid = ceil_div(e, 128), .grid_y = n, .grid_z = b, .block = 128, .stream = stream}, back.data<A>(),
           grad.dh0.defined() ? grad.dh0.data<A>() : nullptr, deltas.data<A>(), scan_pointer<A>(dfinal), view, chunks,
           kScanChunk);

    const Tensor rows = empty({b * chunks, 2, e}, sums, device), bc = empty({blocks, b, l, 2 * n}, sums, device);
    const ScanOutputs<T> out{grad.dx.data<T>(), grad.ddt.data<T>(), grad.dz.defined() ? grad.dz.data<T>() : nullptr,
                             back.data<A>(), rows.data<A>(), bc.data<A>()};
    if (n <= 32)
      run_backward<T, 4, 16>(out, up, states, in, blocks, per_block);
    else
      run_backward<T, 16, 4>(out, up, states, in, blocks, per_block);

    sum_scan_parts(grad, back, rows, bc);
  });
}

}  // namespace krait::kernels::cuda
