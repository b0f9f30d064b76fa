// One position of an mLSTM block in two kernels: what makes q, k, v and the gates, and the cell with what follows it.
#include "kernels/mlstm_step.h"

#include "kernels/cuda/aligned.h"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/cluster_launch.cuh"
#include "kernels/cuda/few_queue.h"
#include "kernels/cuda/mlstm_block.cuh"
#include "kernels/cuda/mlstm_common.cuh"
#include "kernels/cuda/mlstm_step_cluster.h"
#include "kernels/cuda/mlstm_step_maps.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/rows_queue.h"
#include "kernels/cuda/step_known.h"
#include "kernels/cuda/step_values.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kTaps = 4, kSide = 4;  // of the convolution; of a block of the maps
constexpr int kGates = 8;            // summed at a time

__device__ float log_sigmoid(float x) { return fminf(x, 0.0f) - log1pf(expf(-fabsf(x))); }

template <class T>
struct MapsJob {
  using A = accum_t<T>;
  T *q, *k, *v, *x_c, *conv;
  A* gates;  // (rows, warps of a row, n_gates)
  const T *x_m, *conv_weight, *conv_bias, *w_q, *w_k, *w_v, *g;
  int64_t x_row, e;
  int n_gates;
  bool ahead;  // conv was written before the kernels that can be under way
  bool late;   // the next kernel reads ahead what those in front of this one wrote
};

// A warp: 128 channels of a row, each lane a block of the maps. Bound by latency; rows read the weights from L2.
template <class T>
__global__ void __launch_bounds__(32) maps_kernel(MapsJob<T> j) {
  using A = accum_t<T>;
  [[maybe_unused]] constexpr int64_t kBytes = sizeof(T);
  constexpr bool kEarlyGates = sizeof(T) == 2;  // there is room in registers
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.y, first = int64_t{blockIdx.x} * 32 * kSide, count = min(int64_t{32 * kSide}, j.e - first);
  const bool real = lane * kSide < count;
  const int64_t c = first + (real ? lane * kSide : 0);
  if (!j.late) let_next_begin();
  Side<T, 4> before[kTaps], filter[kSide], w[3][kSide];
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    filter[i] = load_four(j.conv_weight + (c + i) * kTaps);
    w[0][i] = load_four(j.w_q + (c + i) * kSide);
    w[1][i] = load_four(j.w_k + (c + i) * kSide);
    w[2][i] = load_four(j.w_v + (c + i) * kSide);
  }
  const auto gate_weight = [&](int g, int part) { return load_four(j.g + (int64_t{g} * 3 + part) * j.e + c); };
  [[maybe_unused]] Side<T, 4> first_gates[kGates][3];
  if constexpr (kEarlyGates) {
#pragma unroll
    for (int g = 0; g < kGates; ++g)
#pragma unroll
      for (int part = 0; part < 3; ++part) first_gates[g][part] = gate_weight(min(g, j.n_gates - 1), part);
  } else {
    for (int64_t g = lane; g < 3 * j.n_gates; g += 32) bring_into_l2(j.g + g * j.e + first, count * kBytes);
  }
  T* const conv = j.conv + row * (kTaps - 1) * j.e + c;
  const auto read_conv = [&] {
#pragma unroll
    for (int t = 0; t + 1 < kTaps; ++t) before[t] = load_four(conv + t * j.e);
  };
  if (j.ahead) read_conv();
  wait_for_previous();
  if (j.late) let_next_begin();
  if (!j.ahead) read_conv();
  before[kTaps - 1] = load_four(j.x_m + row * j.x_row + c);
  A x[2][4], out[3][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    A p = j.conv_bias != nullptr ? static_cast<A>(j.conv_bias[c + i]) : A(0);
#pragma unroll
    for (int t = 0; t < kTaps; ++t) p += static_cast<A>(filter[i].at[t]) * static_cast<A>(before[t].at[i]);
    x[0][i] = static_cast<A>(static_cast<T>(silu_of(p)));
    x[1][i] = static_cast<A>(before[kTaps - 1].at[i]);
  }
