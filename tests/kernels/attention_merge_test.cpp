#include "kernels/attention_merge.h"

#include "kernels/attention.h"
#include "tests/testing/tensors.h"

using namespace krait;
using kernels::AttentionOptions;

namespace {

constexpr int64_t kB = 2, kL = 24, kHq = 4, kHkv = 2, kD = 5;

struct Whole {
  Tensor q = random_tensor({kB, kL, kHq, kD}, Normal{}, 1), k = random_tensor({kB, kL, kHkv, kD}, Normal{}, 2),
         v = random_tensor({kB, kL, kHkv, kD}, Normal{}, 3), do_ = random_tensor({kB, kL, kHq, kD}, Normal{}, 4);
};

AttentionOptions with_dropout() {
  AttentionOptions o;
  o.dropout = {0.3, 77, from_vector<int64_t>({5}).view({}), 3};
  return o;
}

// Queries [q0, q1) over keys [k0, k1) of the whole, two heads from `head` on.
struct Part {
  Tensor q, k, v;
  AttentionOptions options;
  Part(const Whole& x, AttentionOptions o, int64_t head, int64_t q0, int64_t q1, int64_t k0, int64_t k1)
      : q(x.q.slice(1, q0, q1).slice(2, head, head + 2)), k(x.k.slice(1, k0, k1).slice(2, head / 2, head / 2 + 1)),
        v(x.v.slice(1, k0, k1).slice(2, head / 2, head / 2 + 1)), options(std::move(o)) {
    options.q_offset = q0 - k0;
    options.part = {head, kHq, q0, kL, k0, kL};
  }
};

}  // namespace

TEST_CASE("parts over disjoint keys join to the whole attention, with the whole's dropout") {
  const Whole x;
  for (const AttentionOptions& options : {AttentionOptions{}, with_dropout()}) {
    const auto whole = kernels::attention_forward(x.q, x.k, x.v, options);
    const auto grad = kernels::attention_backward(x.do_, x.q, x.k, x.v, whole.o, whole.lse, options);
    for (const int64_t head : {0, 2})
      for (const int64_t q0 : {0, 8}) {
        const int64_t q1 = q0 == 0 ? 8 : kL;
        const auto rows = [&](const Tensor& t) { return t.slice(1, q0, q1).slice(2, head, head + 2); };
        Tensor o, lse, dq;
        for (const int64_t k0 : {0, 8, 16}) {
          const Part p(x, options, head, q0, q1, k0, k0 + 8);
          const auto part = kernels::attention_forward(p.q, p.k, p.v, p.options);
          const auto g = kernels::attention_backward(rows(x.do_), p.q, p.k, p.v, rows(whole.o),
                                                     whole.lse.slice(1, head, head + 2).slice(2, q0, q1), p.options);
          if (!o.defined()) {
            o = part.o, lse = part.lse, dq = g.dq;
            continue;
          }
          kernels::attention_merge(o, lse, part.o, part.lse);
          for (int64_t i = 0; i < dq.numel(); ++i) dq.data<double>()[i] += g.dq.data<double>()[i];
        }
        CHECK(relative_error(o, rows(whole.o)) < 1e-13);
        CHECK(relative_error(lse, whole.lse.slice(1, head, head + 2).slice(2, q0, q1)) < 1e-13);
        CHECK(relative_error(dq, rows(grad.dq)) < 1e-12);
      }
  }
}

TEST_CASE("rows that saw no key weigh nothing in a merge") {
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  Tensor o = zeros({1, 2, 1, 3}, DType::f64, kCpu), lse = full({1, 1, 2}, kNone, DType::f64, kCpu);
  const Tensor other = ones({1, 2, 1, 3}, DType::f64, kCpu), seen = from_vector<double>({kNone, 0.5}, {1, 1, 2});
  kernels::attention_merge(o, lse, other, seen);
  CHECK(o.to_vector<double>() == std::vector<double>{0, 0, 0, 1, 1, 1});
  CHECK(lse.to_vector<double>() == seen.to_vector<double>());
}

TEST_CASE("dropout over keys that do not begin at a multiple of 4 is refused") {
  const Whole x;
  const Part p(x, with_dropout(), 0, 8, 16, 2, 8);
  CHECK(contains(error_of([&] { kernels::attention_forward(p.q, p.k, p.v, p.options); }), "a multiple of 4, not at 2"));
}

TEST_CASE("attention_merge: cuda equals cpu", "[cuda]") {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    const DType wide = accum_dtype(dtype);
    Tensor o = random_tensor({2, 7, 3, 33}, Normal{}, 1, wide), lse = random_tensor({2, 3, 7}, Normal{}, 2, wide);
    const Tensor part = random_tensor({2, 7, 3, 33}, Normal{}, 3, dtype), seen = random_tensor({2, 3, 7}, Normal{}, 4, wide);
    Tensor o_gpu = o.to(cuda_device()), lse_gpu = lse.to(cuda_device());
    kernels::attention_merge(o, lse, part, seen);
    kernels::attention_merge(o_gpu, lse_gpu, part.to(cuda_device()), seen.to(cuda_device()));
    CHECK(relative_error(o_gpu.cpu(), o) < (wide == DType::f64 ? 1e-13 : 1e-5));
    CHECK(relative_error(lse_gpu.cpu(), lse) < (wide == DType::f64 ? 1e-13 : 1e-5));
  }
}
