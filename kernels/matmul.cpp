#include "kernels/matmul.h"

#include <algorithm>
#include <atomic>

#include "core/memory_probe.h"

namespace krait::kernels {

namespace {

std::atomic<bool> use_tf32{false};
std::atomic<int> spare{0};

struct Layout {
  bool ok, trans;
  int64_t ld;
};

// How BLAS sees the last two dimensions. A stride of a dimension of size 1 means nothing.
Layout layout_of(const Tensor& t) {
  const int64_t rows = t.size(-2), columns = t.size(-1), sr = t.stride(-2), sc = t.stride(-1);
  if ((sc == 1 || columns == 1) && (rows == 1 || sr >= std::max<int64_t>(columns, 1)))
    return {true, false, rows == 1 ? std::max<int64_t>(columns, 1) : sr};
  if ((sr == 1 || rows == 1) && (columns == 1 || sc >= std::max<int64_t>(rows, 1)))
    return {true, true, columns == 1 ? std::max<int64_t>(rows, 1) : sc};
  return {false, false, 0};
}

struct BatchDim {
  int64_t size, a, b, c;
};

// Strides of the batch dimensions; 0 where the tensor is broadcast (or, for c, summed into).
std::vector<BatchDim> batch_dims(const Shape& batch, const Tensor& a, const Tensor& b, const Tensor& c) {
  const auto stride = [&](const Tensor& t, int64_t from_end) {
    return from_end + 2 <= t.ndim() && t.size(-from_end - 2) != 1 ? t.stride(-from_end - 2) : 0;
  };
  std::vector<BatchDim> dims;
  for (int64_t i = batch.ndim(); i >= 1; --i) {
    if (batch[-i] == 1) continue;
    const BatchDim d{batch[-i], stride(a, i), stride(b, i), stride(c, i)};
    if (!dims.empty()) {
      BatchDim& outer = dims.back();
      const auto joins = [&](int64_t o, int64_t in) { return o == in * d.size; };
      if (joins(outer.a, d.a) && joins(outer.b, d.b) && joins(outer.c, d.c)) {
        outer = {outer.size * d.size, d.a, d.b, d.c};
        continue;
      }
    }
    dims.push_back(d);
  }
  return dims;
}

int64_t product_of(const std::vector<BatchDim>& dims) {
  int64_t n = 1;
  for (const BatchDim& d : dims) n *= d.size;
  return n;
}

void run(Gemm g, std::vector<BatchDim> dims) {
  // Rows of consecutive entries that meet one matrix b are one taller product; entries that are summed are one
  // deeper product.
  std::erase_if(dims, [&](const BatchDim& d) {
    if (d.b == 0 && !g.trans_a && d.a == g.m * g.lda && d.c == g.m * g.ldc) {
      g.m *= d.size;
      return true;
    }
    if (d.c == 0 && g.trans_a && !g.trans_b && d.a == g.k * g.lda && d.b == g.k * g.ldb) {
      g.k *= d.size;
      return true;
    }
    return false;
  });
  // The largest dimension that c has becomes the batch; the others are looped over, the summed ones innermost.
  auto batch = std::max_element(dims.begin(), dims.end(), [](const BatchDim& x, const BatchDim& y) {
    return (x.c ? x.size : 0) < (y.c ? y.size : 0);
  });
  if (batch != dims.end() && batch->c != 0) {
    g.batch = batch->size;
    g.batch_a = batch->a;
    g.batch_b = batch->b;
    g.batch_c = batch->c;
    dims.erase(batch);
  }
  std::stable_partition(dims.begin(), dims.end(), [](const BatchDim& d) { return d.c != 0; });
  const int64_t count = product_of(dims), in = size_of(g.dtype), out = size_of(g.c_dtype);
  for (int64_t i = 0; i < count; ++i) {
    Gemm one = g;
    int64_t rest = i;
    bool first = true;
    for (size_t d = dims.size(); d-- > 0;) {
      const int64_t at = rest % dims[d].size;
      rest /= dims[d].size;
      one.a = static_cast<const std::byte*>(one.a) + at * dims[d].a * in;
      one.b = static_cast<const std::byte*>(one.b) + at * dims[d].b * in;
      one.c = static_cast<std::byte*>(one.c) + at * dims[d].c * out;
      if (dims[d].c == 0 && at > 0) first = false;
    }
    if (!first) one.beta = 1.0;
    const KernelMemory memory(0);  // the library's workspace is one for all
    KRAIT_DISPATCH(g.device, gemm(one));
  }
}

bool has_sums(const std::vector<BatchDim>& dims) {
  return std::any_of(dims.begin(), dims.end(), [](const BatchDim& d) { return d.c == 0; });
}

struct Sizes {
  int64_t m, n, k;
  Shape batch;
};

Sizes sizes_of(const Tensor& a, const Tensor& b, bool trans_a, bool trans_b) {
  check_same("matmul", a, b);
  KRAIT_CHECK(a.ndim() >= 2 && b.ndim() >= 2, "matmul: {} x {}: both need at least two dimensions", a.shape(),
              b.shape());
  const int64_t k = a.size(trans_a ? -2 : -1), kb = b.size(trans_b ? -1 : -2);
  KRAIT_CHECK(k == kb, "matmul: {}{} x {}{}: inner sizes {} and {} differ", a.shape(), trans_a ? "^T" : "", b.shape(),
              trans_b ? "^T" : "", k, kb);
  return {a.size(trans_a ? -1 : -2), b.size(trans_b ? -2 : -1), k,
          broadcast_shapes(a.shape().drop_last(2), b.shape().drop_last(2))};
}

}  // namespace

void set_tf32(bool on) { use_tf32 = on; }
bool tf32() { return use_tf32; }

void set_spare_multiprocessors(int n) { spare = n; }
int spare_multiprocessors() { return spare; }

Tensor blas_ready(const Tensor& t) { return layout_of(t).ok ? t : t.contiguous(); }

Gemm gemm_of(Tensor& c, const Tensor& a, const Tensor& b, bool trans_a, bool trans_b) {
  const Layout la = layout_of(a), lb = layout_of(b);
  KRAIT_ASSERT(la.ok && lb.ok, "{} x {} is not ready for BLAS.", describe(a), describe(b));
  return {.device = a.device(),
          .dtype = a.dtype(),
          .c_dtype = c.dtype(),
          .m = a.size(trans_a ? -1 : -2),
          .n = b.size(trans_b ? -2 : -1),
          .k = a.size(trans_a ? -2 : -1),
          .a = a.raw_data(),
          .b = b.raw_data(),
          .c = c.raw_data(),
          .trans_a = la.trans != trans_a,
          .trans_b = lb.trans != trans_b,
          .lda = la.ld,
          .ldb = lb.ld,
          .ldc = c.size(-2) == 1 ? c.size(-1) : c.stride(-2)};
}

Tensor matmul(const Tensor& a, const Tensor& b, bool trans_a, bool trans_b) {
  const Sizes s = sizes_of(a, b, trans_a, trans_b);
  Tensor c = empty(s.batch.append(s.m).append(s.n), a.dtype(), a.device());
  matmul_out(c, a, b, trans_a, trans_b);
  return c;
}

void matmul_out(Tensor& c, const Tensor& a_in, const Tensor& b_in, bool trans_a, bool trans_b, double alpha,
                double beta) {
  const Sizes s = sizes_of(a_in, b_in, trans_a, trans_b);
  KRAIT_CHECK(c.device() == a_in.device() &&
                  (c.dtype() == a_in.dtype() || (c.dtype() == DType::f32 && a_in.dtype() == DType::bf16)),
              "matmul_out: {} cannot hold the product of {} and {}", describe(c), describe(a_in), describe(b_in));
  KRAIT_CHECK(c.ndim() >= 2 && c.size(-2) == s.m && c.size(-1) == s.n &&
                  broadcast_shapes(c.shape().drop_last(2), s.batch) == s.batch,
              "matmul_out: c is {}, expected {}", c.shape(), s.batch.append(s.m).append(s.n));
  if (c.numel() == 0) return;
  if (s.k == 0 || s.batch.numel() == 0) {  // an empty sum: beta c
    const Tensor none = zeros({1, 1}, a_in.dtype(), a_in.device());
    matmul_out(c, none.expand(c.shape().with(-1, 1)), none.expand(c.shape().with(-2, 1)), false, false, 0.0, beta);
    return;
  }
  Tensor a = blas_ready(a_in), b = blas_ready(b_in);
  std::vector<BatchDim> dims = batch_dims(s.batch, a, b, c);
  const bool rounds_often = c.dtype() == DType::bf16 && has_sums(dims);
  const Layout lc = layout_of(c);
  if (!lc.ok || lc.trans || rounds_often) {
    Tensor packed = rounds_often ? empty_like(c, DType::f32) : empty_like(c);
    if (beta != 0.0) copy_(packed, c);
    matmul_out(packed, a, b, trans_a, trans_b, alpha, beta);
    copy_(c, packed);
    return;
  }
  // Each turn of the loop over what does not fit one strided batch is a launch: worth a copy when there are many.
  if (a.device().is_cuda() && dims.size() > 1 && product_of(dims) > 16) {
    a = a.contiguous();
    b = b.contiguous();
    dims = batch_dims(s.batch, a, b, c);
  }
  Gemm g = gemm_of(c, a, b, trans_a, trans_b);
  g.alpha = alpha;
  g.beta = beta;
  run(g, std::move(dims));
}

}  // namespace krait::kernels
