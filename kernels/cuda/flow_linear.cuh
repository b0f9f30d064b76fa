#pragma once
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/flow_inputs.cuh"

// Linear maps of up to 8 rows on tensor cores: y^T (columns, rows) = w x^T, kTile columns at a time. Each warp multiplies
// its share of the inputs; the sums of the warps meet in shared memory. Which 8 of a chunk's 32 inputs a lane holds is the
// same for weights and rows, so that both are read in pieces of 16 bytes.
namespace krait::kernels::cuda::flow::step {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// A channel of a convolution of four taps: what does not depend on the new position.
struct Channel {
  uint2 weight;
  float bias, past[3];
  __device__ __forceinline__ void fetch(const MixedStep& m, int row, int c) {
    weight = *reinterpret_cast<const uint2*>(m.weight + 4 * c);
    const bf16* const before = m.conv + int64_t{row} * 3 * m.channels + c;
#pragma unroll
    for (int j = 0; j < 3; ++j) past[j] = fresh(before + j * m.channels);
    bias = m.bias != nullptr ? static_cast<float>(m.bias[c]) : 0.0f;
  }
  __device__ __forceinline__ float mix(float now) const {
    float p = bias + __uint_as_float(weight.x << 16) * past[0];
    p += __uint_as_float(weight.x & 0xffff0000u) * past[1];
    p += __uint_as_float(weight.y << 16) * past[2];
    return silu(p + __uint_as_float(weight.y & 0xffff0000u) * now);
  }
};

/// What follows one value of a linear map; begun before the value is there.
struct Finish {
  int row = 0, column = -1;  // < 0: nothing to finish
  float bias = 0;
  bool mixes = false;
  Channel channel;
  __device__ __forceinline__ void begin(const LinearStep& l) {
    if (column < 0) return;
    if (l.bias != nullptr) bias = static_cast<float>(l.bias[column]);
    mixes = l.mixed.conv != nullptr && column >= l.mixed.first && column < l.mixed.first + l.mixed.channels;
    if (mixes) channel.fetch(l.mixed, row, column - l.mixed.first);
  }
  __device__ __forceinline__ void end(const LinearStep& l, float sum) const {
    if (column < 0) return;
    const float v = activate_as(l.epilogue, sum + bias);
    if (!mixes) return give(l.y, row, column, v);
    const float now = rounded(v);
    give({nullptr, l.y.slot, l.y.row}, row, column, channel.mix(now));
    give({l.y.to, -1, l.y.row}, row, column, now);
    bf16* const conv = l.mixed.conv + int64_t{row} * 3 * l.mixed.channels + column - l.mixed.first;
    conv[0] = static_cast<bf16>(channel.past[1]);
    conv[l.mixed.channels] = static_cast<bf16>(channel.past[2]);
    conv[2 * l.mixed.channels] = static_cast<bf16>(now);
  }
};

// The columns of a linear map that a block has, as their stages come. Workers read the tiles in order.
struct Columns {
  int count, k, pitch, per, tile, stages;
  float inverse;
  uint32_t turn;                  // of the first stage
  int waited = 0, released = 0;   // stages
  uint32_t low = 0, high = 0;     // shared memory: of the lane's columns g and g + 8 of the open tile; 0: none
  __device__ __forceinline__ Columns(int columns, int inputs, uint32_t begin)
      : count(columns), k(inputs), pitch(step_pitch(inputs)), per(columns_of_stage(inputs)), tile(min(kTile, per * kStages)),
        stages((columns + per - 1) / per), inverse(1.0f / static_cast<float>(per)), turn(begin) {}
  __device__ __forceinline__ uint32_t place(int c, bool there) const {
    if (!there) return 0;
    const int stage = static_cast<int>((static_cast<float>(c) + 0.5f) * inverse);
    return shared_address(here().stages[stage_of(turn + static_cast<uint32_t>(stage))]) + static_cast<uint32_t>((c - stage * per) * pitch) +
           static_cast<uint32_t>(lane_of() % 4 * 16);
  }
  __device__ __forceinline__ void open(int at) {
    const int end = min((at + 1) * tile, count), needed = (end + per - 1) / per;
    for (; waited < needed; ++waited) {
      const uint32_t now = turn + static_cast<uint32_t>(waited);
      wait_barrier(&here().full[stage_of(now)], parity_of(now));
    }
    const int g = lane_of() / 4, c = at * tile + g;
    low = place(c, c < end);
    high = place(c + 8, c + 8 < end);
  }
  /// Every lane has read what it needs of the open tile.
  __device__ __forceinline__ void close(int at) {
    const int done = (at + 1) * tile >= count ? stages : (at + 1) * tile / per;
    __syncwarp();
    for (; released < done; ++released)
      if (lane_of() == 0) arrive_barrier(&here().empty[stage_of(turn + static_cast<uint32_t>(released))]);
  }
  __device__ __forceinline__ void read(uint4 (&w)[2], int chunk) const {
    const bool inside = chunk * kStepChunk + lane_of() % 4 * 8 < k;
    const auto from = [&](uint32_t column) {
      uint4 v = {0, 0, 0, 0};
      if (column != 0 && inside)
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(column + static_cast<uint32_t>(chunk * kStepChunk * 2))
                     : "memory");
      return v;
    };
    w[0] = from(low);
    w[1] = from(high);
  }
};

__device__ __forceinline__ void multiply(float (&sum)[2][4], const uint4 (&w)[2], const uint4& x) {
  mma(sum[0], {w[0].x, w[1].x, w[0].y, w[1].y}, x.x, x.y);
  mma(sum[1], {w[0].z, w[1].z, w[0].w, w[1].w}, x.z, x.w);
}

