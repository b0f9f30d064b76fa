#include "autograd/gate_linear.h"

#include "tests/testing/op_case.h"

using namespace krait;

namespace {

// The last input is w, those before it are parts of x.
const OpCase kCase{.name = "gate_linear",
                   .run = [](const Vars& in) { return gate_linear(Vars(in.begin(), in.end() - 1), in.back()); },
                   .reference =
                       [](const Vars& in) {
                         const Tensor w = in.back().data().contiguous();
                         const int64_t out = w.size(0), rows = in[0].data().numel() / in[0].size(-1);
                         Tensor y = zeros(in[0].shape().drop_last().append(out), DType::f64, kCpu);
                         int64_t first = 0;
                         for (size_t p = 0; p + 1 < in.size(); ++p) {
                           const Tensor x = in[p].data().contiguous();
                           const int64_t n = x.size(-1);
                           for (int64_t r = 0; r < rows; ++r)
                             for (int64_t o = 0; o < out; ++o)
                               for (int64_t i = 0; i < n; ++i)
                                 y.data<double>()[r * out + o] +=
                                     x.data<double>()[r * n + i] * w.data<double>()[o * w.size(1) + first + i];
                           first += n;
                         }
                         return Variable(y);
                       },
                   .shapes = {{{1, 1}, {1, 1}}, {{2, 3, 24}, {8, 24}}, {{5, 8}, {5, 16}, {5, 8}, {4, 32}}, {{7, 3}, {7, 2}, {3, 5}}}};

}  // namespace

TEST_CASE("gates of an x in parts match plain loops and pass gradcheck") {
  check_reference(kCase);
  check_grad(kCase);
}
TEST_CASE("gates of an x in parts: cuda equals cpu", "[cuda]") { check_twin(kCase); }

TEST_CASE("gates refuse parts that do not add up to the weight's columns") {
  const Variable a(zeros({2, 3}, DType::f32, kCpu)), w(zeros({4, 5}, DType::f32, kCpu));
  CHECK(contains(error_of([&] { gate_linear(Vars{a}, w); }), "x has 3 columns, w is (4, 5)"));
}
