#include "kernels/cuda/rows_mamba.h"

#include "kernels/cuda/exp2.cuh"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/launch_with.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/rows_exchange.cuh"
#include "kernels/cuda/rows_project.cuh"
#include "kernels/cuda/rows_scan.cuh"
#include "kernels/cuda/step_values.cuh"
#include "kernels/cuda/tma.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 12, kThreads = 32 * kWarps;  // that compute; one more brings weights and states, one clears slots
constexpr int kBlocks = 64, kHalfRows = 32;         // 64 blocks share 32 rows; two such halves know nothing of one another
constexpr int kMaxD = 768, kMaxE = 1536, kMaxOutputs = 80;
constexpr int kInColumns = 48, kOutColumns = 24, kOutRows = 16, kRows = kScanRows, kChannels = 192, kTaps = 4;
constexpr int kInPitch = 2 * kMaxD + 64, kOutPitch = 2 * kMaxE + 64;  // bytes; neighbouring columns in different banks
constexpr int kInSums = kInColumns + 8, kOutSums = kOutColumns;       // pitches of sums: rows in different banks
constexpr int kTilePitch = kInColumns + 8;
constexpr int kInSteps = kMaxD / (32 * kWarps), kOutSteps = kMaxE / (32 * kWarps);  // pieces of 32 of k a warp
constexpr int kPasses = kChannels / (kThreads / 4), kDtPieces = (kMaxOutputs - 2 * kScanStates) / 16;
constexpr int kPartColumns = kMaxE / kInColumns, kSquares = mamba_squares(kMaxD), kSlots = 4;

struct Shared {
  alignas(128) unsigned char in[kWarps * kHalfRows * kInSums * 4];  // in_proj's columns, then sums
  alignas(128) unsigned char out[kOutColumns * kOutPitch];          // out_proj's
  alignas(128) float4 h[kRows][kChannels][4];
  alignas(16) bf16 project[kMaxOutputs][kTilePitch];
  alignas(16) bf16 mixed[kHalfRows][kTilePitch];
  alignas(16) float gathered[kScanGroups][kRows * kMaxOutputs];
  alignas(16) float values[kRows * kMaxOutputs];
  float factor[kHalfRows];
  uint64_t in_full, out_full, h_full, in_free, out_free, h_made, clean;
};
static_assert(kInColumns * kInPitch <= static_cast<int>(sizeof(Shared::in)) && kWarps * kOutRows * kOutSums * 4 <= static_cast<int>(sizeof(Shared::out)));
static_assert(sizeof(Shared) <= 227 * 1024);

/// What the blocks of both halves send one another in a layer (rows_exchange.cuh); layer i uses slot i % kSlots. A
/// counter of each tells when it pays to look: those who wait leave the L2 cache to those who send.
///
/// A block may take its words back when it has received the input of in_proj: `xz`, `part` and `y` of the layer in front,
/// `weighted` and `squares` of the one before that. For who sent that input had received all of y for its rows, whose
/// senders had received part and xz, whose senders had received the input of in_proj a layer before; and a block that
/// sends nothing receives nothing. What is taken back in layer i is announced there, awaited in i + 1, and those that
/// compute wait for that (`clean`) in i + 2, before they ask for anything: for the words of i - 1 they ask again in i + 3,
/// for those of i - 2 at the start of i + 3. All of it is hidden behind a layer.
struct Slot {
  alignas(128) bf16 xz[2 * kHalfRows][2 * kMaxE];  // columns of in_proj; x's convolved
  float part[2 * kHalfRows][kPartColumns][kMaxOutputs];
  bf16 y[2 * kHalfRows][kMaxE], weighted[2 * kHalfRows][kMaxD];
  float squares[2 * kHalfRows][kSquares];  // part p at p % 8 * 4 + p / 8
};
static_assert(kSquares == 32);

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