#pragma unroll
  for (int part = 0; part < 3; ++part)
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      out[part][o] = A(0);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[part][o] += static_cast<A>(w[part][o].at[i]) * x[part / 2][i];
    }
  A* const gates = j.gates + (row * gridDim.x + blockIdx.x) * j.n_gates;
  for (int g0 = 0; g0 < j.n_gates; g0 += kGates) {
    A sums[kGates];
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      sums[g] = A(0);
      if (!real || g0 + g >= j.n_gates) continue;
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        const Side<T, 4> weight = kEarlyGates && g0 == 0 ? first_gates[g][part] : gate_weight(g0 + g, part);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[g] += static_cast<A>(weight.at[i]) * out[part][i];
      }
    }
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      const A sum = sum_lanes<32>(sums[g]);
      if (lane == g && g0 + g < j.n_gates) gates[g0 + g] = sum;
    }
  }
  if (!real) return;
  const int64_t at = row * j.e + c;
  store_four(j.q + at, out[0]);
  store_four(j.k + at, out[1]);
  store_four(j.v + at, out[2]);
  store_four(j.x_c + at, x[0]);
  for (int t = 0; t + 1 < kTaps; ++t) *reinterpret_cast<Side<T, 4>*>(conv + t * j.e) = before[t + 1];
}

constexpr int kCluster = 8, kWideCluster = 16;  // blocks of a cluster, which advances a head of a row
constexpr int kThreads = 512;  // at most
constexpr int kAhead = 4;      // rows of C under way, of each group of threads
constexpr int kMaxHead = 1024;
constexpr int64_t kMaxShared = 200 * 1024;  // that a block may take
constexpr int64_t kHeldUnits = 32, kWideUnits = 4;  // heads of rows at most whose C goes to shared memory first, in wide clusters

template <class T>
struct CellJob {
  float *c, *n, *m;
  const T *q, *k, *v;
  const float *i, *f;           // partial sums, of row r, part p, head h at r gate_row + p gate_part + h
  int64_t gate_row, gate_part;
  int parts, heads, dq, dv;
  float scale, eps;
  float* h;  // of the cell alone
  // Of the whole block.
  T* y;
  const float *bias_i, *bias_f, *norm;
  const T *skip, *x_c, *z;
  int64_t z_row;
  float norm_eps;
  bool ahead;  // the state was written before the kernels that can be under way
};

// A block: dv / kBlocks columns of C, a lane of a group 4 of them. Each block takes a share of n as well and tells the others its
// part of n . q, and mean and squared deviations of its columns of C^T q, of which the norm is made.
// kHeld: its part of C lies in shared memory, read `ahead` while the kernel in front still runs, and is written behind
// what the others wait for.
// Bound by reading and writing C.
template <class T, bool kWhole, bool kHeld, int kBlocks>
__global__ void __launch_bounds__(kThreads) cell_kernel(CellJob<T> j) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kOwn = kMaxHead / kBlocks / 32;  // columns of C, and values of n, of a lane of a block's first warp
  extern __shared__ float4 shared[];
  __shared__ float4 told[kBlocks];
  __shared__ __align__(8) uint64_t barrier;
  const int width = j.dv / kBlocks, lanes = width / 4, groups = static_cast<int>(blockDim.x) / lanes;
  const int t = static_cast<int>(threadIdx.x), group = t / lanes, lane = t % lanes;
  float* const qs = reinterpret_cast<float*>(shared);  // (dq)
  float* const ks = qs + j.dq;                         // (dq)
  float* const parts = ks + j.dq;                      // (groups, width)
  [[maybe_unused]] float* const held = parts + groups * width;  // (dq, width)
  const int rank = static_cast<int>(cluster_rank());
  const int64_t unit = blockIdx.x / kBlocks, row = unit / j.heads, head = unit % j.heads;
  let_next_begin();
  float* const c = j.c + unit * j.dq * j.dv + rank * width + lane * 4;
  const auto row_of = [&](int x) { return reinterpret_cast<float4*>(c + int64_t{x} * j.dv); };
  const auto held_row = [&](int x) { return reinterpret_cast<float4*>(held + x * width + lane * 4); };
  const auto hold = [&] {
    for (int x = group; x < j.dq; x += groups) copy_async(held_row(x), row_of(x), true);
    copy_commit();
  };
  if (kHeld && j.ahead) {
    hold();
  } else if (t < 32) {
    const int64_t piece = int64_t{j.dq} * j.dv / (kBlocks * 32);
    bring_into_l2(j.c + unit * j.dq * j.dv + (rank * 32 + t) * piece, piece * static_cast<int64_t>(sizeof(float)));
  }
  const uint32_t arrivals = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
  if (t == 0) {
    arrivals_init(arrivals);
    arrivals_expect(arrivals, sizeof(told));
  }
  const auto column = [&](int s) { return t + 32 * s; };  // of the block, where t < 32
  const auto channel = [&](int s) { return head * j.dv + rank * width + column(s); };
  const auto has = [&](int s) { return t < 32 && column(s) < width; };
  float factor[kOwn], add[kOwn], gate[kOwn], bias_i = 0, bias_f = 0;
  if constexpr (kWhole) {
    bias_i = j.bias_i[head];
    bias_f = j.bias_f[head];
#pragma unroll
    for (int s = 0; s < kOwn; ++s) {
      factor[s] = has(s) ? 1.0f + j.norm[channel(s)] : 0.0f;
      add[s] = has(s) ? static_cast<float>(j.skip[channel(s)]) : 0.0f;
    }
  }
  cluster_barrier();  // the others' shared memory is there
  wait_for_previous();
  if (kHeld && !j.ahead) hold();

  float4 ahead[kAhead];
  if constexpr (!kHeld)
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (group + a * groups < j.dq) ahead[a] = *row_of(group + a * groups);
  const Side<T, 4> v_in = load_four(j.v + unit * j.dv + rank * width + lane * 4);
  const float m = j.m[unit];
  if constexpr (kWhole)
