#include "kernels/cuda/rows_mamba2.h"

#include "kernels/cuda/copy_words.cuh"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/launch_with.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/rows_exchange.cuh"
#include "kernels/cuda/rows_state.cuh"
#include "kernels/cuda/step_values.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/tma.cuh"
#include "kernels/cuda/wgmma.cuh"

// Two kinds of blocks. Those that map (kMapBlocks) hold in_proj's and out_proj's columns in shared memory, each matrix once on
// the whole GPU, and take all rows; those that keep states (kStateBlocks) have heads of rows each and stream their states
// through a ring, half of a layer's ahead of need. So each multiprocessor reads few of the values that blocks send one
// another: x and y go to the blocks that map alone, a head's x, z, B, C to one block. A layer is bound by the way of these
// values, three times, and by the states that the ring has no room for.
namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 12, kThreads = 32 * kWarps;  // that compute; one warp more brings weights or states, one clears
constexpr int kAllThreads = kThreads + 128;         // slots, two scale rows
constexpr int kGroups = kWarps / 4;                 // warpgroups, each a part of k
constexpr int kMapBlocks = 42, kStateBlocks = 90, kBlocks = kMapBlocks + kStateBlocks;
constexpr int kRows = 64, kMaxD = 768, kMaxHeads = 24, kMaxE = kMaxHeads * kHeadChannels, kTaps = 4;
constexpr int kInColumns = 80, kOutColumns = 24, kMaxN = kMapBlocks * kInColumns;
constexpr int kLine = 64, kInBoxes = kMaxD / kLine, kOutBoxes = kMaxE / kLine;  // of weights: values of k
constexpr int kInBoxBytes = kInColumns * kLine * 2, kOutBoxBytes = kOutColumns * kLine * 2;
constexpr int kInPitch = kInColumns + 8, kOutPitch = kOutColumns + 16;  // of sums: rows in different banks
constexpr int kStep = 16, kInSteps = kMaxD / kStep, kOutSteps = kMaxE / kStep;  // of k: a product
constexpr int kFlightSteps = kInSteps / kGroups;                                 // whose operands a warp has under way
constexpr int kInPairs = kInColumns / 2, kInThreads = 8 * kInPairs;                  // that convolve, each eight rows of two columns
constexpr int kOutThreads = 4 * kRows, kOutPairs = kOutColumns / 8;                  // four a row
constexpr int kSquares = mamba2_squares(kMaxD), kStateSquares = 2 * kMaxHeads, kSlots = 4;
static_assert(kSquares == 32 && kOutSteps == 2 * kGroups * kFlightSteps);

constexpr int kHalf = kHeadChannels / 2;                                                 // channels: a piece of states
constexpr int kUnits = (kRows * kMaxHeads + kStateBlocks - 1) / kStateBlocks;            // heads of rows a block
constexpr int kMaxRowsHere = 2, kBPitch = kHeadStates + 8;

struct Slot;

struct MapShared {
  alignas(1024) unsigned char in[kInBoxes * kInBoxBytes];    // in_proj's columns, then sums (kGroups, kRows, kInPitch)
  alignas(1024) unsigned char out[kOutBoxes * kOutBoxBytes];  // out_proj's
  alignas(16) uint32_t past[kRows][kTaps - 1][kInColumns / 2];  // of the convolution
  alignas(16) uint2 filter[kInColumns];
  alignas(16) bf16 conv_bias[kInColumns];
  float factor[2][2][kRows];                                  // of x, of y; of layers in turn
  uint64_t in_full, in_free, out_full, out_free, seen, scaled;
};
static_assert(kGroups * kRows * kInPitch * 4 <= sizeof(MapShared::in) && kGroups * kRows * kOutPitch * 4 <= sizeof(MapShared::out));

/// Heads of rows: the first one and its row, how many, rows that they touch, heads of the first of them.
struct StatePlace {
  int first, row, count, rows, split, heads;
  __device__ int place(int unit) const { return unit < split ? 0 : 1; }  // of its row among the block's
  __device__ int head(int unit) const { return heads - split + unit - (unit < split ? 0 : heads); }
  template <int kOf>  // threads, of which this is one
  __device__ void forget_front(Slot& slot, int thread) const;
  template <int kOf>
  __device__ void forget_before(Slot&, int) const {}
};

constexpr int kRingBytes = 160 * 1024;
/// Pieces of states: a warp takes every kWorkers-th; kFlight are under way (more stand in the way of what others wait for).
/// Who waits for a piece has had the one kWorkers before it, and so kFlight before that have come: the barrier of its place
/// is not two phases behind, which would look alike.
template <class T>
struct Ring {
  static constexpr int kBytes = kHalf * kHeadStates * static_cast<int>(sizeof(T)), kStages = kRingBytes / kBytes;
  static constexpr int kWorkers = sizeof(T) == 2 ? kWarps : 6, kFlight = sizeof(T) == 2 ? 5 : 4;
  static_assert(kWorkers + kFlight <= kStages);
};
struct StateShared {
  alignas(128) unsigned char ring[kRingBytes];
  alignas(128) bf16 x[kUnits][kMaxRecent][kHeadChannels];
  alignas(16) bf16 B[kMaxRowsHere][kMaxRecent][kBPitch];
  alignas(16) bf16 C[kMaxRowsHere][kHeadStates];
  alignas(16) bf16 z[kUnits][kHeadChannels];
  alignas(16) float norm[kUnits][kHeadChannels], D[kUnits][kHeadChannels];
  alignas(16) bf16 dt[kMaxRowsHere][kMaxHeads];
  alignas(16) float2 steps[kUnits][kMaxRecent];  // dt, log P
  float factor[kUnits][kMaxRecent], decay[kUnits], products[kMaxRowsHere][kMaxRecent];
  float rate_log[kUnits], bias[kUnits];
  StatePlace place;
  int recent[kMaxRowsHere];  // positions that are not yet in h
  uint64_t full[Ring<bf16>::kStages], empty[Ring<bf16>::kStages], recent_full, recent_free;
};
struct Shared {
  union {
    MapShared map;
    StateShared state;
  };
  RowsMamba2Layer layer[2];  // in turn: a kernel's arguments come late when they are first read
  uint64_t received, clean;
};
static_assert(sizeof(Shared) <= 227 * 1024);

/// Rows as products take them.
template <int kSteps>
struct Rows {  // (steps of k, tiles of 16 rows, g, t, lane's operand: rows g, g + 8 at 2 t, then at 2 t + 8)
  uint32_t words[kSteps][kRows / 16][8][4][4];
  __device__ uint32_t* operand(int step, int tile, int lane) { return words[step][tile][lane / 4][lane % 4]; }
  __device__ uint32_t* at(int row, int column) {  // of two columns
    return &words[column / kStep][row / 16][row % 8][column % 8 / 2][row / 8 % 2 + column % kStep / 8 * 2];
  }
};
/// What blocks send one another in a layer (rows_exchange.cuh); layer i uses slot i % kSlots. Words of x and y whose
/// rows or columns do not exist are zero.
///
/// A block takes its words back once it has received what begins a layer, x or mixed: those of `mixed`, y and its squares of
/// the layer in front, those of x and its squares of the one before that. For who sent x had received all of y, whose
/// senders had received mixed, whose senders had received x a layer before; and a block that sends nothing receives nothing.
/// What is taken back in layer i is announced there, awaited in i + 1, and those that compute wait for that (`clean`) in
/// i + 2, before they ask for anything: for the words of i - 1 they ask again in i + 3, for those of i - 2 at the start of
/// i + 3.
struct Slot {
  alignas(128) Rows<kInSteps> x;
  Rows<kOutSteps> y;
  bf16 mixed[kRows][kMaxN];
  float x_squares[kRows][kSquares], y_squares[kRows][kStateSquares];
};