enum Counter { kCleared, kInSent, kOutSent, kScanSent };  // kScanSent of 16 rows each
__device__ __forceinline__ unsigned* counter(const RowsMamba& a, int layer, Counter which, int part = 0) {
  return a.counters + (layer * 2 + static_cast<int>(blockIdx.x) / kBlocks) * 8 + which + part;
}
__device__ __forceinline__ Slot& slot(const RowsMamba& a, int layer) { return static_cast<Slot*>(a.exchange)[layer % kSlots]; }
__device__ __forceinline__ void meet() { cuda::meet(1, kThreads); }  // those that compute
/// threadIdx.x, read again: what depends on it alone would else be kept over all layers, and be spilled. A few spilled words
/// between a wait and what is sent behind it cost up to a tenth of the time.
__device__ __forceinline__ int own_thread() {
  int tid = 0;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(tid));
  return tid;
}
/// Has been computed here: else the compiler moves what is used behind a wait (divisions, exponentials) behind it.
__device__ __forceinline__ void keep(int& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void keep(float4& v) { asm volatile("" : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w)); }
template <class T>
__device__ __forceinline__ void keep(T*& v) {
  asm volatile("" : "+l"(v));
}
/// Says that the block will send soon: before it has, since this and the first question take their time too. Those who wait
/// do so for most blocks only, and ask again for words that are missing: all it says is when it pays to look.
__device__ __forceinline__ void hint(const RowsMamba& a, int layer, Counter which, int part = 0) {
  if (threadIdx.x != 0) return;
  keep(layer);
  cuda::hint(counter(a, layer, which, part));
}
__device__ __forceinline__ void wait_for_hints(const unsigned* at, unsigned blocks) {
  if (threadIdx.x == 0) await_hints(at, blocks - blocks / 8);
  meet();
}
__device__ __forceinline__ uint32_t fresh_word(const float* p) { return __float_as_uint(__ldcg(p)); }
__device__ __forceinline__ uint32_t fresh_pair(const bf16* p) { return __ldcg(reinterpret_cast<const unsigned*>(p)); }

/// What a block does of each layer, and what it reads of it.
struct Place {
  int half_row, block;
  int in_first, in_columns;     // columns of in_proj
  int scan_row, scan_rows, scan_first, scan_channels;
  int out_row, out_first, out_columns;
  bool sends;
  __device__ explicit Place(const RowsMamba& a) {
    half_row = static_cast<int>(blockIdx.x) / kBlocks * kHalfRows;
    block = static_cast<int>(blockIdx.x) % kBlocks;
    in_first = block * kInColumns;
    in_columns = min(max(2 * a.e - in_first, 0), kInColumns);
    scan_row = half_row + block / 8 * kRows;
    scan_rows = min(max(a.rows - scan_row, 0), kRows);
    scan_first = block % 8 * kChannels;
    scan_channels = min(max(a.e - scan_first, 0), kChannels);
    out_row = half_row + block / 32 * kOutRows;
    out_first = block % 32 * kOutColumns;
    out_columns = min(max(a.rows > out_row ? a.d - out_first : 0, 0), kOutColumns);
    if (scan_rows == 0 || scan_channels == 0) scan_rows = scan_channels = 0;
    sends = in_columns + scan_channels + out_columns > 0;
  }
  template <int kOf>  // threads, of which this is one
  __device__ void forget_mixed(Slot& slot, int thread) const {
    if (in_columns > 0) {
      forget<kInColumns / 8, kOf>(&slot.xz[half_row][in_first], kHalfRows, sizeof(slot.xz[0]), thread);
      if (block < kPartColumns) forget<kMaxOutputs / 4, kOf>(slot.part[half_row][block], kHalfRows, sizeof(slot.part[0]), thread);
    }
    if (scan_channels > 0) forget<kChannels / 8, kOf>(&slot.y[scan_row][scan_first], kRows, sizeof(slot.y[0]), thread);
  }
  template <int kOf>
  __device__ void forget_sums(Slot& slot, int thread) const {
    if (out_columns == 0) return;
    forget<kOutColumns / 8, kOf>(&slot.weighted[out_row][out_first], kOutRows, sizeof(slot.weighted[0]), thread);
    if (thread < kOutRows) send(square(slot, out_row + thread), kNothing);
  }
  __device__ void* square(Slot& slot, int row) const { return &slot.squares[row][block % 32 % 8 * 4 + block % 32 / 8]; }
};

/// The warp that brings weights and states: each as soon as its place is free, a layer ahead.
struct Bringer {
  const RowsMamba& a;
  Shared& s;
  const Place& at;
  int lane;

