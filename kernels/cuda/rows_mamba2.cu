#include "kernels/cuda/rows_mamba2.h"

#include "kernels/cuda/copy_words.cuh"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/launch_with.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/rows_exchange.cuh"
#include "kernels/cuda/rows_state.cuh"
#include "kernels/cuda/step_values.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/tma.cuh"

// Two kinds of blocks. Those that map (kMapBlocks) hold in_proj's and out_proj's columns in shared memory, each matrix once on
// the whole GPU; those that keep states (kStateBlocks) stream their heads' states through a ring. So each multiprocessor
// reads few of the values that blocks send one another: x and y go to the blocks that map alone, a head's x, z, B, C to one
// or two blocks.
//
// Two halves of the rows, each with its own values, counters and, in blocks that map, its own warps. A half is bound by the way
// of these values, three times a layer; the other one has the tensor cores, the states' warps and the memory meanwhile. Blocks that
// keep states take the halves in turn; their ring holds a half's states (of bf16; half as many of fp32).
namespace krait::kernels::cuda {

namespace {

constexpr int kHalves = 2, kHalfRows = 32, kRows = kHalves * kHalfRows, kMaxD = 768, kMaxHeads = 24, kMaxE = kMaxHeads * kHeadChannels, kTaps = 4;
constexpr int kMapBlocks = 48, kStateBlocks = 84, kBlocks = kMapBlocks + kStateBlocks;
constexpr int kAllThreads = 512;

// Blocks that map: warps that multiply, for each half; then one that brings weights, one that clears slots, one a half that scales.
constexpr int kRowTiles = kHalfRows / 16, kGroups = 3;  // of k
constexpr int kHalfWarps = kRowTiles * kGroups, kHalfThreads = 32 * kHalfWarps, kMapWarps = kHalves * kHalfWarps, kMapThreads = 32 * kMapWarps;
constexpr int kInColumns = 72, kOutColumns = 16, kInTiles = kInColumns / 8, kOutTiles = kOutColumns / 8, kOwnTiles = kInTiles / kGroups;
constexpr int kMaxN = kMapBlocks * kInColumns, kOwnVectors = kInColumns / 8;  // of 16 bytes
constexpr int kLine = 64, kInBoxes = kMaxD / kLine, kOutBoxes = kMaxE / kLine;  // of weights: values of k
constexpr int kLineBytes = kLine * 2, kInBoxBytes = kInColumns * kLineBytes, kOutBoxBytes = kOutColumns * kLineBytes;
constexpr int kStep = 16, kInSteps = kMaxD / kStep, kOutSteps = kMaxE / kStep;  // of k: a product
constexpr int kFlightSteps = kInSteps / kGroups;                                 // whose operands a warp has under way
static_assert(kOutSteps == 2 * kGroups * kFlightSteps && kOutColumns == kStep && kMapBlocks * kOutColumns == kMaxD);

// Blocks that keep states: warps that make y; then one that brings states, one that brings what they are behind with, one that
// clears slots.
constexpr int kStateWarps = 13, kStateThreads = 32 * kStateWarps;
constexpr int kPiece = 16, kPieces = kHeadChannels / kPiece;  // channels of a head
// Heads in rounds: all blocks make y of the first ones before y of the next, so that out_proj can ask for half of y before the last
// round is done.
constexpr int kRoundHeads = 8, kRoundPieces = kRoundHeads * kPieces, kMaxRounds = kMaxHeads / kRoundHeads;  // of a row
constexpr int kRoundUnits = (kStateWarps + 2 * kPieces - 2) / kPieces, kUnits = kMaxRounds * kRoundUnits;    // heads of rows that a block's pieces touch
constexpr int kRoundShift = kStateBlocks / kMaxRounds;  // who has a piece more than others in a round, has not in the next
static_assert((kHalfRows * kRoundPieces + (kMaxRounds - 1) * kRoundShift + kStateBlocks - 1) / kStateBlocks <= kStateWarps);  // a piece a warp and round
constexpr int kStepWarps = (kUnits * kMaxRecent + 31) / 32;  // of positions that states are behind with
constexpr int kMaxRowsHere = 2, kCoefficientThreads = 32 * (kStepWarps + kMaxRowsHere), kBPitch = kHeadStates + 8;
constexpr int kXSquares = mamba2_squares(kMaxD), kSlots = 4;
static_assert(kMapWarps + 2 + kHalves == kAllThreads / 32 && kStateWarps + 3 == kAllThreads / 32 && kXSquares == kMapBlocks);

struct Slot;

struct Common {
  RowsMamba2Layer layer[2];  // in turn: a kernel's arguments come late when they are first read
  uint64_t received[kHalves], clean[kHalves];
};
struct MapShared : Common {
  alignas(1024) unsigned char in[kInBoxes * kInBoxBytes];    // in_proj's columns
  alignas(1024) unsigned char out[kOutBoxes * kOutBoxBytes];  // out_proj's
  alignas(16) uint32_t past[kRows][kTaps - 1][kInColumns / 2];  // of the convolution
  alignas(16) uint2 filter[kInColumns];
  alignas(16) bf16 conv_bias[kInColumns];
  float4 sums[kHalves][kGroups][kGroups - 1][kRowTiles][kOwnTiles][32];  // lanes' accumulators for a group, of the others
  uint4 residual[kHalves][kRowTiles][32];                               // as lanes finish them, from layer to layer
  float factor[kHalves][2][2][kHalfRows];                               // of x, of y; of layers in turn
  uint64_t in_full, in_free, past_full, past_free, out_full, out_free, seen[kHalves], scaled[kHalves];
};

/// A block's pieces of a half's states, in rounds: heads of rows (units) follow one another, and the pieces of each. Unit u is of
/// round u / kRoundUnits.
struct StatePlace {
  int2 span[kMaxRounds];           // a round's pieces, among the half's of that round: the first, behind the last
  int half, first, reach, pieces;  // the first of any round; from there to behind the last of any; all of all rounds
  int unit, units;                 // the first one among a round's; those that any round's pieces touch
  int row, rows, split;            // of the first unit; rows touched; units of the first of them
  int heads, rounds;
  __device__ bool has(int u) const { return u % kRoundUnits < units && u / kRoundUnits < rounds; }
  __device__ int place(int u) const { return u % kRoundUnits < split ? 0 : 1; }  // of its row among the block's
  __device__ int head(int u) const { return u / kRoundUnits * kRoundHeads + (unit + u % kRoundUnits) % kRoundHeads; }
  /// A unit belongs to the block that has its first piece.
  __device__ bool owns(int u) const {
    const int piece = (unit + u % kRoundUnits) * kPieces;
    const int2 of = span[u / kRoundUnits];
    return piece >= of.x && piece < of.y;
  }
  __device__ int64_t among_all(int u) const { return (int64_t{half} * kHalfRows + row + place(u)) * heads + head(u); }
  template <int kOf>  // threads, of which this is one
  __device__ void forget_front(Slot& slot, int thread) const;
  template <int kOf>
  __device__ void forget_before(Slot&, int) const {}
};

constexpr int kRingBytes = 38 * 4096;
/// Pieces of states, a warp one a round; kFlight are under way (more stand in the way of what others wait for). Who waits for a
/// piece has had the one of the round before, and so kFlight before that have come; or knows that it has been asked for, and so the
/// last one in its place has come: the barrier is not two phases behind, which would look alike.
template <class T>
struct Ring {
  static constexpr int kBytes = kPiece * kHeadStates * static_cast<int>(sizeof(T)), kStages = kRingBytes / kBytes;
  static constexpr int kFlight = sizeof(T) == 2 ? 19 : 6;
  static_assert(kStateWarps + kFlight <= kStages);
};
/// What a half's states are behind with, and what their heads' outputs take.
struct Recent {
  alignas(128) bf16 x[kUnits][kMaxRecent][kHeadChannels];
  alignas(16) bf16 B[kMaxRowsHere][kMaxRecent][kBPitch];
  alignas(16) float2 steps[kUnits][kMaxRecent];  // dt, log P
  float rate_log[kUnits], bias[kUnits];
  int count[kMaxRowsHere];  // positions that are not yet in h
  uint64_t full, free;
};
struct StateShared : Common {
  alignas(128) unsigned char ring[kRingBytes];
  Recent recent[kHalves];
  alignas(16) bf16 C[kMaxRowsHere][kHeadStates];
  alignas(16) bf16 z[kUnits][kHeadChannels];
  float factor[kUnits][kMaxRecent], decay[kUnits], products[kMaxRowsHere][kMaxRecent];
  alignas(16) bf16 coefficient[kUnits][2][kMaxRecent];  // factor times product, and what it lacks
  StatePlace place[kHalves];
  uint8_t counts[kMamba2Layers][kHalves][kMaxRowsHere];
  volatile int asked;  // of the run's pieces
  uint64_t full[Ring<bf16>::kStages], empty[Ring<bf16>::kStages];
};
constexpr int kSharedBytes = sizeof(MapShared) > sizeof(StateShared) ? sizeof(MapShared) : sizeof(StateShared);
static_assert(kSharedBytes <= 227 * 1024);

constexpr int kStepWords = kHalfRows * kStep / 2;
/// Rows of a half as products take them.
template <int kSteps>
struct Rows {  // (steps of k, tiles of 16 rows, g, t, lane's operand: rows g, g + 8 at 2 t, then at 2 t + 8)
  uint32_t words[kSteps][kRowTiles][8][4][4];
  __device__ uint32_t* operand(int step, int tile, int lane) { return words[step][tile][lane / 4][lane % 4]; }
  static __device__ int word(int row, int column) {  // of two columns
    return column / kStep * kStepWords + row / 16 * (kStepWords / kRowTiles) + row % 8 * 16 + column % 8 / 2 * 4 + row / 8 % 2 + column % kStep / 8 * 2;
  }
  __device__ uint32_t* at(int row, int column) { return &words[0][0][0][0][0] + word(row, column); }
};
/// What blocks send one another in a layer, of a half (rows_exchange.cuh); layer i uses slot i % kSlots. Words of x and y whose
/// rows or columns do not exist, and such parts of squares, are zero.
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
  bf16 mixed[kHalfRows][kMaxN];
  float x_squares[kXSquares / 4][kHalfRows][4], y_squares[kMaxHeads][kHalfRows][kPieces];  // four of a row side by side
};

struct Work {
  RowsMamba2 run;
  CUtensorMap in[kMamba2Layers], out[kMamba2Layers];  // (d, n), (e, d)
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)

enum Counter { kCleared, kInSent, kOutSent, kStateSent };  // of the last, one a round
/// Of `count` hints, those that are waited for: who asks when some values are missing asks again for these alone, and has the rest
/// sooner; but who asks often is in the way of all.
__device__ __forceinline__ int enough_hints(Counter which, int count) { return which == kOutSent ? count * 7 / 8 : which == kStateSent ? count * 3 / 4 : count; }
/// Weights are asked for box by box, kPace cycles for 9 KB: all at once they are in the way of the values.
constexpr int kPace = 400;
__device__ __forceinline__ void wait_until(long long time) {
  while (clock64() < time) {
  }
}
__device__ __forceinline__ unsigned* counter(const RowsMamba2& a, int half, int layer, Counter which, int round = 0) {
  static_assert(kStateSent + kMaxRounds <= 8);
  return a.counters + (layer * kHalves + half) * 8 + which + round;
}
__device__ __forceinline__ Slot& slot(const RowsMamba2& a, int half, int layer) { return static_cast<Slot*>(a.exchange)[half * kSlots + layer % kSlots]; }
/// A half's rows; the second has at least one.
__device__ __forceinline__ int rows_of(const RowsMamba2& a, int half) { return min(a.rows - half * kHalfRows, kHalfRows); }
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
/// An address that is kept, not computed again wherever it is used.
template <class T>
__device__ __forceinline__ T* kept(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}
__device__ __forceinline__ void set_pair(bf16* p, uint32_t v) { *reinterpret_cast<uint32_t*>(p) = v; }
__device__ __forceinline__ void forget_word(void* p) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(kNothing) : "memory"); }
/// Arrives once the copies that the thread has asked for so far are there.
__device__ __forceinline__ void arrive_with_copies(uint64_t& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

/// The sum of a row's squares, in one order; four are side by side, the next four kHalfRows vectors behind.
template <int kVectors>
__device__ __forceinline__ float add_squares(const float (&from)[kVectors][kHalfRows][4], int row) {
  uint4 v[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) look(v[i], from[i][row]);
  insist<kVectors>(v, [&](int i) { return from[i][row]; });
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) sum += (__uint_as_float(v[i].x) + __uint_as_float(v[i].y)) + (__uint_as_float(v[i].z) + __uint_as_float(v[i].w));
  return sum;
}