constexpr int kStepWords = kRows * kStep / 2;

struct Work {
  RowsMamba2 run;
  CUtensorMap in[kMamba2Layers], out[kMamba2Layers];  // (d, n), (e, d)
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)

enum Counter { kCleared, kInSent, kOutSent, kStateSent };
__device__ __forceinline__ unsigned* counter(const RowsMamba2& a, int layer, Counter which) { return a.counters + layer * 8 + which; }
__device__ __forceinline__ Slot& slot(const RowsMamba2& a, int layer) { return static_cast<Slot*>(a.exchange)[layer % kSlots]; }
__device__ __forceinline__ void meet() { cuda::meet(1, kThreads); }  // those that compute
/// When the block has sent.
__device__ __forceinline__ void hint(unsigned* at) {
  meet();
  if (threadIdx.x == 0) cuda::hint(at);
}
/// For most blocks: who asks when some have not sent yet asks again for what is missing, and has the rest sooner.
__device__ __forceinline__ void wait_for_hints(const unsigned* at, int blocks) {
  if (threadIdx.x == 0) await_hints(at, blocks * 3 / 4);
  meet();
}
__device__ __forceinline__ void copy_layer(RowsMamba2Layer& to, const RowsMamba2Layer& from, int lane) {
  static_assert(sizeof(to) % 8 == 0);
  for (int i = lane; i < static_cast<int>(sizeof(to) / 8); i += 32) reinterpret_cast<uint64_t*>(&to)[i] = reinterpret_cast<const uint64_t*>(&from)[i];
  __syncwarp();
}
/// A value of which nothing is computed before: what could be known for all layers takes registers.
__device__ __forceinline__ int now(int v) {
  asm volatile("" : "+r"(v));
  return v;
}
__device__ __forceinline__ int thread_now() { return now(static_cast<int>(threadIdx.x)); }
__device__ __forceinline__ void set_pair(bf16* p, uint32_t v) { *reinterpret_cast<uint32_t*>(p) = v; }
__device__ __forceinline__ void forget_word(void* p) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(kNothing) : "memory"); }

// As wgmma.cuh's: d (64, 80), (64, 24) += a b.
#define KRAIT_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
__device__ __forceinline__ void wgmma_add(float (&d)[40], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39}, {%40, %41, %42, %43}, %44, 1, 1, 1, 0;\n"
      : KRAIT_D4(0), KRAIT_D4(4), KRAIT_D4(8), KRAIT_D4(12), KRAIT_D4(16), KRAIT_D4(20), KRAIT_D4(24), KRAIT_D4(28), KRAIT_D4(32), KRAIT_D4(36)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_add(float (&d)[12], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n24k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11}, {%12, %13, %14, %15}, %16, 1, 1, 1, 0;\n"
      : KRAIT_D4(0), KRAIT_D4(4), KRAIT_D4(8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef KRAIT_D4
/// A lane's operands of kCount steps that follow one another.
template <int kCount>
__device__ __forceinline__ void look_for_operands(uint4* x, const uint32_t* from) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) look(x[i], from + i * kStepWords);
}
template <int kCount>
__device__ __forceinline__ void insist_on_operands(uint4* x, const uint32_t* from) {
  insist<kCount>(x, [&](int i) { return from + i * kStepWords; });
}
/// sums += the warp's 16 rows of x times columns, over kCount steps of k from the kFirst-th of `boxes`.
template <int kFirst, int kCount, int kN>
__device__ __forceinline__ void multiply(float (&sums)[kN], const uint4* x, uint32_t boxes, int box_bytes) {
  constexpr int kOfBox = kLine / kStep;
  __syncwarp();
  wgmma_begin();
#pragma unroll
  for (int i = kFirst; i < kFirst + kCount; ++i) {
    const uint4 v = x[i - kFirst];
    wgmma_add(sums, {v.x, v.y, v.z, v.w}, further(along_lines(boxes + i / kOfBox * box_bytes), i % kOfBox * kStep * 2));
  }
  wgmma_commit();
}
/// Until products are done, which read their operands late.
template <int kCount, int kN>
__device__ __forceinline__ void finish_products(float (&sums)[kN], uint4* x) {
  wgmma_wait<0>();
  hold(sums);
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(x[i].x), "+r"(x[i].y), "+r"(x[i].z), "+r"(x[i].w)::"memory");
}
/// A lane's accumulators (wgmma.cuh) into the group's sums.
template <int kN, int kPitch>
__device__ __forceinline__ void leave_sums(float* sums, const float (&acc)[kN]) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float* const to = sums + (warp / 4 * kRows + warp % 4 * 16 + lane / 4) * kPitch + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < kN / 4; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) *reinterpret_cast<float2*>(to + 8 * i * kPitch + 8 * j) = {acc[4 * j + 2 * i], acc[4 * j + 2 * i + 1]};
}
template <int kPitch>
__device__ __forceinline__ float2 add_sums(const float* sums, int row, int column) {
  float2 v{};
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const float2 one = *reinterpret_cast<const float2*>(sums + (i * kRows + row) * kPitch + column);
    v = {v.x + one.x, v.y + one.y};
  }
  return v;
}
/// The sum of a row's squares, of which there are `parts`, in one order.
__device__ __forceinline__ float add_squares(const float* from, int parts) {
  constexpr int kAtOnce = 12;
  float sum = 0;
#pragma unroll 1
  for (int first = 0; first < parts; first += 4 * kAtOnce) {
    uint4 v[kAtOnce] = {};
    const auto look_for = [&](int i) {
      look(v[i], from + first + 4 * i);
      const int left = parts - first - 4 * i;  // behind the last part nothing arrives
      v[i] = {v[i].x, left > 1 ? v[i].y : 0, left > 2 ? v[i].z : 0, left > 3 ? v[i].w : 0};
    };
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + 4 * i < parts) look_for(i);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      for (int polls = 0; !arrived(v[i]); ++polls) {
        if (polls == kExchangePolls) __trap();
        look_for(i);
      }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum += (__uint_as_float(v[i].x) + __uint_as_float(v[i].y)) + (__uint_as_float(v[i].z) + __uint_as_float(v[i].w));
  }
  return sum;
}

// ---- Blocks that map: columns of in_proj with the convolution, columns of out_proj; all rows.

__device__ __forceinline__ int map_blocks(const RowsMamba2& a) {
  return max((a.n + kInColumns - 1) / kInColumns, (a.d + kOutColumns - 1) / kOutColumns);
}
__device__ __forceinline__ int state_blocks(const RowsMamba2& a) {
  const int units = a.rows * a.heads, each = (units + kStateBlocks - 1) / kStateBlocks;
  return (units + each - 1) / each;
}

