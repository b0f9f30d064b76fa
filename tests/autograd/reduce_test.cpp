#include "autograd/reduce.h"

#include <cmath>
#include <limits>

#include "autograd/elementwise.h"
#include "core/parallel.h"
#include "kernels/reduce.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

// Reduces by hand: f of the values that share an index outside dims.
OpFunction by_hand(Dims dims, bool keep, double (*f)(const std::vector<double>&)) {
  return [=](const Vars& in) -> Outputs {
    const Shape& shape = in[0].shape();
    const Shape out = kernels::reduced_shape(shape, dims, keep), kept = kernels::reduced_shape(shape, dims, true);
    std::vector<std::vector<double>> groups(static_cast<size_t>(out.numel()));
    const auto v = in[0].data().to_vector<double>();
    for (int64_t i = 0; i < shape.numel(); ++i) {
      int64_t rest = i, at = 0, step = 1;
      for (int64_t d = shape.ndim() - 1; d >= 0; --d) {
        if (kept[d] != 1) at += rest % shape[d] * step;
        rest /= shape[d];
        step *= kept[d];
      }
      groups[static_cast<size_t>(at)].push_back(v[static_cast<size_t>(i)]);
    }
    std::vector<double> y;
    for (const auto& g : groups) y.push_back(f(g));
    return Variable(from_vector(y, out));
  };
}

double add_up(const std::vector<double>& v) {
  double s = 0;
  for (const double x : v) s += x;
  return s;
}
double average(const std::vector<double>& v) { return add_up(v) / static_cast<double>(v.size()); }
double highest(const std::vector<double>& v) { return *std::max_element(v.begin(), v.end()); }
double log_sum(const std::vector<double>& v) {
  const double m = highest(v);
  double s = 0;
  for (const double x : v) s += std::exp(x - m);
  return m + std::log(s);
}

using Function = Variable (*)(const Variable&, const Dims&, bool);

std::vector<OpCase> cases() {
  std::vector<OpCase> all;
  const std::vector<std::pair<Function, double (*)(const std::vector<double>&)>> functions = {
      {sum, add_up}, {mean, average}, {amax, highest}, {logsumexp, log_sum}};
  const std::vector<std::pair<Dims, std::vector<std::vector<Shape>>>> reductions = {
      {{}, {{{}}, {{1}}, {{3, 5, 7}}, {{70001}}}},
      {{-1}, {{{1, 1}}, {{3, 67}}, {{2, 3, 2049}}, {{0, 4}}, {{40, 3}}}},
      {{0}, {{{3, 1}}, {{67, 5}}, {{1030, 3}}, {{130, 1025}}, {{33}}}},
      {{1}, {{{2, 67, 3}}, {{3, 5, 129}}}},
      {{0, 2}, {{{3, 4, 5}}, {{2, 1, 5}}, {{17, 3, 33}}}},
      {{0, -2}, {{{3, 4, 5}}, {{2, 33, 3}}}}};
  for (const auto& [f, reference] : functions)
    for (const auto& [dims, shapes] : reductions)
      for (const bool keep : {false, true}) {
        OpCase c;
        c.name = fmt::format("reduction {}", all.size());
        c.run = [f = f, dims = dims, keep](const Vars& in) { return f(in[0], dims, keep); };
        c.reference = by_hand(dims, keep, reference);
        c.shapes = shapes;
        c.inputs = {Normal{}, Normal{.mean = 10}};
        c.tolerance = {{DType::f32, 1e-5}, {DType::bf16, 1e-2}};
        c.grad_tolerance = 2e-6;
        if (reference == log_sum) c.tolerance[DType::bf16] = 4e-2;  // softmax from a bf16 log sum
        all.push_back(std::move(c));
      }
  return all;
}

}  // namespace

TEST_CASE("sum, mean, amax and logsumexp equal loops in double over any dimensions") {
  for (const OpCase& c : cases()) check_reference(c);
}
TEST_CASE("reductions pass gradcheck") {
  for (const OpCase& c : cases()) check_grad(c);
}
TEST_CASE("reductions: cuda equals cpu", "[cuda]") {
  for (const OpCase& c : cases()) check_twin(c);
}

TEST_CASE("equal maxima share the gradient") {
  const Variable x(from_vector<float>({2, 5, 5, 1}), true);
  backward(amax(x));
  CHECK(x.grad().to_vector<float>() == std::vector<float>{0, 0.5f, 0.5f, 0});
}

TEST_CASE("the gradient of a sum can be added to") {
  const Variable x(ones({3, 4}, DType::f32, kCpu), true);
  backward(sum(x) + sum(x * x) + mean(sum(x, 0)));
  CHECK(x.grad().to_vector<float>() == std::vector<float>(12, 3.25f));
}