// ---- Blocks that map: columns of in_proj with the convolution, columns of out_proj.

__device__ __forceinline__ int map_blocks(const RowsMamba2& a) {
  return max((a.n + kInColumns - 1) / kInColumns, (a.d + kOutColumns - 1) / kOutColumns);
}
/// Those that have pieces of a half.
__device__ __forceinline__ int state_blocks(const RowsMamba2& a, int half) { return min(rows_of(a, half) * kRoundPieces, kStateBlocks); }

/// Neighbours among blocks run close to one another: both kinds are spread evenly, so that no part of the GPU has to pass the
/// values to most of the blocks that map. Their number among their kind.
constexpr int kPattern = 22, kMapsOfPattern = 8;
static_assert(kMapBlocks % kMapsOfPattern == 0 && kBlocks == kMapBlocks / kMapsOfPattern * kPattern);
__device__ __forceinline__ bool block_maps() { return blockIdx.x % kPattern % 6 < 2; }
__device__ __forceinline__ int block_number() {
  const int pattern = static_cast<int>(blockIdx.x) / kPattern, place = static_cast<int>(blockIdx.x) % kPattern, of = place / 6, in = place % 6;
  return in < 2 ? pattern * kMapsOfPattern + 2 * of + in : pattern * (kPattern - kMapsOfPattern) + 4 * of + in - 2;
}

struct MapPlace {
  int block, in_first, in_columns, conv_first, conv_columns, out_first, e, channels;
  bool has_out;
  __device__ explicit MapPlace(const RowsMamba2& a) {
    block = now(block_number());
    e = a.heads * kHeadChannels;
    channels = e + 2 * kHeadStates;
    in_first = block * kInColumns;
    in_columns = min(max(a.n - in_first, 0), kInColumns);
    conv_first = max(in_first, e);
    conv_columns = max(min(in_first + in_columns, e + channels) - conv_first, 0);
    out_first = block * kOutColumns;
    has_out = out_first < a.d;
  }
  template <int kOf>  // threads, of which this is one
  __device__ void forget_front(Slot& slot, int thread) const {
    if (in_columns > 0) forget<kInColumns / 8, kOf>(&slot.mixed[0][in_first], kHalfRows, sizeof(slot.mixed[0]), thread);
  }
  template <int kOf>
  __device__ void forget_before(Slot& slot, int thread) const {
    if (!has_out) return;
    forget<kStepWords / 4, kOf>(slot.x.words[block], 1, 0, thread);
    for (int row = thread; row < kHalfRows; row += kOf) forget_word(&slot.x_squares[block / 4][row][block % 4]);
  }
};

/// Before a run: zeros for steps of x, rows and columns of y, and parts of squares that do not exist.
__device__ __forceinline__ void clear_others(const RowsMamba2& a) {
  constexpr int kPairs = (kMaxD + kMaxE) / 2, kParts = kXSquares + kMaxHeads * kPieces;
  const int first = block_number() * kMapThreads + static_cast<int>(threadIdx.x), threads = map_blocks(a) * kMapThreads;
#pragma unroll 1
  for (int i = first; i < kHalves * kSlots * kPairs * kHalfRows; i += threads) {
    const int row = i % kHalfRows, x = i / kHalfRows % kPairs * 2, y = x - kMaxD, of = i / kHalfRows / kPairs, half = of / kSlots;
    if (y < 0 ? x < a.d : y < a.heads * kHeadChannels && row < rows_of(a, half)) continue;
    Slot& to = slot(a, half, of % kSlots);
    *(y < 0 ? to.x.at(row, x) : to.y.at(row, y)) = 0;
  }
#pragma unroll 1
  for (int i = first; i < kHalves * kSlots * kParts * kHalfRows; i += threads) {
    const int row = i % kHalfRows, x = i / kHalfRows % kParts, y = x - kXSquares, of = i / kHalfRows / kParts;
    if (y < 0 ? x < mamba2_squares(a.d) : y < a.heads * kPieces) continue;
    Slot& to = slot(a, of / kSlots, of % kSlots);
    (y < 0 ? to.x_squares[x / 4][row][x % 4] : to.y_squares[y / kPieces][row][y % kPieces]) = 0;
  }
}

struct MapBringer {
  const Work& work;
  MapShared& s;
  const MapPlace& at;
  int lane;

