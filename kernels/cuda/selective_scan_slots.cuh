#pragma once
#include "kernels/cuda/selective_scan_walk.cuh"

// Slots of shared memory for the states of a warp at one position, (2, 32, 8) in bf16: states 0 to 7 of its 32 channels,
// then 8 to 15. A lane writes and reads its channel's; sums over the channels read the slot as matrices.
namespace krait::kernels::cuda {

inline constexpr int kSumRow = 36;  // a position's dB and dC, padded

// Four matrices (8, 8) of 16-byte rows; lane i gives the address of row i % 8 of matrix i / 8. Lane 4 g + t receives of
// each the two values from column 2 t of row g; transposed: from row 2 t on of column g.
template <bool kTransposed>
__device__ __forceinline__ void load_slot_matrices(uint32_t (&to)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// c (16, 8) += a (16, 16) b (16, 8), bf16.
__device__ __forceinline__ void multiply_slot(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Sums over a warp's channels of one quantity (dB or dC), as products on the tensor cores: for each position the states
// (channels, 16) of a slot times a factor of each channel. The products hold the factors of eight positions as columns;
// of each product one column counts.
struct ChannelSums {
  float now[4] = {}, other[4] = {};  // states lane / 4 (+ 8) x positions 2 (lane % 4) (+ 1), of eight and the other eight
  uint32_t factors[4];

  // rows: this warp's factors (kWalkKept, 32); half: positions 0 to 7 or 8 to 15 of the chunk.
  __device__ __forceinline__ void load_factors(const char* rows, int half, uint32_t flip, int lane) {
    load_slot_matrices<false>(factors, rows + ((half * 512 + lane % 8 * 64) ^ flip) + lane / 8 * 16);
  }
  // kOdd: the position's last bit; mine: whether this lane has the position's column.
  template <bool kOdd>
  __device__ __forceinline__ void add(const char* slot, int lane, bool mine) {
    const char* row = slot + lane / 8 % 2 * 512 + (lane / 16 * 8 + lane % 8) * 16;
    uint32_t states[2][4];
    load_slot_matrices<true>(states[0], row);
    load_slot_matrices<true>(states[1], row + 256);
    float sums[4] = {};
    multiply_slot(sums, states[0], factors[0], factors[1]);
    multiply_slot(sums, states[1], factors[2], factors[3]);
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
  __device__ __forceinline__ static StatePair pack(const float (&h)[kWalkStates]) {
    return {{pack_pair(h[0], h[1]), pack_pair(h[2], h[3]), pack_pair(h[4], h[5]), pack_pair(h[6], h[7])},
            {pack_pair(h[8], h[9]), pack_pair(h[10], h[11]), pack_pair(h[12], h[13]), pack_pair(h[14], h[15])}};
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