struct MapPlace {
  int block, rows, in_first, in_columns, conv_first, conv_columns, out_first, out_columns, e, channels;
  __device__ explicit MapPlace(const RowsMamba2& a) {
    block = now(static_cast<int>(blockIdx.x));
    rows = a.rows;
    e = a.heads * kHeadChannels;
    channels = e + 2 * kHeadStates;
    in_first = block * kInColumns;
    in_columns = min(max(a.n - in_first, 0), kInColumns);
    conv_first = max(in_first, e);
    conv_columns = max(min(in_first + in_columns, e + channels) - conv_first, 0);
    out_first = block * kOutColumns;
    out_columns = min(max(a.d - out_first, 0), kOutColumns);
  }
  template <int kOf>  // threads, of which this is one
  __device__ void forget_front(Slot& slot, int thread) const {
    if (in_columns > 0) forget<kInColumns / 8, kOf>(&slot.mixed[0][in_first], kRows, sizeof(slot.mixed[0]), thread);
  }
  template <int kOf>
  __device__ void forget_before(Slot& slot, int thread) const {
    if (out_columns == 0) return;
#pragma unroll 1
    for (int i = thread; i < kRows * kOutColumns / 2; i += kOf) {
      const int row = i / (kOutColumns / 2), c = i % (kOutColumns / 2) * 2;
      if (row < rows && c < out_columns) forget_word(slot.x.at(row, out_first + c));
    }
    for (int row = thread; row < rows; row += kOf) forget_word(&slot.x_squares[row][block]);
  }
};

/// Before a run: zeros for rows and columns that do not exist.
__device__ __forceinline__ void clear_others(const RowsMamba2& a) {
  constexpr int kPairsOfRow = (kMaxD + kMaxE) / 2;
  const int blocks = map_blocks(a), e = a.heads * kHeadChannels;
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x); i < kSlots * kPairsOfRow * kRows; i += blocks * kThreads) {
    const int row = i % kRows, c = i / kRows % kPairsOfRow * 2, y = c - kMaxD;
    if (row < a.rows && (y < 0 ? c < a.d : y < e)) continue;
    Slot& of = slot(a, i / kRows / kPairsOfRow);
    *(y < 0 ? of.x.at(row, c) : of.y.at(row, y)) = 0;
  }
}

struct MapBringer {
  const Work& work;
  RowsMamba2Layer (&layers)[2];
  MapShared& s;
  const MapPlace& at;
  int lane;

  __device__ void in(int layer) const {
    const RowsMamba2& a = work.run;
    RowsMamba2Layer& l = layers[layer % 2];
    copy_layer(l, a.layer[layer], lane);
    const uint32_t full = shared_address(&s.in_full);
    const int own = at.conv_first - at.in_first, first = at.conv_first - at.e;
    if (lane == 0) {
      const uint32_t of_column = a.rows * (kTaps - 1) * 2 + kTaps * 2 + (l.conv_bias != nullptr ? 2 : 0);
      barrier_expect(full, at.in_columns > 0 ? kInBoxes * kInBoxBytes + at.conv_columns * of_column : 0);
      if (at.in_columns > 0)
        for (int i = 0; i < kInBoxes; ++i) bring_box(shared_address(s.in + i * kInBoxBytes), work.in[layer], full, i * kLine, at.in_first);
    }
    __syncwarp();
    if (at.conv_columns == 0) return;
    for (int row = lane; row < a.rows; row += 32)
      for (int j = 0; j + 1 < kTaps; ++j)
        bring_bytes(shared_address(&s.past[row][j][own / 2]), l.conv + (int64_t{row} * (kTaps - 1) + j) * at.channels + first, at.conv_columns * 2, full);
    if (lane == 0) bring_bytes(shared_address(&s.filter[own]), l.conv_weight + kTaps * first, at.conv_columns * kTaps * 2, full);
    if (lane == 1 && l.conv_bias != nullptr) bring_bytes(shared_address(&s.conv_bias[own]), l.conv_bias + first, at.conv_columns * 2, full);
  }
  __device__ void out(int layer) const {
    const bool maps = layers[layer % 2].out != nullptr && at.out_columns > 0;
    if (lane == 0) {
      const uint32_t full = shared_address(&s.out_full);
      barrier_expect(full, maps ? kOutBoxes * kOutBoxBytes : 0);
      if (maps)
        for (int i = 0; i < kOutBoxes; ++i) bring_box(shared_address(s.out + i * kOutBoxBytes), work.out[layer], full, i * kLine, at.out_first);
    }
    __syncwarp();
  }
  __device__ void run() const {
    in(0);
    out(0);
#pragma unroll 1
    for (int layer = 0; layer + 1 < work.run.layers; ++layer) {
      barrier_wait(shared_address(&s.in_free), layer % 2);
      in(layer + 1);
      barrier_wait(shared_address(&s.out_free), layer % 2);
      out(layer + 1);
    }
  }
};

/// The warps that scale rows, a lane one: what in_proj and out_proj multiply their sums with.
__device__ __forceinline__ void scale_rows(const RowsMamba2& a, const RowsMamba2Layer (&layers)[2], MapShared& s, const MapPlace& at, int row, int lane) {
#pragma unroll 1
  for (int layer = 0; layer < a.layers; ++layer) {
    const RowsMamba2Layer& l = layers[layer % 2];
    barrier_wait(shared_address(&s.in_full), layer % 2);
    barrier_wait(shared_address(&s.seen), 0);
    float square = 0;
    const bool scales = layer > 0 || a.x_squares != nullptr, adds = scales && row < a.rows;
    if (adds && layer > 0) square = add_squares(slot(a, layer + kSlots - 1).x_squares[row], mamba2_squares(a.d));
    if (adds && layer == 0)
      for (int i = 0; i < a.x_parts; ++i) square += __ldcg(a.x_squares + int64_t{row} * a.x_parts + i);
    s.factor[0][layer % 2][row] = scales ? rsqrtf(square / static_cast<float>(a.d) + l.eps) : 1.0f;
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&s.scaled));
    if (l.out == nullptr) return;
    barrier_wait(shared_address(&s.seen), 1);
    square = row < a.rows && at.out_columns > 0 ? add_squares(slot(a, layer).y_squares[row], 2 * a.heads) : 0.0f;
    s.factor[1][layer % 2][row] = rsqrtf(square / static_cast<float>(at.e) + l.gated_eps);
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&s.scaled));
  }
}