/// Where a worker is: stages that it has used, and the half of the sums that is free (the other half may still be read).
struct Progress {
  uint32_t stages = 0, half = 0;
};

inline constexpr int kHeld = 4;  // chunks of the first tile's weights that are in registers before the inputs are there

__device__ __forceinline__ Progress linear(int operation_at, Progress so_far) {
  Shared& shared = here();
  const StepOp& op = operation(operation_at);
  const LinearStep& l = op.linear;
  const int lane = lane_of(), g = lane / 4, t = lane % 4, k = l.k, rows = op.rows;
  const Range own = share(l.n);
  if (own.begin == own.end) return so_far;
  if (rows > 1) prepare_rows(operation_at);
  Columns columns(own.end - own.begin, k, so_far.stages);
  const int tiles = (columns.count + columns.tile - 1) / columns.tile, together = rows == 1 ? kSums / kTile : 1;
  const Slice slice = slice_of(warp_of(), k);
  const int first = slice.begin / kStepChunk, mine = (slice.count + kStepChunk - 1) / kStepChunk;

  // What a worker finishes: of each round of tiles one value.
  const int tile_in = rows == 1 ? worker() / kTile : 0, finished_row = rows == 1 ? 0 : worker() / kTile, in_tile = worker() % kTile;
  const int part_at = rows == 1 ? worker() : finished_row * kSumRow + in_tile;
  const auto begin_finish = [&](int begin) {
    Finish f;
    const int c = (begin + tile_in) * columns.tile + in_tile;
    if (tile_in < together && finished_row < rows && in_tile < columns.tile && c < columns.count) f.row = finished_row, f.column = own.begin + c;
    f.begin(l);
    return f;
  };
  Finish finish = begin_finish(0);

  uint4 ahead[kHeld][2];
  columns.open(0);
#pragma unroll
  for (int c = 0; c < kHeld; ++c)
    if (c < mine) columns.read(ahead[c], first + c);
  if (mine <= kHeld) columns.close(0);

  if (rows == 1) prepare<1>(operation_at);
  const auto row_piece = [&](int chunk) {
    const int at = chunk * kStepChunk + t * 8;
    uint4 v = {0, 0, 0, 0};
    if (g < rows && at < k) v = *reinterpret_cast<const uint4*>(reinterpret_cast<const bf16*>(shared.rows) + g * k + at);
    return v;
  };

  uint32_t half = so_far.half;
  for (int begin = 0; begin < tiles; begin += together, half ^= 1) {
    const int end = min(begin + together, tiles);
    for (int i = begin; i < end; ++i) {
      float sum[2][4] = {};
      if (i > 0) {
        columns.open(i);
#pragma unroll
        for (int c = 0; c < kHeld; ++c)
          if (c < mine) columns.read(ahead[c], first + c);
      }
#pragma unroll
      for (int c = 0; c < kHeld; ++c)
        if (c < mine) multiply(sum, ahead[c], row_piece(first + c));
#pragma unroll 2
      for (int c = kHeld; c < mine; ++c) {
        uint4 w[2];
        columns.read(w, first + c);
        multiply(sum, w, row_piece(first + c));
      }
      if (i > 0 || mine > kHeld) columns.close(i);
      float* const sums = shared.sums[half][warp_of()];
      if (rows == 1) {
        if (t == 0) {
          sums[(i - begin) * kTile + g] = sum[0][0] + sum[1][0];
          sums[(i - begin) * kTile + g + 8] = sum[0][2] + sum[1][2];
        }
      } else {
#pragma unroll
        for (int v = 0; v < 4; ++v)
          if (2 * t + v % 2 < rows) sums[(2 * t + v % 2) * kSumRow + g + v / 2 * 8] = sum[0][v] + sum[1][v];
      }
    }
    sync_workers();
    if (finish.column >= 0) {
      float s[2] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) s[w % 2] += shared.sums[half][w][part_at];
      finish.end(l, s[0] + s[1]);
    }
    if (end < tiles) finish = begin_finish(end);
  }
  return {so_far.stages + static_cast<uint32_t>(columns.stages), half};
}

/// What a map's convolution needs, asked for in advance.
__device__ __forceinline__ void touch_mixed(const LinearStep& l, int rows, Range own) {
  const MixedStep& m = l.mixed;
  const int begin = max(own.begin - m.first, 0), end = min(own.end - m.first, m.channels);
  if (begin >= end) return;
  touch(m.weight + 4 * begin, (end - begin) * int64_t{8});
  if (m.bias != nullptr) touch(m.bias + begin, (end - begin) * int64_t{2});
  for (int r = 0; r < 3 * rows; ++r) touch(m.conv + int64_t{r} * m.channels + begin, (end - begin) * int64_t{2});
}

/// An input that no linear map follows.
__device__ __noinline__ void input_alone(int at) {
  if (blockIdx.x != 0) return;
  prepare_rows(at);
  sync_workers();  // before the next statistics
}

/// A convolution that does not follow a linear map of the launch.
__device__ __noinline__ void convolve(int at) {
  const StepOp& op = operation(at);
  const LinearStep& l = op.linear;
  const Source x = source_of(l.x);
  const Range own = share(int64_t{op.rows} * l.n);
  for (int i = own.begin + worker(); i < own.end; i += kWorkers) {
    Finish f;
    f.row = i / l.n;
    f.column = i % l.n;
    f.begin(l);
    f.end(l, await(x, int64_t{f.row} * l.x.row + f.column));
  }
}

#endif

}  // namespace krait::kernels::cuda::flow::step
