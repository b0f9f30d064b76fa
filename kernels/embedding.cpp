#include "kernels/embedding.h"

namespace krait::kernels {

namespace {

Tensor checked_tokens(const Tensor& table, const Tensor& tokens) {
  KRAIT_CHECK(table.ndim() == 2, "embedding: table is {}, expected (v, d)", table.shape());
  KRAIT_CHECK(tokens.dtype() == DType::i32 || tokens.dtype() == DType::i64,
              "embedding: tokens are {}, expected int32 or int64", tokens.dtype());
  KRAIT_CHECK(tokens.device() == table.device(), "embedding: tokens are on {}, the table on {}", tokens.device(),
              table.device());
  KRAIT_CHECK(table.size(0) < (int64_t{1} << 31) - 1, "embedding: {} rows are more than 2^31 - 2", table.size(0));
  return tokens.contiguous().view({tokens.numel()});
}

TableRows checked_rows(const Tensor& table, TableRows rows) {
  if (rows.whole == 0) return {0, table.size(0)};
  KRAIT_CHECK(rows.first >= 0 && rows.first + table.size(0) <= rows.whole,
              "embedding: rows from {} of a table {} do not lie in {} rows", rows.first, table.shape(), rows.whole);
  return rows;
}

}  // namespace

Tensor embedding_forward(const Tensor& table, const Tensor& tokens_in, TableRows rows) {
  const Tensor tokens = checked_tokens(table, tokens_in);
  Tensor y = empty({tokens.numel(), table.size(1)}, table.dtype(), table.device());
  KRAIT_DISPATCH(table.device(), embedding_forward(y, table.contiguous(), tokens, checked_rows(table, rows)));
  return y.view(tokens_in.shape().append(table.size(1)));
}

void embedding_backward(Tensor& dtable, const Tensor& dy, const Tensor& tokens_in, TableRows rows) {
  const Tensor tokens = checked_tokens(dtable, tokens_in);
  KRAIT_CHECK(dy.shape() == tokens_in.shape().append(dtable.size(1)) && dy.device() == dtable.device(),
              "embedding: dy is {} for tokens {} and a table {}", describe(dy), tokens_in.shape(), describe(dtable));
  KRAIT_CHECK(dtable.dtype() == dy.dtype() || (dtable.dtype() == DType::f32 && dy.dtype() == DType::bf16),
              "embedding: dtable is {}, dy is {}; expected the same, or float32 under bfloat16", dtable.dtype(),
              dy.dtype());
  KRAIT_CHECK(dtable.is_contiguous(), "embedding: dtable is not contiguous");
  if (dy.numel() == 0) return;
  KRAIT_DISPATCH(dtable.device(),
                 embedding_backward(dtable, dy.contiguous().view({tokens.numel(), dtable.size(1)}), tokens,
                                    checked_rows(dtable, rows)));
}

}  // namespace krait::kernels