/// Leaves the sums of in_proj's columns, by warpgroups.
__device__ __forceinline__ void in_products(const RowsMamba2& a, MapShared& s, uint64_t& received, uint64_t& clean, int layer) {
  constexpr int kLate = 4, kEarly = kFlightSteps - kLate;  // steps: the last ones take the registers of the first
  const int tid = thread_now(), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4, group = __shfl_sync(0xffffffffu, warp / 4, 0);
  const uint32_t* const from = slot(a, layer + kSlots - 1).x.operand(group * kFlightSteps, warp % 4, lane);
  uint4 x[kEarly];
  const auto look_at_first = [&](uint4* to, int step, int count) {  // who stands for rows and columns that do not exist is of no account
    const int row = warp % 4 * 16 + g;
    const bf16 *const up = a.x + min(row, a.rows - 1) * a.x_row, *const down = a.x + min(row + 8, a.rows - 1) * a.x_row;
    const auto word = [&](const bf16* from) { return __ldcg(reinterpret_cast<const unsigned*>(from)); };
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int first = (group * kFlightSteps + step + i) * kStep, c = (first < a.d ? first : 0) + 2 * t;
      to[i] = {word(up + c), word(down + c), word(up + c + 8), word(down + c + 8)};
    }
  };
  if (layer > 0) {
    barrier_wait(shared_address(&clean), (layer - 1) % 2);
    wait_for_hints(counter(a, layer - 1, kOutSent), map_blocks(a));
    if (tid == 0) barrier_arrive(shared_address(&s.seen));
    look_for_operands<kEarly>(x, from);
    insist_on_operands<kEarly>(x, from);
  } else {
    if (tid == 0) barrier_arrive(shared_address(&s.seen));
    look_at_first(x, 0, kEarly);
  }
  barrier_wait(shared_address(&s.in_full), layer % 2);
  const uint32_t columns = shared_address(s.in) + group * (kInBoxes / kGroups) * kInBoxBytes;
  float acc[kInColumns / 2] = {};
  multiply<0, kLate>(acc, x, columns, kInBoxBytes);
  finish_products<kLate>(acc, x);
  if (layer > 0)
    look_for_operands<kLate>(x, from + kEarly * kStepWords);
  else
    look_at_first(x, kEarly, kLate);
  multiply<kLate, kEarly - kLate>(acc, x + kLate, columns, kInBoxBytes);
  if (layer > 0) insist_on_operands<kLate>(x, from + kEarly * kStepWords);
  finish_products<kEarly>(acc, x);
  multiply<kEarly, kLate>(acc, x, columns, kInBoxBytes);
  finish_products<kLate>(acc, x);
  meet();  // the weights have been read
  if (tid == 0) barrier_arrive(shared_address(&received));
  leave_sums<kInColumns / 2, kInPitch>(reinterpret_cast<float*>(s.in), acc);
}

/// Columns of in_proj, those of x, B and C convolved.
__device__ __forceinline__ void in_phase(const RowsMamba2& a, const RowsMamba2Layer& l, MapShared& s, uint64_t& received, uint64_t& clean, int layer) {
  in_products(a, s, received, clean, layer);
  meet();
  const MapPlace at(a);
  const int tid = thread_now(), pair = tid % kInPairs, first_row = tid / kInPairs, column = at.in_first + 2 * pair, channel = column - at.e;
  const bool maps = tid < kInThreads && 2 * pair < at.in_columns, convolves = maps && column >= at.e && column < at.e + at.channels;
  const float* const sums = reinterpret_cast<const float*>(s.in);
  Slot &now = slot(a, layer), &before = slot(a, layer + kSlots - 1);
  barrier_wait(shared_address(&s.scaled), 0);
  if (l.normed != nullptr && at.in_columns > 0) {  // before the block sends: until then nobody takes these words back
    const int blocks = (a.n + kInColumns - 1) / kInColumns, width = (a.d + blocks - 1) / blocks;
    for (int i = tid; i < a.rows * width; i += kThreads) {
      const int row = i / width, c = at.block * width + i % width;
      if (c >= a.d) continue;
      float v = 0;
      if (layer > 0) {
        uint32_t word = kNothing;
        insist(word, before.x.at(row, c));
        v = c % 2 == 0 ? two(word).x : two(word).y;
      } else {
        v = read_fresh_one(a.x + row * a.x_row + c);
      }
      l.normed[int64_t{row} * a.d + c] = static_cast<bf16>(v * s.factor[0][layer % 2][row]);
    }
  }
  uint32_t made[kRows / 8];
  if (maps) {
    const uint4 filter = *reinterpret_cast<const uint4*>(&s.filter[2 * pair]);
    const float2 bias = convolves && l.conv_bias != nullptr ? two(*reinterpret_cast<const uint32_t*>(&s.conv_bias[2 * pair])) : float2{0, 0};
    const float2 w01 = two(filter.x), w23 = two(filter.y), v01 = two(filter.z), v23 = two(filter.w);
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const int row = first_row + 8 * i;
      const float2 sum = add_sums<kInPitch>(sums, row, 2 * pair);
      const float factor = s.factor[0][layer % 2][row];
      made[i] = pack(sum.x * factor, sum.y * factor);
      uint32_t mixed = made[i];
      if (convolves) {
        const float2 x0 = two(s.past[row][0][pair]), x1 = two(s.past[row][1][pair]), x2 = two(s.past[row][2][pair]), x3 = two(made[i]);
        mixed = pack(silu_fast(bias.x + w01.x * x0.x + w01.y * x1.x + w23.x * x2.x + w23.y * x3.x),
                     silu_fast(bias.y + v01.x * x0.y + v01.y * x1.y + v23.x * x2.y + v23.y * x3.y));
      }
      if (row < a.rows) send(&now.mixed[row][column], mixed);
    }
  }
  hint(counter(a, layer, kInSent));
  if (maps)  // what no other block reads
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const int64_t row = first_row + 8 * i;
      if (row >= a.rows) continue;
      set_pair(l.zxbcdt + row * a.n + column, made[i]);
      if (!convolves) continue;
      bf16* const state = l.conv + row * (kTaps - 1) * at.channels + channel;
      set_pair(state, s.past[row][1][pair]);
      set_pair(state + at.channels, s.past[row][2][pair]);
      set_pair(state + 2 * int64_t{at.channels}, made[i]);
    }
  publish_shared();
  meet();
  if (tid == 0) barrier_arrive(shared_address(&s.in_free));
  if (l.rstd != nullptr && at.block == 0 && tid < a.rows) l.rstd[tid] = s.factor[0][layer % 2][tid];
}

