#include "autograd/shape.h"

#include "autograd/elementwise.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

using Index = std::vector<int64_t>;

// y[i] = x[from(i)] for multi-indices i of y: what every function here does.
OpFunction by_index(Shape (*shape_of)(const Shape&), Index (*from)(const Shape& x, const Index& i)) {
  return [=](const Vars& in) -> Outputs {
    const Shape &x = in[0].shape(), y = shape_of(x);
    const auto v = in[0].data().to_vector<double>();
    std::vector<double> out;
    for (int64_t n = 0; n < y.numel(); ++n) {
      Index i(static_cast<size_t>(y.ndim()));
      int64_t rest = n;
      for (int64_t d = y.ndim() - 1; d >= 0; --d) {
        i[static_cast<size_t>(d)] = rest % y[d];
        rest /= y[d];
      }
      const Index at = from(x, i);
      int64_t offset = 0;
      for (int64_t d = 0; d < x.ndim(); ++d) offset = offset * x[d] + at[static_cast<size_t>(d)];
      out.push_back(v[static_cast<size_t>(offset)]);
    }
    return Variable(from_vector(out, y));
  };
}

OpCase moves(const char* name, OpFunction run, Shape (*shape_of)(const Shape&),
             Index (*from)(const Shape&, const Index&)) {
  OpCase c;
  c.name = name;
  c.run = std::move(run);
  c.reference = by_index(shape_of, from);
  c.shapes = {{{2, 3, 4}}, {{1, 3, 1}}, {{2, 33, 5}}, {{0, 3, 2}}};
  c.tolerance = {{DType::f32, 1e-6}, {DType::bf16, 1e-2}};  // sums of gradients only
  return c;
}

const Tensor kRows = from_vector<int64_t>({2, 0, 0, 1, 2});

std::vector<OpCase> cases() {
  return {
      moves("reshape", [](const Vars& in) { return reshape(in[0], {-1, in[0].size(1)}); },
            [](const Shape& s) { return Shape{s[0] * s[2], s[1]}; },
            [](const Shape& s, const Index& i) {
              const int64_t n = i[0] * s[1] + i[1];
              return Index{n / (s[1] * s[2]), n / s[2] % s[1], n % s[2]};
            }),
      moves("transpose", [](const Vars& in) { return transpose(in[0], 0, -1); },
            [](const Shape& s) { return Shape{s[2], s[1], s[0]}; },
            [](const Shape&, const Index& i) { return Index{i[2], i[1], i[0]}; }),
      moves("permute", [](const Vars& in) { return permute(in[0], {2, 0, -2}); },
            [](const Shape& s) { return Shape{s[2], s[0], s[1]}; },
            [](const Shape&, const Index& i) { return Index{i[1], i[2], i[0]}; }),
      moves("unsqueeze, expand", [](const Vars& in) {
              return expand(unsqueeze(in[0], 1), {in[0].size(0), 3, in[0].size(1), in[0].size(2)});
            },
            [](const Shape& s) { return Shape{s[0], 3, s[1], s[2]}; },
            [](const Shape&, const Index& i) { return Index{i[0], i[2], i[3]}; }),
      moves("slice", [](const Vars& in) { return slice(in[0], 1, 1, 3); },
            [](const Shape& s) { return Shape{s[0], 2, s[2]}; },
            [](const Shape&, const Index& i) { return Index{i[0], i[1] + 1, i[2]}; }),
      moves("select", [](const Vars& in) { return select(in[0], 1, -2); },
            [](const Shape& s) { return Shape{s[0], s[2]}; },
            [](const Shape& s, const Index& i) { return Index{i[0], s[1] - 2, i[1]}; }),
      moves("flip", [](const Vars& in) { return flip(in[0], -2); }, [](const Shape& s) { return s; },
            [](const Shape& s, const Index& i) { return Index{i[0], s[1] - 1 - i[1], i[2]}; }),
      moves("contiguous", [](const Vars& in) { return contiguous(transpose(in[0], 1, 2)); },
            [](const Shape& s) { return Shape{s[0], s[2], s[1]}; },
            [](const Shape&, const Index& i) { return Index{i[0], i[2], i[1]}; }),
      moves("concat", [](const Vars& in) { return concat({in[0], in[0]}, 1); },
            [](const Shape& s) { return Shape{s[0], 2 * s[1], s[2]}; },
            [](const Shape& s, const Index& i) { return Index{i[0], i[1] % s[1], i[2]}; }),
      moves("stack", [](const Vars& in) { return stack({in[0], in[0], in[0]}, -1); },
            [](const Shape& s) { return Shape{s[0], s[1], s[2], 3}; },
            [](const Shape&, const Index& i) { return Index{i[0], i[1], i[2]}; }),
      moves("split and join the other way round", [](const Vars& in) {
              const Vars parts = split(in[0], {1, in[0].size(1) - 1}, 1);
              return concat({parts[1], parts[0]}, 1);
            },
            [](const Shape& s) { return s; },
            [](const Shape& s, const Index& i) { return Index{i[0], (i[1] + 1) % s[1], i[2]}; }),
      moves("index_select", [](const Vars& in) { return index_select(in[0], 1, kRows.to(in[0].device())); },
            [](const Shape& s) { return Shape{s[0], 5, s[2]}; },
            [](const Shape&, const Index& i) {
              return Index{i[0], kRows.data<int64_t>()[i[1]], i[2]};
            }),
      moves("gather", [](const Vars& in) {
              const Shape& s = in[0].shape();
              std::vector<int64_t> v(static_cast<size_t>(s[0] * 2 * s[2]));
              for (size_t n = 0; n < v.size(); ++n) v[n] = static_cast<int64_t>(n * 7 % 3);
              return gather(in[0], 1, from_vector(v, {s[0], 2, s[2]}).to(in[0].device()));
            },
            [](const Shape& s) { return Shape{s[0], 2, s[2]}; },
            [](const Shape& s, const Index& i) {
              return Index{i[0], ((i[0] * 2 + i[1]) * s[2] + i[2]) * 7 % 3, i[2]};
            })};
}

}  // namespace

