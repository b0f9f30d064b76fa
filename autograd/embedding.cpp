#include "autograd/embedding.h"

#include "kernels/embedding.h"

namespace krait::autograd {

Variable embedding(const Variable& table, const Tensor& tokens) {
  return record("embedding", {table}, kernels::embedding_forward(table.data(), tokens),
                [table, tokens](const Tensor& dy) -> Grads {
                  const bool direct = table.accumulates_in_place() && table.grad().is_contiguous() &&
                                      (table.grad().dtype() == dy.dtype() ||
                                       (table.grad().dtype() == DType::f32 && dy.dtype() == DType::bf16));
                  if (direct) {
                    Tensor buffer = table.grad();
                    kernels::embedding_backward(buffer, dy, tokens);
                    return {Tensor()};
                  }
                  Tensor dtable = zeros(table.shape(), dy.dtype(), dy.device());
                  kernels::embedding_backward(dtable, dy, tokens);
                  return {dtable};
                });
}

}  // namespace krait::autograd