/// `residual`: the thread's values of the residual stream, from layer to layer.
__device__ __forceinline__ void out_phase(const RowsMamba2& a, const RowsMamba2Layer& l, MapShared& s, uint64_t& clean, uint32_t (&residual)[kOutPairs], int layer) {
  const MapPlace at(a);
  const int tid = thread_now(), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4, group = __shfl_sync(0xffffffffu, warp / 4, 0);
  const int64_t row = tid / 4;
  const bool finishes = tid < kOutThreads && row < a.rows && at.out_columns > 0;
  const auto column = [&](int i) { return 2 * (t * kOutPairs + i); };  // of the block's
  const auto exists = [&](int i) { return finishes && column(i) < at.out_columns; };
  float2 weight[kOutPairs] = {};
#pragma unroll
  for (int i = 0; i < kOutPairs; ++i) {
    if (!exists(i)) continue;
    const int c = at.out_first + column(i);
    weight[i] = *reinterpret_cast<const float2*>(l.weight + c);
    if (layer == 0) residual[i] = __ldcg(reinterpret_cast<const unsigned*>(l.residual + row * a.d + c));
  }
  if (at.out_columns == 0) {
    if (tid == 0) barrier_arrive(shared_address(&s.seen));
    barrier_wait(shared_address(&s.scaled), 1);
    hint(counter(a, layer, kOutSent));
    if (tid == 0) barrier_arrive(shared_address(&s.out_free));
    return;
  }
  Slot& now = slot(a, layer);
  if (layer == 0) barrier_wait(shared_address(&clean), 0);
  wait_for_hints(counter(a, layer, kStateSent), state_blocks(a));
  if (tid == 0) barrier_arrive(shared_address(&s.seen));
  uint4 x[kFlightSteps];
  const uint32_t* const from_y = now.y.operand(2 * group * kFlightSteps, warp % 4, lane);
  float acc[kOutColumns / 2] = {};
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    if (part > 0) finish_products<kFlightSteps>(acc, x);
    const uint32_t* const from = from_y + part * kFlightSteps * kStepWords;
    look_for_operands<kFlightSteps>(x, from);
    insist_on_operands<kFlightSteps>(x, from);
    if (part == 0) barrier_wait(shared_address(&s.out_full), layer % 2);
    multiply<0, kFlightSteps>(acc, x, shared_address(s.out) + (2 * group + part) * (kFlightSteps * kStep / kLine) * kOutBoxBytes, kOutBoxBytes);
  }
  finish_products<kFlightSteps>(acc, x);
  meet();  // the weights have been read
  float* const sums = reinterpret_cast<float*>(s.out);
  leave_sums<kOutColumns / 2, kOutPitch>(sums, acc);
  meet();
  barrier_wait(shared_address(&s.scaled), 1);
  if (l.gated != nullptr) {
    const int blocks = mamba2_squares(a.d), width = (at.e + blocks - 1) / blocks;
    for (int i = tid; i < a.rows * width; i += kThreads) {
      const int r = i / width, c = at.block * width + i % width;
      if (c >= at.e) continue;
      uint32_t word = kNothing;
      insist(word, now.y.at(r, c));
      l.gated[int64_t{r} * at.e + c] = static_cast<bf16>((c % 2 == 0 ? two(word).x : two(word).y) * s.factor[1][layer % 2][r]);
    }
  }
  const float factor = finishes ? s.factor[1][layer % 2][row] : 0.0f;
  uint32_t made[kOutPairs] = {}, weighted[kOutPairs] = {};
  float square = 0;
#pragma unroll
  for (int i = 0; i < kOutPairs; ++i) {
    if (!exists(i)) continue;
    const int c = at.out_first + column(i);
    const float2 v = add_sums<kOutPitch>(sums, static_cast<int>(row), column(i));
    made[i] = pack(v.x * factor, v.y * factor);
    const float2 m = two(made[i]), r = two(residual[i]);
    residual[i] = pack(m.x + r.x, m.y + r.y);
    const float2 u = two(residual[i]);
    weighted[i] = pack(u.x * weight[i].x, u.y * weight[i].y);
    send(now.x.at(static_cast<int>(row), c), weighted[i]);
    square += u.x * u.x + u.y * u.y;
  }
  square = sum_lanes<4>(square);
  if (finishes && t == 0) send(&now.x_squares[row][at.block], square);
  publish_shared();
  hint(counter(a, layer, kOutSent));
  if (tid == 0) barrier_arrive(shared_address(&s.out_free));
  const bool last = layer + 1 == a.layers;
#pragma unroll
  for (int i = 0; i < kOutPairs; ++i) {  // what no other block reads
    if (!exists(i)) continue;
    const int64_t to = row * a.d + at.out_first + column(i);
    set_pair(l.made + to, made[i]);
    set_pair(l.sum + to, residual[i]);
    if (last) set_pair(a.weighted + to, weighted[i]);
  }
  if (last && finishes && t == 0) a.squares[row * mamba2_squares(a.d) + at.block] = square;
}

// ---- Blocks that keep states: heads of rows that follow one another.

template <int kOf>
__device__ __forceinline__ void StatePlace::forget_front(Slot& slot, int thread) const {
  for (int i = thread; i < 2 * count; i += kOf) {
    const int of = head(i / 2) * 2 + i % 2, r = row + place(i / 2);
    for (int c = 0; c < kHalf; c += 2) forget_word(slot.y.at(r, of * kHalf + c));
    forget_word(&slot.y_squares[r][of]);
  }
}
__device__ __forceinline__ StatePlace state_place(const RowsMamba2& a) {
  const int units = a.rows * a.heads, each = (units + kStateBlocks - 1) / kStateBlocks;
  StatePlace p{};
  p.heads = a.heads;
  p.first = (static_cast<int>(blockIdx.x) - kMapBlocks) * each;
  p.count = min(max(units - p.first, 0), each);
  p.row = p.first / p.heads;
  p.split = (p.row + 1) * p.heads - p.first;
  p.rows = p.count > p.split ? 2 : 1;
  return p;
}

template <class T>
struct StateBringer {
  const RowsMamba2& a;
  RowsMamba2Layer (&layers)[2];
  StateShared& s;
  const StatePlace& at;
  int lane;
  static constexpr int kStages = Ring<T>::kStages, kBytes = Ring<T>::kBytes, kFlight = Ring<T>::kFlight;

  __device__ void recent(int layer, const int (&counts)[kMaxRowsHere]) const {
    RowsMamba2Layer& l = layers[layer % 2];
    copy_layer(l, a.layer[layer], lane);
    const uint32_t full = shared_address(&s.recent_full);
    int m[kMaxRowsHere];
    uint32_t bytes = 0;
#pragma unroll
    for (int r = 0; r < kMaxRowsHere; ++r) {
      m[r] = __shfl_sync(0xffffffffu, counts[r], layer);
      if (r < at.rows) bytes += m[r] * kHeadStates * 2;
    }
    const auto sizes = [&](int unit) {
      const int n = at.place(unit) == 0 ? m[0] : m[1];
      return uint2{static_cast<uint32_t>(n * kHeadChannels * 2), static_cast<uint32_t>((n + 1) / 2 * 16)};
    };
    for (int i = 0; i < at.count; ++i) bytes += sizes(i).x + sizes(i).y;
    if (lane == 0) {
      s.recent[0] = m[0], s.recent[1] = m[1];
      barrier_expect(full, bytes);
    }
    __syncwarp();
    if (lane < at.count) {
      const int64_t unit = at.first + lane;
      const uint2 n = sizes(lane);
      if (n.x > 0) {
        bring_bytes(shared_address(s.x[lane]), l.recent_x + unit * kMaxRecent * kHeadChannels, n.x, full);
        bring_bytes(shared_address(s.steps[lane]), l.recent_steps + unit * kMaxRecent * 2, n.y, full);
      }
    }
    for (int i = lane; i < at.rows * kMaxRecent; i += 32)
      if (const int r = i / kMaxRecent, j = i % kMaxRecent; j < (r == 0 ? m[0] : m[1]))
        bring_bytes(shared_address(s.B[r][j]), l.recent_B + (int64_t{at.row + r} * kMaxRecent + j) * kHeadStates, kHeadStates * 2, full);
    __syncwarp();
  }
  __device__ void run() const {
    int counts[kMaxRowsHere] = {};
    if (lane < a.layers && at.count > 0) {  // of the block's own heads: nobody else changes them
      counts[0] = a.layer[lane].count[at.first];
      if (at.rows > 1) counts[1] = a.layer[lane].count[(at.row + 1) * at.heads];
    }
    __syncwarp();
    const int pieces = 2 * at.count;
    const auto piece = [&](int layer, int i) {
      return static_cast<const T*>(a.layer[layer].h) + (int64_t{at.first} * kHeadChannels + i * kHalf) * kHeadStates;
    };
    int stage = 0, round = 0;
#pragma unroll 1
    for (int layer = 0; layer < a.layers; ++layer) {
#pragma unroll 1
      for (int i = 0; i <= pieces; ++i) {
        if (i == min(pieces, kStages / 2)) {  // not behind pieces that wait for those who wait for this
          if (layer > 0) barrier_wait(shared_address(&s.recent_free), (layer - 1) % 2);
          recent(layer, counts);
        }
        if (i == pieces) break;
        if (lane == 0) {
          if (round > 0) barrier_wait(shared_address(&s.empty[stage]), (round - 1) % 2);
          if (const int back = stage - kFlight; round > 0 || back >= 0)
            barrier_wait(shared_address(&s.full[(back + kStages) % kStages]), (back >= 0 ? round : round - 1) % 2);
          barrier_expect(shared_address(&s.full[stage]), kBytes);
          bring_bytes(shared_address(s.ring + stage * kBytes), piece(layer, i), kBytes, shared_address(&s.full[stage]));
        }
        if (++stage == kStages) stage = 0, ++round;
      }
    }
  }
};