  /// `boxes` of kBoxes lines of a matrix's columns from `first` on.
  template <int kBoxes, int kBoxBytes>
  __device__ void bring(unsigned char* boxes, const CUtensorMap& map, uint64_t& barrier, int first, bool wanted, bool paced) const {
    if (lane == 0) {
      const uint32_t full = shared_address(&barrier);
      const long long start = clock64();
      barrier_expect(full, wanted ? kBoxes * kBoxBytes : 0);
      for (int i = 0; i < kBoxes && wanted; ++i) {
        if (paced) wait_until(start + i * (kPace * kBoxBytes / kInBoxBytes));
        bring_box(shared_address(boxes + i * kBoxBytes), map, full, i * kLine, first);
      }
    }
    __syncwarp();
  }
  __device__ void in(int layer) const {
    copy_layer(s.layer[layer % 2], work.run.layer[layer], lane);
    bring<kInBoxes, kInBoxBytes>(s.in, work.in[layer], s.in_full, at.in_first, at.in_columns > 0, layer > 0);
  }
  __device__ void past(int layer) const {
    const RowsMamba2& a = work.run;
    const RowsMamba2Layer& l = s.layer[layer % 2];
    const uint32_t full = shared_address(&s.past_full);
    const int own = at.conv_first - at.in_first, first = at.conv_first - at.e;
    if (lane == 0) barrier_expect(full, at.conv_columns * (a.rows * (kTaps - 1) * 2 + kTaps * 2 + (l.conv_bias != nullptr ? 2 : 0)));
    __syncwarp();
    if (at.conv_columns == 0) return;
    for (int row = lane; row < a.rows; row += 32)
      for (int j = 0; j + 1 < kTaps; ++j)
        bring_bytes(shared_address(&s.past[row][j][own / 2]), l.conv + (int64_t{row} * (kTaps - 1) + j) * at.channels + first, at.conv_columns * 2, full);
    if (lane == 0) bring_bytes(shared_address(&s.filter[own]), l.conv_weight + kTaps * first, at.conv_columns * kTaps * 2, full);
    if (lane == 1 && l.conv_bias != nullptr) bring_bytes(shared_address(&s.conv_bias[own]), l.conv_bias + first, at.conv_columns * 2, full);
    __syncwarp();
  }
  __device__ void out(int layer) const {
    bring<kOutBoxes, kOutBoxBytes>(s.out, work.out[layer], s.out_full, at.out_first, s.layer[layer % 2].out != nullptr && at.has_out, layer > 0);
  }
  __device__ void run() const {
    in(0);
    past(0);
    out(0);
#pragma unroll 1
    for (int layer = 0; layer + 1 < work.run.layers; ++layer) {
      barrier_wait(shared_address(&s.in_free), layer % 2);
      in(layer + 1);
      barrier_wait(shared_address(&s.past_free), layer % 2);
      past(layer + 1);
      barrier_wait(shared_address(&s.out_free), layer % 2);
      out(layer + 1);
    }
  }
};

/// The warp that scales a half's rows, a lane one: what in_proj and out_proj multiply their sums with.
__device__ __forceinline__ void scale_rows(const RowsMamba2& a, MapShared& s, const MapPlace& at, int half, int lane) {
  const bool exists = lane < rows_of(a, half);
#pragma unroll 1
  for (int layer = 0; layer < a.layers; ++layer) {
    const RowsMamba2Layer& l = s.layer[layer % 2];
    barrier_wait(shared_address(&s.in_full), layer % 2);
    barrier_wait(shared_address(&s.seen[half]), 0);
    float square = 0;
    const bool scales = layer > 0 || a.x_squares != nullptr, adds = scales && exists;
    if (adds && layer > 0) square = add_squares(slot(a, half, layer + kSlots - 1).x_squares, lane);
    if (adds && layer == 0)
      for (int i = 0; i < a.x_parts; ++i) square += __ldcg(a.x_squares + int64_t{half * kHalfRows + lane} * a.x_parts + i);
    s.factor[half][0][layer % 2][lane] = scales ? rsqrtf(square / static_cast<float>(a.d) + l.eps) : 1.0f;
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&s.scaled[half]));
    if (l.out == nullptr) return;
    barrier_wait(shared_address(&s.seen[half]), 1);
    square = exists && at.has_out ? add_squares(slot(a, half, layer).y_squares, lane) : 0.0f;
    s.factor[half][1][layer % 2][lane] = rsqrtf(square / static_cast<float>(at.e) + l.gated_eps);
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&s.scaled[half]));
  }
}

/// Asks for a lane's operands of kCount steps that follow one another.
template <int kCount>
__device__ __forceinline__ void look_for_operands(uint4* x, const uint32_t* from) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) look(x[i], from + i * kStepWords);
}
template <int kCount>
__device__ __forceinline__ void insist_on_operands(uint4* x, const uint32_t* from) {
  insist<kCount>(x, [&](int i) { return from + i * kStepWords; });
}
/// Columns of boxes (lines of 64 of k, swizzled), two steps of k at a time: what a lane names to ldmatrix of the first and of the
/// second pair of a box.
struct Columns {
  uint32_t pair[2];
  __device__ Columns(const unsigned char* boxes, int lane) {
    pair[0] = shared_address(boxes) + lane % 8 * kLineBytes + ((lane / 8) ^ (lane % 8)) * 16;
    pair[1] = pair[0] ^ 64;
  }
  /// kCount tiles of eight columns from the first on.
  template <int kBoxBytes, int kCount>
  __device__ void load(uint32_t (&to)[kCount][4], int pair_of, int first) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) load_matrices(to[i], pair[pair_of % 2] + (pair_of / 2 * kBoxBytes + (first + i) * 8 * kLineBytes));
  }
};
__device__ __forceinline__ void multiply(float (&sums)[4], uint4 x, uint32_t b0, uint32_t b1) { mma(sums, {x.x, x.y, x.z, x.w}, b0, b1); }

/// A half's warps of a block that maps: a tile of 16 rows and a third of k each.
struct HalfMap {
  const RowsMamba2& a;
  MapShared& s;
  int half;

  __device__ int thread() const { return now(static_cast<int>(threadIdx.x)) - half * kHalfThreads; }
  __device__ void meet() const { cuda::meet(3 + half, kHalfThreads); }
  __device__ void wait_for_hints(Counter which, int layer, int count, int round = 0, bool last = true) const {
    if (thread() == 0) {
      await_hints(counter(a, half, layer, which, round), enough_hints(which, count));
      if (last) barrier_arrive(shared_address(&s.seen[half]));
    }
    meet();
  }
  /// Accumulators of the group for another one, of its i-th tile of columns.
  __device__ void leave(const float (&acc)[4], int group, int owner, int tile, int i, int lane) const {
    s.sums[half][owner][(group - owner + kGroups - 1) % kGroups][tile][i][lane] = {acc[0], acc[1], acc[2], acc[3]};
  }
  /// What the others left.
  __device__ void add_sums(float (&acc)[4], int group, int tile, int i, int lane) const {
#pragma unroll
    for (int of = 0; of + 1 < kGroups; ++of) {
      const float4 v = s.sums[half][group][of][tile][i][lane];
      acc[0] += v.x, acc[1] += v.y, acc[2] += v.z, acc[3] += v.w;
    }
  }
  __device__ void multiply_in(float (&acc)[kInTiles][4], int layer) const;
  __device__ void multiply_out(float (&acc)[kOutTiles][4], int layer) const;
  __device__ void keep_normed(const RowsMamba2Layer& l, const MapPlace& at, int layer) const;
  __device__ void keep_gated(const RowsMamba2Layer& l, const MapPlace& at, int layer) const;
  __device__ void in_phase(const RowsMamba2Layer& l, int layer) const;
  __device__ void out_phase(const RowsMamba2Layer& l, int layer) const;
};

/// acc: the warp's rows and part of k, all columns of in_proj.
__device__ __forceinline__ void HalfMap::multiply_in(float (&acc)[kInTiles][4], int layer) const {
  constexpr int kLate = 4, kEarly = kFlightSteps - kLate;  // steps: the last ones take the registers of the first
  const int tid = thread(), lane = tid % 32, tile = tid / 32 % kRowTiles, first = tid / 32 / kRowTiles * kFlightSteps;
  const uint32_t* const from = kept(slot(a, half, layer + kSlots - 1).x.operand(first, tile, lane));
  uint4 x[kEarly];
  const auto look_at_first = [&](uint4* to, int step, int count) {  // who stands for rows and columns that do not exist is of no account
    const int row = half * kHalfRows + tile * 16 + lane / 4;
    const bf16 *const up = a.x + min(row, a.rows - 1) * a.x_row, *const down = a.x + min(row + 8, a.rows - 1) * a.x_row;
    const auto word = [&](const bf16* p) { return __ldcg(reinterpret_cast<const unsigned*>(p)); };
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int k = (first + step + i) * kStep, c = (k < a.d ? k : 0) + lane % 4 * 2;
      to[i] = {word(up + c), word(down + c), word(up + c + 8), word(down + c + 8)};
    }
  };
  if (layer > 0) {
    barrier_wait(shared_address(&s.clean[half]), (layer - 1) % 2);
    wait_for_hints(kOutSent, layer - 1, kRowTiles * map_blocks(a));
    look_for_operands<kEarly>(x, from);
  } else {
    if (tid == 0) barrier_arrive(shared_address(&s.seen[half]));
    look_at_first(x, 0, kEarly);
  }
  barrier_wait(shared_address(&s.in_full), layer % 2);
  const Columns columns(s.in + first * kStep / kLine * kInBoxBytes, lane);
  constexpr int kTiles = 3, kRounds = kInTiles / kTiles, kAll = kFlightSteps / 2 * kRounds;  // of columns at once, for two steps of k
  static_assert(kInTiles % kTiles == 0 && kLate % 4 == 0 && kEarly % 4 == 0);
  uint32_t b[2][kTiles][4];
  columns.load<kInBoxBytes>(b[0], 0, 0);