  __device__ void in(int layer) const {
    const RowsMambaLayer& l = a.layer[layer];
    const bool projects = at.in_first < a.e;
    const uint32_t column = a.d * 2, full = shared_address(&s.in_full), outputs = a.r + 2 * kScanStates;
    if (lane == 0) barrier_expect(full, at.in_columns * column + (projects ? outputs * kInColumns * 2 : 0));
    __syncwarp();
    for (int c = lane; c < at.in_columns; c += 32) bring_bytes(shared_address(s.in + c * kInPitch), l.in + int64_t{at.in_first + c} * a.d, column, full);
    if (!projects) return;
    if (lane == 0) bring_into_l2(l.conv_weight + at.in_first * kTaps, kInColumns * kTaps * 2);
    if (lane == 0 && l.conv_bias != nullptr) bring_into_l2(l.conv_bias + at.in_first, kInColumns * 2);
    for (int c = lane; c < static_cast<int>(outputs); c += 32)
      bring_bytes(shared_address(s.project[c]), l.project + int64_t{c} * a.e + at.in_first, kInColumns * 2, full);
    const int row = at.half_row + lane;  // the convolution's past: into L2 only
    if (row < a.rows)
      for (int j = 0; j + 1 < kTaps; ++j) bring_into_l2(l.conv + (int64_t{row} * (kTaps - 1) + j) * a.e + at.in_first, kInColumns * 2);
  }
  __device__ void out(int layer) const {
    const RowsMambaLayer& l = a.layer[layer];
    const uint32_t column = a.e * 2, full = shared_address(&s.out_full);
    const int columns = l.out != nullptr ? at.out_columns : 0;
    if (lane == 0) barrier_expect(full, columns * column);
    __syncwarp();
    if (lane < columns) bring_bytes(shared_address(s.out + lane * kOutPitch), l.out + int64_t{at.out_first + lane} * a.e, column, full);
  }
  __device__ float* states(int layer) const {
    return a.layer[layer].h + (int64_t{at.scan_row + lane} * a.e + at.scan_first) * kScanStates;
  }
  __device__ void bring_h(int layer) const {
    const RowsMambaLayer& l = a.layer[layer];
    const uint32_t bytes = at.scan_channels * kScanStates * 4, full = shared_address(&s.h_full);
    if (lane == 0) barrier_expect(full, bytes * at.scan_rows);
    __syncwarp();
    if (bytes == 0) return;
    if (lane < at.scan_rows) bring_bytes(shared_address(s.h[lane]), states(layer), bytes, full);
    if (at.block / 8 != 0 || lane != 31) return;
    bring_into_l2(l.dt_proj + int64_t{at.scan_first} * a.r, int64_t{at.scan_channels} * a.r * 2);
    bring_into_l2(l.A_log + at.scan_first * kScanStates, int64_t{at.scan_channels} * kScanStates * 4);
  }
  __device__ void store_h(int layer) const {
    if (lane < at.scan_rows && at.scan_channels > 0)
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(states(layer)), "r"(shared_address(s.h[lane])),
                   "r"(at.scan_channels * kScanStates * 4)
                   : "memory");
    stores_commit();
  }
  __device__ void run() const {
    in(0);
    bring_h(0);
    out(0);
#pragma unroll 1
    for (int layer = 0; layer < a.layers; ++layer) {
      const bool more = layer + 1 < a.layers;
      barrier_wait(shared_address(&s.in_free), layer % 2);
      if (more) in(layer + 1);
      barrier_wait(shared_address(&s.h_made), layer % 2);
      store_h(layer);
      stores_wait_read<0>();
      if (more) bring_h(layer + 1);
      barrier_wait(shared_address(&s.out_free), layer % 2);
      if (more) out(layer + 1);
    }
    stores_wait<0>();
  }
};

/// The warp that takes words back (Slot).
__device__ __forceinline__ void clear_slots(const RowsMamba& a, Shared& s, const Place& at, int lane) {
  cuda::meet(2, kThreads + 32);  // those that compute have cleared all
  take_words_back<1>(
      a.layers, kBlocks, &s.in_free, &s.clean, lane, [&](int layer, int) { return counter(a, layer, kCleared); },
      [&](int layer, int) {
        at.forget_mixed<32>(slot(a, layer + kSlots - 1), lane);
        at.forget_sums<32>(slot(a, layer + kSlots - 2), lane);
      });
}