/// Of kHalf channels' states h, a lane's: the product of channel 8 t + g with C. bf16: a lane reads 16 bytes of a row, in odd
/// rows the other one of two neighbours, so that banks differ; odd columns of the other factor are C in that order.
__device__ __forceinline__ float product_with(const bf16* h, const bf16* C, int lane) {
  const int g = lane / 4, t = lane % 4, odd = g % 2;
  const uint4* const own = reinterpret_cast<const uint4*>(h) + g * (kHeadStates / 8) + t;
  float acc[2][2][4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int at = 4 * (j ^ odd);
    const uint4 c = reinterpret_cast<const uint4*>(C)[at + t];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 up = own[16 * i * (kHeadStates / 8) + at], down = own[(16 * i + 8) * (kHeadStates / 8) + at];
      mma(acc[i][0], {up.x, down.x, up.y, down.y}, c.x, c.y);
      mma(acc[i][1], {up.z, down.z, up.w, down.w}, c.z, c.w);
    }
  }
  const auto of = [&](int tile, int k) { return acc[tile][0][k] + acc[tile][1][k]; };
  const float even = t / 2 == 0 ? (t % 2 == 0 ? of(0, 0) : of(0, 2)) : (t % 2 == 0 ? of(1, 0) : of(1, 2));
  const float other = t / 2 == 0 ? (t % 2 == 0 ? of(0, 1) : of(0, 3)) : (t % 2 == 0 ? of(1, 1) : of(1, 3));
  return odd ? other : even;
}
__device__ __forceinline__ float product_with(const float* h, const bf16* C, int lane) {
  const float4 c = quad(C, lane);
  float own = 0;
#pragma unroll
  for (int q = 0; q < kHalf / 8; ++q) {
    float parts[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) parts[i] = dot(quad(h + (8 * q + i) * kHeadStates, lane), c);
    const float sum = sum_lanes<4>(sum_of_own(parts, lane));
    if (lane % 4 == q) own = sum;
  }
  return own;
}
/// to = decay h + sum_j factor[j] x[j] (x) B[j] over all positions, for kHalf channels. bf16: factor x is split in two, so that
/// no more is rounded than h itself.
__device__ __forceinline__ void take_in(bf16* to, const bf16* from, const bf16 (*x)[kHeadChannels], const bf16 (*B)[kBPitch], const float* factor, float decay) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const uint4* const h = reinterpret_cast<const uint4*>(from);
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int position = 2 * t + r / 2 * 8, channel = 16 * i + 8 * (r % 2) + g;
      const float2 v = {factor[position] * static_cast<float>(x[position][channel]), factor[position + 1] * static_cast<float>(x[position + 1][channel])};
      high[r] = pack(v.x, v.y);
      const float2 kept = two(high[r]);
      low[r] = pack(v.x - kept.x, v.y - kept.y);
    }
#pragma unroll 1
    for (int j = 0; j < 4; ++j) {
      const int up_at = (16 * i + g) * (kHeadStates / 8) + 4 * j + t, down_at = up_at + kHeadStates;
      const uint4 up = h[up_at], down = h[down_at];
      uint32_t rows[2][4] = {{up.x, up.y, up.z, up.w}, {down.x, down.y, down.z, down.w}};
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int state = 32 * j + g / 2 * 8 + 2 * q + g % 2;  // column g of the tile
        const auto at = [&](int position) { return uint32_t{*reinterpret_cast<const unsigned short*>(&B[position][state])}; };
        const float2 u = two(rows[0][q]), d = two(rows[1][q]);
        float acc[4] = {decay * u.x, decay * u.y, decay * d.x, decay * d.y};
        const uint32_t b0 = at(2 * t) | at(2 * t + 1) << 16, b1 = at(2 * t + 8) | at(2 * t + 9) << 16;
        mma(acc, high, b0, b1);
        mma(acc, low, b0, b1);
        rows[0][q] = pack(acc[0], acc[1]);
        rows[1][q] = pack(acc[2], acc[3]);
      }
      reinterpret_cast<uint4*>(to)[up_at] = {rows[0][0], rows[0][1], rows[0][2], rows[0][3]};
      reinterpret_cast<uint4*>(to)[down_at] = {rows[1][0], rows[1][1], rows[1][2], rows[1][3]};
    }
  }
}

__device__ __forceinline__ void take_in(float* to, const float* from, const bf16 (*x)[kHeadChannels], const bf16 (*B)[kBPitch], const float* factor, float decay) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int first = 0; first < kHalf; first += 8) {
    float4 state[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      state[i] = {};
      add_scaled(state[i], decay, quad(from + (first + i) * kHeadStates, lane));
    }
#pragma unroll 1
    for (int j = 0; j < kMaxRecent; ++j) {
      const float4 b = quad(B[j], lane);
      const uint4 words = *reinterpret_cast<const uint4*>(&x[j][first]);
      const float4 low = four({words.x, words.y}), high = four({words.z, words.w});
      const float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) add_scaled(state[i], factor[j] * v[i], b);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) *reinterpret_cast<float4*>(to + (first + i) * kHeadStates + 4 * lane) = state[i];
  }
}

/// What can be had before in_proj's columns.
__device__ __forceinline__ void prepare_states(const RowsMamba2& a, const RowsMamba2Layer& l, StateShared& s, int layer) {
  const int tid = thread_now(), unit = tid / 16, c = tid % 8 * 8;
  barrier_wait(shared_address(&s.recent_full), layer % 2);
  const StatePlace at = s.place;
  if (unit < at.count && tid % 16 < 8) {
    const int head = at.head(unit);
    const float* const norm = l.norm + head * kHeadChannels + c;
    copy_async(&s.norm[unit][c], norm, true);
    copy_async(&s.norm[unit][c + 4], norm + 4, true);
#pragma unroll
    for (int i = 0; i < 8; ++i) copy_words<4>(&s.D[unit][c + i], l.D + (a.D_columns == 1 ? head : head * kHeadChannels + c + i));
    if (c == 0) {
      copy_words<4>(&s.rate_log[unit], l.A_log + head);
      copy_words<4>(&s.bias[unit], l.dt_bias + head);
    }
  }
  copy_commit();
}