#pragma unroll
  for (int round = 0; round < kAll; ++round) {
    const int step = round / kRounds * 2, tiles = round % kRounds * kTiles, at = step % kEarly;
    if (step % 4 == 0 && tiles == 0) {
      if (step == kLate) {  // the first ones have been multiplied
        if (layer > 0)
          look_for_operands<kLate>(x, from + kEarly * kStepWords);
        else
          look_at_first(x, kEarly, kLate);
      }
      if (layer > 0) insist_on_operands<4>(x + at, from + step * kStepWords);
    }
    if (round + 1 < kAll) columns.load<kInBoxBytes>(b[(round + 1) % 2], (round + 1) / kRounds, (round + 1) % kRounds * kTiles);
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) multiply(acc[tiles + j], x[at + k], b[round % 2][j][2 * k], b[round % 2][j][2 * k + 1]);
  }
}

/// What in_proj reads, where it is asked for: before the block sends; until then nobody takes these words back.
__device__ __forceinline__ void HalfMap::keep_normed(const RowsMamba2Layer& l, const MapPlace& at, int layer) const {
  Slot& before = slot(a, half, layer + kSlots - 1);
  const int blocks = (a.n + kInColumns - 1) / kInColumns, width = (a.d + blocks - 1) / blocks;
  for (int i = thread(); i < rows_of(a, half) * width; i += kHalfThreads) {
    const int r = i / width, c = at.block * width + i % width;
    const int64_t row = half * kHalfRows + r;
    if (c >= a.d) continue;
    float v = 0;
    if (layer > 0) {
      uint32_t word = kNothing;
      insist(word, before.x.at(r, c));
      v = c % 2 == 0 ? two(word).x : two(word).y;
    } else {
      v = read_fresh_one(a.x + row * a.x_row + c);
    }
    l.normed[row * a.d + c] = static_cast<bf16>(v * s.factor[half][0][layer % 2][r]);
  }
}

/// Columns of in_proj, those of x, B and C convolved.
__device__ __forceinline__ void HalfMap::in_phase(const RowsMamba2Layer& l, int layer) const {
  float own[kOwnTiles][4];
  {
    float acc[kInTiles][4] = {};
    multiply_in(acc, layer);
    const int tid = thread(), lane = tid % 32, tile = tid / 32 % kRowTiles, group = tid / 32 / kRowTiles;
#pragma unroll
    for (int j = 0; j < kInTiles; ++j)
      if (j / kOwnTiles != group) leave(acc[j], group, j / kOwnTiles, tile, j % kOwnTiles, lane);
#pragma unroll
    for (int i = 0; i < kOwnTiles; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) own[i][k] = group == 0 ? acc[i][k] : group == 1 ? acc[kOwnTiles + i][k] : acc[2 * kOwnTiles + i][k];
  }
  const MapPlace at(a);
  const int tid = thread(), lane = tid % 32, tile = tid / 32 % kRowTiles, group = tid / 32 / kRowTiles, t = lane % 4;
  const int first_row = tile * 16 + lane / 4, first_column = group * kOwnTiles * 8 + 2 * t;  // of two rows, 8 apart, and of kOwnTiles pairs, 8 apart
  const bool exists[2] = {half * kHalfRows + first_row < a.rows, half * kHalfRows + first_row + 8 < a.rows};
  const auto maps = [&](int i) { return first_column + 8 * i < at.in_columns; };  // all eight columns of a tile exist, or none
  const auto convolves = [&](int i) {
    const int channel = at.in_first + first_column + 8 * i - at.e;
    return channel >= 0 && channel < at.channels;
  };
  barrier_wait(shared_address(&s.past_full), layer % 2);
  float2 past[kOwnTiles][2], last_tap[kOwnTiles];  // the convolution's sums without this position
#pragma unroll
  for (int i = 0; i < kOwnTiles; ++i) {
    const int c = first_column + 8 * i;
    const uint4 filter = *reinterpret_cast<const uint4*>(&s.filter[c]);
    const float2 bias = l.conv_bias != nullptr ? two(*reinterpret_cast<const uint32_t*>(&s.conv_bias[c])) : float2{0, 0};
    const float2 w01 = two(filter.x), w23 = two(filter.y), v01 = two(filter.z), v23 = two(filter.w);
    last_tap[i] = {w23.y, v23.y};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t(&words)[kTaps - 1][kInColumns / 2] = s.past[half * kHalfRows + first_row + 8 * r];
      const float2 x0 = two(words[0][c / 2]), x1 = two(words[1][c / 2]), x2 = two(words[2][c / 2]);
      past[i][r] = {bias.x + w01.x * x0.x + w01.y * x1.x + w23.x * x2.x, bias.y + v01.x * x0.y + v01.y * x1.y + v23.x * x2.y};
    }
  }
  bf16* const to = kept(&slot(a, half, layer).mixed[first_row][at.in_first + first_column]);
  meet();  // the weights have been read
  if (tid == 0) {
    barrier_arrive(shared_address(&s.in_free));
    barrier_arrive(shared_address(&s.received[half]));
  }
#pragma unroll
  for (int i = 0; i < kOwnTiles; ++i) add_sums(own[i], group, tile, i, lane);
  barrier_wait(shared_address(&s.scaled[half]), 0);
  if (l.normed != nullptr && at.in_columns > 0) keep_normed(l, at, layer);
  const float factor[2] = {s.factor[half][0][layer % 2][first_row], s.factor[half][0][layer % 2][first_row + 8]};
#pragma unroll
  for (int i = 0; i < kOwnTiles; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t made = pack(own[i][2 * r] * factor[r], own[i][2 * r + 1] * factor[r]);
      const float2 x = two(made);
      const uint32_t mixed = pack(silu_fast(past[i][r].x + last_tap[i].x * x.x), silu_fast(past[i][r].y + last_tap[i].y * x.y));
      if (maps(i) && exists[r]) send(to + 8 * r * kMaxN + 8 * i, convolves(i) ? mixed : made);
      s.past[half * kHalfRows + first_row + 8 * r][0][first_column / 2 + 4 * i] = made;  // the thread's own: nobody has read another one's yet
    }
  }
  if (tid == 0) hint(counter(a, half, layer, kInSent));
  meet();
  for (int i = tid; i < kHalfRows * kOwnVectors; i += kHalfThreads) {  // what no other block reads
    const int c = i % kOwnVectors * 8;
    const int64_t of = half * kHalfRows + i / kOwnVectors;
    if (c >= at.in_columns || of >= a.rows) continue;
    const auto vector = [&](int tap) { return *reinterpret_cast<const uint4*>(&s.past[of][tap][c / 2]); };
    const int channel = at.in_first + c - at.e;
    if (l.zxbcdt != nullptr) *reinterpret_cast<uint4*>(l.zxbcdt + of * a.n + at.in_first + c) = vector(0);
    if (channel < 0 || channel >= at.channels) continue;
    bf16* const state = l.conv + of * (kTaps - 1) * at.channels + channel;
#pragma unroll
    for (int tap = 0; tap + 1 < kTaps; ++tap) *reinterpret_cast<uint4*>(state + tap * int64_t{at.channels}) = vector((tap + 1) % (kTaps - 1));
  }
  publish_shared();
  __syncwarp();
  if (lane == 0) barrier_arrive(shared_address(&s.past_free));
  if (l.rstd != nullptr && at.block == 0 && tid < rows_of(a, half)) l.rstd[half * kHalfRows + tid] = s.factor[half][0][layer % 2][tid];
}

/// The gated norm's rows, where they are asked for.
__device__ __forceinline__ void HalfMap::keep_gated(const RowsMamba2Layer& l, const MapPlace& at, int layer) const {
  Slot& now = slot(a, half, layer);
  const int blocks = mamba2_squares(a.d), width = (at.e + blocks - 1) / blocks;
  for (int i = thread(); i < rows_of(a, half) * width; i += kHalfThreads) {
    const int r = i / width, c = at.block * width + i % width;
    if (c >= at.e) continue;
    uint32_t word = kNothing;
    insist(word, now.y.at(r, c));
    l.gated[int64_t{half * kHalfRows + r} * at.e + c] = static_cast<bf16>((c % 2 == 0 ? two(word).x : two(word).y) * s.factor[half][1][layer % 2][r]);
  }
}

