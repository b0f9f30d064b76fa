#include "autograd/block_linear.h"

#include "tests/testing/op_case.h"

using namespace krait;

namespace {

const OpCase kCase{.name = "block_linear",
                   .run = [](const Vars& in) { return block_linear(in[0], in[1]); },
                   .reference =
                       [](const Vars& in) {
                         const Tensor x = in[0].data().contiguous(), w = in[1].data().contiguous();
                         const int64_t n = w.size(0), out = w.size(1), side = w.size(2);
                         Tensor y = zeros(x.shape().with(-1, n * out), DType::f64, kCpu);
                         const int64_t rows = y.numel() / (n * out);
                         for (int64_t r = 0; r < rows; ++r)
                           for (int64_t b = 0; b < n; ++b)
                             for (int64_t o = 0; o < out; ++o)
                               for (int64_t i = 0; i < side; ++i)
                                 y.data<double>()[(r * n + b) * out + o] +=
                                     w.data<double>()[(b * out + o) * side + i] * x.data<double>()[(r * n + b) * side + i];
                         return Variable(y);
                       },
                   .shapes = {{{1, 1}, {1, 1, 1}},
                              {{2, 3, 8}, {2, 4, 4}},
                              {{300, 12}, {3, 4, 4}},   // longer than a chunk
                              {{5, 532}, {133, 4, 4}},  // more blocks than threads
                              {{7, 15}, {5, 2, 3}},
                              {{260, 40}, {4, 16, 10}},
                              {{4, 40}, {2, 17, 20}},  // a batch of products
                              {{0, 8}, {2, 4, 4}}}};

}  // namespace

TEST_CASE("a block-diagonal map matches plain loops and passes gradcheck") {
  check_reference(kCase);
  check_grad(kCase);
}
TEST_CASE("a block-diagonal map: cuda equals cpu", "[cuda]") { check_twin(kCase); }

TEST_CASE("a block-diagonal map adds into the buffer of bf16 weights") {
  const Tensor xt = random_tensor({300, 12}, Normal{}, 1, DType::bf16), wt = random_tensor({3, 4, 4}, Normal{}, 2, DType::bf16);
  const Variable x(xt);
  Variable w(wt, true), exact(wt.to(DType::f64), true);
  w.set_grad(zeros({3, 4, 4}, DType::f32, kCpu));
  const Tensor seed = random_tensor({300, 12}, Normal{}, 3, DType::bf16);
  for (int i = 0; i < 2; ++i) {
    backward(block_linear(x, w), seed);
    backward(block_linear(Variable(xt.to(DType::f64)), exact), seed.to(DType::f64));
  }
  CHECK(relative_error(w.grad(), exact.grad()) < 1e-5);
}
