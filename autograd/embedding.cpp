#include "autograd/embedding.h"

namespace krait::autograd {

Variable embedding(const Variable& table, const Tensor& tokens, kernels::TableRows rows) {
  return record("embedding", {table}, kernels::embedding_forward(table.data(), tokens, rows),
                [table, tokens, rows](const Tensor& dy) -> Grads {
                  const bool direct = table.accumulates_in_place() && table.grad().is_contiguous() &&
                                      (table.grad().dtype() == dy.dtype() ||
                                       (table.grad().dtype() == DType::f32 && dy.dtype() == DType::bf16));
                  if (direct) {
                    Tensor buffer = table.grad();
                    kernels::embedding_backward(buffer, dy, tokens, rows);
                    return {Tensor()};
                  }
                  Tensor dtable = zeros(table.shape(), dy.dtype(), dy.device());
                  kernels::embedding_backward(dtable, dy, tokens, rows);
                  return {dtable};
                });
}

}  // namespace krait::autograd