#pragma unroll
    for (int s = 0; s < kOwn; ++s) {
      if (!has(s)) continue;
      add[s] *= static_cast<float>(j.x_c[row * j.heads * j.dv + channel(s)]);
      gate[s] = static_cast<float>(j.z[row * j.z_row + channel(s)]);
    }
  const int share = (j.dq + kBlocks - 1) / kBlocks, n_end = min((rank + 1) * share, j.dq);
  float n[kOwn];
#pragma unroll
  for (int s = 0; s < kOwn; ++s) {
    const int x = rank * share + t + 32 * s;
    n[s] = t < 32 && x < n_end ? j.n[unit * j.dq + x] : 0.0f;
  }
  float i = 0, f = 0;
  for (int p = t % 32; p < j.parts; p += 32) {
    const int64_t at = row * j.gate_row + p * j.gate_part + head;
    i += j.i[at];
    f += j.f[at];
  }
  i = sum_lanes<32>(i);
  f = sum_lanes<32>(f);
  i += bias_i;
  f += bias_f;
  const float old = m + log_sigmoid(f), top = fmaxf(old, i), keep = exp_of(old - top), take = exp_of(i - top);
  for (int x = t; x < j.dq; x += static_cast<int>(blockDim.x)) {
    qs[x] = j.scale * static_cast<float>(j.q[unit * j.dq + x]);
    ks[x] = take * static_cast<float>(j.k[unit * j.dq + x]);
  }
  if constexpr (kHeld) copy_wait<0>();  // a thread reads what it copied itself
  __syncthreads();
  float v[4], sum[4] = {};
#pragma unroll
  for (int e = 0; e < 4; ++e) v[e] = static_cast<float>(v_in.at[e]);
  for (int base = group; base < j.dq; base += kAhead * groups) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int x = base + a * groups;
      if (x >= j.dq) break;
      const float kx = ks[x], qx = qs[x];
      float4 next = kHeld ? *held_row(x) : ahead[a];
      next.x = keep * next.x + kx * v[0];
      next.y = keep * next.y + kx * v[1];
      next.z = keep * next.z + kx * v[2];
      next.w = keep * next.w + kx * v[3];
      if constexpr (kHeld)
        *held_row(x) = next;
      else
        *row_of(x) = next;
      sum[0] += qx * next.x;
      sum[1] += qx * next.y;
      sum[2] += qx * next.z;
      sum[3] += qx * next.w;
      if (!kHeld && x + kAhead * groups < j.dq) ahead[a] = *row_of(x + kAhead * groups);
    }
  }
  *reinterpret_cast<float4*>(parts + group * width + lane * 4) = make_float4(sum[0], sum[1], sum[2], sum[3]);
  __syncthreads();

  const auto put_back = [&] {
    if constexpr (kHeld)
      for (int x = group; x < j.dq; x += groups) *row_of(x) = *held_row(x);
  };
  if (t >= 32) return put_back();
  float num[kOwn];
  {
    float r = 0, mean = 0, squares = 0;
#pragma unroll
    for (int s = 0; s < kOwn; ++s) {
      const int x = rank * share + t + 32 * s;
      if (x < n_end) {
        n[s] = keep * n[s] + ks[x];
        j.n[unit * j.dq + x] = n[s];
        r += n[s] * qs[x];
      }
      num[s] = 0;
      if (column(s) >= width) continue;
#pragma unroll 8
      for (int g = 0; g < groups; ++g) num[s] += parts[g * width + column(s)];
      mean += num[s];
      if constexpr (kWhole) gate[s] = silu_of(gate[s]);
    }
    r = sum_lanes<32>(r);
    if constexpr (kWhole) {
      mean = sum_lanes<32>(mean) / static_cast<float>(width);
#pragma unroll
      for (int s = 0; s < kOwn; ++s)
        if (column(s) < width) squares += (num[s] - mean) * (num[s] - mean);
      squares = sum_lanes<32>(squares);
    }
    if (t < kBlocks)  // not behind a barrier, which would wait for what has been written of C
      send(of_block(static_cast<uint32_t>(__cvta_generic_to_shared(&told[rank])), static_cast<uint32_t>(t)), of_block(arrivals, static_cast<uint32_t>(t)),
           uint4{__float_as_uint(r), __float_as_uint(mean), __float_as_uint(squares), 0});
  }
  put_back();
  arrivals_wait(arrivals, 0);
  if (t == 0 && rank == 0) j.m[unit] = top;  // which all blocks have read
  float r = 0, mean = 0, squares = 0;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    r += told[b].x;
    mean += told[b].y / kBlocks;
    squares += told[b].z;
  }
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) squares += static_cast<float>(width) * (told[b].y - mean) * (told[b].y - mean);
  const float inverse = 1.0f / mlstm_denominator(r, top, j.eps);
  const float rstd = rsqrtf(squares / static_cast<float>(j.dv) * inverse * inverse + j.norm_eps);