TEST_CASE("shape functions move every value where it belongs") {
  for (const OpCase& c : cases()) check_reference(c);
}
TEST_CASE("shape functions pass gradcheck") {
  for (const OpCase& c : cases()) check_grad(c);
}
TEST_CASE("shape functions: cuda equals cpu", "[cuda]") {
  for (const OpCase& c : cases()) check_twin(c);
}

TEST_CASE("a piece of a split that is not used gets a zero gradient") {
  const Variable x(ones({4}, DType::f64, kCpu), true);
  const Vars parts = chunk(x, 2, 0);
  backward(parts[1], ones({2}, DType::f64, kCpu));
  CHECK(x.grad().to_vector<double>() == std::vector<double>{0, 0, 1, 1});
}

TEST_CASE("cast converts the value, and the gradient back") {
  const Variable x(from_vector<float>({1.00390625f, 3}), true);
  const Variable y = cast(x, DType::bf16);
  CHECK(y.dtype() == DType::bf16);
  CHECK(y.data().to_vector<float>() == std::vector<float>{1, 3});
  backward(y, ones({2}, DType::bf16, kCpu));
  CHECK(x.grad().dtype() == DType::f32);
}

TEST_CASE("many rows gathered from one are summed in fp32") {
  const Variable x(ones({2, 3}, DType::bf16, kCpu), true);
  backward(index_select(x, 0, zeros({1000}, DType::i64, kCpu)), ones({1000, 3}, DType::bf16, kCpu));
  CHECK(x.grad().to_vector<float>() == std::vector<float>{1000, 1000, 1000, 0, 0, 0});
}

TEST_CASE("shape refusals") {
  const Variable x(zeros({2, 3}, DType::f32, kCpu));
  CHECK(contains(error_of([&] { concat({x, Variable(zeros({2, 4}, DType::f32, kCpu))}, 0); }),
                 "concat: (2, 3) and (2, 4) differ outside dimension 0"));
  CHECK(contains(error_of([&] { split(x, {1, 1}, 1); }), "split: the sizes do not add up to dimension 1 of (2, 3)"));
  CHECK(contains(error_of([&] { chunk(x, 2, 1); }), "chunk: dimension 1 of (2, 3) does not split into 2"));
  CHECK(contains(error_of([&] { index_select(x, 0, from_vector<int64_t>({2})); }), "gather: index 2 is out of range"));
  CHECK(contains(error_of([&] { gather(x, 0, from_vector<int64_t>({0})); }), "gather: index (1,) does not match"));
}