/// 32 rows by 48 columns of in_proj; x's columns are convolved and multiplied with theirs of x_proj.
__device__ __forceinline__ void in_phase(const RowsMamba& a, Shared& s, const Place& at, int layer) {
  const RowsMambaLayer& l = a.layer[layer];
  const int tid = own_thread(), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const bool convolves = at.in_first < a.e;
  const auto row_at = [&](int q) { return (tid + q * kThreads) / (kInColumns / 2); };
  const auto column_at = [&](int q) { return (tid + q * kThreads) % (kInColumns / 2) * 2; };
  constexpr int kPairs = kHalfRows * kInColumns / 2 / kThreads;
  static_assert(kPairs * kThreads * 2 == kHalfRows * kInColumns);
  uint32_t past[kPairs][kTaps - 1] = {}, conv_bias[kPairs] = {};
  uint4 filter[kPairs] = {};
  Slot &now = slot(a, layer), &before = slot(a, layer + kSlots - 1);
  uint4 x[kInSteps * 4] = {}, squares{};  // all are asked for before one is added
  const bool scales = layer > 0 || a.x_squares != nullptr, adds = scales && tid < 8 * kHalfRows && at.half_row + tid / 8 < a.rows && at.sends;
  const int parts = layer > 0 ? mamba_squares(a.d) : a.x_parts;
  const auto k = [&](int i) { return (i / 4 * kWarps + warp) * 32 + 8 * t; };
  const auto row_of = [&](int i) { return at.half_row + i % 4 * 8 + g; };
  const float* const row_squares = a.x_squares + int64_t{at.half_row + tid / 8} * parts;
  const bf16* x_from = &before.weighted[at.half_row + g][warp * 32 + 8 * t];
  int rows_left = at.sends ? a.rows - at.half_row - g : 0, columns_left = a.d - 32 * warp;
  keep(x_from), keep(rows_left), keep(columns_left);
  const auto wanted = [&](int i) { return i % 4 * 8 < rows_left && i / 4 * kWarps * 32 < columns_left; };
  const auto look_for_squares = [&] {
    const int thread = own_thread();
    look(squares, &before.squares[at.half_row + thread / 8][thread % 8 * 4]);
  };
  if (layer > 0) {
    barrier_wait(shared_address(&s.clean), (layer - 1) % 2);
    wait_for_hints(counter(a, layer - 1, kOutSent), kBlocks);
    receive(x, [&](int i) { return x_from + i % 4 * 8 * kMaxD + i / 4 * kWarps * 32; }, wanted);
    if (adds) look_for_squares();
  } else {
#pragma unroll
    for (int i = 0; i < kInSteps * 4; ++i)
      if (wanted(i)) x[i] = read_fresh(a.x + row_of(i) * a.x_row + k(i));
    if (adds)
      squares = {tid % 8 < parts ? fresh_word(row_squares + tid % 8) : 0, tid % 8 + 8 < parts ? fresh_word(row_squares + tid % 8 + 8) : 0,
                 tid % 8 + 16 < parts ? fresh_word(row_squares + tid % 8 + 16) : 0, tid % 8 + 24 < parts ? fresh_word(row_squares + tid % 8 + 24) : 0};
  }
  barrier_wait(shared_address(&s.in_full), layer % 2);
  float acc[2][6][4] = {};
#pragma unroll
  for (int step = 0; step < kInSteps; ++step) {
    const int piece = step * kWarps + warp;
    if (32 * piece >= a.d) break;
    const unsigned char* const w = s.in + g * kInPitch + 64 * piece + 16 * t;
    uint4 v[6];
#pragma unroll
    for (int j = 0; j < 6; ++j) v[j] = *reinterpret_cast<const uint4*>(w + 8 * j * kInPitch);
#pragma unroll
    for (int j = 0; j < 6; ++j)
#pragma unroll
      for (int m = 0; m < 2; ++m) mma(acc[m][j], {x[4 * step + 2 * m].x, x[4 * step + 2 * m + 1].x, x[4 * step + 2 * m].y, x[4 * step + 2 * m + 1].y}, v[j].x, v[j].y);
#pragma unroll
    for (int j = 0; j < 6; ++j)
#pragma unroll
      for (int m = 0; m < 2; ++m) mma(acc[m][j], {x[4 * step + 2 * m].z, x[4 * step + 2 * m + 1].z, x[4 * step + 2 * m].w, x[4 * step + 2 * m + 1].w}, v[j].z, v[j].w);
  }
#pragma unroll
  for (int q = 0; q < kPairs; ++q) {  // only here: x and the weights have left the registers
    const int row = at.half_row + row_at(q), channel = at.in_first + column_at(q);
    if (!convolves || row >= a.rows) continue;
    const bf16* const from = l.conv + int64_t{row} * (kTaps - 1) * a.e + channel;
#pragma unroll
    for (int j = 0; j + 1 < kTaps; ++j) past[q][j] = *reinterpret_cast<const uint32_t*>(from + int64_t{j} * a.e);
    filter[q] = *reinterpret_cast<const uint4*>(l.conv_weight + kTaps * channel);
    if (l.conv_bias != nullptr) conv_bias[q] = *reinterpret_cast<const uint32_t*>(l.conv_bias + channel);
  }
  if (layer > 0 && adds) {
    const int left = parts - tid % 8;
    const auto sent = [&] { return uint4{left > 0 ? squares.x : 0, left > 8 ? squares.y : 0, left > 16 ? squares.z : 0, left > 24 ? squares.w : 0}; };
    for (int polls = 0; !arrived(sent()); ++polls) {
      if (polls == kExchangePolls) __trap();
      look_for_squares();
    }
    squares = sent();
  }
  float square = (__uint_as_float(squares.x) + __uint_as_float(squares.y)) + (__uint_as_float(squares.z) + __uint_as_float(squares.w));
  if (layer == 0 && adds)
    for (int i = tid % 8 + 32; i < parts; i += 8) square += __ldcg(row_squares + i);
  square = sum_lanes<8>(square);
  if (tid < 8 * kHalfRows && tid % 8 == 0) s.factor[tid / 8] = scales ? rsqrtf(square / static_cast<float>(a.d) + l.eps) : 1.0f;
  meet();  // the weights have been read
  if (tid == 0 && layer > 0) barrier_arrive(shared_address(&s.out_free));
  float* const sums = reinterpret_cast<float*>(s.in);  // (kWarps, kHalfRows, kInSums)
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int j = 0; j < 6; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<float2*>(sums + (warp * kHalfRows + 16 * m + 8 * i + g) * kInSums + 8 * j + 2 * t) = {acc[m][j][2 * i], acc[m][j][2 * i + 1]};
  meet();
  hint(a, layer, kInSent);

  float2 sum[kPairs] = {};
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
#pragma unroll
    for (int q = 0; q < kPairs; ++q) {
      const float2 v = *reinterpret_cast<const float2*>(sums + (w * kHalfRows + row_at(q)) * kInSums + column_at(q));
      sum[q] = {sum[q].x + v.x, sum[q].y + v.y};
    }
#pragma unroll
  for (int q = 0; q < kPairs; ++q) {
    const int local = row_at(q), column = column_at(q), channel = at.in_first + column;
    const int64_t row = at.half_row + local;
    if (row >= a.rows || column >= at.in_columns) continue;
    const uint32_t made = pack(sum[q].x * s.factor[local], sum[q].y * s.factor[local]);
    if (!convolves) {
      send(&now.xz[row][channel], made);
      *reinterpret_cast<uint32_t*>(l.xz + row * 2 * a.e + channel) = made;
      continue;
    }
    float2 p = two(conv_bias[q]);
    const float2 w01 = two(filter[q].x), w23 = two(filter[q].y), v01 = two(filter[q].z), v23 = two(filter[q].w);
    const float2 x0 = two(past[q][0]), x1 = two(past[q][1]), x2 = two(past[q][2]), x3 = two(made);
    p.x += w01.x * x0.x + w01.y * x1.x + w23.x * x2.x + w23.y * x3.x;
    p.y += v01.x * x0.y + v01.y * x1.y + v23.x * x2.y + v23.y * x3.y;
    const uint32_t mixed = pack(silu_fast(p.x), silu_fast(p.y));
    past[q][0] = made;
    send(&now.xz[row][channel], mixed);
    *reinterpret_cast<uint32_t*>(&s.mixed[local][column]) = mixed;
  }
  const int outputs = a.r + 2 * kScanStates;
  if (convolves) {
    meet();
#pragma unroll 1
    for (int output = 8 * warp; output < outputs; output += 8 * kWarps) {
      const bf16 *const left = &s.mixed[g][2 * t], *const right = &s.project[min(output + g, outputs - 1)][2 * t];
      float d[2][4] = {};
#pragma unroll
      for (int m = 0; m < 2; ++m) project_tile<kInColumns / 16>(d[m], left + 16 * m * kTilePitch, right, kTilePitch);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (const int row = at.half_row + 8 * i + g; row < a.rows && output + 2 * t < outputs)
          send(reinterpret_cast<float2*>(&now.part[row][at.block][output + 2 * t]), {d[i / 2][i % 2 * 2], d[i / 2][i % 2 * 2 + 1]});
    }
  }
  if (l.rstd != nullptr && at.block == 0 && tid < kHalfRows && at.half_row + tid < a.rows) l.rstd[at.half_row + tid] = s.factor[tid];
  if (l.normed != nullptr) {
    for (int i = tid; i < (at.block < kBlocks / 2 ? kHalfRows * kOutColumns : 0); i += kThreads) {
      const int local = i / kOutColumns, c = at.out_first + i % kOutColumns;
      const int64_t row = at.half_row + local;
      if (row >= a.rows || c >= a.d) continue;
      const float v = layer > 0 ? read_fresh_one(&before.weighted[row][c]) : read_fresh_one(a.x + row * a.x_row + c);
      l.normed[row * a.d + c] = static_cast<bf16>(v * s.factor[local]);
    }
  }
  publish_shared();
  if (!convolves) return;
#pragma unroll
  for (int q = 0; q < kPairs; ++q) {  // what no other block reads
    const int channel = at.in_first + column_at(q);
    const int64_t row = at.half_row + row_at(q);
    if (row >= a.rows) continue;
    bf16* const state = l.conv + row * (kTaps - 1) * a.e + channel;
    *reinterpret_cast<uint32_t*>(state) = past[q][1];
    *reinterpret_cast<uint32_t*>(state + a.e) = past[q][2];
    *reinterpret_cast<uint32_t*>(state + 2 * int64_t{a.e}) = past[q][0];
    *reinterpret_cast<uint32_t*>(l.xz + row * 2 * a.e + channel) = past[q][0];
  }
}