/// acc: the warp's rows and part of k, all columns of out_proj: of y's first half, asked for before the last round of states, and of
/// the second.
__device__ __forceinline__ void HalfMap::multiply_out(float (&acc)[kOutTiles][4], int layer) const {
  constexpr int kAtOnce = 4, kPartSteps = kGroups * kFlightSteps, kPartBytes = kPartSteps * kStep / kLine * kOutBoxBytes;
  static_assert(2 * kPartSteps == kOutSteps && kFlightSteps * kStep % kLine == 0);
  const int tid = thread(), lane = tid % 32, tile = tid / 32 % kRowTiles, group = tid / 32 / kRowTiles, rounds = a.heads / kRoundHeads;
  const uint32_t* const from = kept(slot(a, half, layer).y.operand(group * kFlightSteps, tile, lane));
  const Columns columns(s.out + group * (kPartBytes / kGroups), lane);
  uint4 x[kFlightSteps];
  wait_for_hints(kStateSent, layer, state_blocks(a, half), max(rounds - 2, 0), false);
  look_for_operands<kFlightSteps>(x, from);
  barrier_wait(shared_address(&s.out_full), layer % 2);
  wait_for_hints(kStateSent, layer, state_blocks(a, half), rounds - 1, true);
  float sums[2][kOutTiles][4] = {};  // of even and odd steps: shorter chains
#pragma unroll
  for (int step = 0; step < 2 * kFlightSteps; step += kAtOnce) {
    const int part = step / kFlightSteps, i = step % kFlightSteps;
    uint32_t b[kAtOnce / 2][kOutTiles][4];
#pragma unroll
    for (int j = 0; j < kAtOnce / 2; ++j) columns.load<kOutBoxBytes>(b[j], (part * kPartSteps + i) / 2 + j, 0);
    if (i == 0) insist_on_operands<kFlightSteps>(x, from + part * kPartSteps * kStepWords);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
#pragma unroll
      for (int j = 0; j < kOutTiles; ++j) multiply(sums[k % 2][j], x[i + k], b[k / 2][j][k % 2 * 2], b[k / 2][j][k % 2 * 2 + 1]);
    if (part == 0) look_for_operands<kAtOnce>(x + i, from + (kPartSteps + i) * kStepWords);
  }
#pragma unroll
  for (int j = 0; j < kOutTiles; ++j)
#pragma unroll
    for (int k = 0; k < 4; ++k) acc[j][k] = sums[0][j][k] + sums[1][j][k];
}

/// Columns of out_proj, the sums with the residual stream, weighted by the next norm. The first group finishes them: a lane's
/// values are an operand of in_proj's.
__device__ __forceinline__ void HalfMap::out_phase(const RowsMamba2Layer& l, int layer) const {
  const MapPlace at(a);
  const int tid = thread(), lane = tid % 32, tile = tid / 32 % kRowTiles, group = tid / 32 / kRowTiles, g = lane / 4, t = lane % 4;
  if (!at.has_out) {
    if (tid == 0) {
      barrier_arrive(shared_address(&s.seen[half]));
      barrier_arrive(shared_address(&s.out_free));
    }
    barrier_wait(shared_address(&s.scaled[half]), 1);
    if (group == 0 && lane == 0) hint(counter(a, half, layer, kOutSent));
    return;
  }
  const int row = tile * 16 + g, c = at.out_first + 2 * t;
  const bool exists[2] = {half * kHalfRows + row < a.rows, half * kHalfRows + row + 8 < a.rows};
  const auto place = [&](int i) { return int64_t{half * kHalfRows + row + 8 * (i % 2)} * a.d + c + 8 * (i / 2); };  // of a lane's four pairs
  float2 weight[2] = {};
  if (group == 0) {
#pragma unroll
    for (int j = 0; j < 2; ++j) weight[j] = *reinterpret_cast<const float2*>(l.weight + c + 8 * j);
    if (layer == 0) {
      uint32_t first[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) first[i] = exists[i % 2] ? __ldcg(reinterpret_cast<const unsigned*>(l.residual + place(i))) : 0;
      s.residual[half][tile][lane] = {first[0], first[1], first[2], first[3]};
    }
  }
  Slot& now = slot(a, half, layer);
  if (layer == 0) barrier_wait(shared_address(&s.clean[half]), 0);
  float acc[kOutTiles][4];
  multiply_out(acc, layer);
  if (group != 0)
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) leave(acc[j], group, 0, tile, j, lane);
  meet();  // the weights have been read
  if (tid == 0) barrier_arrive(shared_address(&s.out_free));
  if (group == 0)
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) add_sums(acc[j], 0, tile, j, lane);
  else if (l.gated == nullptr)
    return;
  barrier_wait(shared_address(&s.scaled[half]), 1);
  if (l.gated != nullptr) keep_gated(l, at, layer);
  if (group != 0) return;
  const float factor[2] = {s.factor[half][1][layer % 2][row], s.factor[half][1][layer % 2][row + 8]};
  const uint4 before = s.residual[half][tile][lane];
  const uint32_t residual[4] = {before.x, before.y, before.z, before.w};
  uint32_t made[4], sum[4], weighted[4];
  float square[2] = {};
#pragma unroll
  for (int j = 0; j < kOutTiles; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = 2 * j + r;
      made[i] = pack(acc[j][2 * r] * factor[r], acc[j][2 * r + 1] * factor[r]);
      const float2 m = two(made[i]), past = two(residual[i]);
      sum[i] = pack(m.x + past.x, m.y + past.y);
      const float2 u = two(sum[i]);
      weighted[i] = exists[r] ? pack(u.x * weight[j].x, u.y * weight[j].y) : 0;
      square[r] += u.x * u.x + u.y * u.y;
    }
  }
  send(now.x.operand(at.block, tile, lane), {weighted[0], weighted[1], weighted[2], weighted[3]});
  const float squares[2] = {sum_lanes<4>(square[0]), sum_lanes<4>(square[1])};
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (t == r) send(&now.x_squares[at.block / 4][row + 8 * r][at.block % 4], squares[r]);
  __syncwarp();
  if (lane == 0) hint(counter(a, half, layer, kOutSent));
  s.residual[half][tile][lane] = {sum[0], sum[1], sum[2], sum[3]};
  const bool last = layer + 1 == a.layers;
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // what no other block reads
    if (!exists[i % 2]) continue;
    set_pair(l.made + place(i), made[i]);
    set_pair(l.sum + place(i), sum[i]);
    if (last) set_pair(a.weighted + place(i), weighted[i]);
    if (last && i == t && i < 2) a.squares[int64_t{half * kHalfRows + row + 8 * i} * mamba2_squares(a.d) + at.block] = squares[i];
  }
}

// ---- Blocks that keep states: pieces of heads of rows that follow one another.

template <int kOf>
__device__ __forceinline__ void StatePlace::forget_front(Slot& slot, int thread) const {
  for (int round = 0; round < rounds; ++round)
    for (int i = span[round].x + thread; i < span[round].y; i += kOf) {
      const int r = i / kRoundPieces, step = round * kRoundPieces + i % kRoundPieces;
      for (int c = 0; c < kPiece; c += 2) forget_word(slot.y.at(r, step * kPiece + c));
      forget_word(&slot.y_squares[step / kPieces][r][step % kPieces]);
    }
}
__device__ __forceinline__ StatePlace state_place(const RowsMamba2& a, int half) {
  const int all = rows_of(a, half) * kRoundPieces, block = block_number();
  StatePlace p{};
  p.half = half;
  p.heads = a.heads;
  p.rounds = a.heads / kRoundHeads;
  for (int round = 0; round < p.rounds; ++round) {
    p.span[round] = {(block * all + round * kRoundShift) / kStateBlocks, ((block + 1) * all + round * kRoundShift) / kStateBlocks};
    p.pieces += p.span[round].y - p.span[round].x;
  }
  p.first = p.span[0].x;
  p.reach = p.span[p.rounds - 1].y - p.first;
  p.unit = p.first / kPieces;
  p.units = p.reach > 0 ? (p.first + p.reach - 1) / kPieces - p.unit + 1 : 0;
  p.row = p.unit / kRoundHeads;
  p.split = (p.row + 1) * kRoundHeads - p.unit;
  p.rows = p.units > p.split ? 2 : p.units > 0 ? 1 : 0;
  return p;
}

/// All that a half's heads take but their states and what blocks that map send.
struct RecentBringer {
  const RowsMamba2& a;
  StateShared& s;
  int lane;

