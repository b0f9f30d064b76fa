#pragma once
// What the mLSTM kernels on wgmma share.
#include "kernels/cuda/mlstm_common.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/tma.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace krait::kernels::cuda {

/// Boxes of 64 positions and 64 of a head's `width` channels: coordinates channel, head, position, batch entry.
inline CUtensorMap mlstm_rows_map(const Strided<const bf16>& rows, const MlstmShape& s, int width) {
  const int64_t batch = s.units / s.heads;
  const auto stride = [](int64_t size, int64_t value) { return size > 1 ? value : 64; };  // any, where there is one
  const int64_t sizes[] = {width, s.heads, s.l, batch};
  const int64_t strides[] = {stride(s.heads, rows.head), stride(s.l, rows.row), stride(batch, rows.batch)};
  const int box[] = {64, 1, 64, 1};
  return tensor_map(rows.data, DType::bf16, sizes, strides, box);
}

}  // namespace krait::kernels::cuda