/// Four rows of 192 channels, as rows_scan_kernel; a thread has two neighbours, which are one word.
__device__ __forceinline__ void scan_phase(const RowsMamba& a, Shared& s, const Place& at, int layer) {
  const RowsMambaLayer& l = a.layer[layer];
  const int tid = own_thread(), lane = tid % 4, outputs = a.r + 2 * kScanStates, pieces = a.r / 4, count = at.scan_rows;
  const int pair = tid / 4;  // of channels; every other pair is taken the other way round: other banks
  const auto channel = [&](int p) { return 2 * pair + (p ^ (pair & 1)); };
  const bool alive = 2 * pair < at.scan_channels;
  static_assert(kPasses == 2);
  float4 rate[kPasses] = {};
  uint2 weight[kPasses][kDtPieces] = {};
  float bias[kPasses] = {}, skip[kPasses] = {};
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    const int c = at.scan_first + channel(p);
    if (!alive) continue;
    rate[p] = *reinterpret_cast<const float4*>(l.A_log + int64_t{c} * kScanStates + 4 * lane);
#pragma unroll
    for (int q = 0; q < kDtPieces; ++q)
      if (lane + 4 * q < pieces) weight[p][q] = *reinterpret_cast<const uint2*>(l.dt_proj + int64_t{c} * a.r + 4 * (lane + 4 * q));
    bias[p] = l.dt_bias[c];
    skip[p] = l.D[c];
  }
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    rate[p] = {-kLog2e * __expf(rate[p].x), -kLog2e * __expf(rate[p].y), -kLog2e * __expf(rate[p].z), -kLog2e * __expf(rate[p].w)};
    keep(rate[p]);
  }
  Slot& now = slot(a, layer);
  const int own_row = at.scan_row + lane;
  const bool own = alive && lane < count;
  uint32_t own_x = 0, own_z = 0;
  const bf16 *x_from = &now.xz[own_row][at.scan_first + 2 * pair], *z_from = x_from + a.e;
  keep(x_from), keep(z_from);
  const int quads = outputs / 4, items = kRows * quads, parts = a.e / kInColumns, each = (parts + kScanGroups - 1) / kScanGroups;
  const float* part_from = nullptr;
  int part_count = 0, gathered_at = -1;
  if (tid < items * kScanGroups) {
    const int item = tid % items, group = tid / items, row = item / quads;
    part_from = &now.part[at.scan_row + row][group * each][item % quads * 4];
    part_count = row < count ? min(each, parts - group * each) : 0;
    gathered_at = group * kRows * kMaxOutputs + 4 * item;
  }
  keep(part_from), keep(part_count), keep(gathered_at);
  if (layer == 0) barrier_wait(shared_address(&s.clean), 0);
  wait_for_hints(counter(a, layer, kInSent), kBlocks);

  if (own) {
    look(own_x, x_from);
    look(own_z, z_from);
  }
  if (gathered_at >= 0) {
    uint4 v[kPartColumns / kScanGroups] = {};
    receive(v, [&](int i) { return part_from + i * kMaxOutputs; }, [&](int i) { return i < part_count; });
    float4 sum{};
#pragma unroll
    for (int i = 0; i < kPartColumns / kScanGroups; ++i)
      sum = {sum.x + __uint_as_float(v[i].x), sum.y + __uint_as_float(v[i].y), sum.z + __uint_as_float(v[i].z), sum.w + __uint_as_float(v[i].w)};
    *reinterpret_cast<float4*>(s.gathered[0] + gathered_at) = sum;
  }
  insist(own_x, x_from);
  insist(own_z, z_from);
  meet();
  if (tid == 0) barrier_arrive(shared_address(&s.in_free));
  hint(a, layer, kScanSent, at.block / 32);
  if (tid < kRows * outputs) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kScanGroups; ++i) sum += s.gathered[i][tid];
    s.values[tid] = static_cast<float>(static_cast<bf16>(sum));
  }
  barrier_wait(shared_address(&s.h_full), layer % 2);
  meet();
  const auto one = [&](uint32_t v, int p) { return channel(p) % 2 == 0 ? two(v).x : two(v).y; };
  float part[kPasses][kRows] = {}, delta[kPasses], add[kPasses], made[kPasses];