/// 16 bytes a thread: of a head's x (8) and z (8), of a row's B (16) and C (16), of its dt (3).
__device__ __forceinline__ void receive_mixed(const RowsMamba2& a, StateShared& s, int layer) {
  constexpr int kOfRows = 16 * kUnits, kOfSteps = kOfRows + 32 * kMaxRowsHere, kStepPieces = kMaxHeads / 8;
  static_assert(kOfSteps + kStepPieces * kMaxRowsHere <= kThreads);
  const StatePlace at = s.place;
  const int tid = thread_now(), e = at.heads * kHeadChannels;
  const Slot& now = slot(a, layer);
  const bf16* from = nullptr;
  bf16* to = nullptr;
  if (tid < kOfRows) {
    const int unit = tid / 16, c = tid % 8 * 8;
    if (unit < at.count) {
      const int place = at.place(unit);
      const bool is_x = tid % 16 < 8;
      from = &now.mixed[at.row + place][(is_x ? e : 0) + at.head(unit) * kHeadChannels + c];
      to = is_x ? &s.x[unit][s.recent[place]][c] : &s.z[unit][c];
    }
  } else if (tid < kOfSteps) {
    const int place = (tid - kOfRows) / 32, c = tid % 16 * 8;
    const bool is_B = (tid - kOfRows) % 32 < 16;
    if (place < at.rows) {
      from = &now.mixed[at.row + place][2 * e + (is_B ? 0 : kHeadStates) + c];
      to = is_B ? &s.B[place][s.recent[place]][c] : &s.C[place][c];
    }
  } else if (const int i = tid - kOfSteps; i < kStepPieces * at.rows && i % kStepPieces * 8 < at.heads) {
    from = &now.mixed[at.row + i / kStepPieces][2 * e + 2 * kHeadStates + i % kStepPieces * 8];
    to = &s.dt[i / kStepPieces][i % kStepPieces * 8];
  }
  if (from == nullptr) return;
  uint4 v;
  look(v, from);
  insist(v, from);
  *reinterpret_cast<uint4*>(to) = v;
}

/// Of each position that h lacks: the product of B with C, and what its x is multiplied with; the decay of h.
__device__ __forceinline__ void make_steps(const RowsMamba2Layer& l, StateShared& s) {
  const StatePlace at = s.place;
  const int tid = thread_now(), warp = tid / 32, lane = tid % 32;
  for (int i = warp; i < at.rows * kMaxRecent; i += kWarps)
    if (const int place = i / kMaxRecent, k = i % kMaxRecent; k <= s.recent[place]) {
      const float product = sum_lanes<32>(dot(quad(s.B[place][k], lane), quad(s.C[place], lane)));
      if (lane == 0) s.products[place][k] = product;
    }
  const int u = tid / kMaxRecent, j = tid % kMaxRecent;  // a thread a position of a head
  if (u >= at.count) return;
  const int m = s.recent[at.place(u)];
  const float raw = static_cast<float>(s.dt[at.place(u)][at.head(u)]) + s.bias[u];
  const float dt = fminf(fmaxf(softplus_of(raw), l.low), l.high);
  const float log_now = (m > 0 ? s.steps[u][m - 1].y : 0.0f) - expf(s.rate_log[u]) * dt;
  const float2 step = j < m ? s.steps[u][j] : float2{dt, log_now};
  if (j <= m) s.factor[u][j] = expf(log_now - step.y) * step.x;
  if (j != m) return;
  const int64_t unit = at.first + u;
  s.decay[u] = expf(log_now);
  if (m + 1 < kMaxRecent) reinterpret_cast<float2*>(l.recent_steps)[unit * kMaxRecent + m] = step;
  l.count[unit] = m + 1 < kMaxRecent ? m + 1 : 0;
}

/// y of kHalf channels a warp and round.
template <class T>
__device__ __forceinline__ void make_y(const RowsMamba2& a, const RowsMamba2Layer& l, StateShared& s, int layer) {
  constexpr int kStages = Ring<T>::kStages, kWorkers = Ring<T>::kWorkers;
  const StatePlace at = s.place;
  const int tid = thread_now(), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  if (warp >= kWorkers) return;
#pragma unroll 1
  for (int half = warp; half < 2 * at.count; half += kWorkers) {
    const int unit = half / 2, channel = half % 2 * kHalf + 8 * t + g, place = at.place(unit), n = s.recent[place];
    const int sequence = layer * 2 * at.count + half, stage = sequence % kStages;
    const T* const h = reinterpret_cast<const T*>(s.ring + stage * Ring<T>::kBytes);
    barrier_wait(shared_address(&s.full[stage]), sequence / kStages % 2);
    const float past = product_with(h, s.C[place], lane);
    if (n + 1 == kMaxRecent)
      take_in(static_cast<T*>(l.h) + (int64_t{at.first + unit} * kHeadChannels + half % 2 * kHalf) * kHeadStates, h,
              reinterpret_cast<const bf16(*)[kHeadChannels]>(&s.x[unit][0][half % 2 * kHalf]), s.B[place], s.factor[unit], s.decay[unit]);
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&s.empty[stage]));
    const float coefficient = lane <= n ? s.factor[unit][lane % kMaxRecent] * s.products[place][lane % kMaxRecent] : 0.0f;
    float sum = s.decay[unit] * past;
#pragma unroll 4
    for (int k = 0; k <= n; ++k) sum += __shfl_sync(0xffffffffu, coefficient, k) * static_cast<float>(s.x[unit][k][channel]);
    sum += s.D[unit][channel] * static_cast<float>(s.x[unit][n][channel]);
    const float z = static_cast<float>(s.z[unit][channel]);
    const float gated = __fdividef(static_cast<float>(static_cast<bf16>(sum)) * z, 1.0f + __expf(-z));
    const float own = gated * s.norm[unit][channel], next = __shfl_xor_sync(0xffffffffu, own, 4);
    const uint32_t y = pack(own, next);
    const float square = sum_lanes<32>(gated * gated);
    const int column = at.head(unit) * kHeadChannels + channel, part = 2 * at.head(unit) + half % 2, row = at.row + place;
    if (l.out != nullptr) {
      Slot& now = slot(a, layer);
      if (g % 2 == 0) send(now.y.at(row, column), y);
      if (lane == 0) send(&now.y_squares[row][part], square);
    } else {
      if (g % 2 == 0) set_pair(a.between + int64_t{row} * at.heads * kHeadChannels + column, y);
      if (lane == 0) a.between_squares[row * 2 * at.heads + part] = square;
    }
  }
}

