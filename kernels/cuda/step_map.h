#pragma once
#include "kernels/cuda/aligned.h"
#include "kernels/linear.h"
#include "kernels/matmul.h"

// What the linear maps of decoding steps (FewMap, FewLinear, RowsLinear) name alike.
namespace krait::kernels::cuda {

/// y = epilogue(a w^T + bias) of a product in bf16; all else is zero.
template <class Map>
Map step_map_of(const Gemm& g, Tensor& y, const Tensor& bias, Epilogue epilogue) {
  Map map{};
  map.x = static_cast<const bf16*>(g.a);
  map.w = static_cast<const bf16*>(g.b);
  map.bias = pointer_or_null<bf16>(bias);
  map.y = y.data<bf16>();
  map.x_row = g.lda;
  map.y_row = g.ldc;
  map.rows = static_cast<int>(g.m);
  map.n = static_cast<int>(g.n);
  map.k = static_cast<int>(g.k);
  map.epilogue = epilogue;
  return map;
}

/// The columns [begin, end) of y pass a convolution whose state is `conv` (b, taps - 1, channels).
template <class Map, class Weights>
void convolve(Map& map, Tensor& conv, const Weights& w, int64_t begin, int64_t end) {
  map.conv = conv.data<bf16>();
  map.conv_weight = w.conv_weight.template data<bf16>();
  map.conv_bias = pointer_or_null<bf16>(w.conv_bias);
  map.conv_begin = static_cast<int>(begin);
  map.conv_end = static_cast<int>(end);
}

}  // namespace krait::kernels::cuda