#pragma unroll
  for (int q = 0; q < kDtPieces; ++q) {
    if (lane + 4 * q >= pieces) break;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float4 v = *reinterpret_cast<const float4*>(s.values + i * outputs + 4 * (lane + 4 * q));
#pragma unroll
      for (int p = 0; p < kPasses; ++p) part[p][i] += dot(four(weight[p][q]), v);
    }
  }
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    const float dt = static_cast<float>(static_cast<bf16>(sum_own(part[p], lane))) + bias[p];
    delta[p] = softplus_fast(dt);
    add[p] = delta[p] * one(own_x, p);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int from = tid % 32 / 4 * 4 + i;
    const float4 B = *reinterpret_cast<const float4*>(s.values + i * outputs + a.r + 4 * lane);
    const float4 C = *reinterpret_cast<const float4*>(s.values + i * outputs + a.r + kScanStates + 4 * lane);
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const float own_delta = __shfl_sync(0xffffffffu, delta[p], from), own_add = __shfl_sync(0xffffffffu, add[p], from);
      float4 h = s.h[i][channel(p)][lane];
      h.x = exp2_fast(own_delta * rate[p].x) * h.x + own_add * B.x;
      h.y = exp2_fast(own_delta * rate[p].y) * h.y + own_add * B.y;
      h.z = exp2_fast(own_delta * rate[p].z) * h.z + own_add * B.z;
      h.w = exp2_fast(own_delta * rate[p].w) * h.w + own_add * B.w;
      s.h[i][channel(p)][lane] = h;
      part[p][i] = h.x * C.x + h.y * C.y + h.z * C.z + h.w * C.w;
    }
  }
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    const float sum = sum_own(part[p], lane), z = one(own_z, p);
    made[p] = __fdividef((sum + skip[p] * one(own_x, p)) * z, 1.0f + __expf(-z));
  }
  if (own) {
    const uint32_t y = pair % 2 == 0 ? pack(made[0], made[1]) : pack(made[1], made[0]);
    send(&now.y[own_row][at.scan_first + 2 * pair], y);
    *reinterpret_cast<uint32_t*>(l.y + int64_t{own_row} * a.e + at.scan_first + 2 * pair) = y;
  }
  publish_shared();
  if (l.out != nullptr) return;
  meet();
  if (tid == 0) barrier_arrive(shared_address(&s.h_made));
}