/// What is kept until h takes it in.
__device__ __forceinline__ void keep_recent(const RowsMamba2Layer& l, StateShared& s) {
  const StatePlace at = s.place;
  const int tid = thread_now(), unit = tid / 8, c = tid % 8 * 8;
  if (unit < at.count)
    if (const int m = s.recent[at.place(unit)]; m + 1 < kMaxRecent)
      *reinterpret_cast<uint4*>(l.recent_x + (int64_t{at.first + unit} * kMaxRecent + m) * kHeadChannels + c) = *reinterpret_cast<const uint4*>(&s.x[unit][m][c]);
  if (const int place = tid / 16, B = tid % 16 * 8; place < at.rows && (at.row + place) * at.heads >= at.first)  // a row's first block
    if (const int m = s.recent[place]; m + 1 < kMaxRecent)
      *reinterpret_cast<uint4*>(l.recent_B + (int64_t{at.row + place} * kMaxRecent + m) * kHeadStates + B) = *reinterpret_cast<const uint4*>(&s.B[place][m][B]);
}

template <class T>
__device__ __forceinline__ void state_phase(const RowsMamba2& a, const RowsMamba2Layer& l, StateShared& s, uint64_t& received, uint64_t& clean, int layer) {
  prepare_states(a, l, s, layer);
  barrier_wait(shared_address(&clean), layer > 0 ? (layer - 1) % 2 : 0);
  wait_for_hints(counter(a, layer, kInSent), map_blocks(a));
  receive_mixed(a, s, layer);
  copy_wait<0>();
  meet();
  if (threadIdx.x == 0) barrier_arrive(shared_address(&received));
  make_steps(l, s);
  meet();
  make_y<T>(a, l, s, layer);
  hint(counter(a, layer, kStateSent));
  keep_recent(l, s);
  publish_shared();
  meet();
  if (threadIdx.x == 0) barrier_arrive(shared_address(&s.recent_free));
}

/// The warp that takes words back (Slot).
template <class Place>
__device__ __forceinline__ void clear_slots(const RowsMamba2& a, uint64_t& received, uint64_t& clean, const Place& at, int lane) {
  cuda::meet(2, kThreads + 32);  // those that compute have cleared all
  take_words_back(
      a.layers, map_blocks(a) + state_blocks(a), received, clean, lane, [&](int layer) { return counter(a, layer, kCleared); },
      [&](int layer) {
        at.template forget_front<32>(slot(a, layer + kSlots - 1), lane);
        at.template forget_before<32>(slot(a, layer + kSlots - 2), lane);
      });
}
template <class Place>
__device__ __forceinline__ void clear_all(const RowsMamba2& a, const Place& at) {
#pragma unroll 1
  for (int i = 0; i < kSlots; ++i) {
    at.template forget_front<kThreads>(slot(a, i), static_cast<int>(threadIdx.x));
    at.template forget_before<kThreads>(slot(a, i), static_cast<int>(threadIdx.x));
  }
  meet_arrive(2, kThreads + 32);
}

#endif

/// The layers of a run.
template <class T>
__global__ void __launch_bounds__(kAllThreads, 1) rows_mamba2_kernel(const __grid_constant__ Work work) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char mamba2_shared[];
  Shared& s = *reinterpret_cast<Shared*>(mamba2_shared);
  const RowsMamba2& a = work.run;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const bool maps = blockIdx.x < kMapBlocks;
  if (maps ? static_cast<int>(blockIdx.x) >= map_blocks(a) : static_cast<int>(blockIdx.x) - kMapBlocks >= state_blocks(a)) return;
  if (threadIdx.x == 0) {
    for (uint64_t* barrier : {&s.received, &s.clean}) barrier_init(shared_address(barrier), 1);
    if (maps) {
      barrier_init(shared_address(&s.map.scaled), 2);
      for (uint64_t* barrier : {&s.map.in_full, &s.map.in_free, &s.map.out_full, &s.map.out_free, &s.map.seen}) barrier_init(shared_address(barrier), 1);
    } else {
      s.state.place = state_place(a);
      for (uint64_t* barrier : {&s.state.recent_full, &s.state.recent_free}) barrier_init(shared_address(barrier), 1);
      for (int i = 0; i < Ring<T>::kStages; ++i) {
        barrier_init(shared_address(&s.state.full[i]), 1);
        barrier_init(shared_address(&s.state.empty[i]), 1);
      }
    }
    barriers_visible();
  }
  __syncthreads();
  if (warp >= kWarps) {
    if (maps) {
      const MapPlace at(a);
      if (warp == kWarps) MapBringer{work, s.layer, s.map, at, lane}.run();
      if (warp == kWarps + 1) clear_slots(a, s.received, s.clean, at, lane);
      if (warp > kWarps + 1) scale_rows(a, s.layer, s.map, at, (warp - kWarps - 2) * 32 + lane, lane);
    } else {
      const StatePlace at = s.state.place;
      if (warp == kWarps) StateBringer<T>{a, s.layer, s.state, at, lane}.run();
      if (warp == kWarps + 1) clear_slots(a, s.received, s.clean, at, lane);
    }
    return;
  }
  if (maps) {
    clear_others(a);
    clear_all(a, MapPlace(a));
    uint32_t residual[kOutPairs] = {};
#pragma unroll 1
    for (int layer = 0; layer < a.layers; ++layer) {
      in_phase(a, s.layer[layer % 2], s.map, s.received, s.clean, layer);
      if (s.layer[layer % 2].out != nullptr) out_phase(a, s.layer[layer % 2], s.map, s.clean, residual, layer);
    }
  } else {
    clear_all(a, StatePlace{s.state.place});
#pragma unroll 1
    for (int layer = 0; layer < a.layers; ++layer) state_phase<T>(a, s.layer[layer % 2], s.state, s.received, s.clean, layer);
  }
#endif
}

CUtensorMap weights_map(const bf16* data, int64_t k, int64_t columns, int box_columns) {
  const int64_t sizes[] = {k, columns}, strides[] = {k};
  const int box[] = {kLine, box_columns};
  return tensor_map(data, DType::bf16, sizes, strides, box);
}

}  // namespace

bool rows_mamba2_fits(const RowsLinear& in, const RowsState& state, Device device) {
  return in.rows > kRows / 2 && in.rows <= kRows && in.k <= kMaxD && in.k % 32 == 0 && in.bias == nullptr && in.epilogue == Epilogue::none && in.y_row == in.n &&
         in.n <= kMaxN && state.size == kMaxRecent && state.p == kHeadChannels && state.heads % 8 == 0 && state.heads <= kMaxHeads &&
         in.n == 2 * state.heads * kHeadChannels + 2 * kHeadStates + state.heads && aligned16(in.conv_bias, state.norm) &&
         hopper_multiprocessors(device, reinterpret_cast<const void*>(rows_mamba2_kernel<bf16>)) >= kBlocks;
}

int64_t mamba2_exchange() { return kSlots * sizeof(Slot); }

void rows_mamba2(const RowsMamba2& a, Stream stream) {
  Work work{};
  work.run = a;
  for (int i = 0; i < a.layers; ++i) {
    work.in[i] = weights_map(a.layer[i].in, a.d, a.n, kInColumns);
    if (a.layer[i].out != nullptr) work.out[i] = weights_map(a.layer[i].out, int64_t{a.heads} * kHeadChannels, a.d, kOutColumns);
  }
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  launch_with({together}, a.narrow ? rows_mamba2_kernel<bf16> : rows_mamba2_kernel<float>,
              {.grid = kBlocks, .block = kAllThreads, .shared = sizeof(Shared), .stream = stream}, work);
}

}  // namespace krait::kernels::cuda
