#pragma once
#include "kernels/cuda/selective_scan_walk.cuh"

// Slots of shared memory for the states of a warp at one position, (2, 32, 8) in bf16: states 0 to 7 of its 32 channels,
// then 8 to 15. A lane writes and reads its channel's; sums over the channels read the slot as matrices.
namespace krait::kernels::cuda {

inline constexpr int kSumRow = 36;  // a position's dB and dC, padded

// Sums over a warp's channels of one quantity (dB or dC), as products on the tensor cores: for each position the states
// (channels, 16) of a slot times a factor of each channel. The products hold the factors of eight positions as columns;
// of each product one column counts.
struct ChannelSums {
  float now[4] = {}, other[4] = {};  // states lane / 4 (+ 8) x positions 2 (lane % 4) (+ 1), of eight and the other eight
  uint32_t factors[4];

  // rows: this warp's factors (kWalkKept, 32); half: positions 0 to 7 or 8 to 15 of the chunk.
  __device__ __forceinline__ void load_factors(const char* rows, int half, uint32_t flip, int lane) {
    load_matrices(factors, rows + ((half * 512 + lane % 8 * 64) ^ flip) + lane / 8 * 16);
  }
  // kOdd: the position's last bit; mine: whether this lane has the position's column.
  template <bool kOdd>
  __device__ __forceinline__ void add(const char* slot, int lane, bool mine) {
    const char* row = slot + lane / 8 % 2 * 512 + (lane / 16 * 8 + lane % 8) * 16;
    uint32_t states[2][4];
    load_matrices_transposed(states[0], row);
    load_matrices_transposed(states[1], row + 256);
    float sums[4] = {};
    mma(sums, states[0], factors[0], factors[1]);
    mma(sums, states[1], factors[2], factors[3]);
    now[kOdd] = mine ? sums[kOdd] : now[kOdd];
    now[2 + kOdd] = mine ? sums[2 + kOdd] : now[2 + kOdd];
  }
  __device__ __forceinline__ void turn(bool wanted) {
#pragma unroll
    for (int i = 0; i < 4; ++i) other[i] = wanted ? now[i] : other[i];
  }
  // Columns of to (kWalkKept, kSumRow); half: which eight positions came last.
  __device__ __forceinline__ void store(float* to, int half, int lane) const {
    to += lane % 4 * 2 * kSumRow + lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = i % 2 * kSumRow + i / 2 * 8;
      to[at + half * 8 * kSumRow] = now[i];
      to[at + (1 - half) * 8 * kSumRow] = other[i];
    }
  }
};

// The states of one channel, packed.
struct StatePair {
  uint4 low, high;
  __device__ __forceinline__ static StatePair of(const float (&h)[kWalkStates]) {
    return {{pack(h[0], h[1]), pack(h[2], h[3]), pack(h[4], h[5]), pack(h[6], h[7])},
            {pack(h[8], h[9]), pack(h[10], h[11]), pack(h[12], h[13]), pack(h[14], h[15])}};
  }
  __device__ __forceinline__ void store(char* slot, int lane) const {
    uint4* to = reinterpret_cast<uint4*>(slot) + lane;
    to[0] = low;
    to[32] = high;
  }
  __device__ __forceinline__ static StatePair load(const char* slot, int lane) {
    const uint4* from = reinterpret_cast<const uint4*>(slot) + lane;
    return {from[0], from[32]};
  }
  __device__ __forceinline__ float operator[](int i) const {
    const uint4& v = i < 8 ? low : high;
    const int k = i % 8 / 2;
    const uint32_t word = k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w;
    return i % 2 == 0 ? low_half(word) : high_half(word);
  }
};

}  // namespace krait::kernels::cuda
