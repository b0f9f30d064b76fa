#include "autograd/block_linear.h"

#include "autograd/linear.h"
#include "autograd/shape.h"
#include "kernels/block_linear.h"

namespace krait::autograd {

Variable block_linear(const Variable& x, const Variable& w) {
  KRAIT_CHECK(w.ndim() == 3 && x.ndim() >= 1 && x.size(-1) == w.size(0) * w.size(2),
              "block_linear: x is {}, weight {} (blocks, out, in)", x.shape(), w.shape());
  if (std::max(w.size(1), w.size(2)) > kernels::kMaxBlockSide) {
    const int64_t blocks = w.size(0), rows = x.size(-1) > 0 ? x.data().numel() / x.size(-1) : 0;
    const Variable by_block = transpose(reshape(x, {rows, blocks, w.size(2)}), 0, 1);
    const Variable y = matmul(by_block, w, false, true);  // (blocks, rows, out)
    return reshape(transpose(y, 0, 1), x.shape().with(-1, blocks * w.size(1)));
  }
  return record("block_linear", {x, w}, kernels::block_linear_forward(x.data(), w.data()),
                [x, w, xt = x.data(), wt = w.data()](const Tensor& dy) -> Grads {
                  const Tensor sum = w.grad_in_place();
                  auto [dx, dw] = kernels::block_linear_backward(dy, xt, wt, x.requires_grad(), w.requires_grad(), sum);
                  return {dx, sum.defined() ? Tensor{} : dw};
                });
}

}  // namespace krait::autograd