/// 16 rows by 24 columns of out_proj, their sum with the residual stream.
__device__ __forceinline__ void out_phase(const RowsMamba& a, Shared& s, const Place& at, int layer) {
  const RowsMambaLayer& l = a.layer[layer];
  const int tid = own_thread(), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int local = tid / 16, column = tid % 16 * 2, c = at.out_first + column;
  const int64_t row = at.out_row + local;
  const bool finishes = local < kOutRows && column < at.out_columns && row < a.rows;
  uint32_t residual = 0;
  float2 weight{};
  if (finishes) {
    residual = fresh_pair(l.residual + row * a.d + c);
    weight = *reinterpret_cast<const float2*>(l.weight + c);
  }
  Slot& now = slot(a, layer);
  uint4 x[kOutSteps * 2] = {};
  const bf16* y_from = &now.y[at.out_row + g][warp * 32 + 8 * t];
  int rows_left = at.out_columns > 0 ? a.rows - at.out_row - g : 0, columns_left = a.e - 32 * warp;
  keep(y_from), keep(rows_left), keep(columns_left);
  wait_for_hints(counter(a, layer, kScanSent, at.block / 32), kBlocks / 2);
  if (tid == 0) barrier_arrive(shared_address(&s.h_made));  // while y is on its way
  receive(x, [&](int i) { return y_from + i % 2 * 8 * kMaxE + i / 2 * kWarps * 32; }, [&](int i) { return i % 2 * 8 < rows_left && i / 2 * kWarps * 32 < columns_left; });
  barrier_wait(shared_address(&s.out_full), layer % 2);
  float acc[3][4] = {};
#pragma unroll
  for (int step = 0; step < kOutSteps; ++step) {
    const int piece = step * kWarps + warp;
    if (32 * piece >= a.e) break;
    const unsigned char* const w = s.out + g * kOutPitch + 64 * piece + 16 * t;
    uint4 v[3];
#pragma unroll
    for (int j = 0; j < 3; ++j) v[j] = *reinterpret_cast<const uint4*>(w + 8 * j * kOutPitch);
#pragma unroll
    for (int j = 0; j < 3; ++j) mma(acc[j], {x[2 * step].x, x[2 * step + 1].x, x[2 * step].y, x[2 * step + 1].y}, v[j].x, v[j].y);
#pragma unroll
    for (int j = 0; j < 3; ++j) mma(acc[j], {x[2 * step].z, x[2 * step + 1].z, x[2 * step].w, x[2 * step + 1].w}, v[j].z, v[j].w);
  }
  meet();  // the weights have been read
  hint(a, layer, kOutSent);
  float* const sums = reinterpret_cast<float*>(s.out);  // (kWarps, kOutRows, kOutSums)
#pragma unroll
  for (int j = 0; j < 3; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      *reinterpret_cast<float2*>(sums + (warp * kOutRows + 8 * i + g) * kOutSums + 8 * j + 2 * t) = {acc[j][2 * i], acc[j][2 * i + 1]};
  meet();
  float square = 0;
  uint32_t made = 0, sum = 0, weighted = 0;
  if (finishes) {
    float2 v = {0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 one = *reinterpret_cast<const float2*>(sums + (w * kOutRows + local) * kOutSums + column);
      v = {v.x + one.x, v.y + one.y};
    }
    made = pack(v.x, v.y);
    const float2 m = two(made), before = two(residual);
    sum = pack(m.x + before.x, m.y + before.y);
    const float2 u = two(sum);
    weighted = pack(u.x * weight.x, u.y * weight.y);
    send(&now.weighted[row][c], weighted);
    square = u.x * u.x + u.y * u.y;
  }
  square = sum_lanes<16>(square);
  if (finishes && column == 0) send(static_cast<float*>(at.square(now, static_cast<int>(row))), square);
  publish_shared();
  if (!finishes) return;
  if (layer + 1 == a.layers) {
    *reinterpret_cast<uint32_t*>(a.weighted + row * a.d + c) = weighted;
    if (column == 0) a.squares[row * mamba_squares(a.d) + at.block % 32] = square;
  }
  *reinterpret_cast<uint32_t*>(l.made + row * a.d + c) = made;  // what no other block reads
  *reinterpret_cast<uint32_t*>(l.sum + row * a.d + c) = sum;
}

#endif

/// The layers of a run. Weights and states are in shared memory before they are used; what bounds a layer is three times
/// the way of values between blocks through the L2 cache.
__global__ void __launch_bounds__(kThreads + 64, 1) rows_mamba_kernel(const __grid_constant__ RowsMamba a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char mamba_shared[];
  Shared& s = *reinterpret_cast<Shared*>(mamba_shared);
  if (threadIdx.x == 0) {
    for (uint64_t* barrier : {&s.in_full, &s.out_full, &s.h_full, &s.in_free, &s.out_free, &s.h_made, &s.clean}) barrier_init(shared_address(barrier), 1);
    barriers_visible();
  }
  __syncthreads();
  const Place at(a);
  if (threadIdx.x >= kThreads + 32) return clear_slots(a, s, at, static_cast<int>(threadIdx.x) % 32);
  if (threadIdx.x >= kThreads) return Bringer{a, s, at, static_cast<int>(threadIdx.x) % 32}.run();
#pragma unroll 1
  for (int i = 0; i < kSlots; ++i) {
    at.forget_mixed<kThreads>(slot(a, i), static_cast<int>(threadIdx.x));
    at.forget_sums<kThreads>(slot(a, i), static_cast<int>(threadIdx.x));
  }
  meet_arrive(2, kThreads + 32);
#pragma unroll 1
  for (int layer = 0; layer < a.layers; ++layer) {
    in_phase(a, s, at, layer);
    scan_phase(a, s, at, layer);
    if (a.layer[layer].out != nullptr) out_phase(a, s, at, layer);
  }
  if (threadIdx.x == 0) barrier_arrive(shared_address(&s.out_free));
#endif
}

}  // namespace

bool rows_mamba_fits(const RowsLinear& in, int64_t e, int64_t r, Device device) {
  return in.rows > kHalfRows && in.rows <= 2 * kHalfRows && in.n == 2 * e && in.k <= kMaxD && in.k % 32 == 0 && e <= kMaxE && e % 96 == 0 && r % 4 == 0 &&
         r + 2 * kScanStates <= kMaxOutputs && in.bias == nullptr && in.epilogue == Epilogue::none && in.y_row == in.n &&
         hopper_multiprocessors(device, reinterpret_cast<const void*>(rows_mamba_kernel)) >= 2 * kBlocks;
}

int64_t mamba_exchange() { return kSlots * sizeof(Slot); }

void rows_mamba(const RowsMamba& a, Stream stream) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  launch_with({together}, rows_mamba_kernel, {.grid = 2 * kBlocks, .block = kThreads + 64, .shared = sizeof(Shared), .stream = stream}, a);
}

}  // namespace krait::kernels::cuda
