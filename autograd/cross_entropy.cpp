#include "autograd/cross_entropy.h"

namespace krait::autograd {

Variable cross_entropy(const Variable& logits, const Tensor& targets, const CrossEntropyOptions& options,
                       const Tensor& count) {
  const Tensor rows = logits.data().flatten_leading(), flat = targets.reshape({targets.numel()});
  KRAIT_CHECK(targets.shape() == logits.shape().drop_last(), "cross_entropy: logits {} with targets {}", logits.shape(),
              targets.shape());
  const kernels::CrossEntropyOut out = kernels::cross_entropy_forward(rows, flat, options, count);
  return record("cross_entropy", {logits}, out.loss,
                [shape = logits.shape(), rows, flat, lse = out.lse, kept = out.count,
                 options](const Tensor& dloss) -> Grads {
                  Tensor dlogits = empty_like(rows);
                  kernels::cross_entropy_backward(dlogits, dloss, rows, flat, lse, kept, options);
                  return {dlogits.view(shape)};
                });
}

LossOut linear_cross_entropy(const Variable& x, const Variable& w, const Tensor& targets,
                             const CrossEntropyOptions& options, double loss_scale, int64_t chunk_rows,
                             const Tensor& count, const kernels::VocabularyShard& shard) {
  KRAIT_CHECK(targets.shape() == x.shape().drop_last(), "linear_cross_entropy: x {} with targets {}", x.shape(),
              targets.shape());
  const bool tape = recording(), in_place = tape && w.accumulates_in_place();
  Tensor dw;
  if (tape && w.requires_grad())
    dw = in_place ? w.grad() : zeros(w.shape(), accum_dtype(w.dtype()), w.device());
  const auto out = kernels::linear_cross_entropy(x.data().flatten_leading(), w.data(),
                                                 targets.reshape({targets.numel()}),
                                                 {.options = options,
                                                  .loss_scale = loss_scale,
                                                  .chunk_rows = chunk_rows,
                                                  .count = count,
                                                  .want_dx = tape && x.requires_grad(),
                                                  .dw_sum = dw,
                                                  .shard = shard});
  const Variable loss = record("linear_cross_entropy", {x, w}, out.loss,
                               [shape = x.shape(), dtype = w.dtype(), dx_flat = out.dx,
                                dw = in_place ? Tensor{} : dw, in_place](const Tensor& dloss) -> Grads {
                                 Grads grads(2);
                                 if (dx_flat.defined()) {
                                   grads[0] = dx_flat.view(shape);
                                   kernels::scale_by(grads[0], dloss, in_place);
                                 }
                                 if (dw.defined()) {
                                   Tensor scaled = dw;
                                   kernels::scale_by(scaled, dloss, false);
                                   grads[1] = scaled.to(dtype);
                                 }
                                 return grads;
                               });
  return {loss, out.nll_sum, out.count};
}

}  // namespace krait::autograd