  __device__ void bring(int layer, int half) const {
    const RowsMamba2Layer& l = s.layer[layer % 2];
    const StatePlace& at = s.place[half];
    Recent& to = s.recent[half];
    const uint32_t full = shared_address(&to.full);
    const int counts[kMaxRowsHere] = {s.counts[layer][half][0], s.counts[layer][half][1]};
    const auto count = [&](int place) { return place == 0 ? counts[0] : counts[1]; };
    const bool has = lane < kUnits && at.has(lane);
    const int n = has ? count(at.place(lane)) : 0, row = lane / kMaxRecent, j = lane % kMaxRecent;
    const uint32_t x_bytes = n * kHeadChannels * 2, step_bytes = (n + 1) / 2 * 16, B_bytes = row < at.rows && j < count(row) ? kHeadStates * 2 : 0;
    const uint32_t bytes = __reduce_add_sync(0xffffffffu, x_bytes + step_bytes + B_bytes);
    if (lane == 0) {
      to.count[0] = counts[0], to.count[1] = counts[1];
      barrier_expect(full, bytes);
    }
    __syncwarp();
    const int64_t unit = at.among_all(lane);
    if (n > 0) {
      bring_bytes(shared_address(to.x[lane]), l.recent_x + unit * kMaxRecent * kHeadChannels, x_bytes, full);
      bring_bytes(shared_address(to.steps[lane]), l.recent_steps + unit * kMaxRecent * 2, step_bytes, full);
    }
    if (B_bytes > 0)
      bring_bytes(shared_address(to.B[row][j]), l.recent_B + (int64_t{half * kHalfRows + at.row + row} * kMaxRecent + j) * kHeadStates, B_bytes, full);
    if (has) {
      copy_words<4>(&to.rate_log[lane], l.A_log + at.head(lane));
      copy_words<4>(&to.bias[lane], l.dt_bias + at.head(lane));
    }
    arrive_with_copies(to.full);
    __syncwarp();
  }
  __device__ void run() const {
    static_assert(kUnits <= 32 && kMaxRowsHere * kMaxRecent <= 32);
#pragma unroll 1
    for (int i = 0; i < kHalves * a.layers; ++i) {
      const int layer = i / kHalves, half = i % kHalves;
      if (layer > 0) barrier_wait(shared_address(&s.recent[half].free), (layer - 1) % 2);
      if (half == 0) copy_layer(s.layer[layer % 2], a.layer[layer], lane);
      bring(layer, half);
    }
  }
};

template <class T>
struct StateBringer {
  const RowsMamba2& a;
  StateShared& s;
  int lane;
  static constexpr int kStages = Ring<T>::kStages, kBytes = Ring<T>::kBytes, kFlight = Ring<T>::kFlight, kPieceStates = kPiece * kHeadStates;

  __device__ void run() const {
    const void* const own = lane < a.layers ? a.layer[lane].h : nullptr;  // of the lane's layer: arguments come late when they are first read
    int stage = 0, phase = 0, asked = 0;
#pragma unroll 1
    for (int i = 0; i < kHalves * a.layers; ++i) {
      const T* const h = reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(own), i / kHalves));
      if (lane != 0) continue;
      const StatePlace& at = s.place[i % kHalves];
#pragma unroll 1
      for (int round = 0; round < at.rounds; ++round) {
        const int2 span = at.span[round];
        const int64_t first = (int64_t{at.half} * kHalfRows + span.x / kRoundPieces) * at.heads * kPieces + round * kRoundPieces + span.x % kRoundPieces;
        const T* from = h + first * kPieceStates;
        const int64_t to_next_row = (at.heads * kPieces - kRoundPieces) * kPieceStates;
#pragma unroll 1
        for (int piece = span.x; piece < span.y; ++piece) {
          if (phase > 0) barrier_wait(shared_address(&s.empty[stage]), (phase - 1) % 2);
          if (const int back = stage - kFlight; phase > 0 || back >= 0)
            barrier_wait(shared_address(&s.full[(back + kStages) % kStages]), (back >= 0 ? phase : phase - 1) % 2);
          barrier_expect(shared_address(&s.full[stage]), kBytes);
          bring_bytes(shared_address(s.ring + stage * kBytes), from, kBytes, shared_address(&s.full[stage]));
          s.asked = ++asked;
          from += kPieceStates;
          if ((piece + 1) % kRoundPieces == 0) from += to_next_row;
          if (++stage == kStages) stage = 0, ++phase;
        }
      }
    }
  }
};

/// A lane's part of a row's C.
template <class T>
struct LaneC;
template <>
struct LaneC<bf16> {  // words of odd or even pairs of products' operands, as rows with odd or even g read them
  uint2 values[4];
  __device__ LaneC(const bf16* C, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 v = reinterpret_cast<const uint4*>(C)[4 * (j ^ (g / 2 % 2)) + t];
      values[j] = g % 2 == 0 ? uint2{v.x, v.z} : uint2{v.y, v.w};
    }
  }
};
template <>
struct LaneC<float> {
  float4 values;
  __device__ LaneC(const bf16* C, int lane) : values(quad(C, lane)) {}
};
/// Of kPiece channels' states h, a lane's: the product of channel t / 2 * 8 + g with C. bf16: the 16 bytes of a channel that a lane reads
/// are an operand as they are, whose upper rows have other states of the same channels than the lower ones: C of the former is in
/// even columns, of the latter in odd ones. Rows of odd g read the other one of two neighbours, so that banks differ; columns 2, 3, 6
/// and 7 are C in that order. So the lanes whose t is as odd as g have the sums.
__device__ __forceinline__ float product_with(const bf16* h, const LaneC<bf16>& C, int lane) {
  const int g = lane / 4, t = lane % 4;
  const uint4* const own = reinterpret_cast<const uint4*>(h) + g * (kHeadStates / 8) + t;
  float acc[2][4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 v = own[8 * i * (kHeadStates / 8) + 4 * (j ^ (g % 2))];
      mma(acc[i], {v.x, v.y, v.z, v.w}, C.values[j].x, C.values[j].y);
    }
  return t < 2 ? acc[0][0] + acc[0][3] : acc[1][0] + acc[1][3];
}
__device__ __forceinline__ float product_with(const float* h, const LaneC<float>& C, int lane) {
  float own = 0;
#pragma unroll
  for (int q = 0; q < kPiece / 8; ++q) {
    float parts[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) parts[i] = dot(quad(h + (8 * q + i) * kHeadStates, lane), C.values);
    const float sum = sum_lanes<4>(sum_of_own(parts, lane));
    if (lane % 4 / 2 == q) own = sum;
  }
  return own;
}
/// to = decay h + sum_j factor[j] x[j] (x) B[j] over all positions, for kPiece channels. bf16: factor x is split in two, so that
/// no more is rounded than h itself.
__device__ __forceinline__ void take_in(bf16* to, const bf16* from, const bf16 (*x)[kHeadChannels], const bf16 (*B)[kBPitch], const float* factor, float decay) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const uint4* const h = reinterpret_cast<const uint4*>(from);
  uint32_t high[4], low[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int position = 2 * t + r / 2 * 8, channel = 8 * (r % 2) + g;
    const float2 v = {factor[position] * static_cast<float>(x[position][channel]), factor[position + 1] * static_cast<float>(x[position + 1][channel])};
    high[r] = pack(v.x, v.y);
    const float2 kept = two(high[r]);
    low[r] = pack(v.x - kept.x, v.y - kept.y);
  }
