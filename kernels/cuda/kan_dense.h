#pragma once
#include "kernels/kan.h"

namespace krait::kernels::cuda {

/// Whether a layer is large enough that its bases are written out, a chunk of rows at a time, and multiplied by the
/// library's products (TF32 where that is allowed) instead of by kan.cu's tiles. The shapes alone decide.
bool kan_dense_pays(int64_t rows, const KanParameters& p);

/// As kan_forward and kan_backward of kernels/kan.h.
void kan_forward_dense(Tensor& y, const Tensor& x, const KanParameters& p);
void kan_backward_dense(KanGrad& grad, const Tensor& dy, const Tensor& x, const KanParameters& p);

}  // namespace krait::kernels::cuda
