#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Rows in groups, each with matrices of its own (the experts of a mixture). Group e owns rows
/// offsets[e] .. offsets[e + 1] - 1 of `rows` in all; rows from offsets[groups] on belong to nobody, are never read and
/// stay undefined in outputs. Offsets are read where the work is done: on CUDA no size travels to the host.
struct RowGroups {
  Tensor offsets;      // (groups + 1) int32, rising from 0
  int64_t rows = 0;    // room for rows
  Tensor order;        // (rows) int32: a gathered operand's row for row i is order[i] / share
  int64_t share = 1;
  int64_t groups() const { return offsets.size(0) - 1; }
};
enum class Gather : bool { no, yes };

/// w (parts groups, n, k): matrix (p, e) is w[p groups + e]. fp32, bf16 or fp64, sums in fp32 (fp64); matrices
/// contiguous in their last two dimensions. Rows of a and dc: (rows, ...), or any number of rows when gathered.

/// c (rows, parts n): c[i, p n ..] = a_i w[p, e(i)]^T, with a (., k).
Tensor grouped_matmul(const Tensor& a, Gather gather, const Tensor& w, const RowGroups& groups);
/// da (rows, k) = sum_p dc_i[p] w[p, e(i)], with dc (., parts n).
Tensor grouped_matmul_input(const Tensor& dc, Gather gather, const Tensor& w, const RowGroups& groups);
/// dw (parts groups, n, k) in the dtype of sums: dw[p, e] = or += sum over the rows i of e of dc_i[p]^T a_i, in order.
/// A group without rows gets 0.
void grouped_matmul_weight(Tensor& dw, bool add, const Tensor& dc, Gather gather_dc, const Tensor& a, Gather gather_a,
                           const RowGroups& groups);

// Backends: rows contiguous; nothing is empty. `gather_*` says which operand goes through the order.
KRAIT_BACKENDS(
    void grouped_matmul(Tensor& c, const Tensor& a, Gather gather, const Tensor& w, const RowGroups& groups);
    void grouped_matmul_input(Tensor& da, const Tensor& dc, Gather gather, const Tensor& w, const RowGroups& groups);
    void grouped_matmul_weight(Tensor& dw, bool add, const Tensor& dc, Gather gather_dc, const Tensor& a,
                               Gather gather_a, const RowGroups& groups))

}  // namespace kernels
}  // namespace krait