#pragma unroll 1
  for (int j = 0; j < 4; ++j) {
    const int up_at = g * (kHeadStates / 8) + 4 * j + t, down_at = up_at + kHeadStates;
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

__device__ __forceinline__ void take_in(float* to, const float* from, const bf16 (*x)[kHeadChannels], const bf16 (*B)[kBPitch], const float* factor, float decay) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int first = 0; first < kPiece; first += 8) {
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

/// A warp: a row's B and C, and the products of C with B of positions that h lacks; of others, anything.
__device__ __forceinline__ void make_products(StateShared& s, Recent& recent, const Slot& from, const StatePlace& at, int place, int lane) {
  const int row = lane % 16, g = lane / 4, t = lane % 4, m = recent.count[place];
  {
    const bf16* const own = &from.mixed[at.row + place][2 * at.heads * kHeadChannels + 8 * lane];
    uint4 v;
    look(v, own);
    insist(v, own);
    *reinterpret_cast<uint4*>(lane < 16 ? &recent.B[place][m][8 * lane] : &s.C[place][8 * (lane - 16)]) = v;
    __syncwarp();
  }
  float acc[2][4] = {};
#pragma unroll
  for (int k = 0; k < kHeadStates; k += kStep) {
    uint32_t B[4];
    load_matrices(B, &recent.B[place][row][k + lane / 16 * 8]);
    const uint32_t* const C = reinterpret_cast<const uint32_t*>(&s.C[place][k + 2 * t]);
    mma(acc[k / kStep % 2], B, C[0], C[4]);
  }
  if (t > 1) return;
  s.products[place][g + 8 * t] = t == 0 ? acc[0][0] + acc[1][0] : acc[0][2] + acc[1][2];
}
/// A thread's position of a head that h lacks: what its x is multiplied with, and the decay of h; and 16 bytes of the head's x or z.
/// What can be had before this position's values comes first.
struct Step {
  bool exists;
  int u, j, m;
  float rate, bias, past;
  float2 kept;
  const bf16 *dt, *from;  // in the slot
  bf16* to;
  __device__ Step(const StatePlace& at, StateShared& s, const Slot& slot, int tid)
      : exists(tid < kUnits * kMaxRecent && at.has(tid / kMaxRecent)), u(tid / kMaxRecent), j(tid % kMaxRecent), m(0) {
    if (!exists) return;
    Recent& recent = s.recent[at.half];
    m = recent.count[at.place(u)];
    rate = expf(recent.rate_log[u]);
    bias = recent.bias[u];
    past = m > 0 ? recent.steps[u][m - 1].y : 0.0f;
    kept = recent.steps[u][j];
    const int e = at.heads * kHeadChannels, c = tid % 8 * 8;
    const bool is_x = j < 8;
    const bf16* const row = slot.mixed[at.row + at.place(u)];
    dt = cuda::kept(row + 2 * e + 2 * kHeadStates + at.head(u) / 2 * 2);
    from = cuda::kept(row + (is_x ? e : 0) + at.head(u) * kHeadChannels + c);
    to = cuda::kept(is_x ? &recent.x[u][m][c] : &s.z[u][c]);
  }
  /// Returns dt, log P of its position.
  __device__ float2 make(const RowsMamba2Layer& l, StateShared& s, const StatePlace& at) const {
    float factor = 0;
    float2 step{};
    if (exists) {
      uint32_t word;
      uint4 v;
      look(word, dt);
      look(v, from);
      insist(word, dt);
      const float2 both = two(word);
      const float dt_now = fminf(fmaxf(softplus_of((at.head(u) % 2 == 0 ? both.x : both.y) + bias), l.low), l.high);
      const float log_now = past - rate * dt_now;
      step = j < m ? kept : float2{dt_now, log_now};
      if (j <= m) factor = expf(log_now - step.y) * step.x;
      s.factor[u][j] = factor;
      if (j == m) s.decay[u] = expf(log_now);
      insist(v, from);
      *reinterpret_cast<uint4*>(to) = v;
    }
    cuda::meet(3, kCoefficientThreads);  // products are there
    if (!exists) return step;
    const float coefficient = j <= m ? factor * s.products[at.place(u)][j] : 0.0f;
    const bf16 high = static_cast<bf16>(coefficient);
    s.coefficient[u][0][j] = high;
    s.coefficient[u][1][j] = static_cast<bf16>(coefficient - static_cast<float>(high));
    return step;
  }
  __device__ void keep(const RowsMamba2Layer& l, const StatePlace& at, float2 step) const {
    if (!exists || j != m || !at.owns(u)) return;
    const int64_t unit = at.among_all(u);
    if (m + 1 < kMaxRecent) reinterpret_cast<float2*>(l.recent_steps)[unit * kMaxRecent + m] = step;
    l.count[unit] = m + 1 < kMaxRecent ? m + 1 : 0;
  }
};

/// A warp's pieces of a half, one a round at the same place among the round's; of a lane, channel t / 2 * 8 + g. What can be had
/// before this position's values comes first.
struct Pieces {
  bool exist, sends;
  int piece, unit, place, part, channel, n;  // unit: of the first round; n: positions that h lacks, but this one
  uint32_t present[2];                       // of the lane's pairs of positions
  float norm[kMaxRounds], D[kMaxRounds];
  uint32_t* y;  // where the lane's words go, if it sends them
  float* square;
  __device__ Pieces(const RowsMamba2& a, const RowsMamba2Layer& l, const StatePlace& at, const Recent& recent, Slot& to, int tid)
      : exist(tid / 32 < at.reach), sends(false), piece(at.first + tid / 32), unit(0), place(0), part(0), channel(0), n(0), present{}, norm{}, D{}, y(nullptr),
        square(nullptr) {
    if (!exist) return;
    const int lane = tid % 32, g = lane / 4, t = lane % 4;
    unit = piece / kPieces - at.unit, part = piece % kPieces, place = at.place(unit);
    channel = part * kPiece + t / 2 * 8 + g;
    n = recent.count[place];
#pragma unroll
    for (int i = 0; i < 2; ++i) present[i] = 2 * t + 8 * i < n ? 0xffffffffu : 2 * t + 8 * i == n ? 0xffffu : 0u;
    const int head = at.head(unit), row = at.row + place;
    y = kept(to.y.at(row, head * kHeadChannels + part * kPiece) + g / 2 * 4 + t / 2 * 2);
    square = kept(&to.y_squares[head][row][part]);
    sends = g % 2 == 0 && t % 2 == 0;
#pragma unroll
    for (int i = 0; i < kMaxRounds; ++i) {
      if (i >= at.rounds) break;
      norm[i] = __ldg(l.norm + (head + i * kRoundHeads) * kHeadChannels + channel);
      D[i] = __ldg(l.D + (head + i * kRoundHeads) * a.D_columns + (a.D_columns == 1 ? 0 : channel));
    }
  }
};

/// What positions that h lacks add to a lane's channel of unit u: the sum of factor (B C) x. The coefficients are split in two, even and
/// odd columns of a product, so that no more is rounded than x is.
__device__ __forceinline__ float recent_product(const StateShared& s, const Recent& recent, const Pieces& p, int u, int lane) {
  const int t = lane % 4, row = lane % 8 + lane / 16 * 8;
  uint32_t x[4];
  load_matrices_transposed(x, &recent.x[u][row][p.part * kPiece + lane / 8 % 2 * 8]);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] &= p.present[i / 2];  // behind the last position x is anything
  const uint32_t* const coefficients = reinterpret_cast<const uint32_t*>(&s.coefficient[u][lane / 4 % 2][2 * t]);
  float acc[4] = {};
  mma(acc, x, coefficients[0], coefficients[4]);
  return t < 2 ? acc[0] + acc[1] : acc[2] + acc[3];
}

/// y, of kPiece channels a warp and round.
template <class T>
__device__ __forceinline__ void make_y(const RowsMamba2& a, const RowsMamba2Layer& l, StateShared& s, const StatePlace& at, Pieces& p, int layer, int before) {
  if (!p.exist) return;
  constexpr int kStages = Ring<T>::kStages;
  const int lane = now(static_cast<int>(threadIdx.x)) % 32;
  const Recent& recent = s.recent[at.half];
  const LaneC<T> C(s.C[p.place], lane);
  bool had_last = true;  // a piece of the round before
  const auto to_next_round = [&](int2 span) {
    before += span.y - span.x;
    p.y += kRoundPieces * kStepWords;
    p.square += kRoundHeads * kHalfRows * kPieces;
#pragma unroll
    for (int i = 0; i + 1 < kMaxRounds; ++i) p.norm[i] = p.norm[i + 1], p.D[i] = p.D[i + 1];
  };
#pragma unroll 1
  for (int round = 0; round < at.rounds; ++round) {
    const int2 span = at.span[round];
    if (p.piece < span.x || p.piece >= span.y) {
      had_last = false;
      to_next_round(span);
      continue;
    }
    const int u = p.unit + round * kRoundUnits, index = before + p.piece - span.x, stage = index % kStages, phase = index / kStages % 2;
    const float added = recent_product(s, recent, p, u, lane) + p.D[0] * static_cast<float>(recent.x[u][p.n][p.channel]);
    const float z = static_cast<float>(s.z[u][p.channel]), gate = __fdividef(z, 1.0f + __expf(-z)), decay = s.decay[u];
    const T* const h = reinterpret_cast<const T*>(s.ring + stage * Ring<T>::kBytes);
    while (!had_last && s.asked <= index) {
    }
    barrier_wait(shared_address(&s.full[stage]), phase);
    const float past = product_with(h, C, lane);
    if (p.n + 1 == kMaxRecent)
      take_in(static_cast<T*>(l.h) + (at.among_all(u) * kHeadChannels + p.part * kPiece) * kHeadStates, h,
              reinterpret_cast<const bf16(*)[kHeadChannels]>(&recent.x[u][0][p.part * kPiece]), recent.B[p.place], s.factor[u], decay);
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&s.empty[stage]));
    had_last = true;
    const float gated = static_cast<float>(static_cast<bf16>(decay * past + added)) * gate;
    const float own = gated * p.norm[0], next = __shfl_xor_sync(0xffffffffu, own, 5);  // of those that have sums (product_with)
    const uint32_t y = pack(own, next);
    if (l.out != nullptr && p.sends) send(p.y, y);
    float square = gated * gated;
#pragma unroll
    for (const int lanes : {2, 5, 8, 16}) square += __shfl_xor_sync(0xffffffffu, square, lanes);
    if (l.out != nullptr) {
      if (lane == 0) send(p.square, square);
      if (lane == 0 && p.piece + 1 == span.y) hint(counter(a, at.half, layer, kStateSent, round));
    } else {
      const int64_t of = at.among_all(u);
      if (p.sends) set_pair(a.between + of * kHeadChannels + p.channel, y);
      if (lane == 0) a.between_squares[of * kPieces + p.part] = square;
    }
    to_next_round(span);
  }
}

