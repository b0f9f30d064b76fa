#include "autograd/variable.h"

#include "autograd/elementwise.h"
#include "autograd/reduce.h"
#include "core/allocator.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {
Variable leaf(std::vector<double> v) { return Variable(from_vector(v), true); }
std::vector<double> grad_of(const Variable& v) { return v.grad().to_vector<double>(); }
}  // namespace

TEST_CASE("shared inputs and diamonds collect every path") {
  const Variable x = leaf({2});
  const Variable a = x * x, b = a + x, c = a * b;  // x^4 + x^3
  backward(c);
  CHECK(grad_of(x) == std::vector<double>{4 * 8 + 3 * 4});
}

TEST_CASE("a gradient passed on to two inputs is not shared between them") {
  const Variable x = leaf({1, 1}), y = leaf({1, 1});
  const Tensor seed = ones({2}, DType::f64, kCpu);
  backward((x + y) + x, seed);
  CHECK(grad_of(x) == std::vector<double>{2, 2});
  CHECK(grad_of(y) == std::vector<double>{1, 1});
  CHECK(seed.to_vector<double>() == std::vector<double>{1, 1});
}

TEST_CASE("gradients add up over backward passes until cleared") {
  const Variable x = leaf({3});
  backward(square(x));
  backward(square(x));
  CHECK(grad_of(x) == std::vector<double>{12});
  Variable again = x;
  again.clear_grad();
  CHECK(!x.grad().defined());
  backward(square(x));
  CHECK(grad_of(x) == std::vector<double>{6});
}

TEST_CASE("a given buffer is written in place, in its own dtype") {
  Variable x(ones({2}, DType::bf16, kCpu), true);
  const Tensor buffer = zeros({2}, DType::f32, kCpu);
  x.set_grad(buffer);
  CHECK(x.accumulates_in_place());
  for (int i = 0; i < 3; ++i) backward(sum(x * 0.001953125));  // each is too small beside 1 for bf16
  backward(sum(x));
  CHECK(buffer.to_vector<float>() == std::vector<float>(2, 1.005859375f));
  x.clear_grad();
  CHECK(buffer.to_vector<float>() == std::vector<float>{0, 0});
  CHECK(contains(error_of([&] { x.set_grad(zeros({3}, DType::f32, kCpu)); }), "buffer (3,) does not match (2,)"));
}

TEST_CASE("accumulates_in_place holds only for a leaf with a buffer") {
  Variable x = leaf({1});
  CHECK(!x.accumulates_in_place());
  CHECK(!(x * x).accumulates_in_place());
  CHECK(!Variable(x.data()).accumulates_in_place());
  // A function that adds its part itself returns an undefined gradient.
  x.set_grad(zeros({1}, DType::f64, kCpu));
  const Variable y = record("own", {x}, x.data(), [x](const Tensor& dy) -> Grads {
    Tensor g = x.grad();
    g.data<double>()[0] += 5 * dy.item();
    return {Tensor()};
  });
  backward(y + x);
  CHECK(grad_of(x) == std::vector<double>{6});
}

TEST_CASE("a second backward through freed functions refuses") {
  const Variable x = leaf({2});
  const Variable y = square(x);
  backward(y);
  CHECK(contains(error_of([&] { backward(y); }), "square: backward ran through this function already"));
}

TEST_CASE("backward needs one value or a seed that fits") {
  const Variable x = leaf({1, 2});
  CHECK(contains(error_of([&] { backward(x * x); }), "(2,) is not a single value; give a seed"));
  CHECK(contains(error_of([&] { backward(x * x, ones({3}, DType::f64, kCpu)); }), "seed (3,) for an output (2,)"));
  CHECK(contains(error_of([&] { backward(x.detach()); }), "does not depend on anything that requires a gradient"));
  CHECK(contains(error_of([&] { Variable(zeros({1}, DType::i64, kCpu), true); }), "int64 tensor cannot require"));
}

