// Differentiable collectives against one rank that holds everything, in fp64.
#include "autograd/collective.h"

#include "autograd/elementwise.h"
#include "autograd/shape.h"
#include "core/comm/job.h"
#include "tests/parallel/world.h"
#include "tests/testing/tensors.h"

namespace krait {
namespace {

// Differs by rank, by place and by seed.
Tensor local(const Shape& shape, uint64_t seed, int rank, Device device) {
  return random_tensor(shape, Normal{}, seed * 100 + static_cast<uint64_t>(rank)).to(device);
}
Tensor stacked(const Shape& shape, uint64_t seed, int64_t dim) {
  std::vector<Tensor> parts;
  for (int r = 0; r < world()->size(); ++r) parts.push_back(local(shape, seed, r, kCpu));
  Vars v(parts.begin(), parts.end());
  return concat(v, dim).data();
}
Tensor summed(const Shape& shape, uint64_t seed) {
  Tensor sum = local(shape, seed, 0, kCpu);
  for (int r = 1; r < world()->size(); ++r) sum = (Variable(sum) + Variable(local(shape, seed, r, kCpu))).data();
  return sum;
}
Tensor part(const Tensor& t, int64_t dim) {
  const int64_t n = t.size(dim) / world()->size();
  return t.slice(dim, world()->rank() * n, (world()->rank() + 1) * n);
}

// Runs f on x, seeds its gradient with dy, compares output and gradient.
template <class F>
void check(const char* name, F f, const Tensor& x, const Tensor& dy, const Tensor& want_y, const Tensor& want_dx) {
  INFO(name);
  Variable in(x, true);
  // A view in front and a product behind: inputs need not be contiguous, gradients neither.
  const Variable y = f(in * 1.0);
  CHECK(y.shape() == want_y.shape());
  CHECK(relative_error(y.data().cpu(), want_y) < 1e-14);
  backward({y}, {dy});
  CHECK(relative_error(in.grad().cpu(), want_dx) < 1e-14);
}

void check_all(Device device) {
  const comm::GroupPtr& g = world();
  const int64_t p = g->size();
  const int me = g->rank();
  const Shape shape{3, 5, 2};
  const Tensor x = local(shape, 1, me, device);
  const Tensor same = local(shape, 2, 0, device), dy = local(shape, 3, me, device), same_dy = local(shape, 4, 0, device);

  check("copy_to_group", [&](const Variable& v) { return copy_to_group(v, g); }, same, dy, same.cpu(), summed(shape, 3));
  check("reduce_from_group", [&](const Variable& v) { return reduce_from_group(v, g); }, x, same_dy, summed(shape, 1),
        same_dy.cpu());
  for (int64_t dim = -3; dim < 3; ++dim) {
    INFO("dim " << dim);
    const Shape big = shape.with(dim, shape[dim] * p);
    const Tensor big_same = local(big, 5, 0, device), big_mine = local(big, 6, me, device);
    check("gather_from_group", [&](const Variable& v) { return gather_from_group(v, dim, g); }, x, big_same,
          stacked(shape, 1, dim), part(big_same.cpu(), dim));
    check("all_gather_sum", [&](const Variable& v) { return all_gather_sum(v, dim, g); }, x, big_mine,
          stacked(shape, 1, dim), part(summed(big, 6), dim));
    check("scatter_to_group", [&](const Variable& v) { return scatter_to_group(v, dim, g); }, big_same, x,
          part(big_same.cpu(), dim), stacked(shape, 1, dim));
    check("reduce_scatter_to_group", [&](const Variable& v) { return reduce_scatter_to_group(v, dim, g); }, big_mine, x,
          part(summed(big, 6), dim), stacked(shape, 1, dim));
    for (int64_t join = 0; join < 3; ++join) {
      // Everything cut along dim and joined along `join` is the transpose of everything cut along `join`.
      const Shape in = shape.with(dim, shape[dim] * p), out = shape.with(join, shape[join] * p);
      const Tensor v = local(in, 7, me, device), dv = local(out, 8, me, device);
      std::vector<Variable> y, dx;
      for (int r = 0; r < p; ++r) {
        y.emplace_back(part(local(in, 7, r, kCpu), dim));
        dx.emplace_back(part(local(out, 8, r, kCpu), join));
      }
      check("all_to_all", [&](const Variable& a) { return all_to_all(a, dim, join, g); }, v, dv, concat(y, join).data(),
            concat(dx, dim).data());
    }
  }
}

}  // namespace

TEST_CASE("differentiable collectives equal one rank's formulas and gradients") { check_all(kCpu); }
TEST_CASE("NCCL: differentiable collectives equal one rank's formulas and gradients", "[cuda]") {
  check_all(comm::local_cuda_device());
}

TEST_CASE("inputs and gradients with other strides are accepted") {
  const comm::GroupPtr& g = world();
  Variable x(local({4, 3}, 1, g->rank(), kCpu), true);
  const Variable y = transpose(reduce_from_group(transpose(copy_to_group(x, g), 0, 1), g), 0, 1);
  CHECK(relative_error(y.data().contiguous(), summed({4, 3}, 1)) < 1e-14);
  backward({y}, {ones({4, 3}, DType::f64, kCpu)});
  CHECK(relative_error(x.grad().contiguous(), full({4, 3}, g->size(), DType::f64, kCpu)) < 1e-14);
}

TEST_CASE("values that somebody else holds are not summed in place, others are") {
  const comm::GroupPtr& g = world();
  const Tensor mine = local({4, 3}, 1, g->rank(), kCpu), whole = summed({4, 3}, 1);
  const Variable kept(mine.clone());
  CHECK(relative_error(reduce_from_group(kept, g).data(), whole) < 1e-14);
  CHECK(relative_error(kept.data(), mine) == 0);
  Variable given(mine.clone());
  const void* place = given.data().raw_data();
  const Variable sum = reduce_from_group(std::move(given), g);
  CHECK(sum.data().raw_data() == place);
  CHECK(relative_error(sum.data(), whole) < 1e-14);
  // A gradient that goes two ways is one tensor of two.
  Variable x(mine.clone(), true);
  backward({copy_to_group(x, g) + x}, {mine});
  CHECK(relative_error(x.grad(), (Variable(whole) + Variable(mine)).data()) < 1e-14);
}

TEST_CASE("a group of one returns its input") {
  const comm::GroupPtr g = comm::single_group("tensor");
  const Variable x(ones({4, 6}, DType::f64, kCpu), true);
  for (const Variable& y : {copy_to_group(x, g), reduce_from_group(x, g), gather_from_group(x, 0, g), all_gather_sum(x, 1, g),
                            scatter_to_group(x, 0, g), reduce_scatter_to_group(x, 1, g), all_to_all(x, 0, 1, g)})
    CHECK(y.node() == x.node());
}

TEST_CASE("sizes that the ranks do not divide are refused with both numbers") {
  const int p = world()->size();
  const Variable x(ones({p + 1, 2}, DType::f64, kCpu));
  CHECK(contains(error_of([&] { scatter_to_group(x, 0, world()); }), fmt::format("{} ranks do not divide dimension 0", p)));
}

}  // namespace krait