#pragma unroll
  for (int s = 0; s < kOwn; ++s) {
    if (column(s) >= width) continue;
    const int64_t at = unit * j.dv + rank * width + column(s);
    if constexpr (kWhole)
      j.y[at] = static_cast<T>(((num[s] - mean) * inverse * rstd * factor[s] + add[s]) * gate[s]);
    else
      j.h[at] = num[s] * inverse;
  }
#endif
}

// With q, k, v and the state of the job, and its sizes.
bool cell_fits(const Tensor& q, const Tensor& k, const Tensor& v, const MlstmState& state) {
  const int64_t dq = state.c.size(2), dv = state.c.size(3);
  return runs_sm90(q.device()) && (q.dtype() == DType::bf16 || q.dtype() == DType::f32) && dq % 4 == 0 && dq <= kMaxHead && dv % (4 * kCluster) == 0 &&
         (dv <= kMaxHead / 2 || (dv <= kMaxHead && dv % 64 == 0)) && aligned(q, k, v, state.c);
}

template <class T>
CellJob<T> cell_job(const Tensor& q, const Tensor& k, const Tensor& v, MlstmState& state, double eps) {
  CellJob<T> job{};
  job.c = state.c.data<float>();
  job.n = state.n.data<float>();
  job.m = state.m.data<float>();
  job.q = q.data<T>();
  job.k = k.data<T>();
  job.v = v.data<T>();
  job.heads = static_cast<int>(state.c.size(1));
  job.dq = static_cast<int>(state.c.size(2));
  job.dv = static_cast<int>(state.c.size(3));
  job.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(job.dq)));
  job.eps = static_cast<float>(eps);
  return job;
}

template <class T, bool kWhole>
void run(const CellJob<T>& job, int64_t units, Stream stream) {
  const auto launch = [&]<bool kHeld, int kBlocks>(int groups) {
    const int lanes = job.dv / kBlocks / 4;
    const int64_t floats = 2 * job.dq + groups * 4 * lanes + (kHeld ? int64_t{job.dq} * 4 * lanes : 0);
    const LaunchConfig config{.grid = units * kBlocks, .block = groups * lanes, .shared = floats * static_cast<int64_t>(sizeof(float)), .stream = stream};
    if (config.shared > kMaxShared || config.block > kThreads) return false;
    const auto kernel = cell_kernel<T, kWhole, kHeld, kBlocks>;
    if (kHeld) keep_shared_memory(kernel);
    if (kBlocks > kCluster) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
      if (most_clusters(kernel, kBlocks, config) < 1) return false;
    }
    launch_with({clusters_of(kBlocks), overlapping()}, kernel, config, job);
    return true;
  };
  const int groups = job.dv / kCluster / 4 <= kThreads / 32 ? 32 : 16;  // whole warps
  if (units <= kWideUnits && job.dv % (4 * kWideCluster) == 0 && launch.template operator()<true, kWideCluster>(64)) return;
  if (units <= kHeldUnits && launch.template operator()<true, kCluster>(groups)) return;
  launch.template operator()<false, kCluster>(groups);
}

// The two types that clusters serve.
template <class F>
void visit_cell_dtype(DType dtype, F&& f) {
  if (dtype == DType::bf16) return f.template operator()<bf16>();
  f.template operator()<float>();
}