/// What is kept until h takes it in.
__device__ __forceinline__ void keep_recent(const RowsMamba2Layer& l, const Recent& recent, const StatePlace& at) {
  const int tid = now(static_cast<int>(threadIdx.x)), unit = tid / 8, c = tid % 8 * 8;
  if (unit < kUnits && at.has(unit) && at.owns(unit))
    if (const int m = recent.count[at.place(unit)]; m + 1 < kMaxRecent)
      *reinterpret_cast<uint4*>(l.recent_x + (at.among_all(unit) * kMaxRecent + m) * kHeadChannels + c) = *reinterpret_cast<const uint4*>(&recent.x[unit][m][c]);
  const int place = tid / 16, state = tid % 16 * 8, first = place == 0 ? at.split - kRoundHeads : at.split;  // the row's first unit among the block's
  if (place < at.rows && first >= 0 && at.owns(first))
    if (const int m = recent.count[place]; m + 1 < kMaxRecent)
      *reinterpret_cast<uint4*>(l.recent_B + (int64_t{at.half * kHalfRows + at.row + place} * kMaxRecent + m) * kHeadStates + state) =
          *reinterpret_cast<const uint4*>(&recent.B[place][m][state]);
}

template <class T>
__device__ __forceinline__ void state_phase(const RowsMamba2& a, const RowsMamba2Layer& l, StateShared& s, int half, int layer) {
  const auto meet = [] { cuda::meet(1, kStateThreads); };
  const StatePlace& at = s.place[half];
  const int tid = now(static_cast<int>(threadIdx.x)), warp = tid / 32;
  barrier_wait(shared_address(&s.recent[half].full), layer % 2);
  barrier_wait(shared_address(&s.clean[half]), layer > 0 ? (layer - 1) % 2 : 0);
  const Slot& from = slot(a, half, layer);
  const Step step(at, s, from, tid);
  Pieces pieces(a, l, at, s.recent[half], slot(a, half, layer), tid);
  if (threadIdx.x == 0) await_hints(counter(a, half, layer, kInSent), enough_hints(kInSent, map_blocks(a)));
  meet();
  float2 now{};
  if (warp < kStepWarps) {
    now = step.make(l, s, at);
  } else if (const int place = warp - kStepWarps; place < kMaxRowsHere) {
    if (place < at.rows) make_products(s, s.recent[half], from, at, place, tid % 32);
    cuda::meet(3, kCoefficientThreads);
  }
  meet();
  if (threadIdx.x == 0) barrier_arrive(shared_address(&s.received[half]));
  make_y<T>(a, l, s, at, pieces, layer, layer * (s.place[0].pieces + s.place[1].pieces) + half * s.place[0].pieces);
  if (warp < kStepWarps) step.keep(l, at, now);
  keep_recent(l, s.recent[half], at);
  publish_shared();
  meet();
  if (threadIdx.x == 0) barrier_arrive(shared_address(&s.recent[half].free));
}

/// The warp that takes words back (Slot), behind `threads` that compute. places[half]: of a block that keeps states; null: it maps.
template <int kThreads, class Place>
__device__ __forceinline__ void clear_slots(const RowsMamba2& a, Common& s, const Place& place, int lane) {
  cuda::meet(2, kThreads + 32);  // those that compute have cleared all
  take_words_back<kHalves>(
      a.layers, map_blocks(a) + kStateBlocks, s.received, s.clean, lane, [&](int layer, int half) { return counter(a, half, layer, kCleared); },
      [&](int layer, int half) {
        place(half).template forget_front<32>(slot(a, half, layer + kSlots - 1), lane);
        place(half).template forget_before<32>(slot(a, half, layer + kSlots - 2), lane);
      });
}
template <int kThreads, class Place>
__device__ __forceinline__ void clear_all(const RowsMamba2& a, const Place& place) {
#pragma unroll 1
  for (int i = 0; i < kHalves * kSlots; ++i) {
    Slot& of = slot(a, i / kSlots, i % kSlots);
    place(i / kSlots).template forget_front<kThreads>(of, static_cast<int>(threadIdx.x));
    place(i / kSlots).template forget_before<kThreads>(of, static_cast<int>(threadIdx.x));
  }
  meet_arrive(2, kThreads + 32);
}

__device__ __forceinline__ void init(uint64_t& barrier, int arrivals) { barrier_init(shared_address(&barrier), arrivals); }
__device__ __forceinline__ void init(Common& s) {
  for (int half = 0; half < kHalves; ++half) {
    init(s.received[half], 1);
    init(s.clean[half], 1);
  }
}

__device__ __forceinline__ void run_maps(const Work& work, MapShared& s, int warp, int lane) {
  const RowsMamba2& a = work.run;
  if (threadIdx.x == 0) {
    init(static_cast<Common&>(s));
    for (int half = 0; half < kHalves; ++half) {
      init(s.seen[half], 1);
      init(s.scaled[half], 1);
    }
    for (uint64_t* full : {&s.in_full, &s.past_full, &s.out_full}) init(*full, 1);
    init(s.in_free, kHalves);
    init(s.past_free, kMapWarps);
    init(s.out_free, kHalves);
    barriers_visible();
  }
  __syncthreads();
  const MapPlace at(a);
  if (warp == kMapWarps) return MapBringer{work, s, at, lane}.run();
  if (warp == kMapWarps + 1) return clear_slots<kMapThreads>(a, s, [&](int) { return at; }, lane);
  if (warp > kMapWarps + 1) return scale_rows(a, s, at, warp - kMapWarps - 2, lane);
  clear_others(a);
  clear_all<kMapThreads>(a, [&](int) { return at; });
  const int half = __shfl_sync(0xffffffffu, warp / kHalfWarps, 0);
  const HalfMap map{a, s, half};
#pragma unroll 1
  for (int layer = 0; layer < a.layers; ++layer) {
    map.in_phase(s.layer[layer % 2], layer);
    if (s.layer[layer % 2].out != nullptr) map.out_phase(s.layer[layer % 2], layer);
  }
}

template <class T>
__device__ __forceinline__ void run_states(const RowsMamba2& a, StateShared& s, int warp, int lane) {
  if (threadIdx.x == 0) {
    init(static_cast<Common&>(s));
    for (Recent& recent : s.recent) {
      init(recent.full, 1 + 32);
      init(recent.free, 1);
    }
    for (int i = 0; i < Ring<T>::kStages; ++i) {
      init(s.full[i], 1);
      init(s.empty[i], 1);
    }
    s.asked = 0;
    barriers_visible();
  }
  if (warp < kHalves) {
    const StatePlace at = state_place(a, warp);
    if (lane == 0) s.place[warp] = at;
    // All of a row's heads are behind by as many positions. Read here, before the block announces anything: others change them.
    for (int place = 0; place < at.rows && lane < a.layers; ++place)
      s.counts[lane][warp][place] = static_cast<uint8_t>(a.layer[lane].count[int64_t{warp * kHalfRows + at.row + place} * at.heads]);
  }
  __syncthreads();
  const auto place = [&](int half) -> const StatePlace& { return s.place[half]; };
  if (warp == kStateWarps) return StateBringer<T>{a, s, lane}.run();
  if (warp == kStateWarps + 1) return RecentBringer{a, s, lane}.run();
  if (warp == kStateWarps + 2) return clear_slots<kStateThreads>(a, s, place, lane);
  clear_all<kStateThreads>(a, place);
#pragma unroll 1
  for (int i = 0; i < kHalves * a.layers; ++i) state_phase<T>(a, s.layer[i / kHalves % 2], s, i % kHalves, i / kHalves);
}

#endif

/// The layers of a run.
template <class T>
__global__ void __launch_bounds__(kAllThreads, 1) rows_mamba2_kernel(const __grid_constant__ Work work) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char mamba2_shared[];
  const RowsMamba2& a = work.run;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const bool maps = block_maps();
  if (maps && block_number() >= map_blocks(a)) return;
  if (maps)
    run_maps(work, *reinterpret_cast<MapShared*>(mamba2_shared), warp, lane);
  else
    run_states<T>(a, *reinterpret_cast<StateShared*>(mamba2_shared), warp, lane);
#endif
}

CUtensorMap weights_map(const bf16* data, int64_t k, int64_t columns, int box_columns) {
  const int64_t sizes[] = {k, columns}, strides[] = {k};
  const int box[] = {kLine, box_columns};
  return tensor_map(data, DType::bf16, sizes, strides, box);
}

}  // namespace

bool rows_mamba2_fits(const RowsLinear& in, const RowsState& state, Device device) {
  return in.rows > kHalfRows && in.rows <= kRows && in.k <= kMaxD && in.k % 32 == 0 && in.bias == nullptr && in.epilogue == Epilogue::none && in.y_row == in.n &&
         in.n <= kMaxN && state.size == kMaxRecent && state.p == kHeadChannels && state.heads % 8 == 0 && state.heads <= kMaxHeads &&
         in.n == 2 * state.heads * kHeadChannels + 2 * kHeadStates + state.heads && aligned16(in.conv_bias, state.norm) &&
         hopper_multiprocessors(device, reinterpret_cast<const void*>(rows_mamba2_kernel<bf16>)) >= kBlocks;
}

int64_t mamba2_exchange() { return kHalves * kSlots * sizeof(Slot); }

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
              {.grid = kBlocks, .block = kAllThreads, .shared = kSharedBytes, .stream = stream}, work);
}

}  // namespace krait::kernels::cuda
