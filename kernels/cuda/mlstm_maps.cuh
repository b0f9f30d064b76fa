#pragma once
// The maps of an mLSTM block as its kernels for CUDA see them.
#include "core/cuda/launch.cuh"

namespace krait::kernels::cuda {

inline constexpr int kMapsGates = 8;

/// Blocks of 4 x 4 of the three maps (blocks, 4, 4) and the gates' matrix (8, 3, blocks, 4).
template <class T>
struct MapsWeights {
  const T *w[3], *g;
  int blocks;

  __device__ __forceinline__ const T* gates_of(int gate, int part, int n) const {
    return g + (int64_t{gate} * 3 + part) * blocks * 4 + int64_t{n} * 4;
  }
};

/// Rows of values side by side, `stride` elements apart.
template <class T>
struct MapsRows {
  T* data;
  int64_t stride;
};

/// On tensor cores, bf16 alone: e = 4 blocks a multiple of 32, pointers and rows in whole 16 bytes.
bool mlstm_maps_mma_serve(int64_t e);
/// Sums of the gates over groups of channels: partial (rows, mlstm_maps_groups(e), 8).
int64_t mlstm_maps_groups(int64_t e);
/// x_c = silu of a convolution of width 4 over x_m in sequences of `l` rows, made on the way: weight (e, 4), bias (e) or
/// null, both bf16 or (wide) fp32. x_c null: it is there.
struct MapsConvolution {
  bf16* x_c = nullptr;
  const void *weight = nullptr, *bias = nullptr;
  bool wide = false;
  int64_t l = 1;
};
struct MapsForwardJob {
  bf16 *q, *k, *v;
  float* partial;
  const bf16* x_c;  // where there is no convolution
  MapsRows<const bf16> x_m;
  MapsConvolution convolution;
};
void mlstm_maps_forward_mma(const MapsForwardJob& job, const MapsWeights<bf16>& maps, int64_t rows, Stream stream);

/// dx = more + sum W^T dy + E^T dgates of the maps `part` on of one input, one of them or (dy[1] given) two, with E = G W;
/// more may be dx itself, or null. And S = sum dy x^T of each map, D = sum dgates x^T: partial (chunks, 16 maps + 32, blocks).
struct MapsBackwardJob {
  MapsRows<bf16> dx;
  MapsRows<const bf16> more, x;
  const bf16* dy[2];
  const float* dgates;
  float* partial;
  int part;
};
int64_t mlstm_maps_chunks(int64_t rows, int64_t e);
void mlstm_maps_backward_mma(const MapsBackwardJob& job, const MapsWeights<bf16>& maps, int64_t rows, Stream stream);

}  // namespace krait::kernels::cuda