// What gather_few_mlstm_maps asks of the tensors.
bool takes_few(const Tensor& conv, const Tensor& x_m, const MlstmStepMapsWeights& w) {
  return x_m.dtype() == DType::bf16 && w.maps.w_q.size(1) == kSide && w.conv_weight.size(1) == kTaps &&
         (!w.conv_bias.defined() || w.conv_bias.dtype() == DType::bf16) &&
         aligned(conv, w.conv_weight, w.maps.w_q, w.maps.w_k, w.maps.w_v, w.maps.g);
}

}  // namespace

bool mlstm_maps_fit(int64_t rows, const Tensor& conv, const MlstmStepMapsWeights& w) {
  return w.maps.w_q.size(1) == kSide && w.conv_weight.size(1) == kTaps && rows < 65536 &&
         (!w.conv_bias.defined() || w.conv_bias.dtype() == conv.dtype()) &&
         aligned(conv, w.conv_weight, w.maps.w_q, w.maps.w_k, w.maps.w_v, w.maps.g);
}

void mlstm_step_maps(bool& done, MlstmStepMaps& out, Tensor& conv, const Tensor& x_m, const MlstmStepMapsWeights& w) {
  const int64_t rows = x_m.size(0), e = x_m.size(1), n = w.maps.g.size(0), warps = ceil_div(e, 32 * kSide);
  const int64_t four = 4 * size_of(x_m.dtype());
  if (takes_few(conv, x_m, w) && gather_few_mlstm_maps(out, conv, x_m, w)) {
    done = true;
    return;
  }
  done = mlstm_maps_fit(rows, conv, w) && x_m.stride(0) % 4 == 0 && reinterpret_cast<uintptr_t>(x_m.raw_data()) % static_cast<uintptr_t>(four) == 0;
  if (!done) return;
  out.gates = empty({rows, warps, n}, accum_dtype(x_m.dtype()), x_m.device());
  // The cell's state comes early. When the kernel behind a map of rows begins, all in front of that have finished.
  const bool behind_map = gather_rows_launch_beside(x_m);
  visit_float(x_m.dtype(), [&]<class T>() {
    launch_overlapped(maps_kernel<T>, {.grid = warps, .grid_y = rows, .block = 32, .stream = current_stream(x_m.device())},
                      MapsJob<T>{out.q.data<T>(), out.k.data<T>(), out.v.data<T>(), out.x_c.data<T>(), conv.data<T>(),
                                 out.gates.data<accum_t<T>>(), x_m.data<T>(), w.conv_weight.data<T>(), pointer_or_null<T>(w.conv_bias),
                                 w.maps.w_q.data<T>(), w.maps.w_k.data<T>(), w.maps.w_v.data<T>(), w.maps.g.data<T>(), x_m.stride(0), e,
                                 static_cast<int>(n), behind_map, rows > kFewRows && !behind_map});
  });
}

void mlstm_step_output(bool& done, Tensor& y, MlstmState& state, const MlstmStepMaps& in, const Tensor& z, const MlstmStepOutputWeights& w) {
  done = cell_fits(in.q, in.k, in.v, state);
  if (!done) return;
  const int64_t heads = state.c.size(1), parts = in.gates.size(1);
  visit_cell_dtype(y.dtype(), [&]<class T>() {
    CellJob<T> job = cell_job<T>(in.q, in.k, in.v, state, w.eps);
    job.i = in.gates.data<float>();
    job.f = job.i + heads;
    job.gate_row = parts * 2 * heads;
    job.gate_part = 2 * heads;
    job.parts = static_cast<int>(parts);
    job.y = y.data<T>();
    job.bias_i = w.gate_bias.data<float>();
    job.bias_f = job.bias_i + heads;
    job.norm = w.norm.data<float>();
    job.skip = w.skip.data<T>();
    job.x_c = in.x_c.data<T>();
    job.z = z.data<T>();
    job.z_row = z.stride(0);
    job.norm_eps = static_cast<float>(w.norm_eps);
    job.ahead = few_reads_ahead(y.device(), state.c);
    run<T, true>(job, state.m.numel(), current_stream(y.device()));
    few_launched(y);
    gather_rows_known(y);
  });
}

bool mlstm_step_cluster(Tensor& h, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
                        MlstmState& state, double eps) {
  if (!cell_fits(q, k, v, state)) return false;
  visit_cell_dtype(q.dtype(), [&]<class T>() {
    CellJob<T> job = cell_job<T>(q, k, v, state, eps);
    job.i = i.data<float>();
    job.f = f.data<float>();
    job.gate_row = job.heads;
    job.parts = 1;
    job.h = h.data<float>();
    run<T, false>(job, state.m.numel(), current_stream(h.device()));
  });
  return true;
}

}  // namespace krait::kernels::cuda
