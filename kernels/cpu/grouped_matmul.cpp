// One matrix product for each part and group, on rows gathered before.
#include <cstring>

#include "core/parallel.h"
#include "kernels/grouped_matmul.h"
#include "kernels/matmul.h"

namespace krait::kernels::cpu {

namespace {

// t, with the rows that the order names where it is gathered.
Tensor rows_of(const Tensor& t, Gather gather, const RowGroups& g) {
  if (gather == Gather::no) return t;
  Tensor out = empty({g.rows, t.size(1)}, t.dtype(), t.device());
  const int64_t bytes = t.size(1) * size_of(t.dtype()), used = g.offsets.data<int32_t>()[g.groups()];
  const char* from = static_cast<const char*>(t.raw_data());
  char* to = static_cast<char*>(out.raw_data());
  const int32_t* order = g.order.data<int32_t>();
  parallel_for(0, used, std::max<int64_t>(1, 65536 / bytes), [=, share = g.share](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      std::memcpy(to + i * bytes, from + order[i] / share * bytes, static_cast<size_t>(bytes));
  });
  return out;
}

void* at(const Tensor& t, int64_t element) { return static_cast<char*>(t.raw_data()) + element * size_of(t.dtype()); }

// f(matrix index, part, first row, rows) for every part and group with rows; f(..., 0) for the others.
template <class F>
void for_each_matrix(int64_t matrices, const RowGroups& g, F f) {
  const int32_t* offsets = g.offsets.data<int32_t>();
  for (int64_t i = 0; i < matrices; ++i) {
    const int64_t e = i % g.groups();
    f(i, i / g.groups(), int64_t{offsets[e]}, int64_t{offsets[e + 1] - offsets[e]});
  }
}

Gemm product(const Tensor& c, const Tensor& a, int64_t m, int64_t n, int64_t k) {
  Gemm p{};
  p.device = c.device();
  p.dtype = a.dtype();
  p.c_dtype = c.dtype();
  p.m = m;
  p.n = n;
  p.k = k;
  p.batch = 1;
  p.alpha = 1.0;
  return p;
}

}  // namespace

void grouped_matmul(Tensor& c, const Tensor& a_in, Gather gather, const Tensor& w, const RowGroups& groups) {
  const Tensor a = rows_of(a_in, gather, groups);
  const int64_t n = w.size(1), k = w.size(2), width = c.size(1);
  for_each_matrix(w.size(0), groups, [&](int64_t i, int64_t part, int64_t first, int64_t rows) {
    if (rows == 0) return;
    Gemm p = product(c, a, rows, n, k);
    p.a = at(a, first * k);
    p.b = at(w, i * n * k);
    p.c = at(c, first * width + part * n);
    p.trans_b = true;
    p.lda = p.ldb = k;
    p.ldc = width;
    gemm(p);
  });
}

void grouped_matmul_input(Tensor& da, const Tensor& dc_in, Gather gather, const Tensor& w, const RowGroups& groups) {
  const Tensor dc = rows_of(dc_in, gather, groups);
  const int64_t n = w.size(1), k = w.size(2), width = dc.size(1), parts = w.size(0) / groups.groups();
  // Several parts are summed before they are rounded.
  Tensor sum = parts > 1 && da.dtype() == DType::bf16 ? empty(da.shape(), DType::f32, da.device()) : da;
  for_each_matrix(w.size(0), groups, [&](int64_t i, int64_t part, int64_t first, int64_t rows) {
    if (rows == 0) return;
    Gemm p = product(sum, dc, rows, k, n);
    p.a = at(dc, first * width + part * n);
    p.b = at(w, i * n * k);
    p.c = at(sum, first * k);
    p.lda = width;
    p.ldb = p.ldc = k;
    p.beta = part == 0 ? 0.0 : 1.0;
    gemm(p);
  });
  const int64_t used = groups.offsets.data<int32_t>()[groups.groups()];
  if (sum.dtype() != da.dtype() && used > 0) {
    Tensor to = da.slice(0, 0, used);
    copy_(to, sum.slice(0, 0, used));
  }
}

void grouped_matmul_weight(Tensor& dw, bool add, const Tensor& dc_in, Gather gather_dc, const Tensor& a_in,
                           Gather gather_a, const RowGroups& groups) {
  const Tensor dc = rows_of(dc_in, gather_dc, groups), a = rows_of(a_in, gather_a, groups);
  const int64_t n = dw.size(1), k = dw.size(2), width = dc.size(1);
  for_each_matrix(dw.size(0), groups, [&](int64_t i, int64_t part, int64_t first, int64_t rows) {
    if (rows == 0) {
      Tensor matrix = dw.select(0, i);
      if (!add) zero_(matrix);
      return;
    }
    Gemm p = product(dw, a, n, k, rows);
    p.a = at(dc, first * width + part * n);
    p.b = at(a, first * k);
    p.c = at(dw, i * n * k);
    p.trans_a = true;
    p.lda = width;
    p.ldb = p.ldc = k;
    p.beta = add ? 1.0 : 0.0;
    gemm(p);
  });
}

}  // namespace krait::kernels::cpu