TEST_CASE("nothing is recorded without gradients, under NoGrad or from detached values") {
  const Variable x = leaf({2});
  CHECK(!(x.detach() * 2.0).requires_grad());
  {
    const NoGrad guard;
    CHECK(!recording());
    CHECK(!square(x).requires_grad());
    {
      const NoGrad nested;
    }
    CHECK(!recording());
  }
  CHECK(recording());
  backward(x * x.detach());
  CHECK(grad_of(x) == std::vector<double>{2});
  CHECK(contains(error_of([&] { require_no_grad("argsort", {x}); }), "argsort has no gradient"));
}

TEST_CASE("on_grad_ready runs once per leaf, in the order in which gradients are complete") {
  Variable a = leaf({1}), b = leaf({1}), c = leaf({1});
  std::string order;
  a.on_grad_ready([&] { order += "a"; });
  b.on_grad_ready([&] { order += "b"; });
  c.on_grad_ready([&] { order += "c"; });
  const Variable h = a * b;  // first in, last done
  backward(h * c + c);
  CHECK(order == "cab");
  CHECK(grad_of(c) == std::vector<double>{2});
}

TEST_CASE("an output with several gradients leaves out what was not used") {
  const Variable x = leaf({1});
  bool used[2] = {true, true};
  const Vars y = record("pair", {x}, std::vector<Tensor>{x.data(), x.data()},
                        [&used](const std::vector<Tensor>& dy) -> Grads {
                          for (int i = 0; i < 2; ++i) used[i] = dy[static_cast<size_t>(i)].defined();
                          return {dy[1]};
                        });
  backward(y[1] * 3.0);
  CHECK((!used[0] && used[1]));
  CHECK(grad_of(x) == std::vector<double>{3});
}

namespace {
constexpr int64_t kWide = 1 << 16;

Variable deep(Variable x, int layers) {
  for (int i = 0; i < layers; ++i) x = tanh(x * 1.1);
  return x;
}

int64_t peak_of(const std::function<void()>& f) {
  const int64_t before = allocator(kCpu).stats().current_bytes;
  allocator(kCpu).reset_peak();
  f();
  return allocator(kCpu).stats().peak_bytes - before;
}
}  // namespace

TEST_CASE("recompute gives the same numbers and holds fewer bytes") {
  const Tensor start = random_tensor({kWide}, Normal{}, 1);
  const auto run = [&](bool save_memory, std::vector<double>* grad) {
    return peak_of([&] {
      const Variable x(start, true);
      Variable h = x;
      for (int block = 0; block < 4; ++block)
        h = save_memory ? recompute([](const Vars& in) { return Vars{deep(in[0], 4)}; }, {h})[0] : deep(h, 4);
      backward(sum(h));
      *grad = grad_of(x);
    });
  };
  std::vector<double> plain, again;
  const int64_t full = run(false, &plain), less = run(true, &again);
  CHECK(plain == again);
  INFO(full << " bytes without, " << less << " with recompute");
  CHECK(less * 3 < full * 2);
}

TEST_CASE("recompute reaches parameters that f holds") {
  const Variable x = leaf({2}), w = leaf({3});
  backward(recompute([w](const Vars& in) { return Vars{in[0] * w}; }, {x})[0]);
  CHECK(grad_of(x) == std::vector<double>{3});
  CHECK(grad_of(w) == std::vector<double>{2});
}

TEST_CASE("backward frees what functions saved as it goes") {
  const Tensor start = random_tensor({kWide}, Normal{}, 1);
  const Variable x(start, true);
  const Variable y = sum(deep(x, 16));
  const int64_t recorded = allocator(kCpu).stats().current_bytes;
  const int64_t peak = peak_of([&] { backward(y); });
  CHECK(peak < 4 * kWide * 8);  // a few gradients, not one per layer
  CHECK(allocator(kCpu).stats().current_bytes < recorded - 12 * kWide * 8);
}

TEST_CASE("a long chain neither overflows the stack in backward nor when it is dropped") {
  const Variable x = leaf({1});
  {
    Variable h = x;
    for (int i = 0; i < 20000; ++i) h = h + 0.0;
    backward(h);
    Variable unused = x;
    for (int i = 0; i < 20000; ++i) unused = unused + 0.0;
  }
  CHECK(grad_of(x) == std::vector<double>{1});
}
