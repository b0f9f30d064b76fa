#include "kernels/grouped_matmul.h"

namespace krait::kernels {

namespace {

void check_groups(const RowGroups& g, const Tensor& w) {
  KRAIT_CHECK(g.offsets.ndim() == 1 && g.offsets.size(0) >= 2 && g.offsets.dtype() == DType::i32 &&
                  g.offsets.device() == w.device(),
              "grouped_matmul: offsets are {}, expected int32 (groups + 1)", describe(g.offsets));
  KRAIT_CHECK(w.ndim() == 3 && w.size(0) > 0 && w.size(0) % g.groups() == 0 && w.size(1) > 0 && w.size(2) > 0,
              "grouped_matmul: w is {}, expected (parts x {} groups, n, k)", w.shape(), g.groups());
}

void check_operand(const char* name, const Tensor& t, Gather gather, int64_t width, const RowGroups& g) {
  KRAIT_CHECK(t.ndim() == 2 && t.size(1) == width && (gather == Gather::yes || t.size(0) == g.rows),
              "grouped_matmul: {} is {}, expected ({}, {})", name, t.shape(), g.rows, width);
  if (gather == Gather::yes)
    KRAIT_CHECK(g.order.defined() && g.order.shape() == Shape{g.rows} && g.order.dtype() == DType::i32 && g.share > 0 &&
                    t.size(0) * g.share >= g.rows,
                "grouped_matmul: {} {} cannot be gathered by an order {} of which {} share a row", name, t.shape(),
                describe(g.order), g.share);
}

}  // namespace

Tensor grouped_matmul(const Tensor& a, Gather gather, const Tensor& w, const RowGroups& groups) {
  check_groups(groups, w);
  check_same("grouped_matmul", a, w);
  check_operand("a", a, gather, w.size(2), groups);
  Tensor c = empty({groups.rows, w.size(0) / groups.groups() * w.size(1)}, a.dtype(), a.device());
  if (groups.rows > 0)
    KRAIT_DISPATCH(a.device(), grouped_matmul(c, a.contiguous(), gather, w.contiguous(), groups));
  return c;
}

Tensor grouped_matmul_input(const Tensor& dc, Gather gather, const Tensor& w, const RowGroups& groups) {
  check_groups(groups, w);
  check_same("grouped_matmul", dc, w);
  check_operand("dc", dc, gather, w.size(0) / groups.groups() * w.size(1), groups);
  Tensor da = empty({groups.rows, w.size(2)}, dc.dtype(), dc.device());
  if (groups.rows > 0)
    KRAIT_DISPATCH(dc.device(), grouped_matmul_input(da, dc.contiguous(), gather, w.contiguous(), groups));
  return da;
}

void grouped_matmul_weight(Tensor& dw, bool add, const Tensor& dc, Gather gather_dc, const Tensor& a, Gather gather_a,
                           const RowGroups& groups) {
  check_groups(groups, dw);
  check_same("grouped_matmul", dc, a);
  check_operand("dc", dc, gather_dc, dw.size(0) / groups.groups() * dw.size(1), groups);
  check_operand("a", a, gather_a, dw.size(2), groups);
  KRAIT_CHECK(dw.dtype() == accum_dtype(a.dtype()) && dw.is_contiguous() && dw.device() == a.device(),
              "grouped_matmul: dw is {}, expected contiguous and in the dtype of sums of {}", describe(dw), describe(a));
  if (groups.rows > 0) {
    KRAIT_DISPATCH(a.device(), grouped_matmul_weight(dw, add, dc.contiguous(), gather_dc, a.contiguous(), gather_a, groups));
  } else if (!add) {
    zero_(dw);
  }
}

}  // namespace krait::kernels
